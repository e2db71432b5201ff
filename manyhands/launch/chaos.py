"""Faults for a running job: a seeded schedule of them, and how each is brought about on real processes.

    kill    SIGKILL
    stop    SIGSTOP for a while, then SIGCONT: about half last longer than --hang-s, are hangs, and the worker is given up
    slow    SIGSTOP and SIGCONT in turn: a worker with a part of its speed
    cut     one of the worker's established connections is shut down, from outside (pidfd_getfd, Linux 5.6)
    full    RLIMIT_FSIZE: what the worker writes beyond the size that its files have is refused, as on a full disk
    flip    one bit of a parameter in the worker's memory (/proc/PID/mem, where the worker says that a parameter is)

A schedule is a pure function of its seed, and of the --hang-s by which stops are measured. Times are seconds from the
moment when the job's first step was committed, and a victim is a number in [0, 1) that picks one of the workers that are there
then.

The last worker that holds the job's state is neither killed nor cut off nor without a disk, nor does it hang. Workers are found
by what they hold open: ``OUTPUT/ledger/SEAT.jsonl``, so also those that others' launchers have started.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import random
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from manyhands.core.errors import UsageError

KINDS = {
    "kills": "kill",
    "stops": "stop",
    "slows": "slow",
    "cuts": "cut",
    "fulls": "full",
    "flips": "flip",
}
LASTS = {"slow": 10.0, "full": 5.0}  # seconds
HANG_S = 10.0  # of a job that says nothing else
STOPS = (0.2, 2.0)  # times hang_s: between these a stop lasts
MAY_HANG = 0.5  # times hang_s: a longer stop may be a hang already, where the worker spoke late before it
DYING_S = 5.0  # in which a process that was killed may still be seen
DEADLY = ("kill", "cut", "full")  # full: also shared memory for a new group is refused then
DUTY, PERIOD_S = 0.5, 0.1  # a slowed worker's share of the time, and how finely it is cut
_PIDFD_GETFD = 438  # linux/unistd.h, the same on all architectures


@dataclass(frozen=True)
class Fault:
    """One fault to be: what, when, whom (in [0, 1)), for how long."""

    kind: str
    at_s: float
    victim: float
    for_s: float = 0.0


@dataclass(frozen=True)
class Injected:
    """One that was brought about, or why not. `at` is seconds since the epoch."""

    fault: Fault
    at: float
    seat: str
    pid: int
    outcome: str


def schedule(
    seed: int, mtbf_s: Mapping[str, float], *, until_s: float, hang_s: float = HANG_S
) -> list[Fault]:
    """Faults of a job of `until_s` seconds: each kind is a Poisson process with its own mean time between faults. Pure.

    Kinds draw from streams of their own, so another kind's rate moves nothing; nor does `hang_s`, but how long stops last.

    >>> [round(fault.at_s, 1) for fault in schedule(1, {"kill": 10.0}, until_s=30.0)]
    [10.0]
    """
    found = []
    lasting = random.Random(f"{seed} how long stops last")
    for kind, mean_s in mtbf_s.items():
        if not mean_s > 0:
            raise UsageError(
                f"{kind}: a mean of {mean_s} s between faults", "it is positive", "leave it out for none"
            )
        draw = random.Random(f"{seed} {kind}")
        at_s = draw.expovariate(1 / mean_s)
        while at_s < until_s:
            for_s = hang_s * lasting.uniform(*STOPS) if kind == "stop" else LASTS.get(kind, 0.0)
            found.append(Fault(kind, at_s, draw.random(), for_s))
            at_s += draw.expovariate(1 / mean_s)
    return sorted(found, key=lambda fault: (fault.at_s, fault.kind))


def workers_of(output: Path) -> dict[str, int]:
    """The job's live workers on this host that take part: seat -> pid."""
    ledger = f"{(output / 'ledger').resolve()}/"
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):  # it has just ended, or is not ours
                for number in os.listdir(f"/proc/{entry}/fd"):
                    name = os.readlink(f"/proc/{entry}/fd/{number}")
                    if name.startswith(ledger) and name.endswith(".jsonl"):
                        found[name[len(ledger) : -len(".jsonl")]] = int(entry)
    return found


