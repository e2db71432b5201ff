"""A process that has imported what a worker needs, and from which workers are made.

Imports take seconds and much of a core. The process waits for a worker to be lost, and then becomes its replacement. With
``MANYHANDS_FORK=1`` they are done once for all: on Linux without GPUs each worker, the first ones too, is forked from the
process that has them, in some tens of milliseconds, and shares its pages. Nothing but imports happens before a fork: no
thread of ours, no device, no random number.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from manyhands.core import hardware
from manyhands.core.environment import forks_wanted
from manyhands.launch.place import forget_fork, keep_from_forks

NICE = 10  # of the importing thread: about a tenth of a busy core
LEAST_BYTES = 2 << 30  # of memory that must be available
LOOK_S = 0.1
TELL_S = 5.0  # for the waiting process to tell of an end
IMPORT_S = 120.0  # then workers are started without it
PLACES = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")  # of threads, by the user
FORK_S = 5.0  # in which a fork has its own process group, unless something is wrong

BOOT = f"import sys; sys.path[:] = sys.argv.pop(1).split({os.pathsep!r}); from manyhands.launch.waiting import main; main()"


class Process(Protocol):
    """A worker's process, as `subprocess.Popen` has it."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...

    def send_signal(self, signum: int) -> None: ...


class Forked:
    """A worker that is a child of the waiting process, which tells how it ended.

    It outlives the waiting process, and then tells itself how it left. Signals go through a descriptor of the process: its
    number may belong to another one later.
    """

    def __init__(self, pid: int, spare: Spare) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._spare = spare
        self._descriptor = os.pidfd_open(pid)
        self._gone_s: float | None = None  # since when it is

    def poll(self) -> int | None:
        """Its exit code, a killing signal's number negated; None: it runs."""
        if self.returncode is None:
            if self._gone_s is None and _readable(self._descriptor, 0):
                self._gone_s = time.monotonic()
            untold = self._gone_s is not None and time.monotonic() - self._gone_s > TELL_S
            self.returncode = self._spare.ended(self.pid, gone=self._gone_s is not None, untold=untold)
            if self.returncode is not None:
                os.close(self._descriptor)
        return self.returncode

    def wait(self) -> int:
        """Until it has ended."""
        while (code := self.poll()) is None:
            _readable(self._descriptor, None)
            time.sleep(0.001)  # the waiting process has yet to say how
        return code

    def send_signal(self, signum: int) -> None:
        """Nothing where it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signum)


class Spare:
    """One waiting process.

    Args:
        modules: what it imports.
        entry: what a worker runs.
        files: numbers of open files that workers inherit.
        log: takes what is printed by what it imports.
        urgent: import at full speed.
        forks: make workers by forking; else it becomes one.
    """

    def __init__(
        self,
        modules: Sequence[str],
        entry: str,
        variables: Mapping[str, str],
        *,
        flags: Sequence[str],
        files: Sequence[int],
        log: Path,
        urgent: bool,
        forks: bool,
    ) -> None:
        self.forks = forks
        line, self._lifeline = os.pipe()  # never written to: it breaks when the launcher ends
        keep_from_forks(self._lifeline)
        words = [entry, "0" if urgent else str(NICE), str(line) if forks else "", *modules]
        try:
            with log.open("ab") as sink:
                self.process = subprocess.Popen(
                    [sys.executable, *flags, "-c", BOOT, os.pathsep.join(sys.path), *words],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=sink,
                    env=dict(variables),
                    pass_fds=[*files, line],
                    start_new_session=True,
                )
        except OSError:
            forget_fork(self._lifeline)
            os.close(self._lifeline)
            raise
        finally:
            os.close(line)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._orders, self._answers = self.process.stdin.fileno(), self.process.stdout.fileno()
        for descriptor in (self._orders, self._answers):
            os.set_blocking(descriptor, False)
        self._ready = False
        self._said = b""
        self._begotten = 0  # the process id of the last fork
        self._ends: dict[int, int] = {}  # how forks ended, by process id
        self._left: dict[int, int] = {}  # with which code they were about to leave

    @property
    def ready_once(self) -> bool:
        """Whether it had imported everything."""
        self._listen()
        return self._ready

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def ready(self) -> bool:
        """Whether it has imported everything and lives."""
        return self.ready_once and self.alive

    def await_ready(self, unless: Callable[[], object]) -> None:
        """Wait until it is ready, or has died, or `unless` becomes true; for `IMPORT_S` at most."""
        deadline = time.monotonic() + IMPORT_S
        while not self.ready and self.alive and not unless() and time.monotonic() < deadline:
            _readable(self._answers, LOOK_S)

    def wake(self, variables: Mapping[str, str], log: Path) -> Process | None:
        """A worker with these variables, writing to `log`. None: the waiting process does not answer; it is of no more use."""
        order = {"variables": dict(variables), "log": str(log.absolute())}
        deadline = time.monotonic() + FORK_S
        if not self._say(json.dumps(order).encode() + b"\n", deadline):
            return None
        if not self.forks:
            self._hang_up()
            return self.process
        self._begotten = 0
        while not self._begotten and self.alive and time.monotonic() < deadline:
            _readable(self._answers, LOOK_S)
            self._listen()
        if not self._begotten:  # stopped, or on its way to the end
            return None
        worker = Forked(self._begotten, self)
        self._say(b"go\n", deadline)  # should this reach nobody, the worker ends, and that is seen
        return worker

    def ended(self, pid: int, *, gone: bool, untold: bool) -> int | None:
        """How a fork ended; None: it runs, or how it ended has yet to be told.

        Args:
            gone: it does not run.
            untold: nobody will tell any more.
        """
        orphan = not self.alive
        self._listen()  # what was said before either's end is there
        if pid in self._ends or not (untold or (gone and orphan)):
            return self._ends.get(pid)
        return self._left.get(pid, -signal.SIGKILL)

    def abandon(self) -> None:
        """It is of no more use; its forks go on, and tell how they end. `end` is still to be called, when they have ended."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """It is not needed any more; its forks end with it."""
        self._hang_up()
        self.process.kill()
        self.process.wait()

    def _say(self, line: bytes, deadline: float) -> bool:
        """Whether it could be said in time."""
        while line:
            try:
                line = line[os.write(self._orders, line) :]
            except BlockingIOError:  # it is stopped, and the pipe is full
                if time.monotonic() > deadline:
                    return False
                time.sleep(LOOK_S / 10)
            except OSError:
                return False
        return True

    def _listen(self) -> None:
        """Read what it has said since."""
        if self._lifeline < 0:
            return
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._answers, 4096):
                self._said += piece
        *lines, self._said = self._said.split(b"\n")
        for line in lines:
            word, *numbers = line.split()
            if word == b"ready":
                self._ready = True
            elif word == b"born":
                self._begotten = int(numbers[0])
                for known in (self._ends, self._left):  # of an earlier process with this number
                    known.pop(self._begotten, None)
            else:
                (self._ends if word == b"ended" else self._left)[int(numbers[0])] = int(numbers[1])

    def _hang_up(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        if self._lifeline >= 0:
            forget_fork(self._lifeline)
            os.close(self._lifeline)
            self._lifeline = -1


def _readable(descriptor: int, seconds: float | None) -> bool:
    poll = select.poll()  # descriptors may have any number
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def can_fork() -> bool:
    """Whether workers are forked from a process that has imported everything: where they can be, and it is asked for.

    It is not the default: under heavy load a forked worker was seen to stand still in its first matrix product (docs/log.md).
    Where the user places threads, each worker loads OpenMP itself: it looks for its cores as it is loaded.
    """
    if not forks_wanted():
        return False
    if sys.platform != "linux" or any(name in os.environ for name in PLACES) or hardware.gpu_possible():
        return False
    return has_pidfd()


@functools.lru_cache(maxsize=1)
def has_pidfd() -> bool:
    """Whether the kernel has descriptors of processes, and lets us have them."""
    if not hasattr(os, "pidfd_open"):
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def affordable() -> bool:
    """Whether there is memory for a process that only waits."""
    return hardware.memory_available_bytes() > max(LEAST_BYTES, hardware.memory_bytes() // 8)
