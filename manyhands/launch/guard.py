"""Clears up after a launcher, however that ended: no process, no directory, no shared memory is left behind.

The launcher starts this file as a process of its own (by path, the standard library alone: 15 ms, nobody waits for it) and tells
it each worker's process id. When its input ends without the word "done", the launcher was killed: the process groups of
the workers, with whatever they started, are killed, and what they left on disk goes. Other ways to notice it fall
short: a thread in the worker needs the interpreter's lock, and the kernel's death signal does not reach grandchildren.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

LINGER_S = 1.0  # for what a worker started: helpers that clear up by themselves when they see its end


def end_group(leader: int, *, linger_s: float = LINGER_S) -> None:
    """End whatever is left of a worker's process group: asked first, killed after `linger_s`."""
    deadline = time.monotonic() + linger_s
    with contextlib.suppress(
        ProcessLookupError, PermissionError
    ):  # nobody is left; macOS refuses where only zombies are
        if linger_s > 0:
            os.killpg(leader, signal.SIGTERM)
        while time.monotonic() < deadline:
            time.sleep(0.01)
            os.killpg(leader, 0)
        os.killpg(leader, signal.SIGKILL)


def clear(pids: Iterable[int]) -> None:
    """Remove segments of shared memory that killed workers had made and not yet unlinked (named by wire/shared.py)."""
    for pid in pids:
        for directory in (Path("/dev/shm"), Path(tempfile.gettempdir())):
            for path in directory.glob(f"manyhands-{pid}-*"):
                with contextlib.suppress(OSError):
                    path.unlink()


def main() -> None:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # the launcher alone decides when
    directory, running, started = sys.argv[1], set[int](), set[int]()
    for line in sys.stdin:
        word, _, number = line.partition(" ")
        if word.strip() == "done":
            return
        if word == "started":
            running.add(int(number))
            started.add(int(number))
        else:
            running.discard(int(number))
    for pid in running:
        end_group(pid, linger_s=0)
    clear(started)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
