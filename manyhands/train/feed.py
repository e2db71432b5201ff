"""Rows -> my part of each global batch.

The global batch of a step is a pure function of (seed, step): `Order` says which rows, `micro_batch` cuts it into
places, `divide` (`divide_costs` where rows differ in length) gives each worker a contiguous range of places. Where nothing
in a forward pass is random, a worker runs several of its micro-batches in one forward pass of at most `device_batch` rows
(`coalesce`): the result is the same sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from manyhands.core.errors import UsageError
from manyhands.data.partition import divide, divide_costs
from manyhands.data.sample import Order
from manyhands.data.sample import places as cut
from manyhands.train.replica import Part

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from manyhands.core.types import Rows


@dataclass(kw_only=True)
class Feed:
    """Reads this worker's part of any step in O(1).

    `rank` and `weights` may be set at step boundaries, on all workers alike; the global batch does not change.

    Args:
        rows: where rows come from.
        order: which rows make which global batch.
        rank: this worker; `weights` has one relative share per worker.
        micro_batch: rows of a micro-batch.
        device_batch: most rows in one forward pass when `coalesce`.
        coalesce: whether several micro-batches may share a forward pass (nothing in it is random).
        device: where batches go.
        seed: of the random numbers of forward passes.
        divisible: whether a pass may be run in pieces where memory runs out: no fixed order of additions is promised.
        by_speed: local steps follow the shares (`Part.pace`).
    """

    rows: Rows
    order: Order
    rank: int
    weights: Sequence[float]
    micro_batch: int
    device_batch: int
    coalesce: bool
    device: torch.device
    seed: int
    divisible: bool = True
    by_speed: bool = False

    def part(self, step: int, *, places: Sequence[int] | None = None) -> Part:
        """My micro-batches of step `step` (from 0).

        Args:
            places: exactly these micro-batches instead of mine by the current weights, in any order.

        Raises:
            UsageError: the step's global batch has no such place, or one is given twice.
        """
        ids = self.order.ids(step)
        cuts = cut(len(ids), self.micro_batch)
        mine = self.division(step)[self.rank] if places is None else _ascending(places, len(cuts))
        passes = self._passes(cuts, mine)
        batches = [(first, self._batch(step, begin, ids[begin:end])) for first, begin, end in passes]
        spans = [range(first, first + -(-(end - begin) // self.micro_batch)) for first, begin, end in passes]
        return Part(
            step,
            batches,
            len(cuts),
            len(ids),
            self.seed,
            spans,
            divisible=self.divisible,
            pace=self._pace(),
        )

    def _pace(self) -> float:
        return self.weights[self.rank] / max(self.weights) if self.by_speed else 1.0

    def division(self, step: int) -> list[range]:
        """The places of step `step`'s global batch that each rank has by the current weights.

        Where rows tell their lengths, tokens are divided, else rows.
        """
        lengths = getattr(self.rows, "lengths", None)
        if lengths is None:
            return divide(len(cut(self.order.rows(step), self.micro_batch)), self.weights)
        ids = self.order.ids(step)
        starts = [rows.start for rows in cut(len(ids), self.micro_batch)]
        return divide_costs(np.add.reduceat(lengths[ids], starts), self.weights)

    def amounts(self, step: int) -> list[tuple[int, float]]:
        """What each rank has of step `step` by the current weights: rows, and rows of mean length that cost as much."""
        lengths = getattr(self.rows, "lengths", None)
        ids = self.order.ids(step)
        cuts = cut(len(ids), self.micro_batch)
        found = []
        for mine in self.division(step):
            own = ids[cuts[mine.start].start : cuts[mine.stop - 1].stop] if mine else ids[:0]
            cost = len(own) if lengths is None else float(lengths[own].sum() / lengths.mean())
            found.append((len(own), cost))
        return found

    def _passes(self, cuts: Sequence[range], mine: Sequence[int]) -> list[tuple[int, int, int]]:
        """(first place, begin row, end row) of each forward pass; `mine` ascends."""
        passes: list[tuple[int, int, int]] = []
        for place in mine:
            begin, end = cuts[place].start, cuts[place].stop
            joins = self.coalesce and passes and passes[-1][2] == begin
            if joins and end - passes[-1][1] <= self.device_batch:
                first, start, _ = passes[-1]
                passes[-1] = (first, start, end)
            else:
                passes.append((place, begin, end))
        return passes

    def _batch(self, step: int, begin: int, ids: NDArray[np.int64]) -> dict[str, Any]:
        take_at = getattr(self.rows, "take_at", None)
        batch = take_at(ids, self.seed, step, begin) if take_at is not None else self.rows.take(ids)
        if self.device.type == "cpu":
            return batch
        return {
            name: tensor.pin_memory().to(self.device, non_blocking=True) for name, tensor in batch.items()
        }


def _ascending(places: Sequence[int], n_places: int) -> list[int]:
    found = sorted(places)
    if len(set(found)) != len(found) or (found and not 0 <= found[0] <= found[-1] < n_places):
        raise UsageError(
            f"places = {list(places)} of a global batch of {n_places} micro-batches",
            "a micro-batch is computed once, by one worker",
            f"give different places below {n_places}",
        )
    return found


def unit_rows(global_batch: int, *, one_pass: bool) -> int:
    """Rows of a micro-batch where the user gave none; never depends on the number of workers (promise 1).

    One row where forward passes may hold several micro-batches; where each has a pass of its own (dropout, or
    the fixed order), an eighth of the global batch, so that few workers are not held up by tiny passes.
    """
    return 1 if one_pass else max(1, global_batch // 8)
