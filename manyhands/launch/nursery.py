"""Keeps one process ready from which workers are made (see `spare`), for as long as a launch may need it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from manyhands.launch import place
from manyhands.launch.spare import Process, Spare, affordable, can_fork

AGAIN_S = 10.0  # until one that ended by itself is replaced; each time twice as long
AGAIN_MOST_S = 600.0


class Nursery:
    """See the module.

    Args:
        modules: what workers import.
        entry: what they run.
        log: takes what is printed meanwhile; removed at the end where nothing was.
        files: numbers of open files that they inherit.
        tell: takes lines for the process that clears up after the launcher.
    """

    def __init__(
        self,
        modules: Sequence[str],
        entry: str,
        *,
        log: Path,
        files: Sequence[int],
        tell: Callable[[str], None],
    ) -> None:
        self._modules, self._entry, self._log, self._files, self._tell = modules, entry, log, files, tell
        self._spare: Spare | None = None
        self._dropped: list[Spare] = []  # workers that were made of them may live
        self._since_s: float | None = None  # when one was wanted first
        self._again_s, self._wait_s = 0.0, AGAIN_S

    def open(self, variables: Mapping[str, str], unless: Callable[[], object]) -> None:
        """Have one ready now, where workers can be forked; `unless` ends the waiting."""
        if can_fork():
            self._make(variables, urgent=True)
            assert self._spare is not None
            self._spare.await_ready(unless)

    def keep(self, variables: Mapping[str, str], *, after_s: float, urgent: bool) -> None:
        """Make one if there is none: `after_s` after this was asked first, or (`urgent`) now, because somebody was lost."""
        if self._spare is not None:
            if self._spare.alive:
                return
            if not self._spare.ready_once:  # it did not end at once without a reason
                self._again_s = time.monotonic() + self._wait_s
                self._wait_s = min(2 * self._wait_s, AGAIN_MOST_S)
            self._drop()
        now = time.monotonic()
        self._since_s = self._since_s or now
        if now >= self._again_s and (urgent or now - self._since_s >= after_s) and affordable():
            try:
                self._make(variables, urgent=urgent)
            except OSError:  # no memory, no process: the job goes on without
                self._again_s = now + self._wait_s

    def wake(self, variables: Mapping[str, str], log: Path) -> Process | None:
        """A worker with these variables, writing to `log`; None: there is nothing to make it from."""
        spare = self._spare
        if spare is None or not spare.ready:
            return None
        process = spare.wake(variables, log)
        if process is None:
            self._drop()
        elif not spare.forks:
            self._spare = None
        return process

    def close(self) -> None:
        """No more workers; those that were forked have ended, or end with it."""
        self._drop()
        for spare in self._dropped:
            spare.end()
        with contextlib.suppress(OSError):
            if not self._log.stat().st_size:
                self._log.unlink()

    def _make(self, variables: Mapping[str, str], *, urgent: bool) -> None:
        self._spare = Spare(
            self._modules,
            self._entry,
            variables,
            flags=place.flags(),
            files=self._files,
            log=place.writable(self._log),
            urgent=urgent,
            forks=can_fork(),
        )
        self._tell(f"started {self._spare.process.pid}")

    def _drop(self) -> None:
        if self._spare is not None:
            self._spare.abandon()
            self._dropped.append(self._spare)
            self._tell(f"ended {self._spare.process.pid}")
            self._spare = None
