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
from typing import TYPE_CHECKING

from manyhands.exchange import pack, quantize
from manyhands.exchange.codec import gathered, rounds

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PER = 8  # signs in a byte


@dataclass(frozen=True, kw_only=True)
class Sign:
    """One bit a value and two bytes a block; biased, so use it under error feedback.

    Args:
        block: values that share a scale; 0: the whole tensor (the papers' choice, 6% fewer bytes).
    """

    init = rounds
    talk = gathered

    block: int = 256

    def __post_init__(self) -> None:
        quantize.validate(self.block)

    def encode(self, tensor: Tensor, key: int) -> Tensor:
        flat = quantize.flatten(tensor)
        loops = quantize.kernels_for(flat)
        if loops is None:
            return self.reference_encode(flat, key)
        payload = quantize.empty_payload(flat, PER, self.block)
        loops.manyhands_sign_encode(*quantize.place(flat, self.block), payload.data_ptr())
        return payload

    def decode(self, payload: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        import torch

        payload = quantize.checked(payload, self.size_bytes(numel))
        loops = quantize.kernels_for(payload)
        if loops is None:
            return self.reference_decode(payload, numel, dtype)
        values = torch.empty(numel, dtype=torch.float32)
        width = quantize.width(numel, self.block)
        loops.manyhands_sign_decode(payload.data_ptr(), numel, width, values.data_ptr())
        return quantize.as_type(values, dtype)

    def size_bytes(self, numel: int) -> int:
        return quantize.size_bytes(numel, PER, self.block)

    def reference_encode(self, tensor: Tensor, key: int) -> Tensor:
        """`encode` in plain PyTorch."""
        import torch

        flat = quantize.flatten(tensor)
        sums = quantize.in_blocks(flat, self.block).abs().double().sum(1)  # [blocks]
        ends = quantize.width(flat.numel(), self.block) * torch.arange(1, len(sums) + 1, device=flat.device)
        counts = quantize.width(flat.numel(), self.block) - (ends - flat.numel()).clamp(min=0)
        finite = quantize.in_blocks(flat, self.block).isfinite().all(1)
        means = (sums / counts).float().clamp(max=quantize.LARGEST_SCALE).bfloat16().float()
        scales = torch.where(finite, means, torch.nan)
        return torch.cat([quantize.to_bytes(scales), pack.pack(flat.signbit(), PER)])

    def reference_decode(self, payload: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """`decode` in plain PyTorch."""
        import torch

        payload = quantize.checked(payload, self.size_bytes(numel))
        scales, bits = quantize.halves(payload, numel, self.block)
        values = quantize.spread(scales, numel, self.block)
        return quantize.as_type(torch.where(pack.unpack(bits, numel, PER).bool(), -values, values), dtype)
