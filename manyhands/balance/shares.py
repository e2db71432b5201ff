"""Measurements -> shares: who computes how many rows, so that the slowest is as early as it can be.

Worker i needs Tᵢ(b) = aᵢ + cᵢ·b seconds for b ≥ 1 rows and none for none. Wanted: whole bᵢ ≥ 0 (and ≤ a cap) with
Σ bᵢ = B and the least max Tᵢ(bᵢ). Without rounding all that compute are done at one moment T, hence

    bᵢ = (T − aᵢ)/cᵢ ,   T = (B + Σ aᵢ/cᵢ) / Σ 1/cᵢ       (the sums are over workers with aᵢ < T)

(LB-BSP; Cannikin, arXiv:2402.05302; OmniLearn: the same line, fitted while training). Whole rows: give out row after
row, each to the worker that is done with it first. Since each Tᵢ rises, what has been given out after B rows are
the B smallest of all numbers {Tᵢ(k) : k ≥ 1}; any other division of B rows leaves one of those out, and so uses a
number at least as large as the largest of them, which is the makespan. So greedy is optimal, with caps too (a cap
ends a worker's list), and a worker too slow even to start (aᵢ + cᵢ beyond the makespan) is given nothing by itself.

Everything here is addition, multiplication and comparison of floats in a fixed order: every worker computes the same.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from manyhands.core.errors import UsageError


@dataclass(frozen=True)
class Cost:
    """What rows cost one worker: ``fixed`` + ``per_row`` · rows seconds, for any rows at all.

    Raises:
        UsageError: negative or not finite, or rows that cost nothing.
    """

    fixed: float
    per_row: float

    def __post_init__(self) -> None:
        if not (0 <= self.fixed < math.inf and 0 < self.per_row < math.inf):
            raise UsageError(
                f"a cost of {self.fixed} s + {self.per_row} s a row",
                "time is positive and finite",
                "measure at least one step",
            )

    def seconds(self, rows: float) -> float:
        """For `rows` rows; nothing costs nothing."""
        return self.fixed + self.per_row * rows if rows > 0 else 0.0


def makespan(costs: Sequence[Cost], shares: Sequence[float]) -> float:
    """When the last worker is done, in seconds."""
    return max(cost.seconds(rows) for cost, rows in zip(costs, shares, strict=True))


def solve(costs: Sequence[Cost], n_units: int, caps: Sequence[int | None] | None = None) -> list[int]:
    """Whole shares of `n_units` with the least makespan; ties go to the lower rank.

    Args:
        costs: one per worker, in seconds per unit.
        n_units: rows (or micro-batches) to give away.
        caps: the most that a worker can take; None: any number.

    Raises:
        UsageError: there is no worker, or all caps together are less than `n_units`.

    >>> solve([Cost(0, 4), Cost(0, 2), Cost(0, 1)], 14)
    [2, 4, 8]
    >>> solve([Cost(50, 1), Cost(0, 1)], 10)
    [0, 10]
    """
    limits = [n_units if cap is None else min(cap, n_units) for cap in (caps or [None] * len(costs))]
    if not costs or n_units < 0 or sum(limits) < n_units:
        raise UsageError(
            f"{n_units} rows for {len(costs)} workers that can take {sum(limits)}",
            "every row of a global batch is computed",
            "give a smaller --global-batch or --micro-batch, or more memory",
        )
    shares = _surely(costs, n_units, limits)
    heap = [
        (cost.seconds(share + 1), rank)
        for rank, (cost, share, limit) in enumerate(zip(costs, shares, limits, strict=True))
        if share < limit
    ]
    heapq.heapify(heap)
    for _ in range(n_units - sum(shares)):
        _, rank = heapq.heappop(heap)
        shares[rank] += 1
        if shares[rank] < limits[rank]:
            heapq.heappush(heap, (costs[rank].seconds(shares[rank] + 1), rank))
    return shares


def _surely(costs: Sequence[Cost], n_units: int, limits: Sequence[int]) -> list[int]:
    """What greedy has given out when all that are done by some time T have been, for a T that is nearly the last."""
    low, high = 0.0, min(cost.seconds(n_units) for cost in costs) * 2
    found = [0] * len(costs)
    for _ in range(40):  # high − low is then a millionth of a millionth of high
        middle = (low + high) / 2
        done = [_done_by(middle, cost, limit) for cost, limit in zip(costs, limits, strict=True)]
        if sum(done) <= n_units:
            low, found = middle, done
        else:
            high = middle
    return found


def _done_by(time_s: float, cost: Cost, limit: int) -> int:
    """The most units, up to `limit`, that `cost` allows by `time_s`."""
    if cost.seconds(1) > time_s:
        return 0
    units = min(limit, int((time_s - cost.fixed) / cost.per_row))
    while units > 0 and cost.seconds(units) > time_s:  # the quotient was rounded up
        units -= 1
    return units
