"""What a push to a parameter server says: the gradients as they are, or a codec's bytes, what these leave out kept here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from manyhands.core import rng
from manyhands.exchange.allreduce import AllReduce
from manyhands.exchange.codec import wide
from manyhands.exchange.combine import trait
from manyhands.exchange.feedback import ErrorFeedback
from manyhands.train.header import Unsound
from manyhands.train.norm import norm_of

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.serve.layout import Layout


class PushCodec:
    """How a strategy's exchange encodes pushes.

    Attributes:
        codec: None where pushes are raw numbers.
        square: |g|² of what the servers will decode, summed over what was encoded since it was set to 0. Where pushes
            are applied one by one this is what is clipped: with what was held back it may be far longer than the gradient.
    """

    def __init__(self, exchange: Any) -> None:
        self.codec, self._decay = codec_of(exchange)
        self.square = 0.0
        self._left: dict[tuple[int, int], Tensor] = {}  # by server and tensor: of the push on its way

    def fresh(self, flats: Sequence[Tensor]) -> dict[str, Any]:
        """The state for a server before the first push: only error feedback has any."""
        if self.codec is None or self._decay is None:
            return {}
        return {"residual": [torch.zeros(f.numel(), dtype=wide(f.dtype)) for f in flats]}

    def encode(
        self, server: int, flats: Sequence[Tensor], state: dict[str, Any], *, step: int, rank: int
    ) -> Tensor:
        """A server's payload, with what earlier pushes left out; not for raw numbers."""
        parts, residuals = [], state.get("residual", ())
        for i, flat in enumerate(flats):
            value = flat
            if self._decay is not None:
                value = flat.to(wide(flat.dtype)).add(residuals[i], alpha=self._decay)
            # without the step's number a random rounding would repeat itself
            payload = self.codec.encode(value, rng.key(step, server * 1000 + i, rank))
            parts.append(payload)
            decoded = self.codec.decode(payload, flat.numel(), flat.dtype)
            self.square += norm_of([decoded]) ** 2
            if self._decay is not None:
                self._left[server, i] = value - decoded.to(value.dtype)
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def owed(self, layout: Layout, state: Mapping[str, Any]) -> list[str]:
        """Parameters of which earlier pushes have left something out: it travels though no pass used them."""
        found: list[str] = []
        residuals = () if trait(self.codec, "fills") else state.get("residual", ())
        for (_, begin, end), left in zip(layout.groups, residuals, strict=False):
            for entry, at in zip(layout.entries, layout.offsets, strict=True):
                first = (at - begin) // entry.width
                if begin <= at < end and bool(left[first : first + entry.numel].any()):
                    found.append(entry.name)
        return found

    def keep(self, states: Sequence[dict[str, Any]], applied: Sequence[bool]) -> None:
        """What a push left out is held back from now on, where a server has used the push.

        One that was dropped (late, too stale, another worker's not finite) leaves what was held back as it was.
        """
        for (server, i), left in self._left.items():
            if applied[server] and bool(torch.isfinite(left).all()):
                states[server]["residual"][i].copy_(left)
        self._left.clear()


def codec_of(exchange: Any) -> tuple[Any, float | None]:
    """(codec, decay of error feedback) of an exchange that `Served.check` allows; (None, None) for raw numbers."""
    if isinstance(exchange, AllReduce):
        return None, None
    if isinstance(exchange, ErrorFeedback):
        return exchange.inner, exchange.decay
    return exchange, None


def member_of(rank: int) -> str:
    """What a server calls a worker."""
    return f"worker-{rank}"


def whose(answer: Mapping[str, Any]) -> Unsound:
    """Of pushes that make one update together: whose were not finite, by a server's answer."""
    losses, gradients = (answer.get(kind, ()) for kind in ("unsound_losses", "unsound_gradients"))
    return Unsound(tuple(map(_rank, losses)), tuple(map(_rank, gradients)))


def left_out(answer: Mapping[str, Any], size: int) -> list[int]:
    """Of pushes that are applied one by one: how many of each rank's were not finite since the job last began."""
    counts = {_rank(member): int(n) for member, n in answer.get("unsound", {}).items()}
    return [counts.get(rank, 0) for rank in range(size)]


def _rank(member: str) -> int:
    return int(member.rpartition("-")[2])
