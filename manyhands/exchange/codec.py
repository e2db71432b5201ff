"""Codecs: a tensor to bytes and back, and the conversation that carries them.

A codec is a frozen dataclass with three pure functions; ``talk = gathered`` and ``init = rounds`` make an exchange of it:

    encode(tensor, key) -> uint8 [size_bytes(n)]    deterministic in (tensor, key); random rounding draws from `key`
    decode(payload, numel, dtype) -> [n]            the same on every worker
    size_bytes(numel) -> int                        what `encode` produces, exactly: the formula of the wire

Everybody gathers everybody's bytes, decodes them in rank order and adds in float32 (float64 stays), so that all
replicas hold the same bits. Bytes received grow with the number of workers; `TwoPhase` keeps them constant. NaN and
infinity must come out of `decode` as non-finite values: they are seen by all, never hidden in a residual.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from manyhands.core import rng
from manyhands.core.request import Gather, Where
from manyhands.core.types import Agreed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from manyhands.core.types import Talk, Tensors


@runtime_checkable
class Codec(Protocol):
    """A tensor to bytes and back."""

    def encode(self, tensor: Tensor, key: int) -> Tensor:
        """Bytes (uint8 [size_bytes(n)]) of a flat floating-point tensor [n]."""
        ...

    def decode(self, payload: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """The flat tensor [numel] of type `dtype` that the bytes stand for, on the payload's device."""
        ...

    def size_bytes(self, numel: int) -> int:
        """Bytes on the wire for `numel` values."""
        ...


def rounds(self: Any, like: Tensors) -> dict[str, Tensor]:
    """`Exchange.init` of a codec: how many rounds have been, the source of its random numbers."""
    import torch

    return {"round": torch.zeros((), dtype=torch.int64)}


def gathered(self: Codec, delta: Tensors, state: Any) -> Talk:
    """`Exchange.talk` of a codec: gather everybody's bytes (of several tensors one message), decode, add in rank order."""
    import torch

    rank, size = yield Where()
    turn = int(state["round"])
    payloads = [self.encode(t.detach().reshape(-1), rng.key(turn, i, rank)) for i, t in enumerate(delta)]
    everyones = [payloads]
    if size > 1 and payloads:
        message = payloads[0] if len(payloads) == 1 else torch.cat(payloads)
        lengths = [p.numel() for p in payloads]
        everyones = [list(torch.split(m, lengths)) for m in (yield Gather(message, even=True))]
    mean, sent = [], []
    for i, (tensor, payload) in enumerate(zip(delta, payloads, strict=True)):
        own = self.decode(payload, tensor.numel(), tensor.dtype)
        whole = total(self, [each[i] for each in everyones], tensor.numel(), tensor.dtype, (rank, own))
        mean.append(whole.reshape(tensor.shape))
        sent.append(own.reshape(tensor.shape))
    return Agreed(mean, sent, {"round": state["round"] + 1})


def total(
    codec: Codec, payloads: Tensors, numel: int, dtype: torch.dtype, known: tuple[int, Tensor] | None = None
) -> Tensor:
    """Σ of what the payloads stand for, added in their order in `wide(dtype)`, then as `dtype`: [numel].

    Args:
        known: (place, tensor): that payload is decoded already.
    """
    result: Tensor | None = None
    for place, payload in enumerate(payloads):
        part = known[1] if known and place == known[0] else codec.decode(payload, numel, dtype)
        result = part.to(wide(dtype), copy=True) if result is None else result.add_(part)
    assert result is not None
    return result.to(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which values of `dtype` are added: float32 for half precision, else itself."""
    import torch

    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
