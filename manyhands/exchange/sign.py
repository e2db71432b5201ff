"""One bit a value: the sign, times the mean magnitude of the block.

1-bit SGD (Seide et al. 2014, §3) and signSGD with error feedback (Karimireddy et al., arXiv:1901.09847, alg. 1)::

    x̂ = mean|x| · sign(x)                                   the scale that makes ‖x − x̂‖ least
    ‖x − x̂‖² = ‖x‖² − ‖x‖₁²/n + n(s − mean|x|)²             of a block of n, s being the scale as sent

so the error of a block is below its norm. Biased: wrap it in `ErrorFeedback`, without which signSGD need not converge. The
scale is bf16, to nearest: |s − mean|x|| ≤ 2⁻⁸ mean|x|. The sign of zero is its sign bit. A block with NaN or infinity, or a
value beyond float32, is NaN as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from manyhands.core.checked import checked
from manyhands.exchange import pack, quantize, quantize_gpu
from manyhands.exchange.codec import gathered, rounds

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PER = 8  # signs in a byte


@dataclass(frozen=True, kw_only=True)
@checked
class Sign:
    """One bit a value and two bytes a block; biased, so use it under error feedback.

    Args:
        block: values that share a scale; 0: the whole tensor (the papers' choice, 6% fewer bytes).
    """

    fills: ClassVar[bool] = True
    init = rounds
    talk = gathered

    block: int = 256

    def __post_init__(self) -> None:
        quantize.validate(self.block)

    def encode(self, tensor: Tensor, key: int) -> Tensor:
        made = quantize_gpu.sign_encode(tensor, block=self.block)
        if made is not None:
            return made
        flat = quantize.flatten(tensor)
        loops = quantize.kernels_for(flat)
        if loops is None:
            return quantize.fused(expression_of_encode, flat)(flat, self.block)
        payload = quantize.empty_payload(flat, PER, self.block)
        loops.manyhands_sign_encode(*quantize.place(flat, self.block), payload.data_ptr())
        return payload

    def decode(self, payload: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        import torch

        payload = quantize.checked(payload, self.size_bytes(numel))
        made = quantize_gpu.sign_decode(payload, numel, dtype, block=self.block)
        if made is not None:
            return made
        loops = quantize.kernels_for(payload)
        if loops is None:
            expression = quantize.fused(expression_of_decode, payload)
            return quantize.as_type(expression(payload, numel, self.block), dtype)
        values = torch.empty(numel, dtype=torch.float32)
        width = quantize.width(numel, self.block)
        loops.manyhands_sign_decode(payload.data_ptr(), numel, width, values.data_ptr())
        return quantize.as_type(values, dtype)

    def size_bytes(self, numel: int) -> int:
        return quantize.size_bytes(numel, PER, self.block)

    def reference_encode(self, tensor: Tensor, key: int) -> Tensor:
        """`encode` in plain PyTorch."""
        return expression_of_encode(quantize.flatten(tensor), self.block)

    def reference_decode(self, payload: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """`decode` in plain PyTorch."""
        payload = quantize.checked(payload, self.size_bytes(numel))
        return quantize.as_type(expression_of_decode(payload, numel, self.block), dtype)


def expression_of_encode(flat: Tensor, block: int) -> Tensor:
    """The payload of a float32 [n]."""
    import torch

    rows = quantize.in_blocks(flat, block)  # [blocks, block]
    each = quantize.width(flat.numel(), block)
    begins = each * torch.arange(rows.shape[0], device=flat.device)
    counts = (flat.numel() - begins).clamp(max=each)  # the last block may be shorter
    means = (rows.abs().double().sum(1) / counts).float()
    means = means.clamp(max=quantize.LARGEST_SCALE).bfloat16().float()
    scales = torch.where(rows.isfinite().all(1), means, torch.nan)
    return torch.cat([quantize.to_bytes(scales), pack.pack(flat.signbit(), PER)])


def expression_of_decode(payload: Tensor, numel: int, block: int) -> Tensor:
    """The float32 [numel] of a payload."""
    import torch

    scales, bits = quantize.halves(payload, numel, block)
    values = quantize.spread(scales, numel, block)
    return torch.where(pack.unpack(bits, numel, PER).bool(), -values, values)
