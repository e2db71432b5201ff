"""Chain: two codecs, the second sends what the first left (successive refinement, Equitz and Cover 1991).

    q¹ = decode¹(encode¹(g))        q² = decode²(encode²(g − q¹))        sent = q¹ + q²

``Chain(TopK(density=0.001), Sign())`` sends the few large entries exactly and one bit for each of the rest, whose scale the
large ones no longer spoil; ``Chain(Int4(), Int4())`` is an 8-bit code in two layers. Both codes travel in one message,
``size_bytes`` is the sum of both, and the result is a codec again: it works alone, under ``TwoPhase``, in a longer chain.

It is not "encode the bytes again": a sparsifier's values are quantized by its own option (``topk(values=int4)``).
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from manyhands.core import rng
from manyhands.core.checked import checked
from manyhands.core.config import choice
from manyhands.core.errors import UsageError
from manyhands.core.types import Exchange
from manyhands.exchange.codec import Codec, gathered, rounds, wide
from manyhands.exchange.combine import passed, refuse, trait

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
@checked
class Chain:
    """`first`, then `then` for what `first` left.

    Args:
        first, then: codecs.
    """

    init = rounds
    talk = gathered
    contracts = passed("contracts", "first", "then")
    fills = passed("fills", "first", "then")

    first: Exchange = choice("exchanges", "topk", help="sends what it can")
    _: KW_ONLY
    then: Exchange = choice("exchanges", "int4", help="sends what is left")

    @property
    def selects(self) -> bool:
        """Whether entries are left out by both."""
        return bool(trait(self.first, "selects") and trait(self.then, "selects"))

    def __post_init__(self) -> None:
        for field in ("first", "then"):
            inner = getattr(self, field)
            refuse("chain", field, inner, holds=False, tensors=False, exact=True)
            if not isinstance(inner, Codec):
                raise UsageError(
                    f"chain({field}={inner!r})",
                    "codes of both parts travel in one message, so both are codecs: encode, decode and size_bytes",
                    "use by-tensor to choose between exchanges, or codecs such as topk and bf16",
                )

    def encode(self, tensor: Tensor, key: int) -> Tensor:
        """Bytes (uint8 [size_bytes(n)]) of a flat tensor [n]: both codes, one after the other."""
        import torch

        first, then = self._codecs()
        payload = first.encode(tensor, key)
        exact = wide(tensor.dtype)
        left = tensor.to(exact) - first.decode(payload, tensor.numel(), exact)
        return torch.cat([payload, then.encode(left, rng.key(key, 1))])

    def decode(self, payload: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """The flat tensor [numel] that both codes stand for together."""
        first, then = self._codecs()
        cut, exact = first.size_bytes(numel), wide(dtype)
        # a copy: a code's first byte need not be where a float may be
        second = then.decode(payload[cut:].clone(), numel, exact)
        result: Tensor = first.decode(payload[:cut], numel, exact) + second
        return result.to(dtype)

    def size_bytes(self, numel: int) -> int:
        first, then = self._codecs()
        return int(first.size_bytes(numel) + then.size_bytes(numel))

    def _codecs(self) -> tuple[Any, Any]:
        return self.first, self.then
