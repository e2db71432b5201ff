"""Hierarchical: add within each host, then exchange across hosts, each worker a slice.

Links within a host are fast, between hosts slow. After the sum within a host its L workers all hold it, so each needs to
speak for 1/L of it only: worker l exchanges slice l with the workers of equal local rank on the other hosts, and the
host's workers then gather the slices from each other. Between hosts each worker moves 1/L of the bytes, and a
quantizer works L times as fast (Blink, arXiv:1910.04940; hierarchical all-reduce of arXiv:1807.11205).

*What was sent.* Within the host worker i sent aᵢ and S = Σᵢ aᵢ; across hosts the slice's speaker sent b of its slice of S.
It answers for what was lost of the slice: sentᵢ = aᵢ, but aᵢ + (b − S) on the slice that i speaks for. Over a host that is b
on each slice, over all hosts the mean; and ``ErrorFeedback(Hierarchical(Int8()))`` keeps each error exactly once.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from manyhands.core.checked import checked
from manyhands.core.config import choice
from manyhands.core.errors import UsageError
from manyhands.core.request import ACROSS, NODE, Gather, Where
from manyhands.core.types import Agreed, Exchange
from manyhands.exchange.allreduce import AllReduce
from manyhands.exchange.auto import Auto
from manyhands.exchange.combine import addressed, leaves, passed, protected, refuse, storage, trait

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Talk, Tensors


@dataclass(frozen=True)
@checked
class Hierarchical:
    """`within` each host, then `across` hosts by slices. Every host must have equally many workers.

    Where a change of workers in mid-run leaves hosts unequal, wires answer as if each worker were alone on its host: all
    exchange `across`, the whole instead of a slice. Nothing but counters is kept here, so nothing has to be handed over.

    Feedback goes around it, not inside: ``error-feedback(hierarchical(int8))``. A residual of a slice could not be handed
    over when the number of workers per host changes.

    Args:
        across: any exchange of flat tensors that keeps no tensors between rounds.
        within: likewise; usually all-reduce.
    """

    bucket_mb = passed("bucket_mb", "within", "across")
    conserves = passed("conserves", "within", "across")
    contracts = passed("contracts", "within", "across")
    rounds_sums = passed("rounds_sums", "within", "across")
    fills = passed("fills", "within", "across")
    selects = passed("selects", "within", "across")

    across: Exchange = choice("exchanges", "all-reduce", help="between hosts, each worker a slice")
    _: KW_ONLY
    within: Exchange = choice("exchanges", "all-reduce", help="between the workers of a host")

    def __post_init__(self) -> None:
        for field in ("across", "within"):
            inner = getattr(self, field)
            if isinstance(inner, Hierarchical):
                raise UsageError(
                    f"hierarchical({field}={inner!r})", "there are two levels: hosts and their workers", ""
                )
            if getattr(inner, "holds", False):
                inside = getattr(inner, "inner", None)
                raise UsageError(
                    f"hierarchical({field}={inner!r})",
                    "what a worker holds back of a slice cannot be handed over when the workers per host change",
                    f"put it around: {type(inner).__name__}(Hierarchical({field}={inside!r}))"
                    if inside is not None and not trait(inside, "holds")
                    else f"put feedback around, as in error-feedback(hierarchical({field}=int8))",
                )
            if isinstance(inner, Auto):
                raise UsageError(
                    f"hierarchical({field}={inner!r})",
                    "what it has measured is of a slice that is another in another world",
                    "use a codec without state of that kind, such as int8 or topk",
                )
            refuse("hierarchical", field, inner, holds=False, tensors=False)

    def init(self, like: Tensors) -> Any:
        flat = [t.reshape(-1) for t in like]
        state = {"within": self.within.init(flat), "across": self.across.init(flat)}
        for path, leaf in leaves(state):
            if leaf.numel() > 1:
                raise UsageError(
                    f"hierarchical({path[0]}={getattr(self, path[0])!r})",
                    f"it keeps {'.'.join(path[1:])}, shaped {list(leaf.shape)}, of a slice that is another in another world",
                    "use a codec without state of that kind, such as int8 or topk",
                )
        return state

    def talk(self, delta: Tensors, state: Any) -> Talk:
        rank, size = yield Where(NODE)
        lossless = isinstance(self.across, AllReduce) and isinstance(self.within, AllReduce)
        lossless = lossless and {self.across.precision, self.within.precision} == {"as-is"}  # type: ignore[attr-defined]
        # what I contribute, for `sent`; the sum may be written over `delta`
        kept = list(delta) if lossless else [t.detach().clone() for t in delta]
        inner = yield from addressed(self.within.talk(delta, state["within"]), NODE)
        kept = [k if storage(s) == storage(d) else s for k, s, d in zip(kept, inner.sent, delta, strict=True)]
        sums = [t.reshape(-1) for t in inner.mean]
        spans = [span(t.numel(), rank, size) for t in sums]
        slices = [t[own] for t, own in zip(sums, spans, strict=True)]
        talk = self.across.talk(slices, state["across"])
        outer = yield from addressed(talk if lossless else protected(talk), ACROSS)
        mean, sent = [], []
        for i, tensor in enumerate(delta):
            whole = outer.mean[i]
            if size > 1:
                whole = yield from _gathered(whole, sums[i].numel(), size)
            mean.append(whole.reshape(tensor.shape))
            sent.append(kept[i] if lossless else _corrected(kept[i], spans[i], outer.sent[i], slices[i]))
        return Agreed(mean, sent, {"within": inner.state, "across": outer.state})


def span(numel: int, rank: int, size: int) -> slice:
    """The slice that worker `rank` of a host's `size` speaks for: equal ones, the last shorter or empty.

    >>> [span(7, r, 3) for r in range(3)]
    [slice(0, 3, None), slice(3, 6, None), slice(6, 7, None)]
    """
    step = -(-numel // size)
    return slice(min(numel, rank * step), min(numel, (rank + 1) * step))


def _gathered(piece: Tensor, numel: int, size: int) -> Any:
    """The slices of a host's workers as one flat tensor [numel]."""
    import torch

    step = -(-numel // size)
    if piece.numel() < step:  # gathered at one size: the bytes travel at once
        piece = torch.cat([piece, piece.new_zeros(step - piece.numel())])
    return torch.cat((yield Gather(piece.contiguous(), NODE, even=True)))[:numel]


def _corrected(kept: Tensor, own: slice, sent: Tensor, offered: Tensor) -> Tensor:
    """My contribution, less what was lost of the slice that I speak for."""
    import torch

    corrected = kept.clone(memory_format=torch.contiguous_format)  # else its flat form would be a copy
    corrected.view(-1)[own] += sent - offered
    return corrected
