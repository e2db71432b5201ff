"""What a worker tells: everything where it is rank 0 and speaks for the job, else only warnings, into its own log."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.core.environment import console, told_by_launcher
from manyhands.core.events import Emit, Event, Warned
from manyhands.core.registry import resolve
from manyhands.train.sinks import JsonLines, Terminal, fan_out

if TYPE_CHECKING:
    from manyhands.train.job import Job


class Voice:
    """An `Emit` whose reach depends on this worker's rank, which may change."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._sinks: list[Any] = []
        self._speak: Emit = _log_warnings

    def __call__(self, event: Event) -> None:
        self._speak(event)

    def take(self, rank: int) -> None:
        """My rank from now on: terminal and files are rank 0's."""
        if rank != 0:
            self.close()
        elif not self._sinks:
            output = Path(self._job.output)
            output.mkdir(parents=True, exist_ok=True)
            self._sinks = [Terminal(console(), told=told_by_launcher), JsonLines(output / "metrics.jsonl")]
            for name in self._job.sinks:
                self._sinks.append(resolve("sinks", name)(output / name))
            self._speak = fan_out(self._sinks)

    def close(self) -> None:
        """Sinks are written out; from here on only warnings are told."""
        sinks, self._sinks, self._speak = self._sinks, [], _log_warnings
        for sink in sinks:
            sink.close()


def _log_warnings(event: Event) -> None:
    if isinstance(event, Warned):
        print(f"warning: {event.where}: {event.message}", flush=True)
