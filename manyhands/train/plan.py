"""What is going to be done, decided and explained before the start: every derived value with its reason.

Pure functions of the job and of the facts of data, model and world.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manyhands.core.errors import UsageError
from manyhands.data.partition import divide
from manyhands.train.feed import unit_rows

if TYPE_CHECKING:
    from manyhands.train.job import Job

COMPILE_COST_S = 45.0  # compiling forward and backward once on one core, measured 27 to 37 s cold
COMPILE_GAIN = 0.10  # of the remaining time, measured 3 to 15 % with the caching allocator


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the job meets: found, not chosen."""

    rows: int
    world_size: int
    hosts: Sequence[str]
    device_type: str
    device_name: str
    threads: int
    has_bf16: bool
    draws_random: bool
    parameters: int
    flops_per_token: float
    peak_flops: float
    cached_compile: bool = False
    elastic: bool = False  # workers may come
    memory_rows: int | None = None  # that fit into a pass; None: not measured


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Derived values."""

    steps: int
    steps_per_epoch: int
    precision: str
    compile: bool
    micro_batch: int
    device_batch: int
    coalesce: bool
    weights: tuple[float, ...]
    balance: bool
    reasons: Mapping[str, str]


def choose_precision(job: Job, device_type: str, has_bf16: bool) -> tuple[str, str]:
    """The precision of forward passes and why."""
    if job.precision != "auto":
        if job.precision == "fp16" and device_type == "cpu":
            raise UsageError(
                "precision = 'fp16' on the CPU", "CPUs have no fast fp16 kernels", "use bf16 or fp32"
            )
        return job.precision, "given"
    if has_bf16:
        return "bf16", f"this {device_type.upper()} has bf16 units"
    return "fp32", f"this {device_type.upper()} has no bf16 units"


def choose_steps(job: Job, steps_per_epoch: int) -> tuple[int, str]:
    """How many optimizer steps and why."""
    if job.steps is not None:
        return job.steps, f"given; {job.steps / steps_per_epoch:.2f} epochs"
    if job.epochs is not None:
        return max(
            1, math.ceil(job.epochs * steps_per_epoch - 1e-9)
        ), f"{job.epochs:g} epoch{'s' if job.epochs != 1 else ''} of {steps_per_epoch} steps"
    return steps_per_epoch, "one epoch"


def derive(job: Job, facts: Facts) -> Plan:
    """All derived values of `job` under `facts`. Raises `UsageError` for combinations that cannot be."""
    reasons: dict[str, str] = {}
    steps_per_epoch = -(-facts.rows // job.global_batch)
    steps, reasons["steps"] = choose_steps(job, steps_per_epoch)
    precision, reasons["precision"] = choose_precision(job, facts.device_type, facts.has_bf16)
    if job.residual == "bf16" and precision != "bf16":
        raise UsageError(
            f"residual = 'bf16' with precision {precision}",
            "what layers add up is rounded to bf16 where they compute in it",
            "give --precision bf16, or leave out --residual",
        )
    one_pass = not (facts.draws_random or job.reproducible)
    unit = min(job.global_batch, unit_rows(job.global_batch, one_pass=one_pass))
    micro = job.micro_batch or min(unit, job.device_batch or unit)
    if job.micro_batch:
        reasons["micro_batch"] = "given"
    elif micro < unit:
        reasons["micro_batch"] = "one is a forward pass, of at most device_batch rows"
    elif one_pass:
        reasons["micro_batch"] = "nothing in a forward pass is random: any number of rows may share one"
    else:
        reasons["micro_batch"] = "an eighth of the global batch: " + (
            "the fixed order adds whole micro-batches"
            if job.reproducible
            else "dropout is drawn per micro-batch"
        )
    if job.shares is not None and len(job.shares) != facts.world_size:
        raise UsageError(
            f"shares = {list(job.shares)} for {facts.world_size} workers",
            "each worker has one share",
            "give as many",
        )
    weights = job.shares or (1.0,) * facts.world_size
    balance, reasons["balance"] = _balance(job, facts)
    device_batch, reasons["device_batch"] = _device_batch(job, facts)
    if device_batch < micro:
        device_batch, reasons["device_batch"] = micro, "one micro-batch, which is not cut"
    compiled, reasons["compile"] = _compile(job, facts, steps)
    return Plan(
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        precision=precision,
        compile=compiled,
        micro_batch=micro,
        device_batch=device_batch,
        coalesce=one_pass,
        weights=tuple(weights),
        balance=balance,
        reasons=reasons,
    )


def _balance(job: Job, facts: Facts) -> tuple[bool, str]:
    """Whether shares follow the measured speeds, and why."""
    placement = job.strategy.placement
    if facts.world_size == 1 and not facts.elastic:
        return False, "one worker"
    if job.shares is not None:
        return False, "shares are given"
    if job.balance == "off":
        return False, "given"
    if getattr(placement, "needs_group", False):
        return False, "all workers take part in every layer of a divided model"
    if hasattr(placement, "bound"):
        if placement.bound == 0:
            return False, "where a server or a worker is lost, an answer may have reached only some"
        return False, "workers hear of each other at different times"
    return True, "re-estimated at every step"


def _device_batch(job: Job, facts: Facts) -> tuple[int, str]:
    if job.device_batch is not None:
        return job.device_batch, "given"
    rows, tokens = busy_rows(facts.device_type, job.seq_len)
    if facts.memory_rows is not None and facts.memory_rows < rows:
        return (
            facts.memory_rows,
            f"more do not fit into memory; {rows} would keep a {facts.device_type.upper()} busy",
        )
    return rows, f"about {tokens:,} tokens keep a {facts.device_type.upper()} busy"


def busy_rows(device_type: str, seq_len: int) -> tuple[int, int]:
    """(rows, tokens) of a pass that keeps a device busy; more gain nothing."""
    tokens = 1 << 12 if device_type == "cpu" else 1 << 15
    return max(1, tokens // seq_len), tokens


def _compile(job: Job, facts: Facts, steps: int) -> tuple[bool, str]:
    if getattr(job.strategy.placement, "needs_group", False):  # hooks gather its parameters, unit by unit
        if job.compile == "on":
            raise UsageError(
                "compile = 'on' with a divided model",
                "its parameters are gathered by hooks that compiling would have to keep",
                "leave it out, or use zero1 or ddp",
            )
        return False, "a divided model runs eagerly"
    if job.compile != "auto":
        return job.compile == "on", "given"
    if job.reproducible:
        return False, "the bitwise promise needs kernels that do not depend on shapes"
    if facts.draws_random and facts.device_type == "cpu" and job.needs.labelled:
        return False, "small models gain nothing"
    if (
        facts.device_type == "cpu" and not facts.draws_random
    ):  # measured: 0.8 of the speed without (train_speed.md)
        return False, "without dropout a CPU is faster with kernels of our own than compiled"
    tokens = steps * job.global_batch * job.seq_len
    seconds = tokens * facts.flops_per_token / max(1.0, facts.peak_flops) / 0.3
    gain = seconds * COMPILE_GAIN
    if gain > COMPILE_COST_S:
        return (
            True,
            f"about {seconds / 60:.0f} min of work: saves more than the {COMPILE_COST_S:.0f} s it costs",
        )
    return (
        False,
        f"about {seconds:.0f} s of work: less would be saved than the {COMPILE_COST_S:.0f} s it costs",
    )


def shares_in_words(job: Job, plan: Plan, world_size: int) -> str:
    """Who computes what of a global batch."""
    places = -(-job.global_batch // plan.micro_batch)
    rows = [
        min(job.global_batch, r.stop * plan.micro_batch) - min(job.global_batch, r.start * plan.micro_batch)
        for r in divide(places, plan.weights)
    ]
    if len(set(rows)) == 1:
        return f"{world_size} × {rows[0]} rows"
    return " + ".join(map(str, rows)) + " rows"
