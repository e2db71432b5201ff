"""What happens, as frozen values. Whatever notices something emits an event; sinks show or store it.

Nothing below floor 4 prints or logs. `to_record` gives the JSON object of ``metrics.jsonl`` (the contract is
frozen by tests/test_contract.py).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base. `time_s` is seconds since the epoch."""

    time_s: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class Planned(Event):
    """What is going to happen. Each row: (what, value, where the value came from and why)."""

    rows: Sequence[tuple[str, str, str]]


@dataclass(frozen=True, kw_only=True)
class Preparing(Event):
    """Progress of a data preparation; `total_bytes` is None where it cannot be known."""

    done_bytes: int
    total_bytes: int | None
    tokens: int
    phase: str = "tokenize"


@dataclass(frozen=True, kw_only=True)
class PreparedData(Event):
    """A finished (or reused) preparation."""

    directory: str
    documents: int
    tokens: int
    text_bytes: int
    skipped: int
    reused: bool
    wall_s: float


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """Something the user should know; `where` names a file and line, a rank or an option."""

    message: str
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class Stepped(Event):
    """One finished optimizer step, as rank 0 sees it. All rates are over the time since the previous `Stepped`."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    samples: int
    target_tokens: int
    tokens_per_s: float
    mfu: float
    communicate_share: float
    memory_bytes: int
    eta_s: float


@dataclass(frozen=True, kw_only=True)
class Evaluating(Event):
    """Progress of an evaluation."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """Scores of the held-out data after `step`."""

    step: int
    metrics: Mapping[str, float]
    wall_s: float


@dataclass(frozen=True, kw_only=True)
class Saved(Event):
    """A checkpoint that is durable on disk."""

    step: int
    path: str
    size_bytes: int
    wall_s: float
    blocked_s: float


@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """Training continues from a checkpoint, written by `from_workers` workers."""

    step: int
    path: str
    from_workers: int
    workers: int


@dataclass(frozen=True, kw_only=True)
class Sampled(Event):
    """A continuation written by the model."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Served(Event):
    """What parameter servers did. `staleness`: how many pushes came so many updates after their parameters."""

    consistency: str
    updates: int
    discarded: int
    staleness: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Finished(Event):
    """The end of a job. `reason` is "done" or the signal's name."""

    step: int
    reason: str
    wall_s: float
    summary: str


Emit = Callable[[Event], None]


def ignore(event: Event) -> None:
    """An `Emit` that drops everything."""


def to_record(event: Event) -> dict[str, Any]:
    """The event as a JSON object: ``{"event": "stepped", ...}``. Non-finite floats become strings.

    >>> record = to_record(Evaluating(done=1, total=2, time_s=0.0))
    >>> record["event"], record["done"]
    ('evaluating', 1)
    """
    record: dict[str, Any] = {"event": type(event).__name__.lower()}
    for f in dataclasses.fields(event):
        record[f.name] = _plain(getattr(event, f.name))
    return record


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
