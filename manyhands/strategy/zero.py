"""Named strategies that divide one model among workers: ZeRO 1, 2 and 3 (arXiv:1910.02054)."""

from __future__ import annotations

from typing import Any

from manyhands.core.checked import checked_call
from manyhands.placement.sharded import Sharded
from manyhands.strategy.base import Strategy


@checked_call
def zero1(
    *,
    lr: float | None = None,
    optimizer: Any = "adamw",
    schedule: Any = None,
    weight_decay: float | None = None,
    shard: int = 0,
    exchange: Any = "all-reduce",
) -> Strategy:
    """`ddp` with the optimizer's state divided among the workers: the same bits, 4 + 4 + 8/N bytes a parameter.

    Args:
        shard: workers that hold one optimizer state between them; 0: all. With several such groups a lost worker's part
            is still held by another (8/shard instead of 8/N bytes).
    """
    return _strategy(
        Sharded(stage=1, shard=shard),
        lr=lr,
        optimizer=optimizer,
        schedule=schedule,
        weight_decay=weight_decay,
        exchange=exchange,
    )


@checked_call
def zero2(
    *,
    lr: float | None = None,
    optimizer: Any = "adamw",
    schedule: Any = None,
    weight_decay: float | None = None,
    shard: int = 0,
    exchange: Any = "all-reduce",
    tensor_parallel: int = 1,
    accumulate: str = "sharded",
) -> Strategy:
    """Gradients and optimizer state divided among workers; parameters are whole during a step (FSDP2).

    Args:
        shard: workers that hold one model between them; 0: all. Several such groups agree by `exchange`.
        exchange: what groups say about their gradients.
        tensor_parallel: workers that compute each layer together, where the model has a plan.
        accumulate: "sharded" or "whole", see `manyhands.placement.sharded.Sharded`.
    """
    return _strategy(
        Sharded(stage=2, shard=shard, tensor_parallel=tensor_parallel, accumulate=accumulate),  # type: ignore[arg-type]
        lr=lr,
        optimizer=optimizer,
        schedule=schedule,
        weight_decay=weight_decay,
        exchange=exchange,
    )


@checked_call
def zero3(
    *,
    lr: float | None = None,
    optimizer: Any = "adamw",
    schedule: Any = None,
    weight_decay: float | None = None,
    shard: int = 0,
    exchange: Any = "all-reduce",
    tensor_parallel: int = 1,
    accumulate: str = "sharded",
) -> Strategy:
    """Parameters, gradients and optimizer state divided among workers, gathered unit by unit (FSDP2).

    Args:
        shard: workers that hold one model between them; 0: all. Several such groups agree by `exchange`.
        exchange: what groups say about their gradients.
        tensor_parallel: workers that compute each layer together, where the model has a plan.
        accumulate: "sharded" or "whole", see `manyhands.placement.sharded.Sharded`.
    """
    return _strategy(
        Sharded(stage=3, shard=shard, tensor_parallel=tensor_parallel, accumulate=accumulate),  # type: ignore[arg-type]
        lr=lr,
        optimizer=optimizer,
        schedule=schedule,
        weight_decay=weight_decay,
        exchange=exchange,
    )


def _strategy(
    placement: Sharded, *, lr: float | None, optimizer: Any, schedule: Any, weight_decay: Any, exchange: Any
) -> Strategy:
    from manyhands.strategy.presets import _exchange, _optimizer

    return Strategy(
        placement=placement,
        exchange=_exchange(exchange),
        outer=_optimizer(optimizer, lr, schedule, weight_decay),
    )
