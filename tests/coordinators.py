"""The coordinator for tests: `Play` is its policy without sockets; `serving` a real one, and `Worker` a member with its process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from manyhands.coordinate import messages
from manyhands.coordinate.server import Coordinator
from manyhands.coordinate.state import State
from manyhands.coordinate.words import Happening, Note, Rules, Say
from manyhands.core.membership import Epoch, Seat

WAIT_S = 30.0
TOKEN = "a token of the tests, long enough"


def until(condition: Callable[[], Any], what: str = "it") -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.005)
    return found


class Play:
    """A state, and what it said."""

    def __init__(self, *ids: str, begun: bool = True, **rules: Any) -> None:
        self.state, self.now, self.said = State(Rules(**rules)), 0.0, dict[str, list[dict[str, Any]]]()
        self.happened: list[Happening] = []
        self.notes: list[dict[str, Any]] = []
        if ids:
            self.state.expect(ids, self.now)
            for id in reversed(ids):  # as they come; ranks are as expected
                self.come(id)
            for id in ids:
                self.state.ready(id, epoch=0, step=0, now=self.now)
            if begun:
                self.now = 0.5
                self.step(1)

    def come(
        self, id: str, *, holding: Epoch | None = None, step: int = 0, pid: int = 0, at: str = "h cpu"
    ) -> None:
        host, device = at.split()
        seat = Seat(id=id, host=host, device=device, pid=pid)
        self.state.hello(seat, holding=holding, step=step, version=messages.VERSION, now=self.now)

    def step(self, step: int, *ids: str, phase: str = "step") -> None:
        self.beat(*ids, step=step, phase=phase, moved=True)

    def beat(self, *ids: str, step: int | None = None, phase: str = "step", moved: bool = False) -> None:
        for id in ids or tuple(self.state.members):
            member = self.state.members[id]
            calls, at = member.calls + moved, member.step if step is None else step
            self.state.beat(id, phase=phase, step=at, calls=calls, stack="f", now=self.now)

    def ready(self, *ids: str) -> None:
        for id in ids:
            self.state.ready(id, epoch=self.epoch.number, step=self.state.members[id].step, now=self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.state.tick(self.now)

    @property
    def epoch(self) -> Epoch:
        assert self.state.epoch is not None
        return self.state.epoch

    def drain(self) -> None:
        for item in self.state.out:
            if isinstance(item, Say):
                self.said.setdefault(item.to, []).append(dict(item.message))
            elif isinstance(item, Note):
                json.dumps(item.record)
                self.notes.append(dict(item.record))
            else:
                self.happened.append(item)
        self.state.out.clear()

    def heard(self, id: str, op: str) -> list[dict[str, Any]]:
        self.drain()
        return [message for message in self.said.get(id, []) if message["op"] == op]

    def happenings(self, kind: str) -> list[Happening]:
        self.drain()
        return [happening for happening in self.happened if happening.kind == kind]


def ids(epoch: Epoch) -> list[str]:
    return [seat.id for seat in epoch.seats]


@contextlib.contextmanager
def serving(**options: Any) -> Iterator[Coordinator]:
    coordinator = Coordinator(token=TOKEN, **options)
    coordinator.start()
    try:
        yield coordinator
    finally:
        coordinator.stop()


class Worker:
    """A process that holds a membership and does as it is told: see tests/coordinate_worker.py."""

    def __init__(self, address: str, id: str, *, token: str = TOKEN, fingerprint: str = "") -> None:
        script = Path(__file__).parent / "coordinate_worker.py"
        self.id = id
        self.process = subprocess.Popen(
            [sys.executable, str(script), address, token, id, fingerprint],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.heard: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.heard.append({**json.loads(line), "heard_s": time.monotonic()})

    def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def await_(self, what: str, count: int = 1) -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            all_ = [line for line in self.heard if line["what"] == what]
            return all_[count - 1] if len(all_) >= count else None

        result: dict[str, Any] = until(found, f"{self.id}: {what} ({self.heard})")
        return result

    def epoch(self, number: int) -> dict[str, Any]:
        return until(
            lambda: next((x for x in self.heard if x["what"] == "epoch" and x["number"] == number), None),
            f"{self.id}: epoch {number}",
        )

    def kill(self, signum: signal.Signals = signal.SIGKILL) -> float:
        now = time.monotonic()
        os.kill(self.process.pid, signum)
        return now

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


@contextlib.contextmanager
def working(address: str, *ids: str, begun: bool = True, **options: Any) -> Iterator[list[Worker]]:
    """These workers, in the first epoch, and past the first step."""
    workers = [Worker(address, id, **options) for id in ids]
    try:
        for worker in workers:
            worker.tell("next")
        for worker in workers:
            worker.epoch(1)
            if begun:
                worker.tell("at", "step", 1)
        yield workers
    finally:
        for worker in workers:
            worker.end()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def seat(id: str) -> Seat:
    return Seat(id=id, host="h")
