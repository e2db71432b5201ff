"""What a worker of a strategy keeps for each trainable parameter, in bytes: before there is a replica to look at.

A gradient, its copy on the wire, the optimizers' state, what the exchange holds back, and copies of the parameters that the
method keeps. Optimizers and exchanges are asked by way of a small matrix, whose state is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch

from manyhands.core.registry import resolve_target
from manyhands.exchange.combine import named, trait

if TYPE_CHECKING:
    from manyhands.strategy.base import Strategy

SIDE = 64  # of the matrix
VALUE = 4  # bytes of a float32


def bytes_per_parameter(strategy: Strategy) -> float:
    """Of a replica that has made some steps, beside the float32 parameter itself.

    What lives for the moment of an agreement alone is not counted: the activations, whose room is looked for, are gone then.

    >>> from manyhands import presets
    >>> bytes_per_parameter(presets.ddp())  # gradient, wire, two moments
    16.0
    >>> bytes_per_parameter(presets.diloco())  # and anchors, and the outer momentum
    24.0
    """
    own = _optimizer(strategy.outer) + (_optimizer(strategy.inner) if strategy.inner else 0.0)
    more = getattr(resolve_target(strategy.method), "extra_bytes", None)
    copies = more(strategy, own) if more is not None else 0.0
    return 2 * VALUE + own + _exchange(strategy.exchange) + copies


def _optimizer(spec: Any) -> float:
    weight = torch.nn.Parameter(torch.zeros(SIDE, SIDE))
    optimizer = spec.build([("weight", weight)], "cpu")
    weight.grad = torch.ones(SIDE, SIDE)
    optimizer.step()
    return _large(optimizer.state_by_name())


def _exchange(exchange: Any) -> float:
    like = torch.zeros(SIDE, SIDE)
    by_tensor = trait(exchange, "by_tensor")
    return _large(named(exchange, ["weight"]).init([like if by_tensor else like.reshape(-1)]))


def _large(state: Any) -> float:
    """Bytes per value of the matrix of all tensors in a state, without counters."""
    if isinstance(state, torch.Tensor):
        return state.nbytes / SIDE**2 if state.numel() > 1 else 0.0
    if isinstance(state, Mapping):
        return sum(map(_large, state.values()))
    if isinstance(state, (list, tuple)):
        return sum(map(_large, state))
    if is_dataclass(state):
        return sum(_large(getattr(state, f.name)) for f in fields(state))
    return 0.0
