"""Count sketch: the heavy hitters of the *sum*, found without sending any vector.

Two rounds. The sum of everybody's sketches is the sketch of the sum (`sketch`), from which all replicas read the same k
positions of largest estimate; then the exact values at these positions are summed. So the bytes do not grow with the number
of workers, positions never travel, what is applied is exactly what was sent, and an entry that is large only in the sum
is found, which top-k of each worker's own misses (SketchML: Jiang et al. 2018; sketched SGD: Ivkin et al. 2019,
arXiv:1903.04488, algorithm 1, whose second round this is).

Biased: use it under `ErrorFeedback`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from manyhands.core import rng
from manyhands.core.checked import checked
from manyhands.core.errors import UsageError
from manyhands.core.request import Sum
from manyhands.core.types import Agreed
from manyhands.exchange import sparse
from manyhands.exchange.codec import rounds, wide
from manyhands.exchange.largest import largest
from manyhands.exchange.sketch import Sketch, shape

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Talk, Tensors


def check(*, rows: int, compression: float, density: float) -> None:
    """Raises `UsageError` for a sketch that cannot be."""
    if rows < 1 or rows % 2 == 0:
        raise UsageError(
            f"rows = {rows}", "the median of an odd number of estimates is one of them", "try 3 or 5"
        )
    if not (compression > 1 and math.isfinite(compression)):
        raise UsageError(
            f"compression = {compression}",
            "a sketch is smaller than its vector",
            "give a ratio above 1, for example 20",
        )
    if not 0 < density <= 1:
        raise UsageError(
            f"density = {density}", "a share of the entries is above 0 and at most 1", "0.01 recovers 1%"
        )


@dataclass(frozen=True, kw_only=True)
@checked
class CountSketch:
    """Sum sketches, then the exact values of the entries that they point to.

    Args:
        rows: independent estimates of each entry, an odd number.
        compression: how many times smaller than the vector a sketch is.
        density: the share of the entries that is recovered, at least one.
        seed: of the hash functions, which change every round.
    """

    selects: ClassVar[bool] = True
    rows: int = 3
    compression: float = 20.0
    density: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        check(rows=self.rows, compression=self.compression, density=self.density)

    init = rounds

    def talk(self, delta: Tensors, state: Any) -> Talk:
        turn = int(state["round"])
        mean, sent = [], []
        for i, tensor in enumerate(delta):
            flat = tensor.detach().reshape(-1)
            if self._plain(flat.numel()):
                total = yield Sum(flat.to(wide(flat.dtype), copy=True))
                mean.append(total.to(tensor.dtype).view(tensor.shape))
                sent.append(tensor)
                continue
            rows, columns = shape(flat.numel(), self.rows, self.compression)
            sketch = Sketch(flat.numel(), rows, columns, rng.key(self.seed, turn, i))
            own = sketch.of(flat)
            whole = yield Sum(own.clone())
            if not bool(whole.isfinite().all()):  # nobody can say where: no value is to be trusted
                poison = math.nan
                mean.append(tensor.new_full(tensor.shape, poison))
                sent.append(tensor.new_full(tensor.shape, 0.0 if bool(own.isfinite().all()) else poison))
                continue
            where = largest(sketch.estimate(whole), self._count(flat.numel()))
            values = flat[where]
            agreed = yield Sum(values.to(whole.dtype, copy=True))
            mean.append(_spread(where, agreed.to(tensor.dtype), tensor))
            sent.append(_spread(where, values, tensor))
        return Agreed(mean, sent, {"round": state["round"] + 1})

    def size_bytes(self, numel: int) -> int:
        """Bytes of one worker's contribution to both sums, of float32 values (float64: twice as many)."""
        if self._plain(numel):
            return 4 * numel
        rows, columns = shape(numel, self.rows, self.compression)
        return 4 * (rows * columns + self._count(numel))

    def _count(self, numel: int) -> int:
        return min(numel, max(1, round(self.density * numel)))

    def _plain(self, numel: int) -> bool:
        """Whether a sketch and the values would be as large as the vector."""
        rows, columns = shape(numel, self.rows, self.compression)
        return rows * columns + self._count(numel) >= numel


def _spread(where: Tensor, values: Tensor, like: Tensor) -> Tensor:
    return sparse.dense(sparse.Entries(where, values), like.numel()).view(like.shape)
