"""Real worker processes with a membership, for tests of what lives through their deaths.

`Job` is a small coordinator: each worker has a pipe to it, and a pipe that ends is a death. The rules are those of
`manyhands.core.membership`. Workers are forked from a server that has imported torch, so that a replacement is cheap.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import warm

from manyhands.core.errors import ManyhandsError, PeerLost
from manyhands.core.membership import Epoch, Loss, Seat

TIMEOUT_S = 120.0


class Ended(ManyhandsError):
    """The job is over, or I am not part of it."""


class PipeMembership:
    """A worker's end of the pipe: implements `Membership`."""

    def __init__(self, me: Seat, pipe: Any) -> None:
        self.me, self.over = me, threading.Event()
        self._pipe, self._facts, self._epochs = pipe, dict[str, str](), list[Epoch]()
        self._changed, self._sending = threading.Condition(), threading.Lock()
        self._ended = False
        self.over_at = 0.0
        threading.Thread(target=self._read, daemon=True).start()

    change_wanted = stopping = False

    def tell(self, *message: Any) -> None:
        with self._sending:
            self._pipe.send(message)

    def next(self) -> Epoch:
        with self._changed:
            self._epochs.clear()
        self.tell("ready")
        with self._changed:
            if not self._changed.wait_for(lambda: self._epochs or self._ended, TIMEOUT_S) or self._ended:
                raise Ended("no further epoch")
            return self._epochs[-1]

    def next_or(self, fact: str) -> Epoch | None:
        return self.next()

    def at(self, phase: str, step: int) -> None:
        pass

    def fail(self, detail: str) -> None:
        raise AssertionError(detail)

    def suspect(self, rank: int | None, detail: str) -> None:
        self.tell("suspect", rank, detail)

    def leave(self, detail: str) -> None:
        self.tell("leave", detail)

    def publish(self, key: str, text: str) -> None:
        self.tell("fact", key, text)

    def lookup(self, key: str, timeout_s: float = 30.0) -> str:
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while key not in self._facts:
                if self.over.is_set() or time.monotonic() > deadline or self._ended:
                    raise PeerLost(None, f"looking for {key}")
                self._changed.wait(0.01)
            return self._facts[key]

    def facts(self) -> Mapping[str, str]:
        with self._changed:
            return dict(self._facts)

    def _read(self) -> None:
        try:
            while True:
                kind, *rest = self._pipe.recv()
                with self._changed:
                    if kind == "epoch":
                        self.over.clear()
                        self._epochs.append(rest[0])
                    elif kind == "over":
                        self.over_at = time.perf_counter()
                        self.over.set()
                    elif kind == "fact":
                        self._facts[rest[0]] = rest[1]
                    self._changed.notify_all()
        except (EOFError, OSError):
            with self._changed:
                self._ended = True
                self.over.set()
                self._changed.notify_all()


def _start(seat: Seat, pipe: Any, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    membership = PipeMembership(Seat(id=seat.id, host=seat.host, device=seat.device, pid=os.getpid()), pipe)
    try:
        work(membership, *args)
    except Ended:
        pass
    except BaseException:
        membership.tell("error", f"{seat.id}: {traceback.format_exc()}")
    os._exit(0)


class Job:
    """Workers that each run ``work(membership, *args)``. A context manager.

    Attributes:
        told: what workers said by ``membership.tell("told", …)``, as (seat's id, value), in the order of arrival.
    """

    def __init__(self, work: Callable[..., None], *args: Any) -> None:
        self._context = warm.context()
        self._work, self._args = work, args
        self._lock, self._changed = threading.RLock(), threading.Condition()
        self._pipes: dict[str, Any] = {}
        self._seats: dict[str, Seat] = {}
        self._ready: set[str] = set()
        self._inside: tuple[str, ...] = ()
        self._losses: list[Loss] = []
        self.processes: dict[str, Any] = {}
        self.told: list[tuple[str, Any]] = []
        self.errors: list[str] = []
        self.epoch = Epoch(number=0, seats=())
        self.expected = 0

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.join(30)

    def start(self, *ids: str, hosts: Mapping[str, str] | None = None) -> None:
        """Start workers. An epoch begins when as many as were started and live are ready."""
        with self._lock:
            self.expected += len(ids)
        for id in ids:
            mine, theirs = self._context.Pipe()
            seat = Seat(id=id, host=(hosts or {}).get(id, "here"))
            process = self._context.Process(target=_start, args=(seat, theirs, self._work, self._args))
            process.start()
            theirs.close()
            with self._lock:
                self._pipes[id], self.processes[id] = mine, process
                self._seats[id] = Seat(id=id, host=seat.host, pid=process.pid or 0)
            threading.Thread(target=self._listen, args=(id, mine), daemon=True).start()

    def kill(self, id: str, signum: int = signal.SIGKILL) -> None:
        os.kill(self.processes[id].pid, signum)

    def suspect(self) -> None:
        """The epoch is over, though nobody is lost."""
        with self._lock:
            self._end_epoch()

    def evict(self, id: str, how: str = "hang") -> None:
        """It does not take part any more; the others are told. It is not ended."""
        with self._lock:
            if id not in self._pipes:
                return
            del self._pipes[id]
            self.expected -= 1
            self._ready.discard(id)
            if id in self._inside:
                self._losses.append(
                    Loss(seat=self._seats[id], rank=self._inside.index(id), how=how, detail="")
                )
                self._end_epoch()
            self._next()

    def until(self, what: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> Any:
        """Wait until `what()` is true; its value. Raises what a worker raised."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                if self.errors:
                    raise AssertionError("\n".join(self.errors))
                if found := what():
                    return found
                left = deadline - time.monotonic()
                assert left > 0, f"nothing came; told so far: {self.told[-20:]}"
                self._changed.wait(min(left, 1.0))

    def _listen(self, id: str, pipe: Any) -> None:
        try:
            while True:
                kind, *rest = pipe.recv()
                with self._lock, self._changed:
                    if kind == "told":
                        self.told.append((id, rest[0]))
                    elif kind == "error":
                        self.errors.append(rest[0])
                    elif id in self._pipes:
                        if kind == "ready":
                            self._ready.add(id)
                            self._next()
                        elif kind == "suspect":
                            self._end_epoch()
                        elif kind == "fact":
                            self._broadcast(self._pipes, "fact", *rest)
                    self._changed.notify_all()
        except (EOFError, OSError):
            self.evict(id, "death")

    def _broadcast(self, ids: Any, *message: Any) -> None:
        for id in list(ids):
            if id in self._pipes:
                with contextlib.suppress(OSError):
                    self._pipes[id].send(message)

    def _end_epoch(self) -> None:
        self._broadcast([i for i in self._inside if i not in self._ready], "over")

    def _next(self) -> None:
        if self._ready and len(self._ready) == self.expected:
            stay = [i for i in self._inside if i in self._ready]
            new = [i for i in self._seats if i in self._ready and i not in stay]
            self._inside = (*stay, *new)
            self.epoch = Epoch(
                number=self.epoch.number + 1,
                seats=tuple(self._seats[i] for i in self._inside),
                fresh=frozenset(new),
                losses=tuple(self._losses),
            )
            self._losses, self._ready = [], set()
            self._broadcast(self._inside, "epoch", self.epoch)
