"""The loop of the main job: feed, step, and at their times evaluate, save, compare, report."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from manyhands.core.errors import Stopped
from manyhands.core.events import Emit, Evaluated, Stepped, Warned
from manyhands.train import session
from manyhands.train.balancing import rebalance
from manyhands.train.evaluate import evaluate

if TYPE_CHECKING:
    from manyhands.balance.balancer import Balancer
    from manyhands.core.signals import Interrupts
    from manyhands.core.types import Rows, Task
    from manyhands.train.checkpoint import AsyncSaver
    from manyhands.train.feed import Feed
    from manyhands.train.replica import Replica, StepResult
    from manyhands.wire.world import World

LOG_S = 2.0
LOSS_STEPS = 20
SAVE_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When the loop does what, in steps; None: by the clock (rank 0's, agreed through the step's header)."""

    total_steps: int
    log_every: int | None
    eval_every: int | None
    save_every: int | None
    check_every: int


@dataclass
class Tally:
    """What this worker and the job have done so far; rank 0's job totals go into checkpoints."""

    samples: int = 0
    tokens: int = 0
    job_samples: int = 0
    compute_s: float = 0.0
    data_s: float = 0.0
    losses: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=LOSS_STEPS))
    rate_tokens: int = 0
    rate_s: float = 0.0
    eval: dict[str, float] = field(default_factory=dict)
    train_s: float = 0.0

    @property
    def train_loss(self) -> float:
        """Σ loss / Σ targets over the last steps."""
        count = sum(n for _, n in self.losses)
        return sum(loss * n for loss, n in self.losses) / count if count else float("nan")


