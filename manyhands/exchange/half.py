"""Half precision on the wire: bf16 (8 bits of exponent, 8 of significand) and fp16 (5 and 11).

Gathered and added in float32, so each contribution is rounded once and the sum never (unlike an all-reduce in half
precision: `AllReduce(precision="bf16")`, which sends fewer bytes from three workers on).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manyhands.core.checked import checked
from manyhands.exchange.codec import gathered, rounds
from manyhands.exchange.quantize import checked as whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
@checked
class BF16:
    """Two bytes a value, relative error at most 2⁻⁸, the range of float32."""

    init = rounds
    talk = gathered

    def encode(self, tensor: Tensor, key: int) -> Tensor:
        return _encode(tensor, "bfloat16")

    def decode(self, payload: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        return _decode(payload, numel, dtype, "bfloat16")

    def size_bytes(self, numel: int) -> int:
        return 2 * numel


@dataclass(frozen=True, kw_only=True)
@checked
class FP16:
    """Two bytes a value, relative error at most 2⁻¹¹ within 6e-5 … 65,504; beyond that infinity, which all see."""

    init = rounds
    talk = gathered

    def encode(self, tensor: Tensor, key: int) -> Tensor:
        return _encode(tensor, "float16")

    def decode(self, payload: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        return _decode(payload, numel, dtype, "float16")

    def size_bytes(self, numel: int) -> int:
        return 2 * numel


def _encode(tensor: Tensor, name: str) -> Tensor:
    import torch

    return tensor.to(getattr(torch, name)).view(torch.uint8)


def _decode(payload: Tensor, numel: int, dtype: torch.dtype, name: str) -> Tensor:
    import torch

    payload = whole(payload, 2 * numel)
    if payload.storage_offset() % 2:  # a part of a longer message need not be where a number may be
        payload = payload.clone()
    half: Tensor = payload.view(getattr(torch, name))
    return half.to(dtype)
