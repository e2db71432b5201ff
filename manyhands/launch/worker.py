"""One process of a launch, and how it ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from manyhands.core import hardware
from manyhands.launch.spare import Process, has_pidfd
from manyhands.launch.verdict import End, read_record, read_tail

STACKS_S = 0.2  # for one that is given up to write its stacks


@dataclass
class Worker:
    """One process. `id` is its name in the job, `generation` counts its predecessors in this place."""

    rank: int
    generation: int
    id: str
    process: Process
    log: Path
    log_begin: int  # where this process's part of the log begins: others' may stand before it
    error: Path
    started_s: float = field(default_factory=time.time)
    ended_s: float | None = None
    survived: bool = False  # the job went on without it
    evicted_s: float | None = None  # when it was given up (monotonic)
    _end: End | None = None

    def end(self) -> End:
        """How it ended; read once, before a successor writes to the same files."""
        if self._end is None:
            self._end = End(
                rank=self.rank,
                host=hardware.hostname(),
                code=self.process.wait(),  # it has ended
                time_s=self.ended_s or time.time(),
                record=read_record(self.error),
                log=self.log,
                tail=read_tail(self.log, self.log_begin),
                survived=self.survived,
            )
        return self._end

    def signal(self, signum: int) -> None:
        """Nothing where it has ended."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signum)

    def evict(self) -> None:
        """It is given up: it writes where its threads are, if it still can (`child.work`), and is killed by `expire` soon."""
        if self.evicted_s is None and self.process.poll() is None:
            self.evicted_s = time.monotonic()
            self.signal(signal.SIGUSR1)

    def expire(self) -> None:
        """Kill it, if it was given up and has had its time."""
        if self.evicted_s is not None and time.monotonic() - self.evicted_s >= STACKS_S:
            self.signal(signal.SIGKILL)


def nap(workers: Iterable[Worker], seconds: float) -> None:
    """Until one of them ends, for so long at most."""
    if not has_pidfd():
        time.sleep(seconds)
        return
    poll, files = select.poll(), list[int]()
    try:
        for worker in workers:
            if worker.ended_s is None:
                files.append(os.pidfd_open(worker.process.pid))
                poll.register(files[-1], select.POLLIN)
        poll.poll(seconds * 1000)
    except ProcessLookupError:
        pass  # one has ended already, and was waited for while it was sent a signal
    finally:
        for number in files:
            os.close(number)
