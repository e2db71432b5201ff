"""This machine as the cluster: one fresh interpreter per worker, watched until all have ended.

No ports: the workers meet through a private directory (`MANYHANDS_STORE`). Each writes to ``OUTPUT/logs/rank-k.log``; rank 0
also gets this terminal for its display. The first failure of any worker ends the others and is printed last.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from manyhands.core import hardware
from manyhands.core.errors import UsageError

GRACE_S = 10.0  # between SIGTERM and SIGKILL for the peers of a failed worker
TAIL_LINES = 8


@dataclass
class _Child:
    rank: int
    process: subprocess.Popen[bytes]
    log: Path
    error: Path
    code: int | None = None
    ended_s: float = 0.0


def launch(
    entry: str,
    argument: str,
    *,
    workers: int,
    output: Path,
    threads: int | None = None,
    env: Mapping[str, str] | None = None,
) -> int:
    """Run `entry` (``module:function``) with `argument` on `workers` new processes; returns the exit code.

    Args:
        output: logs go to ``output/logs``.
        threads: of each worker; None: the allowed cores divided among them.
        env: further environment variables.

    Returns:
        0; 128 + signal after SIGINT or SIGTERM; else the first failure's code (2 for usage, 1 otherwise).
    """
    logs = output / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"output = {str(output)!r}: {error.strerror}", "it is a directory that can be written", "give another --output"
        ) from None
    with tempfile.TemporaryDirectory(prefix="manyhands-") as store, _Forward() as forward:
        children = _start(entry, argument, workers, logs, store, threads, env or {})
        forward.children = children
        try:
            _watch(children, forward)
        finally:
            _end(children)
        return _verdict(children, forward)


class _Forward:
    """Hands the first SIGINT or SIGTERM on to all workers, which save and end; a second one kills them."""

    def __init__(self) -> None:
        self.children: list[_Child] = []
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Forward:
        with contextlib.suppress(ValueError):  # not the main thread: the signals are somebody else's
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        second = self.signum is not None
        self.signum = self.signum or signum
        for child in self.children:
            if child.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    child.process.send_signal(signal.SIGKILL if second else signum)


def _start(
    entry: str,
    argument: str,
    workers: int,
    logs: Path,
    store: str,
    threads: int | None,
    extra: Mapping[str, str],
) -> list[_Child]:
    reading, writing = os.pipe()  # nobody writes: its end tells the children that we are gone
    os.set_inheritable(reading, True)
    console = os.dup(1)
    os.set_inheritable(console, True)
    children: list[_Child] = []
    try:
        for rank, (cores, count) in enumerate(_cores(workers, threads)):
            log, error = logs / f"rank-{rank}.log", logs / f"rank-{rank}.error.json"
            error.unlink(missing_ok=True)
            variables = {
                **os.environ,
                **hardware.cpu_environment(count),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(workers),
                "LOCAL_WORLD_SIZE": str(workers),
                "MANYHANDS_STORE": store,
                "MANYHANDS_PARENT": str(reading),
                "MANYHANDS_ERROR_FILE": str(error),
                "MANYHANDS_CORES": ",".join(map(str, cores)),
                "PYTHONUNBUFFERED": "1",
                **extra,
            }
            passed = [reading]
            if rank == 0:
                variables["MANYHANDS_CONSOLE"] = str(console)
                passed.append(console)
            with log.open("ab") as sink:
                process = subprocess.Popen(
                    [sys.executable, "-m", "manyhands.launch.child", entry, argument],
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=sink,
                    env=variables,
                    pass_fds=passed,
                    start_new_session=True,  # a Ctrl-C reaches us alone, and we hand it on once
                )
            children.append(_Child(rank, process, log, error))
    except BaseException:
        _end(children)
        raise
    finally:
        os.close(reading)
        os.close(console)
        _keep_open.append(writing)
    return children


_keep_open: list[int] = []  # writing ends of parent pipes, closed when this process ends or the launch is over


def _cores(workers: int, threads: int | None) -> Iterator[tuple[list[int], int]]:
    """(cores to pin to, threads) of each worker; no pinning where workers outnumber cores."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    count = min(hardware.core_count(), len(allowed)) if allowed else hardware.core_count()
    per_worker = count // workers
    for rank in range(workers):
        if per_worker == 0 or not allowed:
            yield [], threads or max(1, per_worker)
        else:
            yield allowed[rank * per_worker : (rank + 1) * per_worker], threads or per_worker


def _watch(children: list[_Child], forward: _Forward) -> None:
    """Until all have ended; after a first failure the others get SIGTERM and, later, SIGKILL."""
    deadline: float | None = None
    while any(child.code is None for child in children):
        for child in children:
            if child.code is None and child.process.poll() is not None:
                child.code, child.ended_s = child.process.returncode, time.time()
                if child.code != 0 and deadline is None and forward.signum is None:
                    deadline = time.monotonic() + GRACE_S
                    _signal(children, signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            _signal(children, signal.SIGKILL)
        running = next((c for c in children if c.code is None), None)
        if running is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.process.wait(0.05)


def _signal(children: list[_Child], signum: int) -> None:
    for child in children:
        if child.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(signum)


def _end(children: list[_Child]) -> None:
    _signal(children, signal.SIGKILL)
    for child in children:
        child.process.wait()
    while _keep_open:
        os.close(_keep_open.pop())


def _verdict(children: list[_Child], forward: _Forward) -> int:
    """The exit code; the first failure is printed, last."""
    if forward.signum is not None:
        return 128 + forward.signum
    failed = [child for child in children if child.code]
    if not failed:
        return 0
    first = min(failed, key=_order)
    print(_words(first), file=sys.stderr, flush=True)
    if first.code is not None and first.code > 128:  # the worker itself was told to stop
        return first.code
    return 2 if first.code == 2 else 1


def _record(child: _Child) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(child.error.read_text())
        return record
    except (OSError, ValueError):
        return {}


def _order(child: _Child) -> tuple[bool, float]:
    """Real causes before their consequences (a lost peer, our own SIGTERM), then by time."""
    record = _record(child)
    consequence = bool(record.get("secondary")) or child.code == 128 + signal.SIGTERM
    return consequence, float(record.get("time_s", child.ended_s))


def _words(child: _Child) -> str:
    record = _record(child)
    assert child.code is not None
    if record.get("ours"):
        cause = str(record["message"])
    elif record:
        cause = f"{record['type']}: {record['message']} ({record['where']})"
    elif child.code < 0:
        name = signal.Signals(-child.code).name
        why = " (out of memory? the kernel's log says)" if name == "SIGKILL" else ""
        cause = f"killed by {name}{why}{_tail(child.log)}"
    else:
        cause = f"exit code {child.code}{_tail(child.log)}"
    return f"manyhands: worker {child.rank} on {hardware.hostname()} failed first: {cause}\nlog: {child.log}"


def _tail(log: Path) -> str:
    try:
        lines = log.read_bytes()[-4096:].decode("utf-8", "replace").strip().splitlines()[-TAIL_LINES:]
    except OSError:
        return ""
    return "; its last lines:\n  " + "\n  ".join(lines) if lines else ""
