"""Learning rate schedules: pure functions of how much is done, never of how many processes do it.

``factor(done, total)`` multiplies the optimizer's `lr`. `done` and `total` count optimizer steps, or valid
target tokens where ``unit = "tokens"``; `done` is what was finished before the step, so the first one has 0.

Parts of a run (`warmup`, `decay`) are a share of `total` where below 1, else an absolute count in the
schedule's unit: ``warmup=0.05`` is 5% of the run, ``warmup=100`` is 100 steps (or tokens). Where the length
of the run is unknown (total = infinity) a share of it cannot be said: such a warm-up is left out and nothing
decays.

The warm-up rises as (done + 1) / (warmup + 1), so that the first step is not wasted on a rate of zero
(nanoGPT's rule). Beyond `total` the last value holds.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Literal, Protocol, runtime_checkable

from manyhands.core.checked import checked
from manyhands.core.config import option
from manyhands.core.errors import UsageError

Unit = Literal["steps", "tokens"]

WARMUP = "rise to the full rate: a share of the run where below 1, else a count of steps (or tokens)"
FLOOR = "the last factor"
UNIT = "what is counted: steps or tokens"


@runtime_checkable
class Schedule(Protocol):
    """How the rate changes over a run."""

    @property
    def unit(self) -> Unit: ...

    def factor(self, done: float, total: float) -> float:
        """The multiplier of the rate after `done` of `total` (in `unit`)."""
        ...


@dataclass(frozen=True)
@checked
class Constant:
    """Warm-up, then the full rate."""

    _: KW_ONLY
    warmup: float = option(0.0, help=WARMUP)
    unit: Unit = option("steps", help=UNIT)

    def __post_init__(self) -> None:
        _check(self)

    def factor(self, done: float, total: float) -> float:
        """1 after the warm-up."""
        return min(1.0, _rise(done, length(self.warmup, total)))


@dataclass(frozen=True)
@checked
class Linear:
    """Warm-up, then down to `floor` in a straight line."""

    _: KW_ONLY
    warmup: float = option(0.05, help=WARMUP)
    floor: float = option(0.0, help=FLOOR)
    unit: Unit = option("steps", help=UNIT)

    def __post_init__(self) -> None:
        _check(self)

    def factor(self, done: float, total: float) -> float:
        """1 − (1 − floor)·x with x the share passed of what follows the warm-up."""
        warmup = length(self.warmup, total)
        if done < warmup:
            return _rise(done, warmup)
        return 1.0 - (1.0 - self.floor) * _share(done - warmup, total - warmup)


@dataclass(frozen=True)
@checked
class Cosine:
    """Warm-up, then down to `floor` along half a cosine (arXiv:1608.03983 eq. 5, without restarts)."""

    _: KW_ONLY
    warmup: float = option(0.05, help=WARMUP)
    floor: float = option(0.1, help=FLOOR)
    unit: Unit = option("steps", help=UNIT)

    def __post_init__(self) -> None:
        _check(self)

    def factor(self, done: float, total: float) -> float:
        """floor + (1 − floor)·(1 + cos πx)/2 with x the share passed of what follows the warm-up."""
        warmup = length(self.warmup, total)
        if done < warmup:
            return _rise(done, warmup)
        x = _share(done - warmup, total - warmup)
        return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * x))


@dataclass(frozen=True)
@checked
class WSD:
    """Warm-up, the full rate until the last `decay`, then a line down to `floor` (arXiv:2404.06395)."""

    _: KW_ONLY
    warmup: float = option(0.05, help=WARMUP)
    decay: float = option(
        0.2, help="the falling part at the end: a share of the run where below 1, else a count"
    )
    floor: float = option(0.0, help=FLOOR)
    unit: Unit = option("steps", help=UNIT)

    def __post_init__(self) -> None:
        _check(self)
        if not 0 <= self.decay < math.inf:
            raise UsageError(f"decay = {self.decay}", "it is a share below 1 or a count", "give 0 <= decay")
        if self.warmup < 1 and self.decay < 1 and self.warmup + self.decay > 1:
            raise UsageError(
                f"warmup = {self.warmup} with decay = {self.decay}",
                "together they are at most the whole run",
                "lower one of them",
            )

    def factor(self, done: float, total: float) -> float:
        """1 between the warm-up and total − decay."""
        warmup, decay = length(self.warmup, total), length(self.decay, total)
        if done < warmup:
            return _rise(done, warmup)
        start = max(total - decay, warmup)
        return 1.0 - (1.0 - self.floor) * _share(done - start, total - start) if done > start else 1.0


def length(part: float, total: float) -> float:
    """A part of a run in its unit: a share of `total` where below 1 (nothing of infinity), else itself.

    >>> length(0.1, 200), length(30, 200), length(0.1, math.inf)
    (20.0, 30, 0.0)
    """
    if part >= 1:
        return part
    return part * total if math.isfinite(total) else 0.0


def _rise(done: float, warmup: float) -> float:
    return (done + 1.0) / (warmup + 1.0)


def _share(done: float, total: float) -> float:
    """done / total within 0 … 1; of a span of no length, all has passed."""
    if total <= 0:
        return 1.0
    return min(max(done / total, 0.0), 1.0)


def _check(schedule: Constant | Linear | Cosine | WSD) -> None:
    if not 0 <= schedule.warmup < math.inf:
        raise UsageError(
            f"warmup = {schedule.warmup}", "it is a share below 1 or a count", "give 0 <= warmup"
        )
    floor = getattr(schedule, "floor", 0.0)
    if not 0 <= floor <= 1:
        raise UsageError(f"floor = {floor}", "it is a factor of the rate", "give 0 <= floor <= 1")
