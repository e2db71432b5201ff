"""A strategy is a value: where parameters live, when to speak, what is said, and what is done with what was agreed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from manyhands.core.checked import checked
from manyhands.core.config import choice, option
from manyhands.core.errors import UsageError
from manyhands.core.types import Cadence, Exchange, Placement
from manyhands.exchange.allreduce import AllReduce
from manyhands.exchange.combine import trait

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn


@runtime_checkable
class OptimizerSpec(Protocol):
    """An optimizer as a value; see `manyhands.strategy.optimizers`."""

    @property
    def lr(self) -> float: ...

    @property
    def schedule(self) -> Any: ...

    def build(self, named_params: Sequence[tuple[str, nn.Parameter]], device_type: str) -> Any: ...


@dataclass(frozen=True, kw_only=True)
@checked
class Strategy:
    """How the replicas are kept in agreement.

    Attributes:
        placement: where parameters, gradients and optimizer state live.
        cadence: when the workers speak.
        exchange: what is said: about gradients, or where `inner` is given about the way since the last agreement.
        outer: the optimizer that consumes what was agreed.
        inner: the optimizer of each worker's own steps; None: there are none, gradients are exchanged.
        keep_local: share of a worker's own parameters that is kept when an agreement arrives (the mixing of
            arXiv:2501.18512, section 2.3; torchft's fragment_update_alpha): 0 takes the agreed ones alone.
    """

    placement: Placement = choice("placements", "replicated")
    cadence: Cadence = choice("cadences", "every-step")
    exchange: Exchange = choice("exchanges", "all-reduce")
    outer: OptimizerSpec = choice("optimizers", "adamw")
    inner: OptimizerSpec | None = choice("optimizers", None)
    keep_local: float = option(0.0, help="share of a worker's own parameters kept at an agreement")

    def __post_init__(self) -> None:
        for part in ("placement", "cadence", "exchange", "outer"):
            if getattr(self, part) is None:
                raise UsageError(f"{part} = none", "a strategy has one", "leave it out for the default")
        if not 0 <= self.keep_local < 1:
            raise UsageError(
                f"keep_local = {self.keep_local}", "it is a share that is kept", "give 0 <= keep_local < 1"
            )
        if not getattr(self.placement, "exchanges", True) and self.exchange != AllReduce():
            raise UsageError(
                f"exchange = {self.exchange!r} with placement = {self.placement!r}",
                "there nothing is exchanged between workers, so it would be ignored",
                "leave out the exchange, or use placement = 'replicated'",
            )
        if self.inner is not None and getattr(self.exchange, "bucket_mb", 25.0) not in (25.0, math.inf):
            raise UsageError(
                f"exchange = {self.exchange!r} with an inner optimizer",
                "buckets are cut from gradients; ways travel by fragment, so bucket_mb would be ignored",
                "leave it out, or use cadence = 'staggered' with fragments",
            )
        if type(self.placement).__name__ == "SharedMemory" and type(self.cadence).__name__ not in (
            "EveryStep",
            "Every",
        ):
            raise UsageError(
                f"cadence = {self.cadence!r} with placement = {self.placement!r}",
                "the cadence says when the workers meet, nothing is delayed or local",
                "use cadence = 'every(32)'",
            )
        if self.inner is None:
            self._check_without_inner()
        elif getattr(self.exchange, "by_place", False):
            raise UsageError(
                "exchange = ordered with an inner optimizer",
                "the fixed order adds micro-batches of one step",
                "leave out inner, or use exchange = 'all-reduce'",
            )
        elif self.placement.method is not None:
            raise UsageError(
                f"placement = {self.placement!r} with an inner optimizer",
                "workers that go their own way each hold a whole replica",
                "use placement = 'replicated', or leave out inner",
            )
        elif getattr(self.cadence, "method", None) is not None:
            raise UsageError(
                f"cadence = {self.cadence!r} with an inner optimizer",
                "it agrees on gradients; ways of one's own are overlapped by fragments in flight",
                "use cadence = 'staggered(fragments=1, delay=1)'",
            )
        if trait(self.exchange, "accelerates") and _has_momentum(self.outer):
            raise UsageError(
                f"exchange = {self.exchange!r} with {self.outer!r}",
                "what it agrees on is a velocity; the momentum of an optimizer that consumes it would add that up once more",
                "consume it with sgd (diloco: outer_momentum=0), or exchange error-feedback(topk) instead",
            )

    def _check_without_inner(self) -> None:
        cadence = type(self.cadence).__name__
        check = getattr(self.placement, "check", None)
        if check is not None:
            check(exchange=self.exchange, optimizer=self.outer, cadence=self.cadence)
        if self.keep_local:
            raise UsageError(
                f"keep_local = {self.keep_local} without an inner optimizer",
                "a share of a worker's own parameters exists where it makes steps of its own",
                "give inner = 'adamw', or leave out keep_local",
            )
        own = getattr(self.cadence, "method", None)
        if own is not None and hasattr(self.cadence, "check"):
            self.cadence.check(exchange=self.exchange, optimizer=self.outer)
        if self.placement.method is None and own is None and cadence not in ("EveryStep", "Every"):
            raise UsageError(
                f"cadence = {self.cadence!r} without an inner optimizer",
                "between such agreements a worker makes steps of its own",
                "give inner = 'adamw', or use cadence = 'every-step' or 'every' (which adds up gradients)",
            )
        if getattr(self.exchange, "by_model", False):
            raise UsageError(
                f"exchange = {self.exchange!r} without an inner optimizer",
                "it averages models, not gradients",
                "give inner = 'adamw' and cadence = 'every(32)'",
            )
        if (cadence == "Every" or own is not None) and getattr(self.exchange, "by_place", False):
            raise UsageError(
                f"exchange = ordered with cadence = {self.cadence!r}",
                "the fixed order adds what one step computed",
                "use cadence = 'every-step'",
            )

    @property
    def local(self) -> bool:
        """Whether workers make steps of their own between agreements."""
        return self.placement.method is None and (
            self.inner is not None or bool(getattr(self.cadence, "local", False))
        )

    @property
    def method(self) -> str:
        """``module:class`` of the worker's side of it (see `manyhands.train.method`)."""
        if self.placement.method is not None:
            return self.placement.method
        if self.inner is not None:
            pairs = getattr(self.exchange, "by_model", False)
            return "manyhands.train.pairs:PairSteps" if pairs else "manyhands.train.local:LocalSteps"
        return getattr(self.cadence, "method", None) or "manyhands.train.synchronous:Synchronous"


def _has_momentum(optimizer: Any) -> bool:
    """Whether it adds up the gradients of several steps (their squares are another matter)."""
    first, *_ = getattr(optimizer, "betas", (0.0,))
    return bool(first or getattr(optimizer, "momentum", 0.0))
