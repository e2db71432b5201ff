"""A replica and its step: the one door to every strategy.

    accumulate my micro-batches (sums and counts) -> the strategy's method -> update

What differs between methods is in `manyhands.train.method` and its neighbours; what they share is here: the model, the
counters, the schedule, and the comparison of fingerprints.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from manyhands.core.errors import ManyhandsError
from manyhands.core.events import Emit, ignore
from manyhands.core.membership import SUMS
from manyhands.core.registry import resolve_target
from manyhands.exchange.combine import check_names
from manyhands.train import chaos_hook
from manyhands.train.carried import fetch_s
from manyhands.train.gradients import refuse_sparse
from manyhands.train.header import Unsound, Wishes, Work
from manyhands.train.leftout import Heard, LeftOut, Note
from manyhands.train.memory import Fits
from manyhands.train.mending import agree_at_start, check_agreement, fingerprint
from manyhands.train.method import MAX_SKIPPED, Part, StepResult

if TYPE_CHECKING:
    from torch import Tensor, nn

    from manyhands.core.types import Wire
    from manyhands.strategy.base import OptimizerSpec, Strategy
    from manyhands.train.method import Loss, Method


LONG_S = 1.5  # an interruption costs half a second at most


def _tell_nobody(phase: str, steps: int) -> None:
    pass


class Replica:
    """A model that is kept in agreement with the others'.

    Args:
        model: on its device, initialised the same on every worker (checked).
        strategy: how the replicas agree.
        wire: joins them.
        max_grad_norm: clip the global gradient norm; 0 or None: never.
        targets_per_row: valid targets of a full row; makes the final scaling factor 1 for full batches.
        total: length of a schedule: a number in its unit (steps or target tokens), or one for each unit, where the optimizers of
            own and of agreed steps may count in different ones; None: a constant rate.
        autocast: context for forward passes.
        over: set when somebody was lost (see `manyhands.core.membership`).
        tell_phase: takes what is being done, and after how many steps, for whoever decides when others may come in.
        lost_round: of local steps: whether what a lost worker has done since the last agreement is done again, "redo" (where
            the method can; "auto", too), or left out, "drop".
        compare: whether all workers' models are equal already, which is checked.
        continues: what the method of an earlier set of workers has salvaged, with the counters; or that this worker is a
            ``guest``, which is not one of the job's workers yet.

    Attributes:
        steps, tokens: done so far, by the whole job.
        skipped: steps without an update because a gradient was not finite.
        work: seconds and rows of forward and backward since they were last told.
        fits: the most rows of a pass that memory was found to hold.
        notes: updates that were left out, until somebody takes them (the last of many).
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: Strategy,
        wire: Wire,
        *,
        max_grad_norm: float | None = None,
        targets_per_row: int = 1,
        total: float | Mapping[str, float] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        forward: nn.Module | Callable[..., Any] | None = None,
        over: threading.Event | None = None,
        tell_phase: Callable[[str, int], None] = _tell_nobody,
        lost_round: str = "auto",
        compare: bool = True,
        continues: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.strategy = strategy
        self.wire = wire
        self.over = over
        self.tell_phase = tell_phase
        self._open = False  # to newcomers, in this step
        self.lost_round = lost_round
        self.total = total
        self.continues = continues or {}
        self.steps = int(self.continues.get("steps", 0))
        self.tokens = int(self.continues.get("tokens", 0))
        self.skipped = int(self.continues.get("skipped", 0))
        self.forward: Any = forward if forward is not None else model
        self.max_norm = max_grad_norm or math.inf
        self.per_row = targets_per_row
        self.autocast = autocast
        self.work = Work(wire.traffic)
        self.fits = Fits()
        self.notes: deque[Note] = deque(maxlen=1000)
        self._skipped_in_a_row = 0
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        refuse_sparse(model)
        check_names(strategy.exchange, [n for n, _ in model.named_parameters(remove_duplicate=False)])
        for _, param in self.named:  # their gradients are, and fused optimizers go through both alike
            if not param.is_contiguous():
                param.data = param.detach().contiguous()
        self.device = self.named[0][1].device if self.named else torch.device("cpu")
        if compare:
            agree_at_start(model, wire)
        self.method: Method = resolve_target(strategy.method)(self)

    def step(
        self,
        part: Part,
        loss: Loss,
        *,
        stop: int = 0,
        save: bool = False,
        change: bool = False,
        check: bool = False,
        late: bool = False,
    ) -> StepResult:
        """Forward, backward, and what the strategy asks for. Every worker calls it, also with an empty part.

        Args:
            part: from `Hands.share` (or built by hand).
            loss: (model, batch) -> (loss sum, count of valid targets).
            stop: nonzero asks all workers to stop; everybody sees the largest at the next agreement.
            save: asks all workers to save then.
            change: asks all workers to form a new set after this step.
            check: asks all workers to compare their replicas after it.
            late: the result may be `late`, so that a GPU gets the next step before it has done with this one; settle each.

        Raises:
            PeerLost: another worker is gone; nothing of this step was applied.
            ManyhandsError: too many successive steps without finite gradients.
        """
        result = self.method.step(part, loss, Wishes(stop, save, change, check))
        return result if late else result.settled()

    def tell_left(self, seconds: float) -> None:
        """So long will the rest of my passes of this step take: it is told where newcomers may take part in them."""
        worth = seconds > max(LONG_S, fetch_s(self))
        if worth != self._open:
            self._open = worth
            self.tell_phase(SUMS if worth else "step", self.steps)

    def tell_pass(self) -> None:
        """One more pass begins: a step may take long, and whoever goes on with it does not stand still."""
        self.tell_phase(SUMS if self._open else "step", self.steps)

    @property
    def interrupted(self) -> bool:
        """Somebody was lost: this set of workers will not finish the step."""
        return self.over is not None and self.over.is_set()

    @property
    def states(self) -> list[Any]:
        """The exchange's states."""
        return self.method.states

    @property
    def exchange_wire(self) -> Wire:
        """Joins those who hold what I hold: along it the exchange speaks. All workers, but where a model is divided."""
        wire: Wire = getattr(self.method, "across", self.wire)
        return wire

    @property
    def at_rest(self) -> bool:
        """The model holds the agreed parameters and nothing is in flight."""
        return self.method.at_rest

    def meet(self) -> None:
        """Come to rest now: what is in flight arrives, what has drifted is exchanged. Collective."""
        self.method.meet()

    def agreed(self, *, collective: bool = True) -> AbstractContextManager[Any]:
        """Inside it the model holds the agreed parameters."""
        return self.method.agreed(collective=collective)

    def length(self, schedule: Any) -> float | None:
        """Of the run, in the unit of `schedule`; None: unknown."""
        if not isinstance(self.total, Mapping):
            return self.total
        return self.total.get(getattr(schedule, "unit", "steps"))

    def rate(self, spec: OptimizerSpec, *, behind: int = 0) -> tuple[float, float]:
        """(factor, rate) of an optimizer's schedule at the current count of tokens or steps, less `behind` steps."""
        schedule = spec.schedule
        if schedule is None:
            return 1.0, spec.lr
        done = self.tokens if getattr(schedule, "unit", "steps") == "tokens" else self.steps - behind
        factor = schedule.factor(float(done), float(self.length(schedule) or math.inf))
        return factor, spec.lr * factor

    def optimized(self, since: float) -> None:
        """An optimizer has worked since then (`time.perf_counter`): a part of my work, too."""
        self.work.add(time.perf_counter() - since, 0)

    def check_agreement(
        self, *, mend: bool = False, who: Sequence[tuple[str, str]] = (), emit: Emit = ignore
    ) -> str:
        """Compare fingerprints over the workers (promise 5). Collective. Raises `Diverged`; see `manyhands.train.mending`.

        Methods whose replicas are never bitwise equal (gossip) are not compared; those that divide a model compare
        what is there more than once.
        """
        check = getattr(self.method, "check", None)
        if check is not None:
            return str(check())
        return check_agreement(self, mend=mend, who=who, emit=emit)

    def took(
        self,
        *,
        finite: bool,
        step: int,
        loss: float,
        norm: float,
        whose: Unsound,
        steps: Sequence[int] = (),
        places: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        """Count a step's update as made, or as skipped because something was not finite.

        Args:
            whose, steps, places: as `LeftOut` has them; no steps: this one.

        Raises:
            ManyhandsError: too many in a row.
        """
        if finite:
            self._skipped_in_a_row = 0
            return
        self.skipped += 1
        self._skipped_in_a_row += 1
        left = LeftOut(step=step, loss=loss, norm=norm, whose=whose, steps=steps or (step,), places=places)
        self.notes.append(left)
        if places is not None:
            self.work.left_out += 1
        if self._skipped_in_a_row > MAX_SKIPPED:
            ranks = whose.losses or whose.gradients or ()
            by = f", by rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}" if ranks else ""
            raise ManyhandsError(
                f"loss {loss} and gradient norm {norm} in {self._skipped_in_a_row} "
                f"successive steps, the last at step {step}{by}",
                "an update needs finite gradients",
                "lower the learning rate, or look at the data of these steps",
            )

    def take_notes(self) -> list[Note]:
        """Of updates that were left out, each once."""
        found = list(self.notes)
        self.notes.clear()
        return found

    def hear(self, left_out: Sequence[int], gradients: Sequence[int] = (), *, at: int = 0) -> None:
        """How many own updates each rank has left out since it last told (of mine I know), and as `Heard` has it."""
        others = {rank: n for rank, n in enumerate(left_out) if n and rank != self.wire.rank}
        if others:
            self.notes.append(Heard(step=self.steps, left_out=others))
        if gradients:
            self.notes.append(Heard(step=self.steps, gradients=gradients, at=at))

    def optimizer_state(self) -> dict[str, Tensor]:
        """The state of the optimizer of agreed updates, by name."""
        return self.method.optimizer_state()

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises `CheckpointError` where it does not fit."""
        self.method.load_optimizer_state(state)

    def adopt(self, old: Replica) -> None:
        """Go on where `old`, the same replica in an earlier set of workers, was after its method's `rewind`."""
        self.steps, self.tokens, self.skipped = old.steps, old.tokens, old.skipped
        self._skipped_in_a_row = old._skipped_in_a_row
        self.notes, self.work.left_out, self.fits = old.notes, old.work.left_out, old.fits
        self.method.adopt(old.method)

    def close(self) -> None:
        chaos_hook.withdraw(self)
        self.method.close()


__all__ = ["Part", "Replica", "StepResult", "fingerprint"]
