"""EF21: compress the *change* of the contribution (arXiv:2106.05203, algorithm 2).

    cᵢ = C(gᵢ − hᵢ)        hᵢ ← hᵢ + cᵢ        H ← H + Σ cᵢ        all get H

Everybody keeps H = Σ hᵢ, an estimate of Σ gᵢ that becomes exact as the gradients settle; no bound on their difference
between workers is needed, unlike for plain error feedback. Contributions come weighted, so hᵢ follows wᵢ gᵢ.

What was "sent" this round is the whole new hᵢ: then Σ sent = Σ hᵢ = H = mean. The sum over rounds of what was agreed is
*not* the sum of what came in (``conserves`` is False); what holds instead is Σᵢ hᵢ = H after every round, through save,
load and resize, since only the sum of the hᵢ matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from manyhands.core.checked import checked
from manyhands.core.config import choice
from manyhands.core.types import Agreed, Exchange
from manyhands.exchange.combine import passed, protected, refuse
from manyhands.exchange.feedback import zeros

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Talk, Tensors


@dataclass(frozen=True)
@checked
class EF21:
    """Send compressed changes of the contribution; all keep the sum.

    State: ``residual``, my hᵢ, and ``agreed``, H, each like the contribution (float32 for half precision).

    Args:
        inner: any contractive exchange that keeps no residual of its own: top-k, low rank, a quantizer.
    """

    holds: ClassVar[bool] = True
    follows: ClassVar[bool] = True
    conserves: ClassVar[bool] = False
    by_tensor = passed("by_tensor")
    bucket_mb = passed("bucket_mb")
    fills = passed("fills")

    inner: Exchange = choice("exchanges", "topk", help="how the change is sent")

    def __post_init__(self) -> None:
        refuse("ef21", "inner", self.inner, holds=False, exact=True, kept=True)

    def init(self, like: Tensors) -> Any:
        return {"residual": zeros(like), "agreed": zeros(like), "inner": self.inner.init(like)}

    def talk(self, delta: Tensors, state: Any) -> Talk:
        own, everyones = state["residual"], state["agreed"]
        # in the estimates' type: a sum rounded to half precision would be in H for ever, and in no h
        change = [d - h for d, h in zip(delta, own, strict=True)]
        agreed = yield from protected(self.inner.talk(change, state["inner"]))
        own = [h + c for h, c in zip(own, agreed.sent, strict=True)]
        everyones = [h + c for h, c in zip(everyones, agreed.mean, strict=True)]
        return Agreed(
            [h.to(d.dtype) for h, d in zip(everyones, delta, strict=True)],
            [h.to(d.dtype) for h, d in zip(own, delta, strict=True)],
            {"residual": own, "agreed": everyones, "inner": agreed.state},
        )

    def renewed(self, delta: Tensors, mean: Tensors, state: Any) -> Any:
        """hᵢ = gᵢ and H = Σ gᵢ of a round that went another way, without loss: else the first changes would be from 0."""
        return {
            **state,
            "residual": [d.to(h.dtype, copy=True) for d, h in zip(delta, state["residual"], strict=True)],
            "agreed": [m.to(h.dtype, copy=True) for m, h in zip(mean, state["agreed"], strict=True)],
        }

    def flush(self, state: Any, like: Tensors) -> tuple[list[Tensor | None], Any]:
        """Nothing is owed: hᵢ is an estimate, which stays."""
        return [None] * len(like), state
