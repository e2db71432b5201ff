"""Scores of held-out rows, shared by all workers, exact for any number of them: only sums and counts are added."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from manyhands.core.errors import OutOfMemory
from manyhands.core.events import Emit, Evaluating, Warned, ignore
from manyhands.core.request import Gather
from manyhands.data.partition import divide
from manyhands.train.memory import Fits, first_line, is_out_of_memory, split_on_oom, tell_launcher

if TYPE_CHECKING:
    from torch import nn

    from manyhands.core.types import Batch, Rows, Task
    from manyhands.wire.world import World

Scores = dict[str, torch.Tensor]


def _never() -> bool:
    return False


def evaluate(
    model: nn.Module | Callable[..., Any],
    task: Task,
    rows: Rows,
    world: World,
    *,
    batch_rows: int,
    device: torch.device,
    autocast: Callable[[], Any],
    emit: Emit = ignore,
    share: tuple[int, int, bool] | None = None,
    fits: Fits | None = None,
    asked: Callable[[], bool] = _never,
) -> dict[str, float] | None:
    """The task's metrics over all of `rows`; collective, the same on every worker. None where one has broken it off.

    Batches of as many rows as every worker can take are dealt to the workers in contiguous ranges; each worker's float64 sums
    are gathered and added in rank order. A batch that finds no memory is scored in halves.

    Args:
        batch_rows: the most that this worker computes at once; others may have other memory, or another device.
        share: (which share, of how many, whether I tell of it), where several workers compute one together; default:
            each worker has its own.
        fits: the most rows that this worker's memory was found to hold in an evaluation, kept from one to the next.
        asked: before each batch, whether to break off; alike on workers that compute one together.

    Raises:
        OutOfMemory: it ran out where several workers compute a batch together, which none can cut alone.
        ManyhandsError: not even one row fits.
    """
    fits = fits or Fits()
    module = model if isinstance(model, torch.nn.Module) else None
    was_training = module.training if module is not None else False
    if module is not None:
        module.eval()
    unit = min(world.gather(batch_rows))
    which, shares, tells = share or (world.rank, world.size, True)
    dealt = divide(-(-len(rows) // unit), [1.0] * shares)[which]
    mine = range(dealt.start * unit, min(dealt.stop * unit, len(rows)), unit if share else batch_rows)
    totals: dict[str, torch.Tensor] = {}
    shown, broken = time.monotonic(), False

    def score(piece: Batch, begin: int = 0, final: bool = True) -> Scores:
        there = {name: tensor.to(device) for name, tensor in piece.items()}
        found = task.score(model, there)  # type: ignore[arg-type]
        return {name: value.to("cpu", torch.float64) for name, value in found.items()}

    with torch.no_grad(), autocast():
        for done, begin in enumerate(mine):
            if broken := asked():
                break
            ids = np.arange(begin, min(begin + mine.step, mine.stop), dtype=np.int64)
            batch = rows.take(ids)
            for found in [_together(score, batch)] if share else _in_pieces(score, batch, fits):
                for name, value in found.items():
                    totals[name] = totals[name] + value if name in totals else value
            if time.monotonic() - shown > 0.2:
                shown = time.monotonic()
                emit(Evaluating(done=done + 1, total=len(mine)))
    if fits.most != fits.told:
        fits.told = fits.most
        message = f"memory ran out in an evaluation: its batches have at most {fits.most} rows now, and the scores stay the same"
        emit(Warned(message=message, where="memory"))
    if module is not None:
        module.train(was_training)
    told = world.gather(None if broken else sorted(totals) if tells else [])
    if None in told:
        return None
    names = sorted({name for each in told for name in each})
    sums = _add_up(names, totals if tells else {}, world)
    return task.metrics(sums, bytes_per_target=rows.bytes_per_target)


def _in_pieces(score: Callable[..., Scores], batch: Batch, fits: Fits) -> list[Scores]:
    """Scores of as many pieces of a batch as memory asks for: they are sums."""
    return split_on_oom(score, batch, fits, divisible=True, untouched=lambda: True, what="forward pass")


def _together(score: Callable[..., Scores], batch: Batch) -> Scores:
    """Scores of a batch that others compute with me."""
    try:
        return score(batch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        rows = len(next(iter(batch.values())))
        tell_launcher(rows, divisible=True)
        raise OutOfMemory(
            f"no memory for a forward pass of {rows} rows: {first_line(error)}",
            "workers that compute each layer together cannot cut a batch alone",
            "give a smaller --device-batch",
        ) from error


def _add_up(names: list[str], totals: dict[str, torch.Tensor], world: World) -> dict[str, torch.Tensor]:
    """Everybody's sums, added in rank order; a worker without a batch contributes nothing."""
    result = {}
    for name in names:
        mine = totals.get(name)
        parts = world.wire.begin(
            Gather(mine.reshape(-1) if mine is not None else torch.empty(0, dtype=torch.float64))
        ).wait()
        shapes = [
            shape
            for shape in world.gather(list(mine.shape) if mine is not None else None)
            if shape is not None
        ]
        result[name] = sum(part for part in parts if part.numel()).reshape(shapes[0])
    return result
