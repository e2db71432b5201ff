"""Error feedback: what a lossy exchange did not send is added to the next contribution.

Seide et al. 2014; Karimireddy et al. 2019 (arXiv:1901.09847, algorithm 2), for contributions gᵢ that arrive weighted:

    pᵢ = gᵢ + β Eᵢ        qᵢ = what the inner exchange sent of pᵢ        Eᵢ = pᵢ − qᵢ        all get Σ qᵢ

With β = 1 nothing is ever lost: Σₜ Σᵢ qᵢ + Σᵢ Eᵢ = Σₜ Σᵢ gᵢ, through changes of weights and of the number of workers,
since only Σᵢ Eᵢ matters. With β < 1 what is held back fades:

* DeMo (arXiv:2411.19870, algorithm 1): m ← βm + g; q = the largest components of m; m ← m − q. That is
  ``ErrorFeedback(DctTopK(...), decay=0.999)``: the residual *is* the momentum.
* SparseLoCo (arXiv:2508.15706): e ← βe + Δ; q = 2-bit(top-k(e)); e ← e − q, with β = 0.95.

The conserved quantity is then discounted: after T rounds Eᵢ = Σₜ β^(T−t) (gᵢₜ − qᵢₜ).

A contribution that is not finite makes the mean not finite, on all workers; the step is left out and the state of
before is kept. Nothing is hidden here: NaN goes into the inner talk as it is.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from manyhands.core.checked import checked
from manyhands.core.config import choice, option
from manyhands.core.errors import UsageError
from manyhands.core.types import Agreed, Exchange
from manyhands.exchange.codec import wide
from manyhands.exchange.combine import leaves, minus, passed, protected, refuse, storage, trait

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Talk, Tensors


@dataclass(frozen=True)
@checked
class ErrorFeedback:
    """Keep what was not sent and add it to the next contribution.

    State: ``residual``, one tensor per contribution, in its type (float32 for half precision).

    Args:
        inner: any exchange that keeps no residual of its own.
        decay: β above, 0 < β ≤ 1.
    """

    holds: ClassVar[bool] = True
    by_tensor = passed("by_tensor")
    bucket_mb = passed("bucket_mb")
    fills = passed("fills")

    inner: Exchange = choice("exchanges", "int8", help="what is sent")
    _: KW_ONLY
    decay: float = option(1.0, help="how much of what was held back is added to the next contribution")

    def __post_init__(self) -> None:
        refuse("error-feedback", "inner", self.inner, holds=False, kept=True)
        if not 0 < self.decay <= 1:
            raise UsageError(
                f"decay = {self.decay}",
                "what is held back is kept (1) or fades (between 0 and 1)",
                "give 1, or use the inner exchange alone for 0",
            )

    @property
    def conserves(self) -> bool:
        """Whether nothing is ever lost."""
        return self.decay == 1.0 and bool(trait(self.inner, "conserves"))

    def init(self, like: Tensors) -> Any:
        return {"residual": zeros(like), "inner": self.inner.init(like)}

    def talk(self, delta: Tensors, state: Any) -> Talk:
        offered = [
            e.mul(self.decay).add_(d) if self.decay != 1 else e + d
            for d, e in zip(delta, state["residual"], strict=True)
        ]
        return (yield from offer(self.inner, offered, delta, state["inner"]))

    def flush(self, state: Any, like: Tensors) -> tuple[list[Tensor | None], Any]:
        """What is owed, to be sent without loss with the next contribution, and the state after that."""
        owed: list[Tensor | None] = [e * self.decay for e in state["residual"]]
        return owed, {**state, "residual": zeros(like)}


def zeros(like: Tensors) -> list[Tensor]:
    """A residual for each of `like`: zero, in its type, float32 for half precision."""
    return [t.new_zeros(t.shape, dtype=wide(t.dtype)) for t in like]


def offer(inner: Exchange, offered: Tensors, delta: Tensors, state: Any) -> Talk:
    """Let `inner` send what it can of `offered` (consumed); the new state holds the rest as ``residual``.

    Args:
        offered: in the residuals' types.
        delta: the contributions, whose types are those on the wire.
        state: of `inner`.
    """
    given = [p.to(d.dtype) for p, d in zip(offered, delta, strict=True)]
    agreed = yield from protected(inner.talk(given, state))
    users = {storage(t) for t in (*agreed.mean, *agreed.sent)} | {storage(t) for _, t in leaves(agreed.state)}
    rest = [minus(p, s.to(p.dtype), users) for p, s in zip(offered, agreed.sent, strict=True)]
    return Agreed(agreed.mean, agreed.sent, {"residual": rest, "inner": agreed.state})