def holds(ledger: Path) -> bool:
    """Whether a worker has told of a step in its ledger, and so holds the job's state; a newcomer may still be fetching it."""
    try:
        return ledger.read_bytes().count(b"\n") > 1  # the first line says whose it is
    except OSError:
        return False


@dataclass
class Chaos:
    """Brings a schedule about on the workers of one job, in a thread of its own, until `stop`.

    Args:
        output: the job's output directory.
        faults: in order of time.
        begun: whether the job's clock runs (its first step is done).
        parameters: directory into which workers tell where a parameter is (``$MANYHANDS_CHAOS``), for flips.
        hang_s: so long a worker may be stopped until the job gives it up.
    """

    output: Path
    faults: Sequence[Fault]
    begun: Callable[[], bool]
    parameters: Path | None = None
    hang_s: float = math.inf
    injected: list[Injected] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._undo: dict[
            tuple[str, int], tuple[float, Callable[[], None]]
        ] = {}  # (kind, pid) -> (until, how)
        self._slowed: dict[int, tuple[float, bool]] = {}  # pid -> (until, stopped now)
        self._thread = threading.Thread(target=self._run, name="chaos", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop, and take back what lasts."""
        self._over.set()
        self._thread.join()
        for _, undo in self._undo.values():
            undo()
        for pid in list(self._slowed):
            _signal(pid, signal.SIGCONT)

    def _run(self) -> None:
        while not self.begun():
            if self._over.wait(0.02):
                return
        start, left = time.monotonic(), list(self.faults)
        while not self._over.is_set():
            now = time.monotonic()
            while left and left[0].at_s <= now - start:
                self._inject(left.pop(0))
            for key in [each for each, (until, _) in self._undo.items() if until <= now]:
                self._undo.pop(key)[1]()
            self._duty(now)
            self._over.wait(0.02)

    def _duty(self, now: float) -> None:
        """Workers that are slowed: stopped for a part of each period."""
        for pid, (until, stopped) in list(self._slowed.items()):
            if ("stop", pid) in self._undo:  # it stands still altogether
                continue
            wanted = now < until and now % PERIOD_S >= DUTY * PERIOD_S
            if wanted != stopped:
                _signal(pid, signal.SIGSTOP if wanted else signal.SIGCONT)
                self._slowed[pid] = (until, wanted)
            if now >= until:
                del self._slowed[pid]

    def _inject(self, fault: Fault) -> None:
        recent = [
            each
            for each in self.injected
            if each.outcome == "done" and time.time() - each.at < each.fault.for_s + DYING_S
        ]
        dying = {each.pid for each in recent if each.fault.kind == "kill"}
        hanging = {each.pid for each in recent if each.fault.kind == "stop" and self._deadly(each.fault)}
        there = sorted(each for each in workers_of(self.output).items() if each[1] not in dying)
        if not there:
            self.injected.append(Injected(fault, time.time(), "", 0, "nobody is there"))
            return
        seat, pid = there[int(fault.victim * len(there))]
        left = (other for other, its in there if other != seat and its not in hanging)
        others = (self.output / "ledger" / f"{other}.jsonl" for other in left)
        if self._deadly(fault) and not any(map(holds, others)):  # the job's state would go with it
            self.injected.append(Injected(fault, time.time(), seat, pid, "left out: it was the last one"))
            return
        at = time.time()
        try:
            outcome = getattr(self, f"_{fault.kind}")(seat, pid, fault)
        except ProcessLookupError:
            outcome = "it has just ended"
        except (OSError, ValueError) as error:
            outcome = f"not possible here: {error}"
        self.injected.append(Injected(fault, at, seat, pid, outcome))

    def _deadly(self, fault: Fault) -> bool:
        """Whether the job may have to go on without the worker."""
        return fault.kind in DEADLY or (fault.kind == "stop" and fault.for_s > MAY_HANG * self.hang_s)

    def _lasting(self, pid: int, fault: Fault, undo: Callable[[], None]) -> None:
        """Take it back later. Of two at once the last to end does, to what was before the first."""
        until, first = self._undo.get((fault.kind, pid), (0.0, undo))
        self._undo[fault.kind, pid] = max(until, time.monotonic() + fault.for_s), first

    # -- kinds

    def _kill(self, seat: str, pid: int, fault: Fault) -> str:
        os.kill(pid, signal.SIGKILL)
        return "done"

    def _stop(self, seat: str, pid: int, fault: Fault) -> str:
        os.kill(pid, signal.SIGSTOP)
        self._lasting(pid, fault, lambda: _signal(pid, signal.SIGCONT))
        return "done"

    def _slow(self, seat: str, pid: int, fault: Fault) -> str:
        until, stopped = self._slowed.get(pid, (0.0, False))
        self._slowed[pid] = max(until, time.monotonic() + fault.for_s), stopped
        return "done"

    def _cut(self, seat: str, pid: int, fault: Fault) -> str:
        return cut(pid, random.Random(fault.victim))

    def _full(self, seat: str, pid: int, fault: Fault) -> str:
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        size = (self.output / "ledger" / f"{seat}.jsonl").stat().st_size
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, before[1]))

        def free() -> None:
            with contextlib.suppress(OSError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, before)

        self._lasting(pid, fault, free)
        return "done"

    def _flip(self, seat: str, pid: int, fault: Fault) -> str:
        told = self.parameters / f"{seat}.{pid}" if self.parameters is not None else None
        if told is None or not told.exists():
            return "the worker has not said where a parameter is"
        return flip(told, pid, random.Random(fault.victim))


def flip(told: Path, pid: int, draw: random.Random) -> str:
    """Flip one bit of the parameter of which a worker has `told` where it is (see `manyhands.train.chaos_hook`).

    Raises:
        OSError: it has withdrawn that, or its memory cannot be reached.
    """
    text = told.read_text()
    name, address, size = text.split()
    at = int(address) + draw.randrange(int(size) // 4) * 4
    bit = 12 + draw.randrange(11)  # of the mantissa's upper half: a different number, and a finite one
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(at)
        (word,) = struct.unpack("<I", memory.read(4))
        if told.read_text() != text:
            return "the worker's parameters have just moved"
        memory.seek(at)
        memory.write(struct.pack("<I", word ^ (1 << bit)))
    return f"done: bit {bit} of {name}"


def cut(pid: int, draw: random.Random) -> str:
    """Shut down one established TCP connection of a process, from outside: both ends see it closed.

    To the coordinator, to another worker, to a server: each is as likely.

    Raises:
        OSError: the kernel does not let us.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.pidfd_open(pid)
    try:
        entries = sorted(os.listdir(f"/proc/{pid}/fd"), key=int)
        draw.shuffle(entries)
        for entry in entries:
            with contextlib.suppress(OSError):
                if not os.readlink(f"/proc/{pid}/fd/{entry}").startswith("socket:"):
                    continue
            number = libc.syscall(_PIDFD_GETFD, handle, int(entry), 0)
            if number < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            with socket.socket(fileno=number) as found:
                if found.family not in (socket.AF_INET, socket.AF_INET6) or found.type != socket.SOCK_STREAM:
                    continue
                with contextlib.suppress(OSError):  # a listening one has no peer
                    peer = found.getpeername()
                    found.shutdown(socket.SHUT_RDWR)
                    return f"done: the connection with {peer[0]}:{peer[1]}"
    finally:
        os.close(handle)
    return "it has no connection"


def _signal(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)
