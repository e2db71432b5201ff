"""Process groups that can be broken at once, and left, though peers are dead, stopped or silent.

Gloo (as of PyTorch 2.13) knows no abort, and two traps lie there:

* A collective with a stopped peer ends at its timeout, half an hour. But a *receive* that times out closes every connection of its
  group, and then what waits in it fails within a millisecond: that is `Breaker.abort`.
* A transfer that had begun when its connection closed is forgotten (`Pair::signalException` passes over the operation that is being
  read or written): whoever waits for it still waits for the timeout, be the peer dead or not. So nobody here waits for gloo without
  looking at the epoch, and a group whose threads still wait is not destroyed (its destructor would wait for them, and
  keep the interpreter's lock) but parked until they have given up.

Every gloo group under the default one must be known for that, also those that FSDP makes. PyTorch lets a backend be registered
with a function that makes its groups: `NAME` is gloo by such a function, which makes the meeting of the members interruptible, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from manyhands.core.errors import UsageError
from manyhands.wire.watch import Watch

NAME = "manyhands"  # of the registered backend: gloo, and breakable
CONNECT_S = 60.0  # a group whose members are all there connects in milliseconds
SETTLE_S = 0.05  # in which a broken group's threads come to rest, if they do and the machine is not too busy
LOOK_S = 0.01  # given at every later leaving to find groups that have come to rest since
_TAG = 0x6D68  # of the receive that is never answered

_current: Breaker | None = None  # of the default process group, which is one for the whole process as well
_parked: list[tuple[float, _Gloo]] = []  # groups, and when their threads have given up at the latest


@dataclass(frozen=True)
class _Gloo:
    """A gloo group.

    Attributes:
        threads: those that were started with it, among them the ones that run its collectives.
    """

    group: Any
    threads: frozenset[str]
    timeout_s: float


class Breaker:
    """The default process group of one epoch and all groups made under it. Makes the default group.

    Raises:
        PeerLost: the epoch ended meanwhile.
        UsageError: there is a default group already.
    """

    def __init__(
        self,
        watch: Watch,
        store: Any,
        rank: int,
        size: int,
        *,
        nccl: bool,
        timeout_s: float,
        address: str = "",
    ) -> None:
        global _current
        if _current is not None:  # of an earlier epoch, whose wire nobody has closed
            _current.leave()
        if dist.is_initialized():
            raise UsageError(
                "a default process group exists already",
                "a job that survives its workers makes its own",
                "end the other one before",
            )
        self._watch, self._address = watch, address
        self._gloos: list[_Gloo] = []
        self._nccl = nccl
        self._fence = threading.Lock()
        self._left = threading.Event()
        _current = self
        if NAME not in dist.Backend.backend_list:
            dist.Backend.register_backend(NAME, _make, devices=["cpu", "cuda"])
        _count_anew()
        dist.init_process_group(
            f"cpu:{NAME},cuda:nccl" if nccl else NAME,
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
        )
        threading.Thread(target=self._await_the_end, name="wire-breaker", daemon=True).start()

    def make(self, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
        """One gloo group, met interruptibly."""
        brief = min(timeout, timedelta(seconds=CONNECT_S))  # a thread that is left behind ends by this
        before = _threads()
        group = self._watch.call(lambda: _gloo(store, rank, size, brief, self._address), "joining")
        group._set_default_timeout(timeout)
        with self._fence:
            self._gloos.append(_Gloo(group, _threads() - before, timeout.total_seconds()))
        return group

    def abort(self) -> None:
        """Close all connections: what waits for them fails, here and at the peers. Takes milliseconds, any number of times."""
        with self._fence:
            for gloo in self._gloos:
                group = gloo.group
                for peer in range(
                    group.size()
                ):  # one whose connection is closed fails before it closes the others
                    if peer != group.rank():
                        with contextlib.suppress(RuntimeError):
                            group.recv([torch.empty(1)], peer, _TAG).wait(timedelta(milliseconds=1))
            if self._nccl and not self._left.is_set():
                whole: Any = dist.group.WORLD
                with contextlib.suppress(RuntimeError):
                    whole._get_backend(torch.device("cuda")).abort()

    def leave(self) -> None:
        """End the default group and all others, whatever their peers do."""
        global _current
        self.abort()
        self._left.set()
        with self._fence:
            _unpark()
            for gloo in self._gloos:
                if not _at_rest(gloo, time.perf_counter() + SETTLE_S):
                    _park(gloo)
            self._gloos.clear()
        if _current is self:
            _current = None
            if dist.is_initialized():
                dist.destroy_process_group()

    def _await_the_end(self) -> None:
        while not self._left.is_set():
            if self._watch.over.wait(0.2):
                if not self._left.is_set():
                    self.abort()
                return


def _count_anew() -> None:
    """Name groups from 0 on, as on all other members: a meeting that failed has used up a name, but not on everybody."""
    world: Any = dist.distributed_c10d._world
    world.group_count = 0  # what `destroy_process_group` does


def _gloo(store: Any, rank: int, size: int, timeout: timedelta, address: str) -> Any:
    """A group that is reached at `address`: what gloo looks up by itself, the host's name, is often 127.0.1.1."""
    if not address or os.environ.get("GLOO_SOCKET_IFNAME"):
        return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
    kind: Any = dist.ProcessGroupGloo
    options = kind._Options()
    options._timeout, options._threads = timeout, 2  # threads as by default
    options._devices = [kind.create_device(hostname=address)]
    return kind(store, rank, size, options)


def _make(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    assert _current is not None, "only a Breaker uses this backend"
    return _current.make(store, rank, size, timeout)


# ------------------------------------------------------------------------------------- threads of a broken group


def _at_rest(gloo: _Gloo, deadline: float) -> bool:
    """Whether no thread of a broken group waits any more, as far as is seen by `deadline` (of `time.perf_counter`).

    A collective that fails at once is given to them again and again: each thread that is free gets one some time, and has
    then slept and woken up meanwhile.
    """
    slept = _sleeps(gloo)
    while slept and time.perf_counter() < deadline:
        probe = gloo.group.allreduce([torch.zeros(1)])
        while not probe.is_completed() and time.perf_counter() < deadline:
            time.sleep(20e-6)
        now = _sleeps(gloo)
        if all(now.get(thread, 0) > count for thread, count in slept.items()):
            return True
    return False


def _sleeps(gloo: _Gloo) -> Mapping[str, int]:
    """How often each thread that runs the group's collectives has slept so far; empty where nobody can tell."""
    found = {}
    for thread in gloo.threads:
        try:
            with open(f"/proc/self/task/{thread}/status") as file:
                lines = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
        except OSError:
            continue
        if lines.get("Name", "").startswith("pt_gloo"):
            found[thread] = int(lines["voluntary_ctxt_switches"])
    return found


def _threads() -> frozenset[str]:
    try:
        return frozenset(os.listdir("/proc/self/task"))
    except OSError:
        return frozenset()


def _park(gloo: _Gloo) -> None:
    """Keep a group alive until its threads have given up; also when the interpreter ends, which drops all else."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(gloo.group))
    _parked.append((time.monotonic() + gloo.timeout_s + 1.0, gloo))


def _unpark() -> None:
    """Let go of the groups whose threads have given up, or only had not been given a processor in time."""
    deadline, each = time.perf_counter() + LOOK_S, LOOK_S / 4
    for entry in list(_parked):
        (until, gloo), now = entry, time.perf_counter()
        if until < time.monotonic() or (now < deadline and _at_rest(gloo, min(now + each, deadline))):
            _parked.remove(entry)
            ctypes.pythonapi.Py_DecRef(ctypes.py_object(gloo.group))
