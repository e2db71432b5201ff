"""An output directory has one owner: whoever runs the job holds a lock on ``OUTPUT/.lock`` until it ends; and one run's records.

The lock is the kernel's (`flock`), so it is free again when its holder dies, however that was. `filelock` is not used here: where
a file system knows no `flock` it falls back to files that outlive their owners. There a run goes on without.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from manyhands.core import hardware
from manyhands.core.errors import UsageError
from manyhands.launch import place
from manyhands.train import durable, ledger, manifest

LOCK = ".lock"
LOOK_S = 0.5  # others may only look whether it is free, or be about to end
TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@contextlib.contextmanager
def claimed(output: Path) -> Iterator[None]:
    """The output is this process's meanwhile. Raises `UsageError`: it is another's."""
    lock = _open(output / LOCK)
    if lock is None:
        yield
        return
    place.keep_from_forks(lock)  # they may outlive us
    try:
        deadline = time.monotonic() + LOOK_S
        while not (got := _locked(lock)) and time.monotonic() < deadline:
            time.sleep(LOOK_S / 10)
        if not got:
            raise _in_use(output, _holder(lock))
        _sign(lock)
        yield
    finally:
        place.forget_fork(lock)
        os.close(lock)


def in_use(output: Path) -> bool:
    """Whether somebody holds it at this moment."""
    try:
        lock = os.open(output / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _locked(lock)
    finally:
        os.close(lock)


def make_fresh(output: Path, resume: str | None, sinks: Sequence[str] = ()) -> None:
    """Before a run begins (not where it goes on): records of an attempt that ended before its first checkpoint make way.

    They go to ``output/earlier-N``; where it made no step there is nothing to keep. Only the owner may do this.

    Raises:
        UsageError: another run's checkpoints are there.
        CheckpointError: nothing can be moved there.
    """
    manifest.check_fresh(output, resume)
    metrics, config = output / "metrics.jsonl", output / "config.toml"
    if manifest.goes_on(output, resume):
        return
    try:
        if _of_no_step(metrics):
            metrics.unlink()
        if (output / ledger.DIRECTORY).exists() or metrics.exists():
            number = next(n for n in itertools.count(1) if not (output / f"earlier-{n}").exists())
            aside = output / f"earlier-{number}"
            aside.mkdir()
            for name in (
                metrics.name,
                "summary.json",
                *sinks,
                ledger.DIRECTORY,
            ):  # the ledger last: it says all this
                if (output / name).exists():
                    (output / name).rename(aside / name)
            if config.exists():  # it stays: this run may have been read from it
                shutil.copyfile(config, aside / config.name)
    except OSError as error:
        raise durable.failure(output, error) from error


def _of_no_step(metrics: Path) -> bool:
    """Whether it is there, ours, and tells of nothing that was computed."""
    try:
        events = [json.loads(line)["event"] for line in metrics.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return "stepped" not in events


def _open(path: Path) -> int | None:
    """None where nothing can be written: who writes there next says so, with the reason."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        return None


def _locked(lock: int) -> bool:
    """False: another holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in TAKEN  # else a file system without locks
    return True


def _sign(lock: int) -> None:
    """Say who holds it, for those who come later."""
    words = f"process {os.getpid()} on {hardware.hostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(lock, 0)
        os.pwrite(lock, words.encode(), 0)


def _holder(lock: int) -> str:
    return os.pread(lock, 200, 0).decode(errors="replace") or "another run"


def _in_use(output: Path, holder: str) -> UsageError:
    from manyhands.launch.control import CONTACT

    remedy = "wait until it has ended, or give another --output"
    if (output / CONTACT).exists():
        remedy += f"; manyhands join {output} helps it"
    return UsageError(f"{output} is in use by {holder}", "a run has its output to itself", remedy)
