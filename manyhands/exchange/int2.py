"""Two bits a value: the levels ±1/3 and ±1 of each block's largest magnitude.

For values none of which is near zero, such as the few that SparseLoCo (arXiv:2508.15706) selects before it quantizes
them to two bits: zero is no level. An exact zero becomes +1/3 of the largest by ``nearest`` and either ±1/3, by
chance, by ``stochastic``; a block of zeros stays zero. Dense tensors want error feedback, or `Ternary`. With a block of 256: 2.06
bits a value. Levels, rounding, the treatment of NaN and the error bounds are derived in ``quantize.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from manyhands.core.checked import checked
from manyhands.exchange import quantize
from manyhands.exchange.codec import gathered, rounds
from manyhands.exchange.quantize import Grid, Rounding

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GRID = Grid(top=3, per=4)


@dataclass(frozen=True, kw_only=True)
@checked
class Int2:
    """A quarter of a byte a value and two a block; error at most 33.6% of the block's largest (67.2% when stochastic).

    Args:
        block: values that share a scale; 0: the whole tensor.
        rounding: ``nearest`` (half the largest error) or ``stochastic`` (no bias).
    """

    fills: ClassVar[bool] = True
    init = rounds
    talk = gathered

    block: int = 256
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        quantize.validate(self.block)

    def encode(self, tensor: Tensor, key: int) -> Tensor:
        return quantize.encode(tensor, key, grid=GRID, block=self.block, rounding=self.rounding)

    def decode(self, payload: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        return quantize.decode(payload, numel, dtype, grid=GRID, block=self.block)

    def size_bytes(self, numel: int) -> int:
        return quantize.size_bytes(numel, GRID.per, self.block)

    def reference_encode(self, tensor: Tensor, key: int) -> Tensor:
        """`encode` in plain PyTorch."""
        return quantize.reference_encode(tensor, key, grid=GRID, block=self.block, rounding=self.rounding)

    def reference_decode(self, payload: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """`decode` in plain PyTorch."""
        return quantize.reference_decode(payload, numel, dtype, grid=GRID, block=self.block)
