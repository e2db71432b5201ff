"""Where events go: a file of JSON lines, TensorBoard, the terminal (`manyhands.train.terminal`)."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from manyhands.core.errors import UsageError
from manyhands.core.events import (
    Balance,
    Emit,
    Evaluated,
    Evaluating,
    Event,
    Preparing,
    Resumed,
    Stepped,
    Warned,
    to_record,
)
from manyhands.train.terminal import Terminal

__all__ = ["JsonLines", "TensorBoard", "Terminal", "fan_out"]


def fan_out(sinks: Sequence[Any]) -> Emit:
    """An `Emit` that hands each event to every sink, one event at a time (the checkpoint thread emits, too).

    A sink that cannot write (a full disk, a closed terminal) does not end the training that it reports on: the
    others are told once, and again when it failed anew after having worked.
    """
    lock = threading.RLock()
    failed: dict[int, type[Event]] = {}

    def hand(event: Event, to: Sequence[int]) -> list[tuple[int, OSError]]:
        errors = []
        for i in to:
            try:
                sinks[i](event)
                if failed.get(i) is type(event):  # of another kind it may show nothing, and so never fail
                    del failed[i]
            except OSError as error:
                if i not in failed:
                    errors.append((i, error))
                failed.setdefault(i, type(event))
        return errors

    def emit(event: Event) -> None:
        with lock:
            for i, error in hand(event, range(len(sinks))):
                name = type(sinks[i]).__name__
                warning = Warned(
                    message=f"{name} lost events: {error.strerror or error}; the training goes on",
                    where=str(getattr(sinks[i], "path", "")),
                )
                hand(warning, [j for j in range(len(sinks)) if j not in failed])

    return emit


class JsonLines:
    """``metrics.jsonl``: one event a line. A resumed run appends; `resumed` events separate the attempts.

    A line is whole or absent: what a killed writer or a full disk left of one is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a+b", buffering=0)
        self._end = _end_of_last_line(self._file)
        self._file.truncate(self._end)

    def __call__(self, event: Event) -> None:
        if isinstance(event, (Preparing, Evaluating)):  # progress for eyes, not for records
            return
        line = (json.dumps(to_record(event), allow_nan=False) + "\n").encode()
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(self._end)
            raise
        self._end += len(line)

    def close(self) -> None:
        self._file.close()


def _end_of_last_line(file: Any) -> int:
    """The offset after the last newline; 0 where there is none."""
    end: int = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - (1 << 16))
        file.seek(begin)
        at = file.read(end - begin).rfind(b"\n")
        if at >= 0:
            return begin + int(at) + 1
        end = begin
    return 0


class TensorBoard:
    """Scalars of steps, evaluations and workers, by step. Raises `UsageError` where the extra is not installed.

    A resumed run hides what an earlier attempt reported of the steps after the checkpoint: one curve, not two.
    """

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError(
                "report_to = 'tensorboard'",
                "it needs the tensorboard package",
                "pip install 'manyhands[tensorboard]'",
            ) from None
        self.path = directory
        self._open = SummaryWriter
        self._writer: Any = None
        self._purge_step: int | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Resumed):
            self._purge_step = event.step + 1
        if not isinstance(event, (Stepped, Evaluated, Balance)):
            return
        if self._writer is None:
            self._writer = self._open(str(self.path), purge_step=self._purge_step)
        if isinstance(event, Stepped):
            for name in ("loss", "lr", "grad_norm", "tokens_per_s", "mfu", "communicate_share"):
                self._writer.add_scalar(f"train/{name}", getattr(event, name), event.step)
        elif isinstance(event, Balance):
            rows = sum(load.rows for load in event.workers)
            for load in event.workers:
                figures = {"share": load.rows / rows if rows else 0.0}
                for name in ("compute", "data", "wait", "network"):
                    figures[name] = getattr(load, f"{name}_s") / event.wall_s if event.wall_s else 0.0
                for name, value in figures.items():
                    self._writer.add_scalar(f"{load.seat}/{name}", value, event.step)
        else:
            for name, value in event.metrics.items():
                self._writer.add_scalar(f"eval/{name}", value, event.step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
