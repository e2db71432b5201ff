"""A strategy is a value: when to speak, what is said, and what is done with what was agreed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from manyhands.core.config import choice
from manyhands.core.types import Cadence, Exchange

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn


class OptimizerSpec(Protocol):
    """An optimizer as a value; see `manyhands.strategy.optimizers`."""

    @property
    def lr(self) -> float: ...

    @property
    def schedule(self) -> Any: ...

    def build(self, named_params: Sequence[tuple[str, nn.Parameter]], device_type: str) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How the replicas are kept in agreement.

    Attributes:
        cadence: when they speak.
        exchange: what is said about the gradients.
        outer: the optimizer that consumes what was agreed.
    """

    cadence: Cadence = choice("cadences", "every-step")
    exchange: Exchange = choice("exchanges", "all-reduce")
    outer: OptimizerSpec = choice("optimizers", "adamw")
