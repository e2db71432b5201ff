"""Minus one, zero or one times each block's largest magnitude: TernGrad (Wen et al., arXiv:1705.07878, eq. 1-3).

    x̂ = s · sign(x) · b,   P(b = 1) = |x| / s,   s = max |x| of the block: unbiased

The paper has one s a layer and clips gradients at 2.5 standard deviations because of it; a block's own largest magnitude needs no
clipping. Five values share a byte in base 3, so a block of 256 takes 1.66 bits a value (log₂ 3 = 1.585 is the least).
Rounding, the treatment of NaN and the error bounds are derived in ``quantize.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manyhands.core.checked import checked
from manyhands.exchange import quantize
from manyhands.exchange.codec import gathered, rounds
from manyhands.exchange.quantize import Grid, Rounding

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GRID = Grid(top=2, per=5)


@dataclass(frozen=True, kw_only=True)
@checked
class Ternary:
    """A fifth of a byte a value and two a block; unbiased, error below the block's largest magnitude (half, by nearest).

    Args:
        block: values that share a scale; 0: the whole tensor.
        rounding: ``stochastic`` (TernGrad, no bias) or ``nearest`` (the largest half become ±s).
    """

    init = rounds
    talk = gathered

    block: int = 256
    rounding: Rounding = "stochastic"

    def __post_init__(self) -> None:
        quantize.validate(self.block)

    @property
    def contracts(self) -> bool:
        """Drawn, a value's error has the variance |x| (s − |x|): for a block of normal values 1.6 times their own."""
        return self.rounding != "stochastic"

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
