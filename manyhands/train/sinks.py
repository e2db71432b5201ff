"""Where events go: a file of JSON lines, TensorBoard, the terminal (`manyhands.train.terminal`)."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from manyhands.core.errors import UsageError
from manyhands.core.events import Emit, Evaluated, Evaluating, Event, Preparing, Stepped, to_record
from manyhands.train.terminal import Terminal

__all__ = ["JsonLines", "TensorBoard", "Terminal", "fan_out"]


def fan_out(sinks: Sequence[Any]) -> Emit:
    """An `Emit` that hands each event to every sink, one event at a time (the checkpoint thread emits, too)."""
    lock = threading.RLock()

    def emit(event: Event) -> None:
        with lock:
            for sink in sinks:
                sink(event)

    return emit


class JsonLines:
    """``metrics.jsonl``: one event a line. A resumed run appends; `resumed` events separate the attempts."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, event: Event) -> None:
        if isinstance(event, (Preparing, Evaluating)):  # progress for eyes, not for records
            return
        self._file.write(json.dumps(to_record(event)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars of steps and evaluations, by step. Raises `UsageError` where the extra is not installed."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError(
                "report_to = 'tensorboard'",
                "it needs the tensorboard package",
                "pip install 'manyhands[tensorboard]'",
            ) from None
        self._writer: Any = SummaryWriter(str(directory))

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stepped):
            for name in ("loss", "lr", "grad_norm", "tokens_per_s", "mfu", "communicate_share"):
                self._writer.add_scalar(f"train/{name}", getattr(event, name), event.step)
        elif isinstance(event, Evaluated):
            for name, value in event.metrics.items():
                self._writer.add_scalar(f"eval/{name}", value, event.step)

    def close(self) -> None:
        self._writer.close()
