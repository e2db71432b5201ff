"""Hogwild: the workers of one machine update one copy of the parameters, without locks (arXiv:1106.5730, algorithm 1).

Each worker computes the mean gradient of its own share of a global batch at whatever the parameters are just then, and
its own optimizer writes the update over them in place: N workers make N small updates where all-reduce makes one. Nobody
waits, except at every `every`-th step of the cadence, where the workers tell each other their sums (loss, targets, a
request to stop): that also bounds how far they can be apart. With one worker it is plain training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from manyhands.core.errors import UsageError
from manyhands.core.request import Gather
from manyhands.train.alone import step_alone
from manyhands.train.gradients import FlatGradients
from manyhands.train.header import Header, Wishes
from manyhands.train.method import Part, StepResult, accumulate
from manyhands.wire.solo import Solo

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.train.method import Loss
    from manyhands.train.replica import Replica


class Hogwild:
    """See the module."""

    agrees = False  # one copy: there is nothing to compare, and it moves while it is read
    comes_to_rest = False
    saves_alone = True

    def __init__(self, replica: Replica) -> None:
        if not hasattr(replica.wire, "common"):
            raise UsageError(
                "placement = 'shared-memory' over a process group",
                "Hogwild's workers share the memory of one machine's CPUs",
                "start all workers on one machine with --device cpu, or use strategy 'parameter-server(consistency=async)'",
            )
        self._replica = replica
        self._cadence = replica.strategy.cadence
        self.states: list[Any] = []
        self._share(replica)
        self.gradients = FlatGradients(replica.named, Solo(), bucket_mb=math.inf, on_bucket=lambda *_: None)
        self.optimizer = replica.strategy.outer.build(replica.named, replica.device.type)
        self._sums = [0.0, 0.0]
        self._exact, self._since, self._met = 0, 0, 0
        self._held: dict[int, list[int]] = {}
        self._rested = True

    @property
    def applied(self) -> list[range]:
        """Which steps since the workers last spoke each rank has written into the common parameters."""
        return [range(self._met, int(steps)) for steps in self._applied]

    @property
    def committed(self) -> int:
        return self._met

    @property
    def at_rest(self) -> bool:
        return self._rested

    def step(self, part: Part, loss: Loss, wishes: Wishes) -> StepResult:
        replica = self._replica
        self._rested = False
        nominal = part.rows * replica.per_row
        done = accumulate(replica, self.gradients, part, loss, float(nominal), announce=False).require()
        loss_sum, count = done.loss_sum, done.count
        self.gradients.finish()
        norm, lr, skipped = self._update(part, done.places, loss_sum, count, nominal)
        if skipped:  # nothing has come of it
            loss_sum = count = 0.0
        replica.steps += 1
        self._applied[replica.wire.rank] = replica.steps
        self._since += nominal
        self._sums = [self._sums[0] + loss_sum, self._sums[1] + count]
        self._held.setdefault(part.step, []).extend(done.places)
        if not self._cadence.due(replica.steps):
            replica.tokens = self._exact + self._since
            mean = loss_sum / count if count else math.nan
            return StepResult(mean, nominal, part.rows, norm, lr, skipped, 0, False, int(count), agreed=False)
        told, correction = self._tell(wishes)
        mean = told.loss_sum / told.count if told.count else math.nan
        return StepResult(
            mean,
            nominal + correction,
            part.rows,
            norm,
            lr,
            skipped,
            told.stop,
            told.save,
            int(count),
            change=told.change,
            work=told.work,
            spent=told.spent,
        )

    def meet(self) -> None:
        if not self._rested:
            self._tell(Wishes())
        self._rested = True

    @contextmanager
    def agreed(self, *, collective: bool = True) -> Iterator[None]:
        """Nobody writes while somebody is inside."""
        if collective:
            self._barrier()
        yield
        if collective:
            self._barrier()

    def optimizer_state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.optimizer.state_by_name()
        return found

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        self.optimizer.load_state_by_name(state)

    def local_state(self) -> dict[str, Tensor]:
        return self.optimizer_state()

    def load_local_state(self, state: Mapping[str, Tensor]) -> None:
        self.optimizer.load_state_by_name(state)

    def restart(self) -> None:
        self._exact, self._since, self._sums, self._rested = self._replica.tokens, 0, [0.0, 0.0], True
        self._met, self._held = self._replica.steps, {}

    def rewind(self) -> dict[int, list[int]]:
        """My updates since the workers last spoke are in the common parameters, and stay."""
        self._replica.steps, self._replica.tokens, self._since = self._met, self._exact, 0
        return {step: list(places) for step, places in self._held.items()}

    def adopt(self, other: Hogwild) -> None:
        self._sums, self._exact, self._met = other._sums, other._exact, other._met
        self._held, self._rested = other._held, other._rested
        self.load_optimizer_state(other.optimizer_state())

    def close(self) -> None:
        self.gradients.close()

    # -- how

    def _share(self, replica: Replica) -> None:
        """Move the parameters into memory that all workers map; rank 0's values (all are equal) fill it."""
        wire: Any = replica.wire
        for dtype in dict.fromkeys(p.dtype for _, p in replica.named):
            mine = [p for _, p in replica.named if p.dtype is dtype]
            memory = wire.common(sum(p.numel() for p in mine), dtype)
            offset = 0
            for param in mine:
                view = memory[offset : offset + param.numel()].view(param.shape)
                if wire.rank == 0:
                    view.copy_(param.detach())
                param.data = view
                offset += param.numel()
        self._applied = wire.common(wire.size, torch.int64)  # how many steps each rank has applied
        self._barrier()

    def _update(
        self, part: Part, places: Sequence[int], loss_sum: float, count: float, nominal: int
    ) -> tuple[float, float, bool]:
        """My own update of the common parameters: (gradient norm, rate, skipped)."""
        replica = self._replica
        factor, lr = replica.rate(replica.strategy.outer)
        if not count:
            self.gradients.detach()
            return math.nan, lr, False
        norm, finite = step_alone(
            replica,
            self.gradients,
            self.optimizer,
            factor,
            loss_sum,
            count,
            unit=nominal,
            step=part.step,
            places={part.step: places},
        )
        return norm, lr, not finite

    def _tell(self, wishes: Wishes) -> tuple[Header, int]:
        """Everybody's sums since the last time, and by how much the targets differ from the nominal ones."""
        row = Header.row(self._sums[0], self._sums[1], wishes, self._replica.work)
        told = Header.of(torch.stack(self._replica.wire.begin(Gather(row, even=True)).wait()))
        self._exact += told.count
        correction = told.count - self._since
        self._since, self._sums = 0, [0.0, 0.0]
        self._met, self._held = self._replica.steps, {}
        self._replica.tokens = self._exact
        self._replica.hear(told.left_out)
        return told, correction

    def _barrier(self) -> None:
        self._replica.wire.begin(Gather(torch.zeros(1), even=True)).wait()
