"""A replica and its step: the one door to every strategy.

    accumulate my micro-batches (sums and counts) -> the strategy's method -> update

What differs between methods is in `manyhands.train.method` and its neighbours; what they share is here: the model, the
counters, the schedule, and the comparison of fingerprints.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from manyhands.core.errors import Diverged, ManyhandsError, PeerLost
from manyhands.core.registry import resolve_target
from manyhands.core.request import Gather
from manyhands.train.method import MAX_SKIPPED, Part, StepResult, Wishes, Work

if TYPE_CHECKING:
    from torch import Tensor, nn

    from manyhands.core.types import Wire
    from manyhands.strategy.base import OptimizerSpec, Strategy
    from manyhands.train.method import Loss, Method


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
        over: set when somebody was lost (see `manyhands.core.membership`).

    Attributes:
        steps, tokens: done so far, by the whole job.
        skipped: steps without an update because a gradient was not finite.
        optimize_s: seconds in optimizers.
        work: seconds and rows of forward and backward since they were last told.
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
        over: threading.Event | None = None,
    ) -> None:
        self.model = model
        self.strategy = strategy
        self.wire = wire
        self.over = over
        self.total = total
        self.steps = 0
        self.tokens = 0
        self.skipped = 0
        self.optimize_s = 0.0
        self.forward: Any = forward if forward is not None else model
        self.max_norm = max_grad_norm or math.inf
        self.per_row = targets_per_row
        self.autocast = autocast
        self.work = Work()
        self._skipped_in_a_row = 0
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.device = self.named[0][1].device if self.named else torch.device("cpu")
        self._compare(fingerprint(model))
        self.method: Method = resolve_target(strategy.method)(self)

    def step(
        self, part: Part, loss: Loss, *, stop: int = 0, save: bool = False, change: bool = False
    ) -> StepResult:
        """Forward, backward, and what the strategy asks for. Every worker calls it, also with an empty part.

        Args:
            part: from `Hands.share` (or built by hand).
            loss: (model, batch) -> (loss sum, count of valid targets).
            stop: nonzero asks all workers to stop; everybody sees the largest at the next agreement.
            save: asks all workers to save then.
            change: asks all workers to form a new set after this step.

        Raises:
            PeerLost: another worker is gone; nothing of this step was applied.
            ManyhandsError: too many successive steps without finite gradients.
        """
        return self.method.step(part, loss, Wishes(stop, save, change))

    def watch(self) -> None:
        """Called before each forward pass. Raises `PeerLost` where the set of workers is over."""
        if self.over is not None and self.over.is_set():
            raise PeerLost(None, "forward", "the set of workers has changed")

    @property
    def states(self) -> list[Any]:
        """The exchange's states."""
        return self.method.states

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

    def rate(self, spec: OptimizerSpec, *, behind: int = 0) -> tuple[float, float]:
        """(factor, rate) of an optimizer's schedule at the current count of tokens or steps, less `behind` steps."""
        schedule = spec.schedule
        if schedule is None:
            return 1.0, spec.lr
        done = self.tokens if getattr(schedule, "unit", "steps") == "tokens" else self.steps - behind
        factor = schedule.factor(float(done), float(self.total) if self.total else math.inf)
        return factor, spec.lr * factor

    def check_agreement(self) -> str:
        """Compare fingerprints of the agreed parameters over the workers (promise 5). Raises `Diverged`.

        Methods whose replicas are never bitwise equal (gossip) are not compared; those that divide a model compare
        what is there more than once.
        """
        check = getattr(self.method, "check", None)
        if check is not None:
            return str(check())
        with self.agreed():
            mine = fingerprint(self.model)
        return self._compare(mine) if self.method.agrees else _words(mine)

    def took(self, *, finite: bool, step: int, loss: float, norm: float) -> None:
        """Count a step's update as made, or as skipped because something was not finite.

        Raises:
            ManyhandsError: too many in a row.
        """
        if finite:
            self._skipped_in_a_row = 0
            return
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > MAX_SKIPPED:
            raise ManyhandsError(
                f"loss {loss} and gradient norm {norm} in {self._skipped_in_a_row} "
                f"successive steps, the last at step {step}",
                "an update needs finite gradients",
                "lower the learning rate, or look at the data of these steps",
            )

    def optimizer_state(self) -> dict[str, Tensor]:
        """The state of the optimizer of agreed updates, by name."""
        return self.method.optimizer_state()

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises `CheckpointError` where it does not fit."""
        self.method.load_optimizer_state(state)

    def close(self) -> None:
        self.method.close()

    def _compare(self, mine: Tensor) -> str:
        everyones = self.wire.begin(Gather(mine)).wait()
        for rank, other in enumerate(everyones):
            if not torch.equal(other, everyones[0]):
                raise Diverged(
                    f"the parameters of worker {rank} differ from worker 0's after step {self.steps}",
                    "replicas are bitwise equal",
                    "build the model the same everywhere; if this appeared in mid-run, a machine computes wrongly",
                )
        return _words(mine)


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


def _words(mine: Tensor) -> str:
    return f"{int(mine[0]) & (2**64 - 1):016x}{int(mine[1]) & (2**64 - 1):016x}"


def _bits(tensor: Tensor) -> Tensor:
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().reshape(-1)
    if flat.dtype is torch.bool or flat.is_complex():
        flat = flat.to(torch.uint8) if flat.dtype is torch.bool else torch.view_as_real(flat).reshape(-1)
    return flat.view(ints[flat.element_size()])


__all__ = ["Part", "Replica", "StepResult", "fingerprint"]
