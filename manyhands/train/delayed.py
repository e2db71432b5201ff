"""Gradients agree one step late, so that they travel while the next step is computed (see `manyhands.cadence.delayed`).

    gₜ at θₜ ;  finish the talk of t−1: mean(t−1) ;  A ← outer(A, mean(t−1)) ;  start the talk of gₜ
    θₜ₊₁ = A, or with `correct` the forecast: outer(A, mean(t−1) + own(t) − own(t−1)), taken back when mean(t) is there

A, the agreed parameters, and the optimizer's state are the same on all workers, to the bit. With one worker the forecast
is exact, and so the method is plain training. It costs a copy of parameters and optimizer state, and one more optimizer
step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from manyhands.core.request import Gather
from manyhands.exchange.combine import named
from manyhands.train.gradients import FlatGradients
from manyhands.train.header import Header, Wishes
from manyhands.train.mending import shared_of
from manyhands.train.method import Part, StepResult, accumulate
from manyhands.train.norm import clip_factor, is_finite, norm_of
from manyhands.train.owed import used_or_owed
from manyhands.wire.drive import Interleave
from manyhands.wire.solo import Solo

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Handle
    from manyhands.strategy.base import Strategy
    from manyhands.train.method import Loss
    from manyhands.train.replica import Replica


class DelayedSteps:
    """See the module."""

    agrees = joint = True
    skips_alike = True
    comes_to_rest = False

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        exchange = replica.strategy.exchange
        self._correct = bool(getattr(replica.strategy.cadence, "correct", False))
        self._by_tensor = bool(getattr(exchange, "by_tensor", False))
        self.gradients = FlatGradients(
            replica.named,
            Solo(str(replica.device)),
            bucket_mb=getattr(exchange, "bucket_mb", math.inf),
            on_bucket=lambda *_: None,
        )
        # what travels stays untouched while the next gradients are computed
        self._travelling = [replica.wire.buffer(b.numel(), b.dtype) for b in self.gradients.buckets]
        buckets = range(len(self._travelling))
        self._exchanges = [named(exchange, self.gradients.names_of(i)) for i in buckets]
        self.states: list[Any] = [self._exchanges[i].init(self._contribution(i)) for i in buckets]
        self.optimizer = replica.strategy.outer.build(replica.named, replica.device.type)
        self._flight: _Flight | None = None
        self._own: tuple[list[Tensor], float] | None = (
            None  # my last contribution and count, for the forecast
        )
        self._saved: tuple[list[Tensor], dict[str, Tensor]] | None = (
            None  # A and the optimizer's state behind a forecast
        )

    @staticmethod
    def extra_bytes(strategy: Strategy, own: float) -> float:
        """See `manyhands.train.state_bytes`: my contribution; for the forecast the last one, and what is gone back to."""
        return 4.0 + (8.0 + own if getattr(strategy.cadence, "correct", False) else 0.0)

    @property
    def committed(self) -> int:
        return self._replica.steps - (self._flight is not None)

    @property
    def at_rest(self) -> bool:
        return self._flight is None and self._saved is None

    def step(self, part: Part, loss: Loss, wishes: Wishes) -> StepResult:
        replica = self._replica
        nominal = float(part.rows * replica.per_row)
        done = accumulate(replica, self.gradients, part, loss, nominal, announce=False).require()
        loss_sum, count = done.loss_sum, done.count
        self.gradients.finish()
        used = list(self.gradients.used)
        own = [b.clone() for b in self.gradients.buckets]
        finite = is_finite(norm_of(own))
        arrived = self._arrive()
        flags = used_or_owed(self.gradients, self._exchanges, self.states, self._contribution)
        row = Header.row(loss_sum, count, wishes, replica.work, [*map(float, flags)], finite=finite)
        for buffer, mine in zip(self._travelling, own, strict=True):
            buffer.copy_(mine)
        self._depart(row, nominal)
        if self._correct:
            self._forecast(own, arrived, nominal, count, used)
            self._own = (own, count)
        replica.steps += 1
        replica.tokens += int(nominal)  # corrected when it arrives
        if arrived is None:  # the first step: nothing has been agreed yet
            mean = loss_sum / count if count else math.nan
            lr = replica.rate(replica.strategy.outer)[1]
            norm = norm_of(own) * nominal / count if count else math.nan
            return StepResult(
                mean, int(nominal), part.rows, norm, lr, False, 0, False, int(count), agreed=False
            )
        told = arrived.told
        mean = told.loss_sum / told.count if told.count else math.nan
        return StepResult(
            mean,
            told.count,
            part.rows,
            arrived.norm,
            arrived.lr,
            not is_finite(arrived.norm),
            told.stop,
            told.save,
            int(count),
            change=told.change,
            check=told.check,
            work=told.work,
            spent=told.spent,
        )

    def meet(self) -> None:
        self._arrive()
        self._own = None

    @contextmanager
    def agreed(self, *, collective: bool = True) -> Iterator[None]:
        """The agreed parameters; what is in flight is not among them."""
        if self._saved is None:
            yield
            return
        forecast = [p.detach().clone() for _, p in self._replica.named]
        self._put(self._saved[0])
        try:
            yield
        finally:
            self._put(forecast)

    def shared(self) -> dict[str, dict[str, Tensor]]:
        """What all replicas hold alike, by kind; behind a forecast that is what was kept."""
        found = shared_of(self._replica, self.optimizer_state())
        if self._saved is not None:
            found["parameters"] = {
                name: kept for (name, _), kept in zip(self._replica.named, self._saved[0], strict=True)
            }
        return found

    def optimizer_state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self._saved[1] if self._saved else self.optimizer.state_by_name()
        return found

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        self.optimizer.load_state_by_name(state)

    def local_state(self) -> dict[str, Tensor]:
        return {}

    def load_local_state(self, state: Mapping[str, Tensor]) -> None:
        pass

    def restart(self) -> None:
        self._flight = self._saved = self._own = None

    def rewind(self) -> dict[int, list[int]]:
        """What was in flight is lost; its step is computed again, at the agreed parameters."""
        if self._saved is not None:
            self._put(self._saved[0])
            self.optimizer.replace_state_by_name(self._saved[1])
        if self._flight is not None:
            self._replica.steps -= 1
            self._replica.tokens -= int(self._flight.nominal)
        self.restart()
        return {}

    def adopt(self, other: DelayedSteps) -> None:
        self.states[:] = other.states
        self.load_optimizer_state(other.optimizer_state())

    def close(self) -> None:
        self.gradients.close()

    # -- how

    def _contribution(self, i: int) -> list[Tensor]:
        if not self._by_tensor:
            return [self._travelling[i]]
        return [view for _, view in self.gradients.cut(i, self._travelling[i])]

    def _depart(self, row: Tensor, nominal: float) -> None:
        wire = self._replica.wire
        header = wire.begin(Gather(row, even=True))
        talks = Interleave(wire)
        for i, state in enumerate(self.states):
            talks.start(self._exchanges[i].talk(self._contribution(i), state))
        self._flight = _Flight(talks, header, nominal)

    def _arrive(self) -> _Arrived | None:
        """What was in flight becomes the agreed parameters, which the model then holds."""
        flight = self._flight
        if flight is None:
            return None
        replica = self._replica
        told = Header.of(torch.stack(flight.header.wait()))
        agreed = flight.talks.finish()
        self._flight = None
        if self._saved is not None:
            self._put(self._saved[0])
            self.optimizer.replace_state_by_name(self._saved[1])
            self._saved = None
        means: list[Tensor] = []
        for i, each in enumerate(agreed):
            for mine, mean in zip(self._contribution(i), each.mean, strict=True):
                if mean is not mine:
                    mine.copy_(mean)
            means.append(self._travelling[i])
        self.gradients.zero_gaps(means)  # a codec may have made something of nothing
        replica.tokens -= int(flight.nominal)
        factor, rate = replica.rate(replica.strategy.outer, behind=1)  # of the step that is now agreed upon
        replica.tokens += told.count
        norm = norm_of(means) * flight.nominal / told.count if told.count else math.nan
        finite = is_finite(norm, told.loss_sum)
        lr = 0.0
        if told.count:
            replica.took(
                finite=finite,
                step=replica.steps - 1,
                loss=told.loss_sum / told.count,
                norm=norm,
                whose=told.unsound,
            )
        if finite:
            self.states[:] = [each.state for each in agreed]
            lr = rate
            self._apply(means, flight.nominal / told.count, norm, told.used, factor)
        return _Arrived(
            told, [m.clone() for m in means] if self._correct else means, norm, lr, finite, flight.nominal
        )

    def _apply(
        self, sums: list[Tensor], scale: float, norm: float, used: list[bool], rate_factor: float
    ) -> None:
        """One optimizer step with these sums."""
        replica = self._replica
        start = time.perf_counter()
        factor = scale * clip_factor(norm, replica.max_norm)
        for bucket, total in zip(self.gradients.buckets, sums, strict=True):
            torch.mul(total, factor, out=bucket)
        self.gradients.zero_gaps()
        self.gradients.attach(used)
        self.optimizer.set_lr(rate_factor)
        self.optimizer.step()
        self.gradients.detach()
        replica.optimized(start)

    def _forecast(
        self, own: list[Tensor], arrived: _Arrived | None, nominal: float, count: float, used: list[bool]
    ) -> None:
        """Go on from outer(A, mean(t−1) + own(t) − own(t−1)); A is kept."""
        if arrived is not None and arrived.finite and self._own is not None and arrived.told.count:
            # in this order a lone worker's mean and last contribution cancel exactly
            last, last_count = self._own
            units = arrived.nominal / nominal  # a last, smaller batch was divided by less
            guess = [(m - before) * units + o for m, o, before in zip(arrived.sums, own, last, strict=True)]
            scale = nominal / max(1.0, arrived.told.count + count - last_count)
            used = [a or b for a, b in zip(arrived.told.used, used, strict=True)]
        elif count:
            guess, scale = own, nominal / count
        else:
            return
        norm = norm_of(guess) * scale
        if not is_finite(norm):
            return
        state = {name: t.clone() for name, t in self.optimizer.state_by_name().items()}
        self._saved = ([p.detach().clone() for _, p in self._replica.named], state)
        factor, _ = self._replica.rate(self._replica.strategy.outer)  # what the true update will have
        self._apply(guess, scale, norm, used, factor)

    def _put(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for (_, param), value in zip(self._replica.named, values, strict=True):
                param.copy_(value)


@dataclass(frozen=True)
class _Flight:
    talks: Interleave
    header: Handle
    nominal: float


@dataclass(frozen=True)
class _Arrived:
    """An agreement: header, sums, norm of the mean, rate, whether it was applied, what contributions were divided by."""

    told: Header
    sums: list[Tensor]
    norm: float
    lr: float
    finite: bool
    nominal: float
