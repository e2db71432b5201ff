"""Natural compression: each value to a power of two (Horváth et al., arXiv:1905.10988, def. 1).

    2ᵉ ≤ |x| < 2ᵉ⁺¹:   |x̂| = 2ᵉ⁺¹ with probability |x|/2ᵉ − 1, else 2ᵉ

which is adding 23 random bits to float32's significand and dropping it: E[x̂] = x exactly, E(x̂ − x)² ≤ x²/8 (theorem 1),
|x̂ − x| < |x|. By nearest (up from 1.5 · 2ᵉ): |x̂ − x| ≤ |x|/3.

The paper sends sign and exponent in 9 bits. Here the exponent counts within a window of 127 below the block's largest, so a
value takes 8 bits and a block one byte for the window's place: 8.03 bits. What rounds to less than 2⁻¹²⁶ of the block's
largest becomes zero, as does what rounds to less than 2⁻¹²⁶; from 2¹²⁷ on nothing is rounded up. A block with NaN or
infinity, or a value beyond float32, is NaN as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manyhands.core import rng
from manyhands.core.checked import checked
from manyhands.exchange import quantize, quantize_gpu
from manyhands.exchange.codec import gathered, rounds
from manyhands.exchange.quantize import Rounding

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NOT_FINITE = 255  # in place of a window's


@dataclass(frozen=True, kw_only=True)
@checked
class Natural:
    """One byte a value, of any magnitude: unbiased rounding to powers of two, variance at most an eighth of the square.

    Args:
        block: values that share a window of exponents; 0: the whole tensor.
        rounding: ``stochastic`` (no bias) or ``nearest`` (relative error at most 1/3).
    """

    init = rounds
    talk = gathered

    block: int = 256
    rounding: Rounding = "stochastic"

    def __post_init__(self) -> None:
        quantize.validate(self.block)

    def encode(self, tensor: Tensor, key: int) -> Tensor:
        random = self.rounding == "stochastic"
        made = quantize_gpu.natural_encode(tensor, key, block=self.block, stochastic=random)
        if made is not None:
            return made
        flat = quantize.flatten(tensor)
        loops = quantize.kernels_for(flat)
        if loops is None:
            expression = quantize.fused(expression_of_encode, flat)
            return expression(flat, quantize.seed(key, flat.device), self.block, random)
        payload = quantize.empty_payload(flat, 1, self.block, scale_bytes=1)
        place = quantize.place(flat, self.block)
        loops.manyhands_natural_encode(*place, payload.data_ptr(), random, rng.mix(key))
        return payload

    def decode(self, payload: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        import torch

        payload = quantize.checked(payload, self.size_bytes(numel))
        made = quantize_gpu.natural_decode(payload, numel, dtype, block=self.block)
        if made is not None:
            return made
        loops = quantize.kernels_for(payload)
        if loops is None:
            expression = quantize.fused(expression_of_decode, payload)
            return quantize.as_type(expression(payload, numel, self.block), dtype)
        values = torch.empty(numel, dtype=torch.float32)
        width = quantize.width(numel, self.block)
        loops.manyhands_natural_decode(payload.data_ptr(), numel, width, values.data_ptr())
        return quantize.as_type(values, dtype)

    def size_bytes(self, numel: int) -> int:
        return quantize.size_bytes(numel, 1, self.block, scale_bytes=1)

    def reference_encode(self, tensor: Tensor, key: int) -> Tensor:
        """`encode` in plain PyTorch."""
        flat = quantize.flatten(tensor)
        seed = quantize.seed(key, flat.device)
        return expression_of_encode(flat, seed, self.block, self.rounding == "stochastic")

    def reference_decode(self, payload: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """`decode` in plain PyTorch."""
        payload = quantize.checked(payload, self.size_bytes(numel))
        return quantize.as_type(expression_of_decode(payload, numel, self.block), dtype)


def expression_of_encode(flat: Tensor, seed: Tensor, block: int, stochastic: bool) -> Tensor:
    """The payload of a float32 [n]."""
    import torch

    rows = quantize.in_blocks(flat, block)  # [blocks, block]
    largest = rows.abs().amax(1, keepdim=True)  # [blocks, 1]; NaN wins
    highest = ((largest.view(torch.int32) >> 23) + 1).clamp(max=254)  # a value may be rounded up to it
    lower = (highest - 127).clamp(min=0)
    add = quantize.random_bits(rows, seed) >> 9 if stochastic else 0x400000
    magnitude = rows.view(torch.int32).to(torch.int64) & 0x7FFFFFFF
    exponents = ((magnitude + add) >> 23).clamp(max=254)
    codes = (exponents - lower).clamp(min=0) | rows.signbit().to(torch.int64) << 7
    codes = torch.where(largest.isfinite(), codes, 0).view(-1)[: flat.numel()]
    windows = torch.where(largest.isfinite(), lower, NOT_FINITE).view(-1)
    return torch.cat([windows, codes]).to(torch.uint8)


def expression_of_decode(payload: Tensor, numel: int, block: int) -> Tensor:
    """The float32 [numel] of a payload."""
    import torch

    blocks = quantize.blocks_of(numel, block)
    windows, codes = payload[:blocks].to(torch.int32), payload[blocks:].to(torch.int32)
    window, level = quantize.spread(windows, numel, block), codes & 127
    magnitude = torch.where(level == 0, 0, (level + window) << 23).view(torch.float32)
    values = torch.where(codes > 127, -magnitude, magnitude)
    return torch.where(window == NOT_FINITE, torch.nan, values)
