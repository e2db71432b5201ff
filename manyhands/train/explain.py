"""The plan in words: what, value, and where the value came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from manyhands.core import compute
from manyhands.data.sample import Order
from manyhands.train.plan import shares_in_words

if TYPE_CHECKING:
    from manyhands.train.job import Job
    from manyhands.train.material import Material
    from manyhands.train.plan import Facts, Plan
    from manyhands.wire.world import World

Row = tuple[str, str, str]


def explain(
    job: Job,
    origins: Mapping[str, str],
    material: Material,
    facts: Facts,
    plan: Plan,
    world: World,
    allocator: str,
) -> list[Row]:
    """Rows (what, value, origin and reason) for the table before the start."""

    def origin(name: str, reason: str = "") -> str:
        given = sorted({where for key, where in origins.items() if key == name or key.startswith(name + ".")})
        words = ", ".join(given) or ("derived" if reason else "default")
        return f"{words}: {reason}" if reason and reason != "given" else words

    held = len(material.evaluation) if material.evaluation is not None else 0
    model = job.model if job.model != "auto" else material.default_model
    skipped = f", {material.skipped:,} broken rows skipped" if material.skipped else ""
    targets, exact = targets_of(material, job.global_batch, plan.steps)
    kind = {"solo": "one worker", "shared memory": "shared memory", "nccl": "NCCL", "gloo": "gloo"}[
        world.kind
    ]
    per_worker = f"{facts.threads} thread{'s' if facts.threads > 1 else ''} each"
    rows: list[Row] = [
        ("task", repr(job.task), origin("task")),
        (
            "data",
            f"{', '.join(job.data)}: {material.documents:,} documents, {material.tokens:,} tokens{skipped}",
            origin("data"),
        ),
        ("classes", _classes_in_words(material.labels), origin("task")) if material.labels else ("", "", ""),
        (
            "held out",
            f"{held:,} of {held + len(material.train):,} rows" if held else "nothing",
            origin("eval_data" if job.eval_data else "eval_fraction"),
        ),
        ("tokenizer", f"{material.tokenizer_spec}, {material.vocab_size:,} tokens", origin("tokenizer")),
        ("model", f"{model}, {facts.parameters:,} parameters", origin("model")),
        (
            "workers",
            f"{world.size} on {', '.join(facts.hosts)}, {facts.device_name}, {per_worker}",
            origin("workers"),
        ),
        ("strategy", _strategy_in_words(job), origin("strategy")),
        (
            "transport",
            kind,
            origin("transport", "all workers are CPUs of one host" if world.kind == "shared memory" else ""),
        ),
        (
            "global batch",
            f"{job.global_batch} rows {'of up to' if material.labels else '×'} {job.seq_len} tokens",
            origin("global_batch"),
        ),
        (
            "who computes what",
            shares_in_words(job, plan, world.size)
            + (" at first, then by measured speed" if plan.balance else ""),
            origin("shares" if job.shares else "balance", plan.reasons["balance"]),
        ),
        (
            "micro-batch",
            f"{plan.micro_batch} row{'s' if plan.micro_batch > 1 else ''}",
            origin("micro_batch", plan.reasons["micro_batch"]),
        ),
    ]
    if plan.coalesce:
        rows.append(
            (
                "forward pass",
                f"up to {plan.device_batch} row{'s' if plan.device_batch > 1 else ''}",
                origin("device_batch", plan.reasons["device_batch"]),
            )
        )
    rows += [
        (
            "length",
            f"{plan.steps:,} steps, {'' if exact else 'at most '}{targets:,} targets",
            origin("steps" if job.epochs is None else "epochs", plan.reasons["steps"]),
        ),
        ("precision", plan.precision, origin("precision", plan.reasons["precision"])),
        ("compile", "yes" if plan.compile else "no", origin("compile", plan.reasons["compile"])),
        ("reproducible", "bitwise, for any number of workers", origin("reproducible"))
        if job.reproducible
        else ("", "", ""),
        ("allocator", allocator, "derived"),
        ("kernels", compute.about(), "derived"),
        ("seed", str(job.seed), origin("seed")),
        ("output", job.output, origin("output")),
    ]
    return [row for row in rows if row[0]]


def _classes_in_words(labels: Sequence[str]) -> str:
    shown = [name if len(name) <= 20 else f"{name[:19]}…" for name in labels[:8]]
    return f"{len(labels)}: {', '.join(shown)}{', …' if len(labels) > 8 else ''}"


def targets_of(material: Material, global_batch: int, steps: int) -> tuple[int, bool]:
    """How many targets the rows of `steps` steps have, and whether that is exact: it is not where a part of an epoch may hold
    the last row of a text, which has fewer.
    """
    rows = material.train
    seen = Order(len(rows), global_batch, seed=0).seen(steps)
    epochs, rest = divmod(seen, len(rows))
    lacking = getattr(rows, "lacking", 0)
    return seen * material.targets_per_row - epochs * lacking, not (rest and lacking)


def _strategy_in_words(job: Job) -> str:
    """For example ``Every(every=64), AllReduce(…), inner AdamW(lr=0.0004), …, outer SGD(lr=0.7), …``."""
    strategy = job.strategy
    exchange = "Ordered()" if job.reproducible else repr(strategy.exchange)
    parts = [repr(strategy.cadence)]
    if getattr(strategy.placement, "exchanges", True):
        parts.append(exchange)
    if strategy.placement.method is not None:
        parts.insert(0, repr(strategy.placement))
    if strategy.inner is not None:
        parts.append(f"inner {_optimizer_in_words(strategy.inner)}, outer")
    return ", ".join(parts) + f"{'' if strategy.inner else ','} {_optimizer_in_words(strategy.outer)}"


def _optimizer_in_words(spec: Any) -> str:
    return f"{type(spec).__name__}(lr={spec.lr:g}), {spec.schedule!r}"
