"""Momentum correction around a sparsifier: deep gradient compression (arXiv:1712.01887, section 3).

Plain error feedback under an optimizer with momentum applies momentum to what arrives late. Here momentum comes before
what is held back (equation 4), and the optimizer has none:

    uᵢ ← m uᵢ + gᵢ        vᵢ ← vᵢ + uᵢ        q = C(vᵢ)        vᵢ ← vᵢ − q        uᵢ ← 0 where q ≠ 0

The last is momentum factor masking (section 3.3): what was just sent starts without the momentum of stale gradients. It is
for tensors of which a sparsifier left something out: what is sent whole in every round is never stale, and what nobody
selects has no entries that were sent and others that were not. There u is plain momentum.
With ``nesterov``: uᵢ ← m (uᵢ + gᵢ), vᵢ ← vᵢ + uᵢ + gᵢ, as in the authors' code.

Conserved is the sum of *velocities*: Σₜ qᵢ + vᵢ = Σₜ uᵢₜ (``conserves`` is False: it is not the sum of gᵢ, of which each
counts 1/(1−m) times in the end, but for the mask). u and v are linear in g but for that, so only their sums over workers matter.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from manyhands.core.checked import checked
from manyhands.core.config import choice, option
from manyhands.core.errors import UsageError
from manyhands.core.types import Agreed, Exchange
from manyhands.exchange.allreduce import AllReduce
from manyhands.exchange.combine import passed, refuse, selected
from manyhands.exchange.feedback import offer, zeros

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Talk, Tensors


@dataclass(frozen=True)
@checked
class Momentum:
    """Accumulate velocities, send the largest, keep the rest. Use it with an optimizer without momentum.

    State: ``residual``, with ``velocity`` u and ``unsent`` v, like the contributions (float32 for half precision).

    Args:
        inner: a sparsifier.
        momentum: m, 0 ≤ m < 1.
        mask: no momentum where a sparsifier sent something.
        nesterov: look ahead.
    """

    holds: ClassVar[bool] = True
    conserves: ClassVar[bool] = False
    accelerates: ClassVar[bool] = True
    by_tensor = passed("by_tensor")
    bucket_mb = passed("bucket_mb")
    fills = passed("fills")

    inner: Exchange = choice("exchanges", "topk", help="what is sent")
    _: KW_ONLY
    momentum: float = option(0.9, help="of the velocity, before what is held back")
    mask: bool = option(True, help="no momentum where a sparsifier sent something")
    nesterov: bool = option(False, help="look ahead")

    def __post_init__(self) -> None:
        refuse("momentum", "inner", self.inner, holds=False, kept=True)
        if not 0 <= self.momentum < 1:
            raise UsageError(f"momentum = {self.momentum}", "it is at least 0 and less than 1", "give 0.9")
        if isinstance(self.inner, AllReduce):
            raise UsageError(
                f"momentum(inner={self.inner!r})",
                "it corrects what a sparsifier sends late; all-reduce sends everything at once",
                "use all-reduce with an optimizer that has momentum, such as sgd(momentum=0.9)",
            )

    def init(self, like: Tensors) -> Any:
        residual = {"velocity": zeros(like), "unsent": zeros(like)}
        return {"residual": residual, "inner": self.inner.init(like)}

    def talk(self, delta: Tensors, state: Any) -> Talk:
        held = state["residual"]
        velocity, offered = [], []
        for d, u, v in zip(delta, held["velocity"], held["unsent"], strict=True):
            u = (u + d).mul_(self.momentum) if self.nesterov else (u * self.momentum).add_(d)
            velocity.append(u)
            offered.append((v + u).add_(d) if self.nesterov else v + u)
        agreed = yield from offer(self.inner, offered, delta, state["inner"])
        if self.mask:
            chosen = selected(self.inner, delta)
            for u, sent, rest, some in zip(
                velocity, agreed.sent, agreed.state["residual"], chosen, strict=True
            ):
                if some:
                    unsent = sent == 0
                    # a warm-up inside sends whole tensors, too
                    u.mul_(unsent | ~(unsent & (rest != 0)).any())
        residual = {"velocity": velocity, "unsent": agreed.state["residual"]}
        return Agreed(agreed.mean, agreed.sent, {"residual": residual, "inner": agreed.state["inner"]})

    def flush(self, state: Any, like: Tensors) -> tuple[list[Tensor | None], Any]:
        """What earlier contributions would still bring, v + (m + m² + …) u, to be sent without loss, and the state after that."""
        held, share = state["residual"], self.momentum / (1.0 - self.momentum)
        owed: list[Tensor | None] = [
            v.add(u, alpha=share) for u, v in zip(held["velocity"], held["unsent"], strict=True)
        ]
        return owed, {**state, "residual": {"velocity": zeros(like), "unsent": zeros(like)}}
