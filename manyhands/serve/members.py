"""Who takes part in a shard's work, and what they wish."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from manyhands.serve.rules import Push


@dataclass
class Member:
    """A worker that takes part.

    Attributes:
        clock: the step of its next push.
        loss, count: totals at its last answer.
        load: what it has told of its time (see `Push`); empty until it has, and after a restart: nothing depends on it.
        came_s: when its push of this round came (synchronous), on this server's clock.
        waited_s: how long its last push waited for those of others.
    """

    clock: int
    seen: float = field(default_factory=time.monotonic)
    loss: float = 0.0
    count: int = 0
    load: tuple[float, ...] = ()
    came_s: float = field(default_factory=time.monotonic)
    waited_s: float = 0.0

    def took(self, push: Push) -> None:
        """`push` is dealt with; one of a log says nothing of time."""
        self.clock, self.load = push.step + 1, push.load or self.load


def loads(members: Mapping[str, Member]) -> dict[str, tuple[float, ...]]:
    """What the members have told of their time, by name."""
    return {who: member.load for who, member in members.items() if member.load}


def slowest(members: Mapping[str, Member]) -> int:
    """The step at which the last of them is; endless where there is nobody."""
    return min((m.clock for m in members.values()), default=1 << 62)


def first_step(members: Mapping[str, Member], wanted: int, progress: float) -> int:
    """Where a worker begins that comes by itself: not behind the others, or, alone, not behind what is done."""
    return max(wanted, slowest(members) if members else int(progress))


@dataclass
class Wishes:
    """A wish to stop, to save or to change the set of workers, of one, is fulfilled by all after the same step of theirs.

    That step is one that no worker has been answered yet: every worker hears of it in the answer to that very step.

    Attributes:
        answered: the latest step that any worker was answered.
        stop: the signal's number; `stop_at` the step after which all stop.
        save_at, change_at: the step after which all save, or meet to change their set.
    """

    answered: int = -1
    stop: int = 0
    stop_at: int = -1
    save_at: int = -1
    change_at: int = -1

    def hear(self, step: int, *, stop: int, save: bool, change: bool) -> None:
        """A worker pushes `step` with its wishes."""
        after = max(self.answered + 1, step)
        if stop and not self.stop:
            self.stop, self.stop_at = stop, after
        if save and step > self.save_at:
            self.save_at = after
        if change and step > self.change_at:
            self.change_at = after

    def answer(self, step: int) -> dict[str, object]:
        """What the answer to a push of `step` says."""
        self.answered = max(self.answered, step)
        due = self.stop and step >= self.stop_at
        return {
            "stop": self.stop if due else 0,
            "save": step == self.save_at,
            "change": step == self.change_at,
        }
