"""Small codes side by side in bytes: 1 of 256 values, 2 of 16, 4 of 4, 5 of 3 (1.6 bits each) or 8 of 2.

The first code has the lowest digit, the last byte is filled up with zeros: ⌈n / per⌉ bytes. These are the readable
expressions for any device; ``quantize.cpp`` does the same within its loops.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BASE = {1: 256, 2: 16, 4: 4, 5: 3, 8: 2}  # codes in a byte: values a code may have


def size_bytes(numel: int, per: int) -> int:
    """Bytes of `numel` codes, `per` in a byte."""
    return -(-numel // per)


def pack(codes: Tensor, per: int) -> Tensor:
    """Bytes (uint8 [⌈n / per⌉]) of codes [n], each an integer below ``BASE[per]``.

    >>> import torch
    >>> pack(torch.tensor([1, 2, 0, 0, 2, 1]), 5).tolist()  # 1 + 2·3 + 2·81, and 1
    [169, 1]
    """
    import torch

    padded = torch.nn.functional.pad(codes, (0, -codes.numel() % per)).view(-1, per)  # [bytes, per]
    return (padded.to(torch.int32) * _weights(per, codes)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, numel: int, per: int) -> Tensor:
    """The codes (uint8 [numel]) that `pack` made these bytes of."""
    import torch

    digits = packed.to(torch.int32).unsqueeze(1) // _weights(per, packed) % BASE[per]  # [bytes, per]
    return digits.to(torch.uint8).view(-1)[:numel]


def _weights(per: int, like: Tensor) -> Tensor:
    import torch

    return torch.tensor([BASE[per] ** k for k in range(per)], dtype=torch.int32, device=like.device)
