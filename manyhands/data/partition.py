"""Who takes what: places of a global batch divided among workers. Pure arithmetic, the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from manyhands.core.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def divide(n_units: int, weights: Sequence[float]) -> list[range]:
    """Divide `n_units` in proportion to `weights` by largest remainder (Hamilton's method).

    Each worker is within one unit of its exact quota, a weight of zero gets nothing, ties go to the lower
    rank. The quotas are computed in exact fractions, so every machine divides alike.

    Args:
        n_units: places (or rows) to give away.
        weights: one per worker, finite, not negative, not all zero.

    Returns:
        contiguous ranges in rank order which cover ``range(n_units)`` exactly.

    Raises:
        UsageError: n_units or a weight is impossible.

    >>> [len(r) for r in divide(18, [1] * 7)]
    [3, 3, 3, 3, 2, 2, 2]
    >>> divide(4, [1, 0, 3])
    [range(0, 1), range(1, 1), range(1, 4)]
    """
    if n_units < 0:
        raise UsageError(f"n_units = {n_units}", "there is no negative number of units", "give n_units >= 0")
    bad = [w for w in weights if not math.isfinite(w) or w < 0]
    if bad or not any(weights):
        raise UsageError(
            f"weights = {list(weights)}",
            "weights are finite, not negative and not all zero",
            "give each worker its relative share, as in 2,1",
        )
    exact = [Fraction(w) for w in weights]
    total = sum(exact)
    quotas = [n_units * w / total for w in exact]
    counts = [math.floor(q) for q in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: (counts[i] - quotas[i], i))
    for i in by_remainder[: n_units - sum(counts)]:
        counts[i] += 1
    ranges, first = [], 0
    for count in counts:
        ranges.append(range(first, first + count))
        first += count
    return ranges


def divide_costs(costs: NDArray[np.int64], weights: Sequence[float]) -> list[range]:
    """Divide places of unequal cost: contiguous ranges in rank order with the least max(cost of i's range / weight of i).

    With a bound t on that maximum, taking as much as the bound allows, rank after rank, gets furthest; so the least
    possible t is found by bisection. Under it, each boundary is put where it is nearest to proportional.

    Args:
        costs: of each place, [n], not negative (tokens).
        weights: as for `divide`.

    Returns:
        as `divide`; for equal costs the same.

    >>> divide_costs(np.array([5, 1, 1, 1, 1, 1]), [1, 1])
    [range(0, 1), range(1, 6)]
    """
    places = len(costs)
    if places == 0 or int(costs.min()) == int(costs.max()):
        return divide(places, weights)
    divide(0, weights)  # refuses impossible ones
    prefix = np.concatenate([[0], np.cumsum(costs)])  # [n + 1]
    total = int(prefix[-1])
    low, high = total / math.fsum(weights), total / max(weights)  # one alone could do it all by `high`
    high = max(high, low) * (1 + 1e-12)
    for _ in range(60):
        middle = (low + high) / 2
        if _reached(prefix, weights, middle)[-1] == places:
            high = middle
        else:
            low = middle
    high *= 1 + 1e-9  # what was reached is reached from other begins, too, whatever is rounded
    backwards = total - prefix[::-1]
    earliest = [places - end for end in reversed(_reached(backwards, list(reversed(weights)), high))]
    earliest = [*earliest[1:], places]
    ranges, begin, so_far = [], 0, 0.0
    share = total / math.fsum(weights)
    for rank, weight in enumerate(weights):
        so_far += weight * share
        nearest = int(np.abs(prefix - so_far).argmin())
        most = _furthest(prefix, begin, weight * high) if weight else begin
        end = min(most, max(nearest, earliest[rank], begin))
        ranges.append(range(begin, end))
        begin = end
    assert begin == places
    return ranges


def _furthest(prefix: NDArray[np.int64], begin: int, budget: float) -> int:
    """The end of the longest range from `begin` that costs no more than `budget`."""
    return int(np.searchsorted(prefix, prefix[begin] + budget, side="right")) - 1


def _reached(prefix: NDArray[np.int64], weights: Sequence[float], bound: float) -> list[int]:
    """Where each rank's range ends at the latest, if nobody costs more than `bound` times its weight."""
    ends, end = [], 0
    for weight in weights:
        end = _furthest(prefix, end, weight * bound) if weight else end
        ends.append(end)
    return ends
