"""What surrounds the workers of a launch: logs, a private directory, environment variables."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from manyhands.core import hardware
from manyhands.core.errors import UsageError
from manyhands.launch import guard

_ours: set[int] = set()


def keep_from_forks(descriptor: int) -> None:
    """Somebody watches for this descriptor's end: a fork of this process, which its user's code may make, must not hold it."""
    _ours.add(descriptor)


def forget_fork(descriptor: int) -> None:
    """It is about to be closed."""
    _ours.discard(descriptor)


def _after_fork() -> None:
    if _ours:
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in _ours:  # replaced, not closed: objects of the fork hold their numbers
            os.dup2(nothing, descriptor, inheritable=False)
        os.close(nothing)
        _ours.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def make_logs(output: Path, *, keep: bool = False) -> Path:
    """``output/logs``; records of an earlier run's ends go, unless `keep`. Raises `UsageError`: it cannot be written."""
    logs = output / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        for stale in () if keep else logs.glob("rank-*.error.json"):
            stale.unlink()
    except OSError as error:
        raise UsageError(
            f"output = {str(output)!r}: {error.strerror}",
            "it is a directory that can be written",
            "give another --output",
        ) from None
    return logs


def writable(log: Path) -> Path:
    """This log, made where it is absent; or nowhere, where it cannot be (somebody has removed the directory, the disk is full)."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.open("ab").close()
    except OSError:
        return Path(os.devnull)
    return log


@contextlib.contextmanager
def scratch() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A private directory, and the process that clears up should this one be killed."""
    store = tempfile.mkdtemp(prefix="manyhands-")
    try:
        watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, store],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert watcher.stdin is not None
        keep_from_forks(watcher.stdin.fileno())
        try:
            yield store, watcher
        finally:
            forget_fork(watcher.stdin.fileno())
            with contextlib.suppress(OSError):
                watcher.communicate(b"done\n")
            watcher.wait()
    finally:
        shutil.rmtree(store, ignore_errors=True)


def variables(
    rank: int, workers: int, seat: hardware.Seat, store: str, extra: Mapping[str, str]
) -> dict[str, str]:
    """The environment of one worker."""
    return {
        **os.environ,
        **hardware.cpu_environment(seat.threads),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(workers),
        "LOCAL_WORLD_SIZE": str(workers),
        "MANYHANDS_STORE": store,
        "MANYHANDS_PARENT": str(os.getpid()),
        "MANYHANDS_CORES": ",".join(map(str, seat.cpus)),
        **extra,
    }


def flags() -> list[str]:
    """This interpreter's own options (-X, -W, -O …), as multiprocessing hands them on."""
    return list(subprocess._args_from_interpreter_flags())  # type: ignore[attr-defined]
