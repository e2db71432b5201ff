"""Scores of a saved model: one worker's part. Started by a launcher by its dotted name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.core import config
from manyhands.core.environment import console
from manyhands.core.errors import CheckpointError
from manyhands.core.events import ignore
from manyhands.train.job import Job

if TYPE_CHECKING:
    from manyhands.wire.world import World


def main(argument: str) -> int:
    """`argument` is JSON: the job, the file for the scores, whether data was given. Returns the exit code."""
    from manyhands.core.native import enable_allocator
    from manyhands.core.signals import Interrupts

    order = json.loads(argument)
    job = config.from_data(Job, order["job"])
    with Interrupts() as interrupts, interrupts.phase("evaluate", interruptible=True):
        enable_allocator()
        scores = score(job, held_out=not order["given"], trust=order["trust"])
    if scores is not None:
        Path(order["result"]).write_text(json.dumps(scores))
    return 0


def score(job: Job, *, held_out: bool, trust: bool) -> dict[str, float | int | str] | None:
    """The scores on rank 0, None on the others. Raises as loading and preparing do."""
    import dataclasses

    import torch

    from manyhands.core import hardware
    from manyhands.core.errors import UsageError
    from manyhands.models.build import load_model
    from manyhands.train import checkpoint, session
    from manyhands.train.evaluate import evaluate
    from manyhands.train.material import gather_scored
    from manyhands.train.plan import choose_precision
    from manyhands.train.resume import same_held_out
    from manyhands.train.sinks import Terminal, fan_out

    assert job.resume is not None
    if job.threads is not None:  # under others' launchers nobody else has set them
        torch.set_num_threads(job.threads)
    path = checkpoint.resolve_resume(job.resume, Path(job.resume))
    world, device = session.connect_from_environment(device=job.device, transport=job.transport)
    terminal = Terminal(console()) if world.rank == 0 else None
    emit = fan_out([terminal]) if terminal is not None else ignore
    try:
        # a run that goes on may have saved another one between our looks
        path = Path(world.gather(str(path))[0])
        _verify_everywhere(path, world)
        state = checkpoint.load_state(path).state
        own = dataclasses.replace(job, tokenizer=str(path))
        found = gather_scored(own, world, emit, labels=state.get("labels"))
        if held_out:
            same_held_out(path, state, job, found)
        rows = found.rows
        if rows is None:
            raise UsageError(f"{job.resume} held nothing out", "there is nothing to score", "give --data")
        model = load_model(path, trust=trust).to(device)
        has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else hardware.cpu_has_bf16()
        precision, _ = choose_precision(job, device.type, has_bf16)
        if precision == "fp64":
            model.double()
        metrics = evaluate(
            model,
            job.task,
            rows,
            world,
            batch_rows=job.device_batch or max(1, 4096 // job.seq_len),
            device=device,
            autocast=session.autocast_for(precision, device.type),
            emit=emit,
        )
        assert metrics is not None  # nobody breaks it off: a signal ends this worker at once
        told: dict[str, float | int | str] = {
            "checkpoint": str(path),
            "rows": len(rows),
            "skipped": found.skipped,
            **metrics,
        }
        return told if world.rank == 0 else None
    finally:
        if terminal is not None:
            terminal.close()
        world.wire.close()


def _verify_everywhere(path: Path, world: World) -> None:
    """Each worker reads the checkpoint itself: all stop where one cannot. Collective. Raises `CheckpointError`."""
    from manyhands.train import checkpoint

    found: CheckpointError | None = None
    try:
        checkpoint.verify(path)
    except CheckpointError as error:
        found = error
    lacking = [rank for rank, well in enumerate(world.gather(found is None)) if not well]
    if found is not None:
        raise found
    if lacking:
        raise CheckpointError(
            f"worker {lacking[0]} on {world.members[lacking[0]].host} cannot read {path}",
            "every worker reads the checkpoint itself",
            "copy it there, or give a directory that all machines share",
        )
