"""A replica and its step: the one loop body that serves every strategy.

    accumulate my micro-batches (sums and counts) -> talk -> agree -> scale, clip -> optimizer

What is exchanged is g = Σ ∇(loss sum) / nominal over my micro-batches, with one `nominal` for all workers, plus a small
header with the exact sums. Afterwards everything is multiplied by nominal / Σ valid targets, so the update is Σ/Σ over
everyone and over accumulation (promise 2). With full rows the factor is exactly 1 and costs nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from manyhands.core import rng
from manyhands.core.errors import Diverged, ManyhandsError
from manyhands.core.request import Gather
from manyhands.core.types import Agreed, Summed
from manyhands.exchange.ordered import Tree
from manyhands.train.gradients import FlatGradients
from manyhands.wire.drive import Interleave, run

if TYPE_CHECKING:
    from torch import Tensor, nn

    from manyhands.core.types import Talk, Wire
    from manyhands.strategy.base import Strategy

    Batch = Mapping[str, Tensor]
    Loss = Callable[[nn.Module, Batch], "Summed | tuple[Tensor, int | Tensor]"]

MAX_SKIPPED = 10


@dataclass(frozen=True)
class Part:
    """My part of one global batch.

    Attributes:
        step: which global batch, from 0.
        micro_batches: (place in the global batch, batch), in order; empty where this worker has nothing to do.
        n_places: micro-batches in the whole global batch.
        rows: rows in the whole global batch.
        seed: with step and place, the source of every random number.
    """

    step: int
    micro_batches: Sequence[tuple[int, Batch]]
    n_places: int
    rows: int
    seed: int


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every replica.

    Attributes:
        loss: Σ loss / Σ valid targets over the whole global batch.
        target_tokens: Σ valid targets.
        grad_norm: before clipping.
        lr: the rate used.
        skipped: the update was left out because a gradient was not finite.
        stop: nonzero when a worker was asked to stop (the signal's number).
        save: a worker asked for a checkpoint after this step.
        own_tokens: valid targets of this worker's part.
    """

    loss: float
    target_tokens: int
    rows: int
    grad_norm: float
    lr: float
    skipped: bool
    stop: int
    save: bool
    own_tokens: int


