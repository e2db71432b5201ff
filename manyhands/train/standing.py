"""Where the workers of a new set stand, and what all conclude from it, each alike. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from manyhands.core.errors import ManyhandsError

Held = Mapping[int, Sequence[int]]  # places of micro-batches by step


def _texts(held: Held) -> dict[str, list[int]]:
    return {str(step): list(places) for step, places in held.items()}


def _numbers(held: Mapping[str, Sequence[int]]) -> dict[int, tuple[int, ...]]:
    return {int(step): tuple(places) for step, places in held.items()}


class NobodyHolds(ManyhandsError):
    """All that held the job's state are gone."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where one worker stands when a new set of workers meets.

    Attributes:
        seat: its id.
        fresh: it holds no state of the job.
        steps: steps that are agreed upon.
        agreements: how many it has taken part in, where several may fall on one step.
        committed: steps of which it knows that everybody's work is agreed upon.
        chores: what it still has to do after that step, in order.
        held: places of micro-batches that it has computed since, by step.
        gone: the same of those who were lost, where what they did stays (they wrote into common parameters).
        dropped: places of those who were lost that nobody is to compute (what they had of their round goes with them).
        quick: to fetch its state takes a newcomer much less than a step.
        closing: the last step is done, and its chores are among `chores` or done, too.
        saved: the step of the last checkpoint that was begun.
        first: who was rank 0, and wrote it.
        incomplete: I am who, and what I write for all lacks the part of another.
    """

    seat: str
    fresh: bool
    steps: int
    agreements: int = 0
    committed: int = 0
    chores: Sequence[str] = ()
    held: Held = field(default_factory=dict)
    gone: Mapping[str, Held] = field(default_factory=dict)
    dropped: Mapping[str, Held] = field(default_factory=dict)
    quick: bool = False
    closing: bool = False
    saved: int = 0
    first: str = ""
    incomplete: bool = False

    def to_data(self) -> dict[str, Any]:
        """As JSON data."""
        of_lost = {
            name: {seat: _texts(held) for seat, held in getattr(self, name).items()}
            for name in ("gone", "dropped")
        }
        return {**self.__dict__, "chores": list(self.chores), "held": _texts(self.held), **of_lost}

    @staticmethod
    def of(data: Mapping[str, Any]) -> Position:
        """From `to_data`'s."""
        of_lost = {
            name: {seat: _numbers(held) for seat, held in data[name].items()} for name in ("gone", "dropped")
        }
        more = {"chores": tuple(data["chores"]), "held": _numbers(data["held"]), **of_lost}
        return Position(**{**data, **more})


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What all workers conclude from their positions, each alike.

    Attributes:
        steps: how far the job is.
        committed: steps of which one of those who have the state knows that everybody's work is in it.
        leader: the rank that has the job's state.
        behind: ranks that must get it.
        fresh: those of them that never had it.
        chores: what is left to do after that step.
        held: by step: places by seat that need not be computed again.
        dropped: the same of what nobody is to compute.
        closing: the last step is done.
        saved: the step of the last checkpoint that everybody knows to be begun; -1: who wrote it, or a part of it, is gone.
        resting: ranks that fetch the state while the others compute the next step; the others of `behind` do so before it.
    """

    steps: int
    leader: int
    committed: int = 0
    behind: tuple[int, ...] = ()
    fresh: tuple[int, ...] = ()
    chores: tuple[str, ...] = ()
    held: Mapping[int, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    dropped: Mapping[int, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    closing: bool = False
    saved: int = 0
    resting: tuple[int, ...] = ()


def conclude(positions: Sequence[Position], *, still: bool = True) -> Standing:
    """The job goes on from the furthest agreement that anybody has.

    Args:
        still: parameters and optimizer state stay as they are until the next agreement.

    Raises:
        NobodyHolds: nobody has any.

    >>> ahead = Position(seat="a", fresh=False, steps=7, held={7: (0, 1)})
    >>> conclude([Position(seat="b", fresh=False, steps=6, held={6: (4,)}), ahead]).behind
    (0,)
    """
    veterans = [p for p in positions if not p.fresh]
    if not veterans:
        raise NobodyHolds(
            "no worker of this job holds its state any more",
            "one survivor is enough",
            "continue from the last checkpoint with --resume",
        )
    furthest = max((p.steps, p.agreements) for p in veterans)
    up_to_date = [not p.fresh and (p.steps, p.agreements) == furthest for p in positions]
    there = [p for p, ok in zip(positions, up_to_date, strict=True) if ok]
    held: dict[int, dict[str, tuple[int, ...]]] = {}
    for p in there:
        for step, places in p.held.items():
            held.setdefault(step, {})[p.seat] = tuple(places)
    for p in there:  # whoever looked last knows of the most
        for seat, by in p.gone.items():
            for step, places in by.items():
                known = held.setdefault(step, {}).get(seat, ())
                held[step][seat] = tuple(sorted({*known, *places}))
    dropped: dict[int, dict[str, tuple[int, ...]]] = {}
    for p in there:  # who is further in its round knows of more steps
        for seat, by in p.dropped.items():
            for step, places in by.items():
                dropped.setdefault(step, {})[seat] = tuple(places)
    behind = tuple(rank for rank, ok in enumerate(up_to_date) if not ok)
    chores = max((tuple(p.chores) for p in there), key=len)
    orphaned = there[0].first not in [p.seat for p in positions] or any(p.incomplete for p in veterans)
    if orphaned and "wait" in chores and "save" not in chores:
        chores = ("meet", "save", *chores)
    return Standing(
        steps=furthest[0],
        leader=up_to_date.index(True),
        committed=max(p.committed for p in there),
        behind=behind,
        fresh=tuple(rank for rank, p in enumerate(positions) if p.fresh),
        chores=chores,
        held=held,
        dropped=dropped,
        closing=any(p.closing for p in there),
        saved=-1 if orphaned else min(p.saved for p in there),
        resting=() if chores or not still or any(p.quick for p in there) else behind,
    )
