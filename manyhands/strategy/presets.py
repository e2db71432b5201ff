"""Named strategies: functions from a few parameters to a `Strategy` value.

On the command line in call form, ``--strategy "ddp(lr=3e-4, bucket_mb=8)"``; in Python
``manyhands.presets.ddp(lr=3e-4, bucket_mb=8)``.
"""

from __future__ import annotations

from typing import Any

from manyhands.core.callform import parse
from manyhands.core.config import from_choice
from manyhands.core.registry import resolve
from manyhands.exchange.allreduce import AllReduce, Precision
from manyhands.strategy.base import OptimizerSpec, Strategy


def _optimizer(name: str, lr: float | None, schedule: str | None, more: dict[str, Any]) -> OptimizerSpec:
    cls = resolve("optimizers", name)
    if lr is not None:
        more = {"lr": lr, **more}
    if schedule is not None:
        more = {"schedule": from_choice("schedules", parse(schedule), "schedule"), **more}
    spec: OptimizerSpec = cls(**{k: v for k, v in more.items() if v is not None})
    return spec


def ddp(
    *,
    lr: float | None = None,
    optimizer: str = "adamw",
    schedule: str | None = None,
    weight_decay: float | None = None,
    bucket_mb: float = 25.0,
    precision: Precision = "as-is",
) -> Strategy:
    """All-reduce of gradients at every step, in buckets overlapped with backward (arXiv:2006.15704)."""
    more = {} if weight_decay is None else {"weight_decay": weight_decay}
    return Strategy(
        exchange=AllReduce(bucket_mb=bucket_mb, precision=precision),
        outer=_optimizer(optimizer, lr, schedule, more),
    )
