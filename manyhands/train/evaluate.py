"""Scores of held-out rows, shared by all workers, exact for any number of them: only sums and counts are added."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from manyhands.core.events import Emit, Evaluating, ignore
from manyhands.core.request import Gather
from manyhands.data.partition import divide

if TYPE_CHECKING:
    from torch import nn

    from manyhands.core.types import Rows, Task
    from manyhands.wire.world import World


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
) -> dict[str, float]:
    """The task's metrics over all of `rows`; collective, the same on every worker.

    Batches of as many rows as every worker can take are dealt to the workers in contiguous ranges; each worker's float64 sums
    are gathered and added in rank order.

    Args:
        batch_rows: the most that this worker computes at once; others may have other memory, or another device.
        share: (which share, of how many, whether I tell of it), where several workers compute one together; default:
            each worker has its own.
    """
    module = model if isinstance(model, torch.nn.Module) else None
    was_training = module.training if module is not None else False
    if module is not None:
        module.eval()
    unit = min(world.gather(batch_rows))
    which, shares, tells = share or (world.rank, world.size, True)
    dealt = divide(-(-len(rows) // unit), [1.0] * shares)[which]
    mine = range(dealt.start * unit, min(dealt.stop * unit, len(rows)), unit if share else batch_rows)
    totals: dict[str, torch.Tensor] = {}
    shown = time.monotonic()
    with torch.no_grad(), autocast():
        for done, begin in enumerate(mine):
            ids = np.arange(begin, min(begin + mine.step, mine.stop), dtype=np.int64)
            batch = {name: tensor.to(device) for name, tensor in rows.take(ids).items()}
            for name, value in task.score(model, batch).items():  # type: ignore[arg-type]
                value = value.to("cpu", torch.float64)
                totals[name] = totals[name] + value if name in totals else value
            if time.monotonic() - shown > 0.2:
                shown = time.monotonic()
                emit(Evaluating(done=done + 1, total=len(mine)))
    if module is not None:
        module.train(was_training)
    return task.metrics(_add_up(totals if tells else {}, world), bytes_per_target=rows.bytes_per_target)


def _add_up(totals: dict[str, torch.Tensor], world: World) -> dict[str, torch.Tensor]:
    """Everybody's sums, added in rank order; a worker without a batch contributes nothing."""
    names = sorted({name for each in world.gather(sorted(totals)) for name in each})
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
