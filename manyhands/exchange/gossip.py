"""Gossip: workers agree in pairs that change from round to round; a round waits for the partner, not for all.

NoLoCo (arXiv:2506.10911, section 3.2): with slow weights φ (anchors) and pseudo-gradients Δ = φ − θ, worker i and its
partner j of this round (n = 2, or the one left over: n = 1) make the outer step

    δᵢ ← α δᵢ + β · (Δᵢ + Δⱼ)/2 + γ · (φᵢ − (φᵢ + φⱼ)/2) ;   φᵢ ← φᵢ − δᵢ

which is an SGD step of rate β and momentum α on what this exchange agrees on, with ``pull`` = γ/β. The second
term draws the two together: the replicas differ, and their spread is held by it. Pairs are drawn from the round alone,
so everybody knows them. With ``pull=1``, outer momentum 0 and rate 1 it is plain gossip averaging: both take the mean
of their models.

The paper's workers see equally many targets in a round. Here they may not, and (Δᵢ + Δⱼ)/2 is (wᵢΔᵢ + wⱼΔⱼ)/(wᵢ + wⱼ) with w the
targets that each has seen, as in all methods of local steps: a partner without any rows leaves the other's way as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from manyhands.core.checked import checked
from manyhands.core.errors import UsageError
from manyhands.core.request import Swap
from manyhands.core.types import Agreed

if TYPE_CHECKING:
    from manyhands.core.types import Talk, Tensors


@dataclass(frozen=True, kw_only=True)
@checked
class Gossip:
    """Average with one other worker, another in each round.

    `delta` is [*pseudo-gradients, *anchors] (equally many of each), unweighted; then, where the two do not count alike, what
    this worker's pseudo-gradients count (float64 []). What comes back is this pair's, so replicas
    do not agree bitwise (``by_model``, ``conserves = False``).

    Args:
        pull: weight of the difference between the two models, γ/β above.
    """

    by_model: ClassVar[bool] = True
    conserves: ClassVar[bool] = False

    pull: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.pull < float("inf"):
            raise UsageError(
                f"pull = {self.pull}", "it draws two models together", "1 takes the mean of the two"
            )

    def init(self, like: Tensors) -> Any:
        import torch

        return {"round": torch.zeros((), dtype=torch.int64)}

    def talk(self, delta: Tensors, state: Any) -> Talk:
        import torch

        half = len(delta) // 2
        key = int(state["round"])
        share = 0.5
        if len(delta) % 2:
            theirs = yield Swap(delta[-1].reshape(1), key)
            both = float(delta[-1]) + float(theirs)
            share = float(delta[-1]) / both if both else 0.5
        mean = []
        for own, anchor in zip(delta[:half], delta[half : 2 * half], strict=True):
            mine = torch.stack([own, anchor])  # [2, n]
            theirs = yield Swap(mine, key)
            way = share * own + (1 - share) * theirs[0]
            mean.append(way + self.pull * (anchor - theirs[1]) / 2)
        return Agreed(mean, list(delta[:half]), {"round": state["round"] + 1})
