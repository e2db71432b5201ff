"""FetchSGD: momentum and error feedback inside the sketch (Rothchild et al. 2020, arXiv:2007.07682, algorithm 1).

    S = Σ S(g_i) ;  Su = ρ Su + S ;  Se = Se + Su ;  Δ = top-k(U(Se)) ;  Se = Su = 0 in the buckets of Δ

The workers keep nothing of their own: momentum and what was held back live in two sketches that are equal on all of
them. Buckets are zeroed, not reduced by S(Δ): subtracting diverges (the paper's section 5; "error" and "momentum factor
masking"). The learning rate is the outer optimizer's, which should have no momentum of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from manyhands.core import rng
from manyhands.core.checked import checked
from manyhands.core.errors import UsageError
from manyhands.core.request import Sum, Where
from manyhands.core.types import Agreed
from manyhands.exchange import sparse
from manyhands.exchange.codec import wide
from manyhands.exchange.countsketch import check
from manyhands.exchange.largest import largest
from manyhands.exchange.sketch import Sketch, shape

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Talk, Tensors


@dataclass(frozen=True, kw_only=True)
@checked
class FetchSGD:
    """Send a sketch; apply the largest entries of accumulated momentum.

    The contract differs from other exchanges': ``mean`` is the update Δ, made of estimates, not the mean of this round's
    contributions, and ``sent`` is an equal share Δ / N of it on each worker, so that Σ of `sent` is `mean` as everywhere. It
    says nothing about what is held back (`conserves` is False), which is in the state already: `ErrorFeedback` refuses it.
    A round that is not finite shows as a Δ that is not, and leaves the state as it was.

    Args:
        rows: independent estimates of each entry, an odd number.
        compression: how many times smaller than the vector a sketch is.
        density: the share of the entries that is updated in a round, at least one.
        momentum: ρ.
        seed: of the hash functions, which are the same in all rounds.
    """

    conserves: ClassVar[bool] = False
    accelerates: ClassVar[bool] = True
    holds: ClassVar[bool] = True
    rows: int = 5
    compression: float = 20.0
    density: float = 0.01
    momentum: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        check(rows=self.rows, compression=self.compression, density=self.density)
        if not 0 <= self.momentum < 1:
            raise UsageError(
                f"momentum = {self.momentum}", "momentum decays: at least 0 and below 1", "0.9 is usual"
            )

    def init(self, like: Tensors) -> dict[str, list[Tensor]]:
        """Two sketches [rows, columns] of each tensor, equal on all workers."""
        import torch

        sketches = [self._sketch(t, i) for i, t in enumerate(like)]
        return {
            name: [
                torch.zeros(s.rows, s.columns, dtype=wide(t.dtype), device=t.device)
                for s, t in zip(sketches, like, strict=True)
            ]
            for name in ("momentum", "error")
        }

    def talk(self, delta: Tensors, state: Any) -> Talk:
        import torch

        _, size = yield Where()
        mean, sent = [], []
        after: dict[str, list[Tensor]] = {"momentum": [], "error": []}
        for i, tensor in enumerate(delta):
            sketch = self._sketch(tensor, i)
            whole = yield Sum(sketch.of(tensor.detach().reshape(-1)))
            momentum = whole.add(state["momentum"][i], alpha=self.momentum)
            error = state["error"][i] + momentum
            if bool(error.isfinite().all()):
                update = self._take(sketch, momentum, error).view(tensor.shape)
            else:
                update = torch.full(tensor.shape, torch.nan, dtype=error.dtype, device=error.device)
                momentum, error = state["momentum"][i], state["error"][i]
            after["momentum"].append(momentum)
            after["error"].append(error)
            mean.append(update.to(tensor.dtype))
            sent.append((update / size).to(tensor.dtype))
        return Agreed(mean, sent, after)

    def _take(self, sketch: Sketch, momentum: Tensor, error: Tensor) -> Tensor:
        """Δ [n]: the largest estimates of `error`; its buckets are zeroed in both sketches."""
        estimate = sketch.estimate(error)
        where = largest(estimate, min(sketch.numel, max(1, round(self.density * sketch.numel))))
        values = estimate[where]
        buckets = sketch.buckets(where[values != 0])
        momentum.scatter_(1, buckets, 0.0)
        error.scatter_(1, buckets, 0.0)
        return sparse.dense(sparse.Entries(where, values), sketch.numel)

    def flush(self, state: Any, like: Tensors) -> tuple[list[None], Any]:
        """Nothing can be sent otherwise: what is held back is known as a sketch alone, and stays."""
        return [None] * len(like), state

    def size_bytes(self, numel: int) -> int:
        """Bytes of one worker's contribution to the sum, of float32 values (float64: twice as many)."""
        rows, columns = shape(numel, self.rows, self.compression)
        return 4 * rows * columns

    def _sketch(self, tensor: Tensor, i: int) -> Sketch:
        rows, columns = shape(tensor.numel(), self.rows, self.compression)
        return Sketch(tensor.numel(), rows, columns, rng.key(self.seed, i))
