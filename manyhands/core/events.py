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
class Redivided(Event):
    """The global batch is divided anew among the workers from the step after `step` on.

    Attributes:
        shares: micro-batches of a global batch, of each worker.
        rows_per_s: how fast each was found to be; None where it was not measured.
    """

    step: int
    shares: Sequence[int]
    rows_per_s: Sequence[float | None]


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
class Lost(Event):
    """A worker is gone, against its will or in an orderly way that nobody had announced.

    Attributes:
        seat, rank, host: who it was; its rank in the epoch that it was lost from.
        how: "death", "hang", "failed" (an exception) or "evicted".
        detail: the cause in words.
        phase, step: what it was doing when it was last heard of.
        stack: its main thread's last known stack, innermost call last; empty where unknown.
        silent_s: from its last sign to the verdict.
        then: what its launcher does about it, in words.
    """

    seat: str
    rank: int
    host: str
    how: str
    detail: str
    phase: str
    step: int
    stack: str = ""
    silent_s: float = 0.0
    then: str = ""


@dataclass(frozen=True, kw_only=True)
class Left(Event):
    """A worker ended in an orderly way after `step`; nothing of it was lost."""

    seat: str
    rank: int
    host: str
    step: int
    detail: str


@dataclass(frozen=True, kw_only=True)
class Joined(Event):
    """A worker takes part from `step` on; `size_bytes` of state came in `wall_s`, or in a step, while the others computed."""

    seat: str
    rank: int
    host: str
    step: int
    size_bytes: int
    wall_s: float


@dataclass(frozen=True, kw_only=True)
class Reformed(Event):
    """The workers go on as a new group.

    Attributes:
        epoch: the membership epoch that begins.
        workers: how many they are now.
        step: the one that they go on with.
        wall_s: from the loss being known (or the change being wanted) until all of them work again.
        kept_places: micro-batches of the interrupted step whose gradients were kept.
        redone_places: those that are computed anew, or for the first time, by the workers that are there now.
        by: whose state the job goes on with: "survivors", or the words for another source (a checkpoint).
        rebuilt: where state is divided among the workers and those that are there hold all of it: how it was put together.
        redone_steps: steps that were agreed upon and are done again, because what they had changed was lost.
    """

    epoch: int
    workers: int
    step: int
    wall_s: float
    kept_places: int
    redone_places: int
    by: str = "survivors"
    rebuilt: str = ""
    redone_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Mended(Event):
    """A replica differed from the majority and was given the state of `source`.

    `what`: what differed: "parameters", "optimizer state" or both.
    """

    seat: str
    rank: int
    host: str
    step: int
    what: str
    source: str
    size_bytes: int
    wall_s: float


@dataclass(frozen=True, kw_only=True)
class Aligned(Event):
    """Replicas on devices of another kind, which round differently, were given the state of the others.

    Attributes:
        ranks: those. drift: the largest ‖theirs − the others'‖ / ‖the others'‖ of the parameters before.
    """

    step: int
    ranks: tuple[int, ...]
    drift: float
    size_bytes: int
    wall_s: float


@dataclass(frozen=True, kw_only=True)
class Load:
    """How one worker spent the time since the last `Balance`.

    Attributes:
        rows: of the global batches, that it computed.
        compute_s: in forward, backward and the optimizer. data_s: until its rows were there.
        wait_s: until the slowest other worker had arrived. network_s: moving what the workers tell each other, or
            a parameter server, its work included.
    """

    seat: str
    rank: int
    host: str
    rows: int
    compute_s: float
    data_s: float = 0.0
    wait_s: float = 0.0
    network_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Balance(Event):
    """Who did how much, and who waited for whom, in the `wall_s` seconds before `step` was done.

    Attributes:
        workers: in rank order.
        slowest: the seat that the others wait for; empty where nobody waits to speak of.
        reason: why: "compute", "data" or "network" of the slowest; "network" without a slowest where moving bytes holds up
            all; empty: nothing does.
    """

    step: int
    wall_s: float
    workers: Sequence[Load]
    slowest: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Finished(Event):
    """The end of a job. `reason` is "done" or the signal's name; `load` the line of Python that loads the last checkpoint."""

    step: int
    reason: str
    wall_s: float
    summary: str
    load: str = ""


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
    if isinstance(value, Load):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value
