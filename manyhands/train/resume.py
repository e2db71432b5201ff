"""How a run is continued, and what must stay the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.core.errors import CheckpointError, UsageError
from manyhands.core.events import Emit, Resumed, Warned

if TYPE_CHECKING:
    from manyhands.train.job import Job
    from manyhands.train.loop import Loop
    from manyhands.train.material import Material


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
    rows = len(material.train)
    if before.get("rows") not in (None, rows):
        raise UsageError(
            f"{rows:,} rows to train on, but {path} was written with {before['rows']:,}",
            "a resumed run continues with the same batches",
            "leave out --eval-fraction and --eval-data, or start a new run",
        )
    if before.get("data") not in (None, material.identity):
        raise CheckpointError(
            f"{path} was trained on other data than {', '.join(job.data)} holds now",
            "a resumed run continues with the same rows",
            "restore the data, or start a new run",
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
