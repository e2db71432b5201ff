"""Entry points for the launcher's tests. They speak through a FIFO whose path is in the argument: no sleeps, and its end of
file proves that every process that held it is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

RANK = int(os.environ.get("RANK", "0"))


def say(argument: str, *words: object) -> int:
    """One line to the test; returns the open file's number, which this process keeps."""
    number = os.open(argument, os.O_WRONLY)
    os.write(number, (" ".join(map(str, (RANK, *words))) + "\n").encode())
    return number


def report(argument: str) -> int:
    from manyhands.core.environment import console

    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "GIVEN")
    facts = {"affinity": affinity, "torch": "torch" in sys.modules, "length": len(argument), "path": sys.path}
    print(json.dumps({**facts, **{name: os.environ.get(name) for name in names}}))
    print(f"rank {RANK} on a terminal: {console().isatty()}", file=console(), flush=True)
    return 0


def wait_for_end(argument: str) -> int:
    say(argument, "ready", os.getpid())
    signal.pause()
    return 0


def fail_second(argument: str) -> int:
    from manyhands.core.signals import Interrupts

    if RANK == 1:
        with Interrupts() as interrupts, interrupts.phase("build"):
            raise ValueError("boom")
    signal.pause()
    return 0


def misuse(argument: str) -> int:
    from manyhands.core.errors import UsageError

    raise UsageError("lr = -1", "a rate is positive", "give --lr 3e-4")


def kill_itself(argument: str) -> int:
    if RANK == 1:
        print("about to go", flush=True)
        os.kill(os.getpid(), int(argument))
    signal.pause()
    return 0


def lose_then_fail(argument: str) -> int:
    """Rank 0 loses its peer first; rank 1, whose fault it is, says so only later."""
    from manyhands.core.errors import PeerLost
    from manyhands.core.signals import Interrupts

    with Interrupts() as interrupts, interrupts.phase("step", interruptible=False):
        if RANK == 0:
            Path(argument).read_bytes()  # until rank 1 is here
            raise PeerLost(1, "step")
        Path(argument).write_bytes(b"here")
        while interrupts.requested is None:  # the launcher ends us because of rank 0
            signal.sigtimedwait([], 0.02)
        raise OSError("the disk is full")


def fail_on_a_full_disk(argument: str) -> int:
    """Nothing more goes into this worker's log; it goes on, and then fails."""
    import resource

    size = os.fstat(2).st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5000, resource.RLIM_INFINITY))
    for stream in (sys.stdout, sys.stderr):
        for _ in range(200):
            print("many hands " * 5, file=stream)
    Path(argument).write_text("it goes on")
    raise ValueError("but not for long")


def save_and_stop(argument: str) -> int:
    """A loop that notices the signal at a step boundary, saves and ends."""
    from manyhands.core.errors import Stopped
    from manyhands.core.signals import Interrupts

    with Interrupts() as interrupts, interrupts.phase("step", interruptible=False):
        say(argument, "ready", os.getpid())
        while interrupts.requested is None:
            signal.sigtimedwait([], 0.02)
        say(argument, "saved", signal.Signals(interrupts.requested).name)
        raise Stopped(interrupts.requested)


def never_stop(argument: str) -> int:
    from manyhands.core.signals import Interrupts

    with Interrupts() as interrupts, interrupts.phase("step", interruptible=False):
        say(argument, "ready", os.getpid())
        told = False
        while True:
            signal.sigtimedwait([], 0.02)
            if interrupts.requested is not None and not told:
                told = True
                say(argument, "noticed")


def with_grandchild(argument: str) -> int:
    """A worker with a process of its own that ignores signals, and a half-made segment of shared memory."""
    number = say(argument, "starting")
    os.set_inheritable(number, True)
    code = (
        "import os, signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "os.write(int(sys.argv[1]), b'x grandchild\\n'); signal.pause()"
    )
    subprocess.Popen([sys.executable, "-c", code, str(number)], close_fds=False)
    if Path("/dev/shm").is_dir():
        Path(f"/dev/shm/manyhands-{os.getpid()}-test").write_bytes(b"x")
    say(argument, "ready", os.getpid())
    signal.pause()
    return 0
