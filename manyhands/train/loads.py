"""Who is slow, who waits for whom, and why: from what every step's header tells of all workers.

In a step all workers start together and end together, so what a worker does not spend on its own rows it spends on moving
bytes and on waiting for the last one. The one that waits least is the one that the others wait for. Where workers push to a
server at different times, what each has done by then takes the place of the step's.

In train/loop.py, on rank 0::

    loads.add(result.work, result.spent, wall_s=now - start)         # every step
    balance = loads.take(replica.steps, seats)                       # where `Stepped` is emitted
    if balance is not None: emit(balance)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from manyhands.core.events import Balance, Load
from manyhands.core.membership import Seat

MATTERS = 0.05  # share of the time that is worth a word


@dataclass
class Loads:
    """Sums over steps, [workers, (compute_s, rows, data_s, wait_s, network_s)]."""

    wall_s: float = 0.0
    sums: list[list[float]] = field(default_factory=list)

    def add(
        self,
        work: Sequence[tuple[float, float]],
        spent: Sequence[tuple[float, float, float]] = (),
        *,
        wall_s: float,
    ) -> None:
        """One step.

        Args:
            work: (seconds computing, rows) of every rank; empty between agreements.
            spent: (seconds waiting for data, for others, moving bytes) of every rank; where nobody tells them, what was not
                computing counts as waiting.
            wall_s: of the step, the same for all.
        """
        if work and len(work) != len(self.sums):  # another group
            self.sums, self.wall_s = [[0.0] * 5 for _ in work], 0.0
        self.wall_s += wall_s
        for i, (seconds, rows) in enumerate(work):
            more = spent[i] if spent else (0.0, max(0.0, wall_s - seconds), 0.0)
            for j, figure in enumerate((seconds, rows, *more)):
                self.sums[i][j] += figure

    def take(self, step: int, seats: Sequence[Seat]) -> Balance | None:
        """What has come together, and begin anew; None where nothing has, or the group has just changed."""
        sums, wall_s = self.sums, self.wall_s
        self.sums, self.wall_s = [], 0.0
        if len(sums) != len(seats) or not wall_s:
            return None
        loads = tuple(
            Load(
                seat=seat.id,
                rank=rank,
                host=seat.host,
                rows=round(rows),
                **_within(wall_s, compute_s=compute_s, data_s=data_s, network_s=network_s, wait_s=wait_s),
            )
            for rank, (seat, (compute_s, rows, data_s, wait_s, network_s)) in enumerate(
                zip(seats, sums, strict=True)
            )
        )
        slowest, reason = blame(loads, wall_s)
        return Balance(step=step, wall_s=wall_s, workers=loads, slowest=slowest, reason=reason)


@dataclass
class Totals:
    """What workers have done where they do not speak with each other at every step of mine: each tells its totals.

    Attributes:
        own: mine: [compute_s, rows, data_s, wait_s, network_s].
        heard: by name, those that are accounted for.
    """

    own: list[float] = field(default_factory=lambda: [0.0] * 5)
    heard: dict[str, Sequence[float]] = field(default_factory=dict)

    def add(self, more: Sequence[float]) -> list[float]:
        """Mine, with what I have done since I last told."""
        self.own = [a + b for a, b in zip(self.own, more, strict=True)]
        return self.own

    def new(
        self, told: Mapping[str, Sequence[float]], names: Sequence[str]
    ) -> tuple[tuple[tuple[float, float], ...], tuple[tuple[float, float, float], ...]]:
        """(`work`, `spent`) of a `StepResult`: what `names` have told beyond what is accounted for.

        >>> totals = Totals()
        >>> totals.new({"a": [2.0, 8.0, 0.0, 1.0, 0.5]}, ["a", "b"])
        (((2.0, 8.0), (0.0, 0.0)), ((0.0, 1.0, 0.5), (0.0, 0.0, 0.0)))
        >>> totals.new({"a": [3.0, 12.0, 0.0, 1.0, 0.5]}, ["a"])
        (((1.0, 4.0),), ((0.0, 0.0, 0.0),))
        """
        work, spent = [], []
        for name in names:
            before = self.heard.get(name, [0.0] * 5)
            now = self.heard[name] = told.get(name, before)
            seconds, rows, data_s, wait_s, network_s = (b - a for a, b in zip(before, now, strict=True))
            work.append((seconds, rows))
            spent.append((data_s, wait_s, network_s))
        return tuple(work), tuple(spent)


def _within(wall_s: float, **seconds: float) -> dict[str, float]:
    """No more than there was, the first ones before the last: they are told with the next header, so they are a step late."""
    found: dict[str, float] = {}
    for name, spent in seconds.items():
        found[name] = max(0.0, min(spent, wall_s - sum(found.values())))
    return found


def blame(loads: Sequence[Load], wall_s: float) -> tuple[str, str]:
    """(the seat that the others wait for, why): see `Balance`.

    >>> a = Load(seat="w0", rank=0, host="h", rows=8, compute_s=2.0, wait_s=2.0)
    >>> b = Load(seat="w1", rank=1, host="h", rows=8, compute_s=4.0)
    >>> blame([a, b], 4.0)
    ('w1', 'compute')
    """
    if not loads or wall_s <= 0:
        return "", ""
    if len(loads) > 1 and max(load.wait_s for load in loads) > MATTERS * wall_s:
        slowest = max(loads, key=lambda load: load.compute_s + load.data_s + load.network_s)

        def more(reason: str) -> float:
            spent = [float(getattr(load, f"{reason}_s")) for load in (slowest, *loads)]
            return spent[0] - sum(spent[1:]) / len(loads)  # than the mean

        return slowest.seat, max(("compute", "data", "network"), key=more)
    if max(load.network_s for load in loads) > MATTERS * wall_s:
        return "", "network"
    return "", ""
