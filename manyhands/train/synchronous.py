"""Gradients agree at every step, in buckets, overlapped with backward.

What is exchanged is g = Σ ∇(loss sum) / nominal over my micro-batches, with one `nominal` for all workers, plus a small
header with the exact sums. Afterwards everything is multiplied by nominal / Σ valid targets, so the update is Σ/Σ over
everyone and over accumulation (promise 2). With full rows the factor is exactly 1 and costs nothing. A cadence of every
k-th step adds up the gradients of k global batches before they are exchanged.

A talk touches no parameter, so a failure before the update costs nothing but the step; where the result is not
finite the update is left out and the exchange keeps its old state. Where the set of workers changes (a `PeerLost`) before
the gradients travel, what I have added up stays: `adopt` takes it along into the next set, and only the micro-batches
of those who were lost are computed again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from manyhands.core.errors import PeerLost
from manyhands.core.request import Gather
from manyhands.exchange.combine import named
from manyhands.exchange.ordered import Tree
from manyhands.train.gradients import FlatGradients
from manyhands.train.header import Header, Unsound, Wishes
from manyhands.train.mending import shared_of
from manyhands.train.method import Part, StepResult, Sums, accumulate
from manyhands.train.norm import clip_factor, is_finite, norm_of, norm_there
from manyhands.train.owed import used_or_owed
from manyhands.train.reading import Reading, Stopwatch
from manyhands.wire.drive import Interleave, run

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Agreed, Talk
    from manyhands.train.method import Loss
    from manyhands.train.replica import Replica

WARY = 100  # agreements


class Synchronous:
    """All-reduce and its like: see the module.

    Attributes:
        unseen: the update does not wait for the norm to come to the host, and leaves itself out where that is not finite;
            the result is then `late`.
        keeps_sums: an interruption before the last micro-batch costs nothing of what was added up.
    """

    agrees = joint = True
    keeps_sums = True
    skips_alike = True
    comes_to_rest = True
    still = True

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        exchange = replica.strategy.exchange
        self._cadence = replica.strategy.cadence
        self._by_place = bool(getattr(exchange, "by_place", False))
        self._by_tensor = bool(getattr(exchange, "by_tensor", False))
        bucket_mb = math.inf if self._by_place else getattr(exchange, "bucket_mb", math.inf)
        self._talks = Interleave(replica.wire)
        self.gradients = FlatGradients(
            replica.named, replica.wire, bucket_mb=bucket_mb, on_bucket=self._begin
        )
        buckets = range(len(self.gradients.buckets))
        self._exchanges = [named(exchange, self.gradients.names_of(i)) for i in buckets]
        self.states: list[Any] = [self._exchanges[i].init(self._contribution(i)) for i in buckets]
        self.optimizer = self._build_optimizer()
        self._lazy = bool(getattr(replica.wire, "lazy", False))
        self.unseen = (
            replica.device.type == "cuda"
            and type(self)._update is Synchronous._update
            and getattr(self.optimizer, "looks_itself", False)
            and all(
                isinstance(s, tuple) and not s for s in self.states
            )  # else it depends on the update being made
        )
        self._pending = _Pending()
        self._norms: list[Tensor] = []  # of what I have added up, by bucket, before it travels
        self._asked: Reading | None = None  # of the last step, on a GPU
        self._wary = 0  # agreements before which all of my gradients are looked at
        self._told_of = 0  # the step of the last agreement
        self._consumed = False  # the buffers hold what the exchange has made of my contribution

    @property
    def committed(self) -> int:
        return self._replica.steps - self._pending.unfinished

    @property
    def at_rest(self) -> bool:
        return not self._pending.nominal

    def step(self, part: Part, loss: Loss, wishes: Wishes) -> StepResult:
        replica, pending = self._replica, self._pending
        due = self._cadence.due(replica.steps + 1)
        nominal = float(part.rows * replica.per_row)
        if self._by_place and part.step not in pending.held:
            self._tree = Tree(part.n_places)
        try:
            done = accumulate(
                replica,
                self.gradients,
                part,
                loss,
                pending.unit or nominal,
                announce=due and not self._lazy,
                fresh=not pending.nominal,
                by_place=self._leaf if self._by_place else None,
            )
            pending.add(part.step, done, nominal)
            done.require()
            if due:
                return self._agree_and_update(part, wishes, int(done.count), finishes=1)
        except BaseException as error:
            if not isinstance(error, PeerLost) or replica.over is None:
                self._forget()  # nothing was applied: the step can be done again
            raise
        loss_sum, count = done.loss_sum, done.count
        replica.steps += 1
        pending.unfinished += 1
        replica.tokens += int(nominal)
        pending.counted += int(nominal)
        mean = loss_sum / count if count else math.nan
        return StepResult(
            mean, int(nominal), part.rows, math.nan, 0.0, False, 0, False, int(count), agreed=False
        )

    def meet(self) -> None:
        """Gradients that were added up but not yet exchanged are, now."""
        if not self.at_rest:
            self._agree_and_update(Part(self._replica.steps - 1, [], 0, 0, 0), Wishes(), 0, finishes=0)

    def _agree_and_update(self, part: Part, wishes: Wishes, own: int, *, finishes: int) -> StepResult:
        """`finishes`: how many steps are done with it, 1 or (when coming to rest) none."""
        replica, pending = self._replica, self._pending
        told, states = self._agree(pending.loss_sum, pending.count, wishes)
        if self.unseen:
            replica.hear((), told.unsound.gradients or (), at=self._told_of)
        self._told_of = part.step
        lr, mean, norm, finite = 0.0, math.nan, math.nan, False
        late: Callable[[], float] | None = None
        if told.count:  # else a step without a single valid target: nothing to learn from, nothing wrong
            mean, scale = told.loss_sum / told.count, pending.unit / told.count
            if self.unseen and is_finite(mean):
                late, lr = self._update_unseen(told, scale, part.step, behind=1 - finishes)
                finite = True  # as far as is known
            else:
                norm = norm_of(self.gradients.buckets) * scale
                finite = is_finite(norm, mean)
                if finite:
                    lr = self._update(told, scale, norm, behind=1 - finishes)
                whose = Unsound(told.unsound.losses) if self.unseen else told.unsound
                self._wary = max(0, self._wary - 1) if finite or whose.losses or whose.gradients else WARY
                steps = tuple(pending.held)
                replica.took(finite=finite, step=part.step, loss=mean, norm=norm, whose=whose, steps=steps)
        if finite:
            self.states[:] = states
        self.gradients.detach()
        new_tokens = told.count - pending.counted
        replica.steps += finishes
        replica.tokens += new_tokens
        self._forget()
        return StepResult(
            mean,
            new_tokens,
            part.rows,
            norm,
            lr,
            not finite,
            told.stop,
            told.save,
            own,
            change=told.change,
            check=told.check,
            work=told.work,
            spent=told.spent,
            late=late,
        )

    @contextmanager
    def agreed(self, *, collective: bool = True) -> Iterator[None]:
        yield

    def shared(self) -> dict[str, dict[str, Tensor]]:
        """What all replicas hold alike, by kind: see `manyhands.train.mending`."""
        return shared_of(self._replica, self.optimizer.state_by_name())

    def optimizer_state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.optimizer.state_by_name()
        return found

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        self.optimizer.load_state_by_name(state)

    def local_state(self) -> dict[str, Tensor]:
        return {}

    def load_local_state(self, state: Mapping[str, Tensor]) -> None:
        pass

    def restart(self) -> None:
        self._forget()

    def rewind(self) -> dict[int, list[int]]:
        pending, replica = self._pending, self._replica
        replica.steps -= pending.unfinished
        replica.tokens -= pending.counted
        if self._consumed:
            self._forget()
            return {}
        pending.unfinished = pending.counted = 0
        return {step: list(places) for step, places in pending.held.items()}

    def adopt(self, other: Synchronous) -> None:
        self._adopt_sums(other)
        self.load_optimizer_state(other.optimizer_state())

    def _adopt_sums(self, other: Synchronous) -> None:
        """What was added up, and the exchange's state."""
        self._pending = other._pending
        if self._pending.nominal:
            self.gradients.adopt(other.gradients)
            if self._by_place:
                self._tree = other._tree
        self.states[:] = other.states

    def close(self) -> None:
        self.gradients.close()

    # -- how

    def _forget(self) -> None:
        """Nothing is added up, nothing is on its way."""
        self._pending = _Pending()
        self._talks = Interleave(self._replica.wire)
        self._consumed, self._norms = False, []

    def _build_optimizer(self) -> Any:
        replica = self._replica
        return replica.strategy.outer.build(replica.named, replica.device.type)

    def _agree(self, loss_sum: float, count: float, wishes: Wishes) -> tuple[Header, list[Any]]:
        """Exchange header and gradients; the buckets hold Σ afterwards. Also the exchange's next states."""
        eager = not (self._lazy or self._by_place)
        if eager:  # the gradients are already on their way
            self._consumed = True
            self.gradients.finish()
        else:
            self.gradients.zero_unused(self.gradients.used)
            self._norms = []
            if self._by_place and self._tree.nodes:
                self._norms.append(norm_there(list(self._tree.nodes.values())))
            for position in range(0 if self._by_place else len(self.gradients.buckets)):
                self._look_at(position)
        used = used_or_owed(self.gradients, self._exchanges, self.states, self._contribution)
        finite = self._own_is_finite()
        row = Header.row(loss_sum, count, wishes, self._replica.work, [*map(float, used)], finite=finite)
        told = Header.of(torch.stack(self._replica.wire.begin(Gather(row, even=True)).wait()))
        if not self._by_place:
            self._consumed = True
            if not eager:
                self.gradients.finish()
            agreed = self._talks.finish()
            copied = [self._take(i, each) for i, each in enumerate(agreed)]
            if any(copied):
                self.gradients.zero_gaps()
            return told, [each.state for each in agreed]
        agreed = [run(self._ordered(), self._replica.wire)]
        (total,) = agreed[0].mean
        offset = 0
        for bucket in self.gradients.buckets:
            bucket.copy_(total[offset : offset + bucket.numel()])
            offset += bucket.numel()
        return told, [agreed[0].state, *self.states[1:]]

    def _look_at(self, position: int) -> None:
        """Whether what I have added up of a bucket is finite: at all of it only for a while after nobody could be named."""
        buckets = self.gradients.buckets
        looked = buckets[position : position + 1] if self._wary else self.gradients.telling(position)
        if looked:
            self._norms.append(norm_there(looked))

    def _own_is_finite(self) -> bool:
        """Whether what I have added up is; where the update does not wait for its norm, of the step before."""
        norms, self._norms = self._norms, []
        asked, self._asked = (self._asked, None) if self.unseen else (None, None)
        if not norms:
            return True
        reading: Reading | None = Reading(torch.stack(norms))
        if self.unseen:
            reading, self._asked = asked, reading
        return reading is None or is_finite(*reading.values())

    def _update(self, told: Header, scale: float, norm: float, *, behind: int) -> float:
        """Scale, clip, optimizer step. Returns the rate used."""
        replica = self._replica
        start = time.perf_counter()
        clip = clip_factor(norm, replica.max_norm)
        if scale * clip != 1.0:
            for bucket in self.gradients.buckets:
                bucket.mul_(scale * clip)
        self.gradients.attach(told.used)
        factor, lr = replica.rate(replica.strategy.outer, behind=behind)
        self.optimizer.set_lr(factor)
        self.optimizer.step()
        replica.optimized(start)
        return lr

    def _update_unseen(
        self, told: Header, scale: float, step: int, *, behind: int
    ) -> tuple[Callable[[], float], float]:
        """The same without waiting for the norm: what clips, and leaves the update out, is a number on the device.

        Returns (what waits for the norm and counts the update, rate).
        """
        replica = self._replica
        stopwatch = Stopwatch(replica.device)
        steps = tuple(self._pending.held)
        norm = norm_there(self.gradients.buckets) * scale
        reading = Reading(norm)
        clip = (replica.max_norm / (norm + 1e-6)).clamp(max=1.0)
        self.gradients.attach(told.used)
        factor, lr = replica.rate(replica.strategy.outer, behind=behind)
        self.optimizer.set_lr(factor)
        self.optimizer.step(divisor=(1.0 / (scale * clip)).float(), left_out=(~norm.isfinite()).float())
        replica.work.stop(stopwatch, 0)

        def late() -> float:
            (found,) = reading.values()
            mean = told.loss_sum / told.count
            finite = math.isfinite(found)
            replica.took(finite=finite, step=step, loss=mean, norm=found, whose=Unsound(), steps=steps)
            return found

        return late, lr

    def _contribution(self, position: int) -> list[Tensor]:
        if self._by_tensor:
            return self.gradients.tensors(position)
        return [self.gradients.buckets[position]]

    def _begin(self, position: int, bucket: Tensor) -> None:
        self._consumed = True
        if not (self._lazy or self._by_place):  # else it is all there before anything travels
            self._look_at(position)
        exchange = self._exchanges[position]
        self._talks.start(exchange.talk(self._contribution(position), self.states[position]))

    def _take(self, position: int, agreed: Agreed) -> bool:
        """Put the sums into the buckets; whether they were not there already."""
        copied = False
        for mine, mean in zip(self._contribution(position), agreed.mean, strict=True):
            if mean is not mine and mean.data_ptr() != mine.data_ptr():
                mine.copy_(mean)
                copied = True
        return copied

    def _leaf(self, place: int) -> None:
        self._tree.add((0, place), torch.cat([b.reshape(-1) for b in self.gradients.micro_batch()]))

    def _ordered(self) -> Talk:
        nodes = self._tree.nodes
        numel = sum(b.numel() for b in self.gradients.buckets)
        like = self.gradients.buckets[0]
        leaves = self._tree.leaves
        keys = torch.tensor([[level, index, leaves] for level, index in nodes], dtype=torch.int64).reshape(
            -1, 3
        )
        values = torch.stack(list(nodes.values())) if nodes else like.new_empty(0, numel)
        talk: Talk = self._exchanges[0].talk([keys, values], self.states[0])
        return talk


@dataclass
class _Pending:
    """What was computed since the last agreement.

    Attributes:
        unit: the nominal count by which all of it was divided: the first global batch's.
        nominal: Σ nominal counts.
        counted: how many of them were added to the replica's tokens already, and `unfinished` how many steps to its steps.
        held: the places of which micro-batches, by step.
    """

    loss_sum: float = 0.0
    count: float = 0.0
    unit: float = 0.0
    nominal: float = 0.0
    counted: int = 0
    unfinished: int = 0
    held: dict[int, list[int]] = field(default_factory=dict)

    def add(self, step: int, done: Sums, nominal: float) -> None:
        self.loss_sum += done.loss_sum
        self.count += done.count
        self.unit = self.unit or nominal
        if step not in self.held:  # else this step goes on with another set of workers
            self.nominal += nominal
        self.held.setdefault(step, []).extend(done.places)
