"""The shares of a running job: re-estimated at every step, changed when it pays.

All workers see the same numbers (they travel in the step's header) and so come to the same shares without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from manyhands.balance.estimate import Track
from manyhands.balance.shares import Cost, makespan, solve

PAYS = 0.015  # of a step's time must be won, beyond what may be noise
NEEDED = 2  # steps measured before the first change

Work = Sequence[tuple[float, float]]


class Balancer:
    """Decides who computes how many micro-batches.

    Equal workers keep equal shares: a change has to win `PAYS` of the step's time and twice the standard error of what
    was measured. See `manyhands.balance.estimate` for what is known of each worker.

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
        return self.weights

    def observe(self, work: Work) -> tuple[int, ...]:
        """After each step, on every worker alike.

        Args:
            work: (seconds in forward and backward, rows) of each rank in this step; rows may be fractions
                (tokens / tokens of a mean row).

        Returns:
            the shares of the next step.
        """
        tracks = [self._tracks[each] for each in self._ids]
        for track, (seconds, rows) in zip(tracks, work, strict=True):
            track.observe(rows, seconds)
        measured = (len(t.samples) >= NEEDED for t, share in zip(tracks, self.weights, strict=True) if share)
        if not all(measured):
            return self.weights
        costs = self._costs()
        # one that has rested is tried with a single micro-batch: if it is as slow as it was, little is lost
        caps = [
            cap if share or not track.samples else min(1, cap if cap is not None else 1)
            for cap, track, share in zip(self._limits(), tracks, self.weights, strict=True)
        ]
        better = tuple(solve(costs, self._n_units, caps))
        tried = any(new and not old for new, old in zip(better, self.weights, strict=True))
        now, then = makespan(costs, self.weights), makespan(costs, better)
        doubt = max(t.doubt for t, share in zip(tracks, self.weights, strict=True) if share)
        if tried or now - then > (PAYS + 2 * doubt) * now:
            self.weights = better
        return self.weights

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
            "tracks": {each: track.to_json() for each, track in self._tracks.items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """What `state` said on a worker of the same set. Where the set changes too, `reset` comes after it."""
        self._tracks = {each: Track.from_json(data) for each, data in state["tracks"].items()}
        self._ids, self.weights = tuple(state["tracks"]), tuple(state["weights"])
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
