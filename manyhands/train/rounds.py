"""What a worker has computed since its gradients were last sent, fragment by fragment (see `manyhands.train.forecast`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from manyhands.exchange.codec import wide

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.train.fragments import Fragment


@dataclass
class Round:
    """What I have computed since the gradients were last sent.

    Attributes:
        sums: Σ n g, per parameter; anything where there are no terms.
        squares: Σ n |g|², per parameter.
        used: whether any of these gradients was of the parameter; it may be zero.
        terms: how many gradients that is.
        steps: of the job.
    """

    sums: list[Tensor]
    squares: list[float] = field(default_factory=list)
    used: list[bool] = field(default_factory=list)
    terms: int = 0
    steps: int = 0

    @staticmethod
    def empty(like: Sequence[Tensor]) -> Round:
        made = Round([torch.empty(g.shape, dtype=wide(g.dtype), device=g.device) for g in like])
        made.clear()
        return made

    def clear(self) -> None:
        self.squares, self.used = [0.0] * len(self.sums), [False] * len(self.sums)
        self.terms = self.steps = 0

    def take(self, gradients: Sequence[Tensor], count: float, used: Sequence[bool]) -> None:
        """One more: the mean of `count` targets."""
        norms = [float(n) for n in torch._foreach_norm(list(gradients))]
        if self.terms:
            torch._foreach_add_(self.sums, list(gradients), alpha=count)
        else:
            for total, gradient in zip(self.sums, gradients, strict=True):
                torch.mul(gradient.to(total.dtype), count, out=total)
        self.squares = [s + count * n * n for s, n in zip(self.squares, norms, strict=True)]
        self.used = [a or b for a, b in zip(self.used, used, strict=True)]
        self.terms += 1

    def add(self, other: Round) -> None:
        if not other.terms:
            return
        if self.terms:
            torch._foreach_add_(self.sums, other.sums)
        else:
            torch._foreach_copy_(self.sums, other.sums)
        self.squares = [a + b for a, b in zip(self.squares, other.squares, strict=True)]
        self.used = [a or b for a, b in zip(self.used, other.used, strict=True)]
        self.terms += other.terms


@dataclass
class Piece:
    """What goes with a fragment.

    Attributes:
        names: of its parameters.
        gradients: the views in which each step's arrive.
        round, sent: what is added up, and what is under way.
        apart: alone: the parameters and optimizer state that were sent from.
    """

    names: frozenset[str]
    gradients: list[Tensor]
    round: Round
    sent: Round
    apart: tuple[list[Tensor], dict[str, Tensor]] | None = None

    @staticmethod
    def of(fragment: Fragment, gradients: list[Tensor]) -> Piece:
        return Piece(frozenset(fragment.names), gradients, Round.empty(gradients), Round.empty(gradients))
