"""A worker's own steps between agreements: an inner optimizer on its share of each global batch.

Where shares differ, the slower workers make fewer steps of the same size instead of as many of fewer rows: parts are added
up until they are about a batch of the largest share (DyLU, arXiv:2401.09135, has slow workers make fewer steps of the
batch that all have; here a slow worker's part of each global batch is smaller by its `pace`, and 1/pace of them make that
batch). The samples are the same, and what is agreed is weighted by targets as ever. At equal shares each part is a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from manyhands.train.alone import step_alone
from manyhands.train.gradients import FlatGradients
from manyhands.train.method import Part, Sums, accumulate
from manyhands.wire.solo import Solo

if TYPE_CHECKING:
    from manyhands.strategy.base import OptimizerSpec
    from manyhands.train.method import Loss
    from manyhands.train.replica import Replica


@dataclass
class _Added:
    """Gradients in the buffers that no step has used: Σ ∇loss / `unit`; none where `unit` is 0. `places`: of what, by step."""

    unit: float = 0.0
    loss_sum: float = 0.0
    count: float = 0.0
    step: int = 0
    places: dict[int, list[int]] = field(default_factory=dict)


class InnerSteps:
    """The inner optimizer of a replica and the gradients for it."""

    def __init__(self, replica: Replica, spec: OptimizerSpec) -> None:
        self._replica = replica
        self._spec, self._cadence = spec, replica.strategy.cadence
        self.gradients = FlatGradients(
            replica.named, Solo(str(replica.device)), bucket_mb=math.inf, on_bucket=lambda *_: None
        )
        self.optimizer: Any = spec.build(replica.named, replica.device.type)
        self._added = _Added()
        self._round = (0, 0)  # the step before it, its last step

    @property
    def pending(self) -> bool:
        """There are gradients that no step has used."""
        return bool(self._added.unit)

    @property
    def count(self) -> float:
        """Valid targets of the gradients that no step has used."""
        return self._added.count

    def compute(self, part: Part, loss: Loss, nominal: float) -> Sums:
        """Add my part's gradients to those that no step has used. Where others were lost meanwhile it is not whole."""
        added = self._added
        done = accumulate(
            self._replica,
            self.gradients,
            part,
            loss,
            added.unit or nominal,
            announce=False,
            fresh=not added.unit,
        )
        added.unit, added.step = added.unit or nominal, part.step
        added.places.setdefault(part.step, []).extend(done.places)
        added.loss_sum += done.loss_sum
        added.count += done.count
        return done

    def due(self, pace: float) -> bool:
        """Whether a step follows this part: about H · pace of a round's H, evenly spread, the last one at its end.

        Args:
            pace: my share over the largest.
        """
        if pace >= 1.0:
            return True
        now = self._replica.steps + 1
        if not self._round[0] < now <= self._round[1]:
            first, last = now - 1, now
            while first > 0 and not self._cadence.starts(first):
                first -= 1
            while not self._cadence.starts(last):
                last += 1
            self._round = first, last
        first, last = self._round
        length, steps = last - first, max(1, round((last - first) * pace))
        return (now - first) * steps // length > (now - 1 - first) * steps // length

    def step(self) -> tuple[float, float, bool, tuple[float, float]]:
        """Use what was added up: (gradient norm, rate, skipped, (loss sum, targets) of it that count)."""
        replica = self._replica
        added, self._added = self._added, _Added()
        self.gradients.finish()
        factor, lr = replica.rate(self._spec)
        if not added.count:
            self.gradients.detach()
            return math.nan, lr, False, (0.0, 0.0)
        norm, finite = step_alone(
            replica,
            self.gradients,
            self.optimizer,
            factor,
            added.loss_sum,
            added.count,
            unit=added.unit,
            step=added.step,
            places=added.places,
        )
        return norm, lr, not finite, (added.loss_sum, added.count) if finite else (0.0, 0.0)

    def forget(self) -> None:
        """Drop what was added up."""
        self._added = _Added()

    def close(self) -> None:
        self.gradients.close()
