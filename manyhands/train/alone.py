"""An optimizer step on what one worker has added up by itself: of local steps, and of Hogwild."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from manyhands.train.leftout import own
from manyhands.train.norm import clip_factor, is_finite, norm_of

if TYPE_CHECKING:
    from manyhands.train.gradients import FlatGradients
    from manyhands.train.replica import Replica


def step_alone(
    replica: Replica,
    gradients: FlatGradients,
    optimizer: Any,
    factor: float,
    loss_sum: float,
    count: float,
    *,
    unit: float,
    step: int,
    places: Mapping[int, Sequence[int]],
) -> tuple[float, bool]:
    """Mean, clip, step; left out where something is not finite. Returns (gradient norm, whether the step was made).

    Args:
        factor: of the optimizer's schedule.
        loss_sum, count: of the targets that were added up; at least one.
        unit: what the gradients are divided by so far.
        step: which global batch, for messages.
        places: of the micro-batches that were added up, by step.

    Raises:
        ManyhandsError: too many steps in a row were left out.
    """
    start = time.perf_counter()
    scale = unit / count
    norm = norm_of(gradients.buckets) * scale
    finite = is_finite(norm, loss_sum)
    whose = own(replica.wire.rank, loss_is_finite=is_finite(loss_sum))
    loss = loss_sum / count
    replica.took(
        finite=finite, step=step, loss=loss, norm=norm, whose=whose, steps=tuple(places), places=places
    )
    if finite:
        scale *= clip_factor(norm, replica.max_norm)
        if scale != 1.0:
            for bucket in gradients.buckets:
                bucket.mul_(scale)
        gradients.attach(gradients.used)
        optimizer.set_lr(factor)
        optimizer.step()
    gradients.detach()
    replica.optimized(start)
    return norm, finite
