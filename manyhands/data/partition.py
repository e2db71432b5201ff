"""Who takes what: places of a global batch divided among workers. Pure arithmetic, the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from manyhands.core.errors import UsageError


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
