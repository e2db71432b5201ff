"""How a run is continued or scored, and what must stay the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.core.errors import CheckpointError, UsageError
from manyhands.core.events import Emit, Resumed, Warned
from manyhands.data.prepare import VERSION

if TYPE_CHECKING:
    from torch import nn

    from manyhands.train.job import Job
    from manyhands.train.loop import Loop
    from manyhands.train.material import Material, Scored


def same_order(path: Path, before: Mapping[str, Any], job: Job, material: Material) -> None:
    """Refuse to continue with other batches than the checkpoint's (promise 1)."""
    old = before.get("job", {})
    for key in ("seed", "order", "global_batch", "micro_batch", "seq_len"):
        new = getattr(job, key)
        if new is not None and old.get(key) is not None and old[key] != new:
            raise UsageError(
                f"{key} = {new}, but {path} was written with {old[key]}",
                "a resumed run continues with the same batches",
                f"leave out --{key.replace('_', '-')}, or start a new run",
            )
    if before.get("data") not in (None, material.identity):
        held_out = material.held_out_identity
        if "eval_data" in before and (before["eval_data"] is None) != (held_out is None):
            raise UsageError(
                f"{path} was written {'with' if held_out is None else 'without'} eval_data",
                "a resumed run continues with the same batches",
                "leave out --eval-data and --eval-fraction, or start a new run",
            )
        _same_release(path, before)
        raise CheckpointError(
            f"{path} was trained on other data than {', '.join((*job.data, *job.eval_data))} holds now",
            "a resumed run continues with the same rows",
            "restore the data and how they are read, or start a new run",
        )
    rows = len(material.train)
    if before.get("rows") not in (None, rows):
        raise UsageError(
            f"{rows:,} rows to train on, but {path} was written with {before['rows']:,}",
            "a resumed run continues with the same batches",
            "leave out --eval-fraction, or start a new run",
        )


def _same_release(path: Path, before: Mapping[str, Any]) -> None:
    """Data that look different may be the same, and be read otherwise by this release. Raises `CheckpointError`."""
    made = before.get("prepared")
    if made != VERSION:
        raise CheckpointError(
            f"{path} is of a release that prepared data otherwise ({'an early one' if made is None else f'version {made}'}, "
            f"here version {VERSION})",
            "its rows may be others than this release makes of the same data",
            "go on with the release that wrote it, or load its model into a new run (--model)",
        )


def same_held_out(path: Path, before: Mapping[str, Any], job: Job, found: Scored) -> None:
    """Refuse to score rows as held out that the checkpoint's run did not hold out: it may have been trained on them."""
    rule = "a run is scored on the rows that it held out"
    known = before.get("data" if found.others is not None else "eval_data")
    if known not in (None, found.identity):
        _same_release(path, before)
        raise CheckpointError(
            f"{path} held out rows of other data than {', '.join(job.eval_data or job.data)} holds now",
            rule,
            "restore the data and how they are read, or give --data to score other text",
        )
    if found.others is None:
        return
    old = before.get("job", {})
    for key in ("seed", "seq_len", "eval_fraction"):
        if old.get(key) not in (None, getattr(job, key)):
            raise UsageError(
                f"{key} = {getattr(job, key)}, but {path} was written with {old[key]}",
                rule,
                f"leave out {key}, or give --data to score other text",
            )
    if before.get("rows") not in (None, found.others):
        raise CheckpointError(
            f"{found.others:,} rows are not held out, but {path} was trained on {before['rows']:,}",
            rule,
            "restore the data and how they are read, or give --data to score other text",
        )


def same_function(path: Path, model: nn.Module) -> None:
    """Refuse to go on with parameters in a model that makes something else of them."""
    from manyhands.models.same import difference

    found = difference(model, path)
    if found is not None:
        raise UsageError(
            f"the model's {found.name} = {found.now!r}, but {path} was written with {found.saved!r}",
            "parameters go on in the model that they were trained in (its dropout may change)",
            "leave out --model, or start a new run",
        )


def not_beyond(path: Path, step: int, total: int) -> None:
    """Refuse a length that the run has exceeded already: it would end at once, as if it were done."""
    if step > total:
        raise UsageError(
            f"the job has {total} steps, but {path} stands after step {step}",
            "steps are counted from the run's beginning",
            f"give --steps {step} or more, or resume an earlier checkpoint",
        )


def restore(loop: Loop, path: Path, job: Job, material: Material, emit: Emit) -> list[int]:
    """Bring a loop to where a checkpoint (already verified) stands. Collective.

    Returns:
        How many workers the run had before, attempt by attempt.

    Raises:
        UsageError, CheckpointError: this job would not continue it.
    """
    from manyhands.train import checkpoint, exchange_state, session

    before = checkpoint.load_state(path).state
    same_order(path, before, job, material)
    same_function(path, loop.replica.model)
    not_beyond(path, int(before.get("step", 0)), loop.schedule.total_steps)
    session.restore_replica(loop.replica, path, verified=True)
    lost = exchange_state.missing(before)
    earlier = list(before.get("world_sizes", []))
    if loop.world.rank == 0:
        if lost:
            emit(Warned(message=lost, where="resume"))
        asked: Any = job.strategy.placement
        made: Any = loop.replica.strategy.placement
        if asked != made:  # `Sharded.fitted`
            groups = made.shard * made.tensor_parallel or loop.world.size
            said = f"{asked!r} does not divide {loop.world.size} workers: groups of {groups}"
            emit(Warned(message=said, where="resume"))
        emit(
            Resumed(
                step=loop.replica.steps,
                path=str(path),
                from_workers=earlier[-1] if earlier else 0,
                workers=loop.world.size,
            )
        )
    return earlier
