"""The shares of a running job: re-estimated at every step, changed when it pays.

All workers see the same numbers (they travel in the step's header) and so come to the same shares without a word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from manyhands.balance.estimate import USUAL, WINDOW, Track
from manyhands.balance.shares import Cost, makespan, solve

PAYS = 0.015  # of a step's time must be won, beyond what may be noise
NEEDED = 2  # steps measured before the first change

Work = Sequence[tuple[float, float]]


class Balancer:
    """Decides who computes how many micro-batches.

    Equal workers keep equal shares: a change has to win `PAYS` of the step's time, and twice the standard error of that win
    over the last steps. See `manyhands.balance.estimate` for what is known of each worker.

    Args:
        ids: of the workers, in rank order.
        n_units: micro-batches in a global batch.
        unit_rows: rows in one.
        caps: the most micro-batches that a worker can take at all; None: any number.

    Attributes:
        weights: the current share of each worker, in micro-batches: Σ = n_units.
    """

    def __init__(
        self,
        ids: Sequence[str],
        *,
        n_units: int,
        unit_rows: int = 1,
        caps: Sequence[int | None] | None = None,
    ) -> None:
        self._n_units, self._unit_rows = n_units, unit_rows
        self._tracks: dict[str, Track] = {}
        self.weights: tuple[int, ...] = ()
        self.reset(ids, caps=caps)

    def reset(self, ids: Sequence[str], *, caps: Sequence[int | None] | None = None) -> tuple[int, ...]:
        """Other workers: what is known of those that stay is kept; newcomers are believed to be like the median.

        Returns:
            the new shares.
        """
        self._ids, self._caps = tuple(ids), tuple(caps) if caps is not None else None
        self._tracks = {each: self._tracks.get(each, Track()) for each in ids}
        self.weights = tuple(solve(self._costs(), self._n_units, self._caps))
        self._steps: list[list[float]] = []
        self._last: list[float] = []
        self._needed = NEEDED
        return self.weights

    def observe(self, work: Work) -> tuple[int, ...]:
        """After each step, on every worker alike.

        Args:
            work: (seconds of its own work, rows) of each rank in this step; rows may be fractions (tokens / tokens of
                a mean row).

        Returns:
            the shares of the next step.
        """
        tracks = [self._tracks[each] for each in self._ids]
        triples = zip(tracks, self.weights, work, strict=True)
        # a smaller batch, at the end of a pass over the data, leaves some without rows: whoever has a share does not rest
        changed = [
            (rows > 0 or not share) and track.observe(rows, seconds)
            for track, share, (seconds, rows) in triples
        ]
        self._remember([seconds if rows > 0 else 0.0 for seconds, rows in work], any(changed))
        busy = [track for track, share in zip(tracks, self.weights, strict=True) if share]
        if len(self._steps) < self._needed or not all(track.samples for track in busy):
            return self.weights
        costs = self._costs()
        if len(busy) == len(tracks) and not self._may_gain(costs):
            return self.weights
        # one that has rested is tried with a single micro-batch: if it is as slow as it was, little is lost
        caps = [
            cap if share or not track.samples else min(1, cap if cap is not None else 1)
            for cap, track, share in zip(self._limits(), tracks, self.weights, strict=True)
        ]
        better = tuple(solve(costs, self._n_units, caps))
        tried = any(new and not old for new, old in zip(better, self.weights, strict=True))
        if tried or self._gains(costs, better):
            self.weights, self._steps = better, []
            self._needed = 1 if tried else NEEDED  # a trial in vain is ended at once
        return self.weights

    def _remember(self, seconds: list[float], changed: bool) -> None:
        """The steps at the current shares and speeds, as far as they are worth a comparison."""
        tracks = [self._tracks[each] for each in self._ids]
        if changed:  # this step and the last were the first ones at the new speed
            self._steps = [self._last] if self._last else []
        if all(track.odd is None and (track.samples or track.idle) for track in tracks):
            self._steps = [*self._steps, seconds][-WINDOW:]
        self._last = seconds

    def _may_gain(self, costs: Sequence[Cost]) -> bool:
        """Whether even the derivation's T, without rounding, would be worth a change; quickly found."""
        rates = [1.0 / cost.per_row for cost in costs]
        fixed = [cost.fixed / cost.per_row for cost in costs]
        least = (self._n_units + math.fsum(fixed)) / math.fsum(rates)
        return least < (1.0 - PAYS) * makespan(costs, self.weights)

    def _gains(self, costs: Sequence[Cost], better: Sequence[int]) -> bool:
        """Whether the steps at the current shares would have been shorter with `better` ones, beyond doubt.

        Compared within each step: what slows all workers at once is no doubt about their shares.
        """
        gains = []
        for seconds in self._steps:
            then = [
                cost.seconds(new) * (took / cost.seconds(old) if old else 1.0)
                for cost, new, old, took in zip(costs, better, self.weights, seconds, strict=True)
            ]
            gains.append(1.0 - max(then) / max(*seconds, 1e-9))
        n, mean = len(gains), math.fsum(gains) / len(gains)
        apart = math.fsum((gain - mean) ** 2 for gain in gains)
        doubt = math.sqrt((apart + 2 * USUAL**2) / (n + 1) / n)  # two steps' worth of belief in what is usual
        return mean > PAYS + 2 * doubt

    def seconds(self) -> list[float]:
        """The expected forward and backward of each worker in the next step."""
        return [cost.seconds(share) for cost, share in zip(self._costs(), self.weights, strict=True)]

    def speeds(self) -> list[float | None]:
        """Rows per second of each worker at its current share; None where it was not measured."""
        found: list[float | None] = []
        for each, share in zip(self._ids, self.weights, strict=True):
            cost = self._tracks[each].cost()
            rows = max(share, 1) * self._unit_rows
            found.append(rows / cost.seconds(rows) if cost is not None else None)
        return found

    def state(self) -> dict[str, Any]:
        """Everything, as JSON: a newcomer that loads it goes on like the others."""
        return {
            "weights": list(self.weights),
            "steps": self._steps,
            "last": self._last,
            "needed": self._needed,
            "tracks": {each: track.to_json() for each, track in self._tracks.items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """What `state` said on a worker of the same set. Where the set changes too, `reset` comes after it."""
        self._tracks = {each: Track.from_json(data) for each, data in state["tracks"].items()}
        self._ids, self.weights = tuple(state["tracks"]), tuple(state["weights"])
        self._steps, self._last = [list(each) for each in state["steps"]], list(state["last"])
        self._needed = int(state["needed"])
        self._caps = self._caps if self._caps and len(self._caps) == len(self._ids) else None

    def _limits(self) -> Sequence[int | None]:
        return self._caps or [None] * len(self._ids)

    def _costs(self) -> list[Cost]:
        """Per micro-batch."""
        known = [self._tracks[each].cost() for each in self._ids]
        measured = [cost for cost in known if cost is not None]
        usual = (
            Cost(median(c.fixed for c in measured), median(c.per_row for c in measured))
            if measured
            else Cost(0.0, 1.0)
        )
        return [
            Cost(cost.fixed, cost.per_row * self._unit_rows)
            for cost in (cost if cost is not None else usual for cost in known)
        ]
