"""Eight bits a value: 255 evenly spaced levels in each block, after QSGD (Alistarh et al., arXiv:1610.02132, §3.1).

With the largest magnitude of a block of 256 as the scale (a bf16 number): 8.06 bits a value. Levels, rounding, the treatment
of NaN and the error bounds are derived in ``quantize.py``.
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

GRID = Grid(top=254, per=1)


@dataclass(frozen=True, kw_only=True)
@checked
class Int8:
    """One byte a value and two a block; error at most 0.4% of the block's largest magnitude (0.8% when stochastic).

    Args:
        block: values that share a scale; 0: the whole tensor.
        rounding: ``nearest`` (half the largest error) or ``stochastic`` (no bias).
    """

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
