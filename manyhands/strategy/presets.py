"""Named strategies: functions from a few parameters to a `Strategy` value.

On the command line in call form, ``--strategy "diloco(lr=4e-4, every=64)"``; in Python ``manyhands.presets.diloco(lr=4e-4,
every=64)``. Where a parameter is an exchange or an optimizer it is written in call form, too:
``--strategy "ddp(exchange=error-feedback(int8))"``, ``"local-sgd(optimizer=muon)"``. docs/methods.md helps to choose.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from manyhands.cadence.delayed import Delayed
from manyhands.cadence.every import Every, EveryStep, PostLocal
from manyhands.cadence.forecast import Forecast
from manyhands.cadence.staggered import Staggered
from manyhands.core.callform import parse
from manyhands.core.checked import checked_call
from manyhands.core.config import from_choice
from manyhands.core.errors import UsageError
from manyhands.exchange.allreduce import AllReduce, Precision
from manyhands.strategy.base import OptimizerSpec, Strategy
from manyhands.strategy.optimizers import SGD
from manyhands.strategy.zero import zero1 as zero1
from manyhands.strategy.zero import zero2 as zero2
from manyhands.strategy.zero import zero3 as zero3


def _optimizer(value: Any, lr: float | None, schedule: Any, weight_decay: float | None) -> OptimizerSpec:
    """An optimizer from its name, call form or value, with the preset's own parameters put in."""
    spec: Any = from_choice("optimizers", value, "optimizer")
    if spec is None:
        raise UsageError(f"optimizer = {value!r}", "a strategy has one", "for example 'adamw'")
    changes: dict[str, Any] = {}
    if lr is not None:
        changes["lr"] = lr
    if weight_decay is not None:
        changes["weight_decay"] = weight_decay
    if schedule is not None:
        text = parse(schedule) if isinstance(schedule, str) else schedule
        changes["schedule"] = from_choice("schedules", text, "schedule")
    changed: OptimizerSpec = dataclasses.replace(spec, **changes)
    return changed


def _exchange(value: Any) -> Any:
    """An exchange from its name, call form or value."""
    found = from_choice("exchanges", value, "exchange")
    if found is None:
        raise UsageError(
            "exchange = none", "workers that say nothing never agree", "'all-reduce' is the plain one"
        )
    return found


def _momentum(lr: float, momentum: float, *, nesterov: bool = False) -> SGD:
    return SGD(lr, momentum=momentum, nesterov=nesterov and momentum > 0)


@checked_call
def ddp(
    *,
    lr: float | None = None,
    optimizer: Any = "adamw",
    schedule: Any = None,
    weight_decay: float | None = None,
    bucket_mb: float = 25.0,
    precision: Precision = "as-is",
    exchange: Any = None,
) -> Strategy:
    """All-reduce of gradients at every step, in buckets overlapped with backward (arXiv:2006.15704)."""
    if exchange is not None and (bucket_mb, precision) != (25.0, "as-is"):
        raise UsageError(
            f"bucket_mb = {bucket_mb}, precision = {precision!r} with exchange = {exchange!r}",
            "they are the all-reduce's own parameters",
            "leave them out, or write exchange=all-reduce(bucket_mb=…)",
        )
    return Strategy(
        exchange=AllReduce(bucket_mb=bucket_mb, precision=precision)
        if exchange is None
        else _exchange(exchange),
        outer=_optimizer(optimizer, lr, schedule, weight_decay),
    )


@checked_call
def accumulate(
    *,
    every: int = 4,
    lr: float | None = None,
    optimizer: Any = "adamw",
    schedule: Any = None,
    weight_decay: float | None = None,
    exchange: Any = "all-reduce",
) -> Strategy:
    """Gradients of `every` global batches are added up, then agreed upon and applied once: fewer, larger updates."""
    return Strategy(
        cadence=Every(every),
        exchange=_exchange(exchange),
        outer=_optimizer(optimizer, lr, schedule, weight_decay),
    )


@checked_call
def hierarchical(
    *,
    lr: float | None = None,
    optimizer: Any = "adamw",
    schedule: Any = None,
    weight_decay: float | None = None,
    across: Any = "all-reduce",
    feedback: bool | None = None,
) -> Strategy:
    """Gradients are added within each host first, then across hosts by slices, there compressed if you like.

    Args:
        across: the exchange between hosts, for example ``int8``.
        feedback: error feedback around it all; default: where `across` is a codec. An all-reduce in half precision goes
            without: it rounds sums, which feedback does not hear of.
    """
    from manyhands.exchange.feedback import ErrorFeedback
    from manyhands.exchange.hierarchical import Hierarchical

    between = _exchange(across)
    exchange: Any = Hierarchical(between)
    if not isinstance(between, AllReduce) if feedback is None else feedback:
        exchange = ErrorFeedback(exchange)
    return Strategy(exchange=exchange, outer=_optimizer(optimizer, lr, schedule, weight_decay))


