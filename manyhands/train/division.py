"""Who computes which micro-batches of each step, also when workers come and go in the middle of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from manyhands.data.partition import divide

if TYPE_CHECKING:
    from manyhands.core.membership import Seat
    from manyhands.train.feed import Feed
    from manyhands.train.method import Part
    from manyhands.train.standing import Standing

Spans = list[tuple[int, int]]


@dataclass
class Division:
    """The division of each step among the workers, and who did what of those that are not committed yet.

    Most steps are divided by the feed's weights. Steps that were interrupted are not: what survivors hold stays theirs, and
    the rest is divided anew, among those that have the job's state.
    """

    feed: Feed
    _open: dict[int, Mapping[str, Sequence[int]]] = field(
        default_factory=dict
    )  # held places by step and seat
    _dropped: dict[int, Mapping[str, Sequence[int]]] = field(
        default_factory=dict
    )  # places by step and seat that nobody computes
    _resting: tuple[int, Sequence[int]] = (-1, ())  # in this step these ranks still fetch the state
    _by: dict[int, tuple[int, dict[str, Spans], int]] = field(default_factory=dict)

    def part(self, step: int) -> Part:
        """My part of step `step`."""
        return self.feed.part(
            step, places=self._places(step)[self.feed.rank] if self._special(step) else None
        )

    def begin(self, step: int, seats: Sequence[Seat], epoch: int) -> None:
        """Everybody computes its part of `step` now."""
        places = self._places(step)
        who = {seat.id: list(mine) for seat, mine in zip(seats, places, strict=True)}
        for seat, held in self._open.get(step, {}).items():
            who[seat] = sorted([*who.get(seat, []), *held])
        rows = self.feed.order.rows(step)
        self._by[step] = (epoch, {seat: spans_of(mine) for seat, mine in who.items()}, rows)

    def committed(self, steps: int) -> Iterator[tuple[int, int, dict[str, Spans], int]]:
        """(step, epoch, who, rows) of the steps before `steps` that were not told of yet, in order."""
        for step in sorted(s for s in self._by if s < steps):
            yield (step, *self._by.pop(step))

    def go_on(self, standing: Standing) -> None:
        """Another set of workers goes on after ``standing.steps`` steps."""
        self._by.clear()
        self._open = {step: by for step, by in standing.held.items() if step >= standing.steps}
        self._dropped = dict(standing.dropped)
        self._resting = (standing.steps, standing.resting)

    @property
    def open_until(self) -> int:
        """The first step that nobody has begun to compute."""
        return max(self._open, default=-1) + 1

    def open_places(self) -> int:
        """Micro-batches of the steps that were interrupted, all together."""
        dropped = sum(len(places) for by in self._dropped.values() for places in by.values())
        return sum(self._n_places(step) for step in self._open.keys() | self._dropped.keys()) - dropped

    def of_rank(self, rank: int, steps: Iterable[int]) -> dict[int, list[int]]:
        """The places that a rank of the present set has in each of `steps`."""
        return {step: list(self._places(step)[rank]) for step in steps}

    def held(self) -> dict[str, dict[int, list[int]]]:
        """What each seat, also of an earlier set, has computed of the steps that were interrupted."""
        found: dict[str, dict[int, list[int]]] = {}
        for step, by in self._open.items():
            for seat, places in by.items():
                found.setdefault(seat, {})[step] = list(places)
        return found

    def begun(self) -> dict[str, dict[int, list[int]]]:
        """By seat, what each was to compute of the steps that are begun and not committed, and what is dropped already."""
        found: dict[str, dict[int, list[int]]] = {}
        for step, (_, who, _) in self._by.items():
            for seat, spans in who.items():
                found.setdefault(seat, {})[step] = [place for span in spans for place in range(*span)]
        for step, by in self._dropped.items():
            for seat, places in by.items():
                found.setdefault(seat, {})[step] = list(places)
        return found

    def take_dropped(self, step: int) -> dict[str, Spans]:
        """What of `step`, which is committed now, nobody has computed."""
        return {seat: spans_of(places) for seat, places in self._dropped.pop(step, {}).items()}

    # -- how

    def _special(self, step: int) -> bool:
        return (
            step in self._open
            or step in self._dropped
            or (step == self._resting[0] and bool(self._resting[1]))
        )

    def _n_places(self, step: int) -> int:
        return sum(len(r) for r in self.feed.division(step))

    def _places(self, step: int) -> Sequence[Sequence[int]]:
        if not self._special(step):
            return self.feed.division(step)
        weights = list(self.feed.weights)
        if step == self._resting[0]:
            weights = [0 if rank in self._resting[1] else weight for rank, weight in enumerate(weights)]
            if not any(weights):  # whoever is there had been resting
                weights = [int(rank not in self._resting[1]) for rank in range(len(weights))]
        taken = {**self._open.get(step, {}), **self._dropped.get(step, {})}
        return remaining(self._n_places(step), taken, weights)


def remaining(n_places: int, held: Mapping[str, Sequence[int]], weights: Sequence[float]) -> list[list[int]]:
    """Places that nobody holds, divided by rank.

    >>> remaining(6, {"a": [0, 1], "b": [4]}, [1, 1])
    [[2, 3], [5]]
    """
    taken = {place for places in held.values() for place in places}
    free = [place for place in range(n_places) if place not in taken]
    return [[free[i] for i in part] for part in divide(len(free), weights)]


def spans_of(places: Sequence[int]) -> Spans:
    """Half-open ranges of ascending places.

    >>> spans_of([0, 1, 2, 5])
    [(0, 3), (5, 6)]
    """
    spans: Spans = []
    for place in places:
        if spans and spans[-1][1] == place:
            spans[-1] = (spans[-1][0], place + 1)
        else:
            spans.append((place, place + 1))
    return spans
