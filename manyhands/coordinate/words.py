"""The values of the coordinator's policy: its numbers, what it knows of a worker, what it wants done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manyhands.core.membership import SUMS, Epoch, Loss, Seat


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The policy's numbers.

    Attributes:
        awaited: workers that the first epoch waits for, expected by name or not.
        patience_s: how long a replacement is awaited where too few are alive.
        start_s: a worker has at least so long from its start to its first word.
        faults, kills: workers that one step may end by themselves, and by any cause (for every three workers of the job).
        shared: only shared memory joins the workers: all are CPU workers of one host.
        resume: how the job is continued from its checkpoint, for messages.
    """

    hang_s: float = 10.0
    stuck_s: float = 300.0
    min_workers: int = 1
    awaited: int = 1
    patience_s: float = 3.0
    start_s: float = 60.0
    faults: int = 3
    kills: int = 40
    shared: bool = False
    resume: str = "--resume OUTPUT"


@dataclass(frozen=True, kw_only=True)
class Happening:
    """What the launcher or a log wants to know: "joined", "epoch", "evict", "lost", "failed" or "done"."""

    kind: str
    seat_id: str = ""
    epoch: Epoch | None = None
    loss: Loss | None = None
    detail: str = ""


@dataclass(frozen=True)
class Say:
    """A message for one worker."""

    to: str
    message: Mapping[str, Any]


@dataclass(frozen=True)
class Note:
    """A line for the journal, to be durable before anything after it is said."""

    record: Mapping[str, Any]


@dataclass
class Member:
    """What is known of a living worker."""

    seat: Seat
    heard_s: float
    moved_s: float  # when its main thread last said what it does
    connected: bool = True
    cut_s: float = 0.0  # when its connection ended; 0: it never did
    ready: bool = False
    leaving: str | None = None
    phase: str = ""
    step: int = 0  # committed steps that it holds: fewer than before where the job has gone back
    holds: bool = False  # it has said that it holds the state of a step
    begun_s: float | None = None  # when it began its present step; None: not as a whole, see `Pace`
    calls: int = 0
    stack: str = ""

    def shift(self, seconds: float) -> None:
        """So much time has gone by in which nobody could be heard."""
        self.heard_s += seconds
        self.moved_s += seconds
        self.cut_s += seconds if self.cut_s else 0.0
        self.begun_s = None if self.begun_s is None else self.begun_s + seconds


BEGINNING = {"start": "starting", "prepare": "preparing its data", "build": "building the model"}


def during(loss: Loss) -> str:
    """What it was doing, in words: " in backward of step 57"; empty where unknown."""
    if not loss.phase:
        return ""
    if loss.phase in BEGINNING and not loss.step:
        return f" while {BEGINNING[loss.phase]}"
    if loss.phase.startswith("stop"):
        return f" as it stopped after step {loss.step}"
    of = "" if loss.phase in ("step", SUMS) else f"{loss.phase} of "
    return f" in {of}step {loss.step + 1}"
