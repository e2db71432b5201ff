"""Two-phase all-reduce of encoded chunks: bytes that do not grow with the number of workers.

As in 1-bit Adam (arXiv:2102.02888, section 4.3) and ZeRO++ (arXiv:2306.10209): the tensor is cut into one chunk per
worker. Each worker scatters its encoded chunks to their owners; an owner decodes them, adds its own (which never
travels and is not rounded), encodes the sum and all gather the sums. Each worker sends and receives 2 (N−1)/N times
``size_bytes(n)``, like a ring, while gathering everything (`manyhands.exchange.codec.gathered`) takes N−1 times.

*Who owes the second rounding.* Of chunk j, owned by worker j, worker i ≠ j sent qᵢ = decode(encode(gᵢ)). The owner has
s = gⱼ + Σ_{i≠j} qᵢ and all get r = decode(encode(s)). With

    sentᵢ = qᵢ for i ≠ j        sentⱼ = gⱼ + (r − s)

Σᵢ sentᵢ = s + (r − s) = r, which is the mean. So ``ErrorFeedback(TwoPhase(Int8()))`` needs no second residual: the owner's
own, gⱼ − sentⱼ = s − r, is the error of the second phase, and each other's, gᵢ − qᵢ, that of the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manyhands.core import rng
from manyhands.core.checked import checked
from manyhands.core.config import choice
from manyhands.core.errors import UsageError
from manyhands.core.request import Gather, Scatter, Where
from manyhands.core.types import Agreed, Exchange
from manyhands.exchange.codec import Codec, rounds, wide
from manyhands.exchange.combine import passed, refuse

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Talk, Tensors

ALIGN_MOST = 4096  # codecs work in blocks of up to this many values; chunks end where blocks do
UNEVEN_MOST = 32  # ... if a chunk is at least this many times as long


@dataclass(frozen=True)
@checked
class TwoPhase:
    """Scatter encoded chunks, add, gather the encoded sums.

    Args:
        inner: a codec (int8, topk, sign, ...): it turns any flat tensor into bytes and back.
    """

    init = rounds
    contracts = passed("contracts")
    fills = passed("fills")
    selects = passed("selects")

    inner: Exchange = choice("exchanges", "int8", help="how chunks are encoded")

    def __post_init__(self) -> None:
        refuse("two-phase", "inner", self.inner, holds=False, tensors=False, exact=True)
        if not isinstance(self.inner, Codec):
            raise UsageError(
                f"two-phase(inner={self.inner!r})",
                "it re-encodes sums of chunks, so it needs a codec: encode, decode and size_bytes",
                "use two-phase(int8), or this exchange alone",
            )

    def talk(self, delta: Tensors, state: Any) -> Talk:
        rank, size = yield Where()
        turn = int(state["round"])
        mean, sent = [], []
        for i, tensor in enumerate(delta):
            whole, own = yield from self._chunks(tensor.detach().reshape(-1), (turn, i), rank, size)
            mean.append(whole.reshape(tensor.shape))
            sent.append(own.reshape(tensor.shape))
        return Agreed(mean, sent, {"round": state["round"] + 1})

    def _chunks(self, flat: Tensor, turn: tuple[int, int], rank: int, size: int) -> Any:
        """The two phases for one flat tensor [n]; returns (mean [n], sent [n])."""
        import torch

        codec: Any = self.inner
        n, dtype = flat.numel(), flat.dtype
        pieces = list(torch.split(flat, lengths(n, size)))  # one per owner, empty ones at the end
        mine = pieces[rank]
        payloads = [codec.encode(p, rng.key(*turn, rank, j)) for j, p in enumerate(pieces) if j != rank]
        # my own stays here; a placeholder of the same size takes its place among the parts
        payloads.insert(rank, torch.empty(codec.size_bytes(len(mine)), dtype=torch.uint8, device=flat.device))
        sent = [
            mine if j == rank else codec.decode(b, len(p), dtype)
            for j, (b, p) in enumerate(zip(payloads, pieces, strict=True))
        ]
        received = payloads if size == 1 else (yield Scatter([b.contiguous() for b in payloads]))

        total = torch.zeros(len(mine), dtype=wide(dtype), device=flat.device)
        for j, payload in enumerate(received):
            total += mine if j == rank else codec.decode(payload, len(mine), dtype)
        payload = codec.encode(total, rng.key(*turn, rank, size))

        # gathered at one size, the longest chunk's: the bytes travel at once
        sizes = [codec.size_bytes(len(p)) for p in pieces]
        padded = payload if len(payload) == max(sizes) else payload.new_zeros(max(sizes))
        padded[: len(payload)] = payload
        everyones = [padded] if size == 1 else (yield Gather(padded, even=True))
        sums = [
            codec.decode(b[:s], len(p), total.dtype) for b, s, p in zip(everyones, sizes, pieces, strict=True)
        ]
        sent[rank] = (mine + (sums[rank] - total)).to(dtype)
        return torch.cat(sums).to(dtype), torch.cat(sent)


def lengths(numel: int, size: int) -> list[int]:
    """How `numel` values are cut for `size` owners: equal chunks, the last ones shorter or empty.

    >>> lengths(7, 5)
    [2, 2, 2, 1, 0]
    >>> lengths(1_000_000, 3)
    [335872, 335872, 328256]
    """
    chunk = -(-numel // size)
    align = ALIGN_MOST
    while align > 1 and align * UNEVEN_MOST > chunk:
        align //= 2
    chunk = -(-chunk // align) * align
    return [max(0, min(chunk, numel - i * chunk)) for i in range(size)]