@checked_call
def powersgd(
    *,
    lr: float | None = None,
    rank: int = 4,
    optimizer: Any = "adamw",
    schedule: Any = None,
    weight_decay: float | None = None,
) -> Strategy:
    """Gradients as matrices of low rank, with error feedback (arXiv:1905.13727)."""
    from manyhands.exchange.feedback import ErrorFeedback
    from manyhands.exchange.powersgd import PowerSGD

    return Strategy(
        exchange=ErrorFeedback(PowerSGD(rank=rank)), outer=_optimizer(optimizer, lr, schedule, weight_decay)
    )


@checked_call
def local_sgd(
    *,
    lr: float | None = None,
    every: int = 32,
    optimizer: Any = "adamw",
    schedule: Any = None,
    weight_decay: float | None = None,
    exchange: Any = "all-reduce",
) -> Strategy:
    """Each worker makes `every` steps of its own, then the models are averaged (arXiv:1805.09767)."""
    return Strategy(
        cadence=Every(every),
        exchange=_exchange(exchange),
        inner=_optimizer(optimizer, lr, schedule, weight_decay),
        outer=SGD(1.0),
    )


@checked_call
def post_local_sgd(
    *,
    lr: float | None = None,
    every: int = 16,
    start: int = 1000,
    optimizer: Any = "adamw",
    schedule: Any = None,
    weight_decay: float | None = None,
    exchange: Any = "all-reduce",
) -> Strategy:
    """Averages after each step up to step `start`, after every `every`-th from there on (arXiv:1808.07217)."""
    return Strategy(
        cadence=PostLocal(every, start=start),
        exchange=_exchange(exchange),
        inner=_optimizer(optimizer, lr, schedule, weight_decay),
        outer=SGD(1.0),
    )


@checked_call
def slowmo(
    *,
    lr: float | None = None,
    every: int = 32,
    slow_lr: float = 1.0,
    slow_momentum: float = 0.5,
    optimizer: Any = "adamw",
    schedule: Any = None,
    weight_decay: float | None = None,
    exchange: Any = "all-reduce",
) -> Strategy:
    """Local steps with a slow momentum on the averaged way (SlowMo, arXiv:1910.00643, algorithm 1).

    The momentum is held in units of parameters: the paper's algorithm where the inner rate is constant; with a falling
    rate, earlier and longer ways keep their length in it.
    """
    return Strategy(
        cadence=Every(every),
        exchange=_exchange(exchange),
        inner=_optimizer(optimizer, lr, schedule, weight_decay),
        outer=_momentum(slow_lr, slow_momentum),
    )


@checked_call
def diloco(
    *,
    lr: float | None = None,
    every: int = 64,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.9,
    optimizer: Any = "adamw",
    schedule: Any = None,
    weight_decay: float | None = None,
    exchange: Any = "all-reduce",
) -> Strategy:
    """Local AdamW steps, then a Nesterov step on the averaged way: rarely anything to say (arXiv:2311.08105)."""
    return Strategy(
        cadence=Every(every),
        exchange=_exchange(exchange),
        inner=_optimizer(optimizer, lr, schedule, weight_decay),
        outer=_momentum(outer_lr, outer_momentum, nesterov=True),
    )


@checked_call
def streaming_diloco(
    *,
    lr: float | None = None,
    every: int = 64,
    fragments: int = 4,
    delay: int = 4,
    keep_local: float = 0.5,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.9,
    optimizer: Any = "adamw",
    schedule: Any = None,
    weight_decay: float | None = None,
    exchange: Any = "error-feedback(int4)",
) -> Strategy:
    """DiLoCo in fragments, in 4 bits, overlapped with the steps that follow (arXiv:2501.18512)."""
    return Strategy(
        cadence=Staggered(every, fragments=fragments, delay=delay),
        exchange=_exchange(exchange),
        inner=_optimizer(optimizer, lr, schedule, weight_decay),
        outer=_momentum(outer_lr, outer_momentum, nesterov=True),
        keep_local=keep_local,
    )


