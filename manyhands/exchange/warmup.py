"""Warm-up: everything is sent at first, when gradients are large and change fast; then the inner exchange takes over.

1-bit Adam (arXiv:2102.02888) and PowerSGD's users (arXiv:1905.13727, appendix) begin without compression; deep gradient
compression (arXiv:1712.01887, section 3.3) raises sparsity step by step from 75% to 99.9%: an exchange with a ``density``,
wherever it stands inside, begins at 1/4 after the lossless rounds and comes down to its own in a geometric series:

    density(t) = start · (density / start)^(t / ramp),  t = 0 … ramp
"""

from __future__ import annotations

import dataclasses
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from manyhands.core.checked import checked
from manyhands.core.config import choice, option
from manyhands.core.errors import UsageError
from manyhands.core.types import Agreed, Exchange
from manyhands.exchange.allreduce import beside, together
from manyhands.exchange.combine import changed, flush, passed, refuse, renewed, trait

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Talk, Tensors

START_DENSITY = 0.25


@dataclass(frozen=True)
@checked
class Warmup:
    """All-reduce for the first rounds, then `inner`.

    State: ``round``, and the inner exchange's, untouched until it begins (but for estimates of contributions, as EF21's,
    which begin with those of the last lossless round).

    Args:
        inner: any exchange.
        rounds: how many rounds are lossless.
        ramp: over how many further rounds a density comes down; 0: at once.
    """

    by_tensor = passed("by_tensor")
    bucket_mb = passed("bucket_mb")
    holds = passed("holds")
    conserves = passed("conserves")
    contracts = passed("contracts")
    rounds_sums = passed("rounds_sums")
    fills = passed("fills")
    selects = passed("selects")
    follows = passed("follows")
    accelerates = passed("accelerates")

    inner: Exchange = choice("exchanges", "error-feedback(int8)", help="after the warm-up")
    _: KW_ONLY
    rounds: int = option(100, help="lossless rounds at first")
    ramp: int = option(0, help="rounds in which a density comes down to its value; 0: at once")

    def __post_init__(self) -> None:
        refuse("warmup", "inner", self.inner)
        if self.rounds and trait(self.inner, "accelerates"):
            raise UsageError(
                f"warmup(inner={self.inner!r}, rounds={self.rounds})",
                "it agrees on a velocity, and the lossless rounds on gradients: the optimizer would be another",
                "let the density come down inside, as in momentum(warmup(topk, rounds=0, ramp=400))",
            )
        for name in ("rounds", "ramp"):
            if getattr(self, name) < 0:
                raise UsageError(
                    f"{name} = {getattr(self, name)}", "it is a number of rounds", "give 0 or more"
                )
        if self.ramp and not _densities(self.inner):
            raise UsageError(
                f"ramp = {self.ramp} with {self.inner!r}",
                "it lowers a density, and nothing inside has one",
                "use ramp=0, or a sparsifier such as topk(density=0.01)",
            )

    def init(self, like: Tensors) -> Any:
        import torch

        return {"round": torch.zeros((), dtype=torch.int64), "inner": self.inner.init(like)}

    def talk(self, delta: Tensors, state: Any) -> Talk:
        turn = int(state["round"])
        if turn < self.rounds:
            last = turn + 1 == self.rounds
            talk = beside(self.inner, delta, state["inner"]) if last else together(delta)
            agreed = yield from talk
            inner = agreed.state if last else state["inner"]
            return Agreed(agreed.mean, agreed.sent, {"round": state["round"] + 1, "inner": inner})
        agreed = yield from self.at(turn).talk(delta, state["inner"])
        return Agreed(agreed.mean, agreed.sent, {"round": state["round"] + 1, "inner": agreed.state})

    def at(self, turn: int) -> Exchange:
        """The inner exchange as it is in round `turn`, counted from 0."""
        done = turn - self.rounds
        return self.inner if done >= self.ramp else denser(self.inner, done / self.ramp)

    def renewed(self, delta: Tensors, mean: Tensors, state: Any) -> Any:
        """The inner exchange's estimates after a round that went another way."""
        return {**state, "inner": renewed(self.inner, delta, mean, state["inner"])}

    def flush(self, state: Any, like: Tensors) -> tuple[list[Tensor | None], Any]:
        """What the inner exchange owes, to be sent without loss, and the state after that."""
        owed, inner = flush(self.inner, state["inner"], like)
        return owed, {**state, "inner": inner}


def denser(exchange: Any, share: float) -> Any:
    """`exchange` with each density d inside it replaced by start · (d / start)^share; one above the start stays."""
    fields = {name: denser(inner, share) for name, inner in _inner(exchange)}
    if _has_density(exchange):
        fields["density"] = START_DENSITY * (exchange.density / START_DENSITY) ** share
    return changed(exchange, fields) if fields else exchange


def _densities(exchange: Any) -> bool:
    """Whether there is a density inside that `denser` would change."""
    return _has_density(exchange) or any(_densities(inner) for _, inner in _inner(exchange))


def _has_density(exchange: Any) -> bool:
    """One of its own, below the start, that no count `k` goes before."""
    density = getattr(exchange, "density", None)
    return density is not None and density < START_DENSITY and getattr(exchange, "k", None) is None


def _inner(exchange: Any) -> list[tuple[str, Any]]:
    return [
        (f.name, getattr(exchange, f.name))
        for f in dataclasses.fields(exchange)
        if f.metadata.get("choice") == "exchanges"
    ]
