"""A seekable shuffle: any entry of a pseudo-random permutation of range(n), without making the others.

A Feistel network over a grid of a × b cells with a ≈ b ≈ √n (Black and Rogaway 2002, "Ciphers with arbitrary
finite domains", method 3, generalized Feistel) is a bijection of the grid whatever its round
function is. The grid has fewer than n + 2√n cells; the few values that fall beyond n are enciphered again
until they do not (cycle walking, method 2 there), which keeps it a bijection of range(n). The round function
is SplitMix64's finalizer (`manyhands.core.rng.mix`). Ten rounds: Luby and Rackoff's four assume large halves;
small n needs more (the distribution over seeds is tested).

Memory is O(1), an entry costs microseconds at any n, and a resumed job need not skip what it has seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from manyhands.core import rng
from manyhands.core.errors import DataError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Words = NDArray[np.uint64]

ROUNDS = 10
MOST = 1 << 62
_STREAM = 0x6F72646572  # "order": keeps these keys apart from those that seed the forward passes


@dataclass(frozen=True)
class Permutation:
    """A bijection of ``range(n)`` that is a pure function of (n, seed, epoch).

    Attributes:
        n: how many samples; 1 … 2**62.
        seed: of the job.
        epoch: another epoch is another permutation.

    Raises:
        DataError: n < 1.
        UsageError: n > 2**62.

    >>> sorted(Permutation(5, seed=0, epoch=0)[i] for i in range(5))
    [0, 1, 2, 3, 4]
    """

    n: int
    seed: int
    epoch: int = 0
    _grid: tuple[int, int] = field(init=False, repr=False, compare=False)
    _keys: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.n < 1:
            raise DataError(
                f"n = {self.n} samples",
                "an order needs at least one sample",
                "check that the data is not empty",
            )
        if self.n > MOST:
            raise UsageError(f"n = {self.n} samples", f"at most 2**62 = {MOST} can be ordered", "give fewer")
        high = math.isqrt(self.n - 1) + 1  # ceil(√n)
        keys = tuple(rng.key(_STREAM, self.seed, self.epoch, r) for r in range(ROUNDS))
        object.__setattr__(self, "_grid", (high, -(-self.n // high)))
        object.__setattr__(self, "_keys", keys)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> int:
        """Which sample comes at position `i`. Raises IndexError beyond 0 … n − 1."""
        if not 0 <= i < self.n:
            raise IndexError(f"position {i} of {self.n}")
        x = self._round_trip(i)
        while x >= self.n:
            x = self._round_trip(x)
        return x

    def take(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """`self[i]` for each position of `ids` (any shape, int64). Raises IndexError beyond 0 … n − 1."""
        shape = ids.shape
        flat = np.asarray(ids, dtype=np.int64).reshape(-1)  # [k]
        if flat.size and (int(flat.min()) < 0 or int(flat.max()) >= self.n):
            bad = int(flat.min()) if int(flat.min()) < 0 else int(flat.max())
            raise IndexError(f"position {bad} of {self.n}")
        x = self._round_trips(flat.astype(np.uint64))
        beyond = np.flatnonzero(x >= np.uint64(self.n))
        while beyond.size:
            x[beyond] = self._round_trips(x[beyond])
            beyond = beyond[x[beyond] >= np.uint64(self.n)]
        return x.astype(np.int64).reshape(shape)

    def _round_trip(self, x: int) -> int:
        """One pass over the grid of one cell, in Python's integers: the reference of `_round_trips`."""
        high, low = self._grid
        left, right = divmod(x, low)
        for r, key in enumerate(self._keys):
            if r % 2 == 0:
                left = (left + rng.mix(right ^ key) % high) % high
            else:
                right = (right + rng.mix(left ^ key) % low) % low
        return int(left * low + right)

    def _round_trips(self, x: Words) -> Words:
        """The same for many cells: [k] -> [k]."""
        high, low = (np.uint64(side) for side in self._grid)
        left, right = np.divmod(x, low)
        for r, key in enumerate(self._keys):
            if r % 2 == 0:
                left = (left + _mix(right ^ np.uint64(key)) % high) % high
            else:
                right = (right + _mix(left ^ np.uint64(key)) % low) % low
        out: Words = left * low + right
        return out


def _mix(x: Words) -> Words:
    """`rng.mix` for an array; unsigned arithmetic wraps, as it must."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