@checked_call
def muloco(
    *,
    lr: float | None = None,
    every: int = 64,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.9,
    schedule: Any = None,
    weight_decay: float | None = None,
    exchange: Any = "error-feedback(by-tensor(int2, numel=0))",
) -> Strategy:
    """DiLoCo with Muon inside and 2 bits with error feedback between the workers (arXiv:2505.23725).

    Blocks end with tensors: two bits have no zero, and what nobody uses would drift beside a neighbour's values.
    """
    return diloco(
        lr=lr,
        every=every,
        outer_lr=outer_lr,
        outer_momentum=outer_momentum,
        optimizer="muon",
        schedule=schedule,
        weight_decay=weight_decay,
        exchange=exchange,
    )


@checked_call
def sparseloco(
    *,
    lr: float | None = None,
    every: int = 32,
    k: int = 64,
    chunk: int = 4096,
    decay: float = 0.95,
    outer_lr: float = 1.0,
    optimizer: Any = "adamw",
    schedule: Any = None,
    weight_decay: float | None = None,
) -> Strategy:
    """Local steps; of each 4,096 values of the way the 64 largest travel, in 2 bits (arXiv:2508.15706)."""
    from manyhands.exchange.feedback import ErrorFeedback
    from manyhands.exchange.topk import TopK

    return Strategy(
        cadence=Every(every),
        exchange=ErrorFeedback(TopK(chunk=chunk, k=k, values="int2"), decay=decay),
        inner=_optimizer(optimizer, lr, schedule, weight_decay),
        outer=SGD(outer_lr),
    )


@checked_call
def demo(
    *,
    lr: float | None = None,
    block: int = 64,
    k: int = 32,
    decay: float = 0.999,
    schedule: Any = None,
    weight_decay: float | None = None,
) -> Strategy:
    """Decoupled momentum: its largest DCT components travel, and the sign of their mean is the step (arXiv:2411.19870)."""
    from manyhands.exchange.dct import DctTopK
    from manyhands.exchange.feedback import ErrorFeedback

    return Strategy(
        cadence=EveryStep(),
        exchange=ErrorFeedback(DctTopK(block=block, k=k, average="senders"), decay=decay),
        outer=_optimizer("signsgd", lr, schedule, weight_decay),
    )


@checked_call
def gossip(
    *,
    lr: float | None = None,
    every: int = 32,
    pull: float = 1.0,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.5,
    optimizer: Any = "adamw",
    schedule: Any = None,
    weight_decay: float | None = None,
) -> Strategy:
    """Local steps; then pairs of workers average, other pairs each time: no collective of all (arXiv:2506.10911)."""
    from manyhands.exchange.gossip import Gossip

    return Strategy(
        cadence=Every(every),
        exchange=Gossip(pull=pull),
        inner=_optimizer(optimizer, lr, schedule, weight_decay),
        outer=_momentum(outer_lr, outer_momentum),
    )


@checked_call
def eager(
    *,
    lr: float | None = None,
    correct: bool = True,
    optimizer: Any = "adamw",
    schedule: Any = None,
    weight_decay: float | None = None,
    exchange: Any = "all-reduce",
) -> Strategy:
    """All-reduce overlapped with the whole next step, whose forecast is corrected when it arrives (arXiv:2502.12996)."""
    return Strategy(
        cadence=Delayed(correct),
        exchange=_exchange(exchange),
        outer=_optimizer(optimizer, lr, schedule, weight_decay),
    )


@checked_call
def forecast(
    *,
    lr: float | None = None,
    every: int = 4,
    delay: int = 0,
    fragments: int = 1,
    optimizer: Any = "adamw",
    schedule: Any = None,
    weight_decay: float | None = None,
    exchange: Any = "all-reduce",
) -> Strategy:
    """Own steps forecast the agreed ones, which follow from `every` steps' gradients and take their place."""
    return Strategy(
        cadence=Forecast(every, delay=delay, fragments=fragments),
        exchange=_exchange(exchange),
        outer=_optimizer(optimizer, lr, schedule, weight_decay),
    )


@checked_call
def hogwild(
    *,
    lr: float | None = None,
    every: int = 32,
    optimizer: Any = "sgd",
    schedule: Any = None,
    weight_decay: float | None = None,
) -> Strategy:
    """One copy of the parameters in shared memory, updated by all workers without locks (arXiv:1106.5730).

    Args:
        every: steps between two meetings, where losses are added up and requests to stop are heard.
    """
    from manyhands.placement.shared import SharedMemory

    return Strategy(
        placement=SharedMemory(),
        cadence=Every(every),
        outer=_optimizer(optimizer, lr, schedule, weight_decay),
    )
