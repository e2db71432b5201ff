"""An optimizer step on what one worker has added up by itself: of local steps, and of Hogwild."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

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
) -> tuple[float, bool]:
    """Mean, clip, step; left out where something is not finite. Returns (gradient norm, whether the step was made).

    Args:
        factor: of the optimizer's schedule.
        loss_sum, count: of the targets that were added up; at least one.
        unit: what the gradients are divided by so far.
        step: which global batch, for messages.

    Raises:
        ManyhandsError: too many steps in a row were left out.
    """
    start = time.perf_counter()
    scale = unit / count
    norm = norm_of(gradients.buckets) * scale
    finite = is_finite(norm, loss_sum)
    replica.took(finite=finite, step=step, loss=loss_sum / count, norm=norm)
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
