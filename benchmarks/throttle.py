"""Slow processes, on one machine: each is given a part of a processor.

By cgroup v1 (``cpu.cfs_quota_us``), else cgroup v2 (``cpu.max``), where this may be written to; else by stopping and continuing
(SIGSTOP, SIGCONT) in turn, which is coarser and stops waiting too.

    with Throttle() as throttle:
        throttle.limit(pid, 0.25)
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

PERIOD_S = 0.02  # of a quota; short, so that a step has many
DUTY_S = 0.1  # of stopping and continuing


class Throttle:
    """A context manager that undoes what it did. `how` names the means."""

    def __init__(self) -> None:
        self._root = _root()
        self.how = (
            "SIGSTOP" if self._root is None else "cpu.max" if _is_v2(self._root) else "cpu.cfs_quota_us"
        )
        self._groups: dict[int, Path] = {}
        self._duties: dict[int, float] = {}
        self._ended = threading.Event()

    def __enter__(self) -> Throttle:
        if self._root is None:
            threading.Thread(target=self._stop_and_go, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        for group in self._groups.values():
            for pid in (group / "cgroup.procs").read_text().split():
                _write(group.parent / "cgroup.procs", pid)
            group.rmdir()

    def limit(self, pid: int, share: float) -> None:
        """Process `pid`, with all its threads, gets `share` of one processor from now on."""
        if self._root is None:
            self._duties[pid] = share
            return
        group = self._groups.get(pid)
        if group is None:
            group = self._groups[pid] = self._root / f"throttle-{os.getpid()}-{pid}"
            group.mkdir()
        period = int(PERIOD_S * 1e6)
        if _is_v2(self._root):
            _write(group / "cpu.max", f"{int(period * share)} {period}")
        else:
            _write(group / "cpu.cfs_period_us", str(period))
            _write(group / "cpu.cfs_quota_us", str(int(period * share)))
        _write(group / "cgroup.procs", str(pid))

    def _stop_and_go(self) -> None:
        while not self._ended.is_set():
            begun = time.monotonic()
            waiting = dict(self._duties)
            for pid in waiting:
                _signal(pid, signal.SIGCONT)
            for pid, share in sorted(waiting.items(), key=lambda each: each[1]):
                time.sleep(max(0.0, begun + DUTY_S * share - time.monotonic()))
                _signal(pid, signal.SIGSTOP)
            time.sleep(max(0.0, begun + DUTY_S - time.monotonic()))
        for pid in self._duties:
            _signal(pid, signal.SIGCONT)


def _root() -> Path | None:
    """A group that children with a limit can be made in."""
    v1, v2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    if (v1 / "cpu.cfs_quota_us").exists() and os.access(v1, os.W_OK):
        return v1
    if (v2 / "cgroup.subtree_control").exists() and os.access(v2, os.W_OK):
        try:
            _write(v2 / "cgroup.subtree_control", "+cpu")
        except OSError:
            return None
        return v2
    return None


def _is_v2(root: Path) -> bool:
    return (root / "cgroup.controllers").exists()


def _write(path: Path, text: str) -> None:
    file = os.open(path, os.O_WRONLY)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def ranks(parent: int) -> dict[int, int]:
    """The workers among the descendants of process `parent`: rank -> pid, by the variable RANK that they were started with."""
    found: dict[int, int] = {}
    for pid in descendants(parent):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = [v for v in variables if v.startswith(b"RANK=")]
        if rank:
            found.setdefault(int(rank[0].partition(b"=")[2]), pid)  # a worker's own children come later
    return found


def descendants(parent: int) -> Iterator[int]:
    """Children of `parent`, and theirs, parents first."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    waiting = sorted(children.get(parent, []))
    while waiting:
        pid = waiting.pop(0)
        yield pid
        waiting += sorted(children.get(pid, []))