@dataclass
class Loop:
    """One run over `schedule`. All workers run it in step.

    Attributes:
        state: what a checkpoint needs beyond the replica, as a function (rank 0's is written).
        flops_per_token, peak_flops: for MFU; peak over all workers.
    """

    replica: Replica
    feed: Feed
    balancer: Balancer | None
    task: Task
    world: World
    schedule: Schedule
    interrupts: Interrupts
    emit: Emit
    autocast: Callable[[], Any]
    eval_rows: Rows | None
    eval_batch: int
    saver: AsyncSaver | None
    state: Callable[[], dict[str, Any]]
    tokenizer: Path | None
    flops_per_token: float
    peak_flops: float
    tally: Tally = field(default_factory=Tally)

    def run(self) -> str:
        """Train to the end or until told to stop; returns "done" or the signal's name. Raises as the parts do."""
        self._mark = self._begun = time.perf_counter()
        self._marked = (self.replica.steps, self.replica.tokens, 0.0)
        self._saved_at = time.monotonic()
        self._saved_step = self.replica.steps
        self._save_due = self._torn = False
        first, self._warm = True, False
        while self.replica.steps < self.schedule.total_steps:
            step = self.replica.steps
            with self.interrupts.phase("compile" if first else "step", interruptible=first):
                self._torn = True
                result = self._step(step)
                self._torn = False
            first = False
            done = self.replica.steps
            if self._due_log(done):
                self._log(result)
            if result.stop:
                self.replica.meet()
                self._save(final=True)
                raise Stopped(result.stop & 0xFF)
            if self.schedule.check_every and done % self.schedule.check_every == 0:
                self.replica.check_agreement()
            if (
                self.schedule.eval_every
                and done % self.schedule.eval_every == 0
                and done < self.schedule.total_steps
            ):
                self.evaluate()
            if result.save or (self.schedule.save_every and done % self.schedule.save_every == 0):
                self._save_due = True
            if self._save_due and (self.replica.at_rest or not self.replica.method.comes_to_rest):
                self.replica.meet()
                self._save()
        self.replica.meet()
        self.evaluate()
        self._save(final=True)
        return "done"

    def _step(self, step: int) -> StepResult:
        start = time.perf_counter()
        part = self.feed.part(step)
        loaded = time.perf_counter()
        traffic = self.replica.wire.traffic
        before = traffic.communicate_s + traffic.idle_s
        result = self.replica.step(
            part, self.task.loss, stop=self.interrupts.requested or 0, save=self._clock_says_save()
        )
        now = time.perf_counter()
        self.tally.data_s += loaded - start
        self.tally.compute_s += now - loaded - (traffic.communicate_s + traffic.idle_s - before)
        self.tally.samples += sum(len(next(iter(batch.values()))) for _, batch in part.micro_batches)
        self.tally.tokens += result.own_tokens
        self.tally.train_s = now - self._begun
        self.tally.job_samples += result.rows
        if self._warm:  # the first step of a run builds kernels and fills caches
            self.tally.rate_s += now - start
            self.tally.rate_tokens += result.target_tokens
        self._warm = True
        emit = self.emit if self.world.rank == 0 else _drop
        rebalance(self.balancer, self.feed, result, self.replica.steps, emit)
        if not result.skipped and result.agreed:
            self.tally.losses.append((result.loss, result.target_tokens))
        elif result.skipped and result.target_tokens:
            self.emit(
                Warned(
                    message=f"step {step + 1}: loss {result.loss}, gradient norm {result.grad_norm}: update skipped",
                    where="train",
                )
            )
        return result

    def _clock_says_save(self) -> bool:
        return (
            self.schedule.save_every is None
            and self.world.rank == 0
            and self.saver is not None
            and time.monotonic() - self._saved_at > SAVE_S
        )

    def _due_log(self, done: int) -> bool:
        if self.world.rank != 0:
            return False
        if done == self.schedule.total_steps or done == 1:
            return True
        if self.schedule.log_every is not None:
            return done % self.schedule.log_every == 0
        return time.perf_counter() - self._mark > LOG_S

    def _log(self, result: StepResult) -> None:
        now = time.perf_counter()
        traffic = self.replica.wire.traffic
        steps, tokens, communicated = self._marked
        elapsed = max(now - self._mark, 1e-9)
        rate = (self.replica.tokens - tokens) / elapsed
        spent = traffic.communicate_s + traffic.idle_s
        per_step = elapsed / max(1, self.replica.steps - steps)
        self.emit(
            Stepped(
                step=self.replica.steps,
                total_steps=self.schedule.total_steps,
                epoch=self.feed.order.epoch(self.replica.steps),
                loss=result.loss,
                lr=result.lr,
                grad_norm=result.grad_norm,
                samples=result.rows,
                target_tokens=self.replica.tokens,
                tokens_per_s=rate,
                mfu=rate * self.flops_per_token / self.peak_flops if self.peak_flops else 0.0,
                communicate_share=min(1.0, (spent - communicated) / elapsed),
                memory_bytes=_memory_bytes(self.feed.device),
                eta_s=per_step * (self.schedule.total_steps - self.replica.steps),
            )
        )
        self._mark, self._marked = now, (self.replica.steps, self.replica.tokens, spent)

    def evaluate(self) -> dict[str, float]:
        """Score the held-out rows now; keeps and emits the metrics."""
        if self.eval_rows is None:
            return {}
        start = time.perf_counter()
        with self.interrupts.phase("evaluate", interruptible=True), self.replica.agreed():
            metrics = evaluate(
                self.replica.model,
                self.task,
                self.eval_rows,
                self.world,
                batch_rows=self.eval_batch,
                device=self.feed.device,
                autocast=self.autocast,
                emit=self.emit if self.world.rank == 0 else _drop,
                share=getattr(self.replica.method, "share", None),
            )
        self.tally.eval = metrics
        if self.world.rank == 0:
            self.emit(Evaluated(step=self.replica.steps, metrics=metrics, wall_s=time.perf_counter() - start))
        pause = time.perf_counter() - start
        self._mark += pause
        self._begun += pause
        return metrics

    def _save(self, *, final: bool = False) -> None:
        """Collective, at rest."""
        self._save_due = False
        if self._saved_step != self.replica.steps:
            self.replica.check_agreement()
            self._submit(collective=True)
            self._saved_step = self.replica.steps
            self._saved_at = time.monotonic()
        if final and self.saver is not None:
            self.saver.wait()

    def _submit(self, *, collective: bool) -> None:
        state = self.state() if self.saver is not None else {}
        taken = session.snapshot_of(self.replica, state, self.tokenizer, collective=collective)
        if self.saver is not None and taken is not None:
            self.saver.submit(taken)

    def save_now(self) -> None:
        """After an interruption inside a phase: keep what the last finished step left (rank 0 only, no collective).

        Between agreements, and within a step, that is nothing: the last checkpoint stands.
        """
        method = self.replica.method
        whole = not self._torn and (method.at_rest or getattr(method, "saves_alone", False))
        if whole and self.saver is not None and self._saved_step != self.replica.steps:
            self._submit(collective=False)
            self._saved_step = self.replica.steps
        if self.saver is not None:
            self.saver.wait()


def _drop(event: Any) -> None:
    pass


def _memory_bytes(device: torch.device) -> int:
    """Peak memory of this worker: the GPU's, or resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