class Replica:
    """A model that is kept in agreement with the others'.

    Args:
        model: on its device, initialised the same on every worker (checked).
        strategy: how the replicas agree.
        wire: joins them.
        max_grad_norm: clip the global gradient norm; 0 or None: never.
        targets_per_row: valid targets of a full row; makes the final scaling factor 1 for full batches.
        total: length of the schedule, in its unit (steps or target tokens); None: a constant rate.
        autocast: context for forward passes.
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: Strategy,
        wire: Wire,
        *,
        max_grad_norm: float | None = None,
        targets_per_row: int = 1,
        total: float | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        forward: nn.Module | Callable[..., Any] | None = None,
    ) -> None:
        self.model = model
        self.strategy = strategy
        self.wire = wire
        self.total = total
        self.steps = 0
        self.tokens = 0
        self.skipped = 0
        self.optimize_s = 0.0
        self._forward = forward if forward is not None else model
        self._max_norm = max_grad_norm or math.inf
        self._per_row = targets_per_row
        self._autocast = autocast
        self._skipped_in_a_row = 0
        self._by_place = bool(getattr(strategy.exchange, "by_place", False))
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        device = named[0][1].device if named else torch.device("cpu")
        bucket_mb = getattr(strategy.exchange, "bucket_mb", math.inf)
        self._talks = Interleave(wire)
        self.gradients = FlatGradients(
            named, wire, bucket_mb=math.inf if self._by_place else bucket_mb, on_bucket=self._begin
        )
        self.states = [strategy.exchange.init([b]) for b in self.gradients.buckets]
        self.optimizer = strategy.outer.build(named, device.type)
        self._device = device
        self.check_agreement()

    def step(self, part: Part, loss: Loss, *, stop: int = 0, save: bool = False) -> StepResult:
        """Forward, backward, agreement, update. Collective: every worker calls it, also with an empty part.

        Args:
            part: from `Hands.share` (or built by hand).
            loss: (model, batch) -> (loss sum, count of valid targets).
            stop: nonzero asks all workers to stop after this step; everybody sees the largest.
            save: asks all workers to save after this step.

        Raises:
            PeerLost: another worker is gone; nothing of this step was applied.
            ManyhandsError: too many successive steps without finite gradients.
        """
        nominal = float(part.rows * self._per_row)
        loss_sum, count = self._accumulate(part, loss, nominal)
        agreed = self._agree(loss_sum, count, stop, save)
        norm = math.nan if not agreed.count else self._norm() * nominal / agreed.count
        lr = 0.0
        skipped = not (math.isfinite(norm) and math.isfinite(agreed.loss_sum))
        if skipped:
            self._skip(part, agreed, norm)
        else:
            self._skipped_in_a_row = 0
            lr = self._update(agreed, nominal / agreed.count, norm)
        self.gradients.detach()
        self.steps += 1
        self.tokens += agreed.count
        mean = agreed.loss_sum / agreed.count if agreed.count else math.nan
        return StepResult(
            mean, agreed.count, part.rows, norm, lr, skipped, agreed.stop, agreed.save, int(count)
        )

    def set_rate(self) -> float:
        """Apply the schedule at the current count of steps or tokens; the base rate after it."""
        spec = self.strategy.outer
        schedule = spec.schedule
        factor = 1.0
        if schedule is not None:
            done = self.tokens if getattr(schedule, "unit", "steps") == "tokens" else self.steps
            factor = schedule.factor(float(done), float(self.total) if self.total else math.inf)
        self.optimizer.set_lr(factor)
        return spec.lr * factor

    def check_agreement(self) -> str:
        """Compare fingerprints of all parameters over the workers (promise 5). Raises `Diverged`."""
        mine = fingerprint(self.model)
        everyones = self.wire.begin(Gather(mine)).wait()
        for rank, other in enumerate(everyones):
            if not torch.equal(other, everyones[0]):
                raise Diverged(
                    f"the parameters of worker {rank} differ from worker 0's after step {self.steps}",
                    "replicas are bitwise equal",
                    "build the model the same everywhere; if this appeared in mid-run, a machine computes wrongly",
                )
        return f"{int(mine[0]) & (2**64 - 1):016x}{int(mine[1]) & (2**64 - 1):016x}"

    def close(self) -> None:
        self.gradients.close()

    # -- how

    def _accumulate(self, part: Part, loss: Loss, nominal: float) -> tuple[float, float]:
        """Run my micro-batches; returns my loss sum and count."""
        self.gradients.start()
        self._tree = Tree(part.n_places)
        loss_sum: Tensor | None = None
        count: int | Tensor = 0
        for i, (place, batch) in enumerate(part.micro_batches):
            last = i == len(part.micro_batches) - 1
            self.gradients.start_micro_batch(last=last and not self._by_place, separate=self._by_place)
            rng.seed_torch(part.seed, part.step, place)
            with self._autocast():
                summed = Summed(*loss(self._forward, batch))  # type: ignore[arg-type]
            (summed.loss_sum / nominal).backward()  # type: ignore[no-untyped-call]
            detached = summed.loss_sum.detach().double()
            loss_sum = detached if loss_sum is None else loss_sum + detached
            count = count + summed.count
            if self._by_place:
                flat = torch.cat([b.reshape(-1) for b in self.gradients.micro_batch()])
                self._tree.add((0, place), flat)
        return (0.0 if loss_sum is None else float(loss_sum)), float(count)

    def _agree(self, loss_sum: float, count: float, stop: int, save: bool) -> _Header:
        """Exchange header and gradients; the buckets hold Σ afterwards."""
        if not self._by_place:
            self.gradients.finish()
        used = [float(u) for u in self.gradients.used]
        header = torch.tensor([loss_sum, count, float(stop), float(save), *used], dtype=torch.float64)
        table = torch.stack(self.wire.begin(Gather(header)).wait())  # [workers, 4 + parameters]
        if self._by_place:
            (total,) = run(self._ordered(), self.wire).mean
            offset = 0
            for bucket in self.gradients.buckets:
                bucket.copy_(total[offset : offset + bucket.numel()])
                offset += bucket.numel()
        else:
            for i, agreed in enumerate(self._talks.finish()):
                self._take(i, agreed)
        return _Header(
            loss_sum=float(table[:, 0].sum()),
            count=int(table[:, 1].sum()),
            stop=int(table[:, 2].max()),
            save=bool(table[:, 3].max()),
            used=(table[:, 4:].sum(0) > 0).tolist(),
        )

    def _update(self, agreed: _Header, scale: float, norm: float) -> float:
        """Scale, clip, optimizer step. Returns the rate used."""
        start = time.perf_counter()
        clip = min(1.0, self._max_norm / (norm + 1e-6))
        if scale * clip != 1.0:
            for bucket in self.gradients.buckets:
                bucket.mul_(scale * clip)
        self.gradients.attach(agreed.used)
        lr = self.set_rate()
        self.optimizer.step()
        self.optimize_s += time.perf_counter() - start
        return lr

    def _begin(self, position: int, bucket: Tensor) -> None:
        self._talks.start(self.strategy.exchange.talk([bucket], self.states[position]))

    def _take(self, position: int, agreed: Agreed) -> None:
        (mean,) = agreed.mean
        bucket = self.gradients.buckets[position]
        if mean is not bucket:
            bucket.copy_(mean)
        self.states[position] = agreed.state

    def _ordered(self) -> Talk:
        nodes = self._tree.nodes
        numel = sum(b.numel() for b in self.gradients.buckets)
        like = self.gradients.buckets[0]
        leaves = self._tree.leaves
        keys = torch.tensor([[level, index, leaves] for level, index in nodes], dtype=torch.int64).reshape(
            -1, 3
        )
        values = torch.stack(list(nodes.values())) if nodes else like.new_empty(0, numel)
        return self.strategy.exchange.talk([keys, values], self.states[0])

    def _norm(self) -> float:
        norms = [
            torch.linalg.vector_norm(b, dtype=torch.promote_types(b.dtype, torch.float32))
            for b in self.gradients.buckets
        ]
        return float(torch.linalg.vector_norm(torch.stack([n.double() for n in norms])))

    def _skip(self, part: Part, agreed: _Header, norm: float) -> None:
        if not agreed.count:  # a step without a single valid target: nothing to learn from, nothing wrong
            return
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > MAX_SKIPPED:
            raise ManyhandsError(
                f"loss {agreed.loss_sum / agreed.count} and gradient norm {norm} in {self._skipped_in_a_row} "
                f"successive steps, the last at step {part.step}",
                "an update needs finite gradients",
                "lower the learning rate, or look at the data of these steps",
            )


@dataclass(frozen=True)
class _Header:
    """The exact sums of one step over all workers."""

    loss_sum: float
    count: int
    stop: int
    save: bool
    used: list[bool]


def fingerprint(model: nn.Module) -> Tensor:
    """Two 64-bit words that change with any bit of any parameter or persistent buffer: [2] int64.

    Word sums of the raw bits, and the same weighted by position; wrap-around arithmetic, so order of addition and
    number of threads do not matter.
    """
    plain = torch.zeros((), dtype=torch.int64)
    placed = torch.zeros((), dtype=torch.int64)
    for i, tensor in enumerate(model.state_dict().values()):
        bits = _bits(tensor)
        word = bits.sum(dtype=torch.int64).cpu()
        plain += word
        placed += word * (2 * i + 1) + (bits[::7].sum(dtype=torch.int64).cpu() << 20)
    return torch.stack([plain, placed])


def _bits(tensor: Tensor) -> Tensor:
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().reshape(-1)
    if flat.dtype is torch.bool or flat.is_complex():
        flat = flat.to(torch.uint8) if flat.dtype is torch.bool else torch.view_as_real(flat).reshape(-1)
    return flat.view(ints[flat.element_size()])


__all__ = ["Part", "Replica", "StepResult", "fingerprint"]
