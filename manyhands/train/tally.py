"""When a loop does what, and what it has done."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from manyhands.core.events import Emit
    from manyhands.core.membership import Seat
    from manyhands.train.leftout import Note
    from manyhands.train.method import Part, StepResult

LOSS_STEPS = 20


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
    """What this worker has done so far, and how fast.

    Attributes:
        resumed_from: the step of the checkpoint that the job's command began with; 0: none.
    """

    resumed_from: int = 0
    samples: int = 0
    tokens: int = 0
    compute_s: float = 0.0
    data_s: float = 0.0
    losses: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=LOSS_STEPS))
    rate_tokens: int = 0
    rate_s: float = 0.0
    began: bool = False  # a step was made
    eval: dict[str, float] = field(default_factory=dict)
    train_s: float = 0.0
    step_s: float = 0.0  # the last step's
    interrupted_s: float = 0.0  # attempts at this step that were interrupted
    skipped: bool = False
    _first: tuple[int, float] = (0, 0.0)
    _late: StepResult | None = None

    def add(self, part: Part, result: StepResult, *, data_s: float, compute_s: float, wall_s: float) -> None:
        """A step is done, after `wall_s` in its last attempt."""
        self.data_s += data_s
        self.compute_s += compute_s
        self.samples += sum(len(next(iter(batch.values()))) for _, batch in part.micro_batches)
        self.tokens += result.own_tokens
        if self.began:  # the first step of a run builds kernels and fills caches
            self.rate_s += wall_s
            self.rate_tokens += result.target_tokens
        else:
            self.began, self._first = True, (result.target_tokens, wall_s)
        self.step_s, self.interrupted_s = self.interrupted_s + wall_s, 0.0

    def take(self, result: StepResult) -> None:
        """Note a step's loss; where it is not known yet whether its update was left out, by the next step's end."""
        self.settle()
        if result.late is not None:
            self._late = result
        elif not result.skipped and result.agreed:
            self.losses.append((result.loss, result.target_tokens))

    def tell(self, notes: Sequence[Note], seats: Sequence[Seat], emit: Emit) -> None:
        """Of updates that were left out."""
        from manyhands.core.events import Warned

        for note in notes:
            emit(Warned(message=note.words(seats), where="train"))
            self.skipped = True

    def facts(self) -> dict[str, Any]:
        """What is the job's and not this worker's, as JSON data: for one that may speak for all later."""
        return {
            "step_s": self.step_s,
            "train_s": self.train_s,
            "resumed_from": self.resumed_from,
            "losses": [list(each) for each in self.losses],
        }

    def take_facts(self, facts: Mapping[str, Any]) -> bool:
        """What `facts` said on another worker; whether this one knew nothing yet."""
        new = not self.began and not self.losses
        if new:
            self.step_s, self.train_s = float(facts["step_s"]), float(facts["train_s"])
            self.resumed_from = int(facts["resumed_from"])
            self.losses.extend((float(loss), int(count)) for loss, count in facts["losses"])
        return new

    def settle(self) -> StepResult | None:
        """Wait for what is late; that step's result, if there is one."""
        if self._late is None:
            return None
        late, self._late = self._late, None
        found = late.settled()
        self.take(found)
        return found

    def take_skipped(self) -> bool:
        """Whether an update was left out since this was asked last."""
        found, self.skipped = self.skipped, False
        return found

    @property
    def rate(self) -> float:
        """Targets a second, of the first step only where there was no other."""
        tokens, seconds = (self.rate_tokens, self.rate_s) if self.rate_s > 0 else self._first
        return tokens / seconds if seconds > 0 else 0.0

    @property
    def train_loss(self) -> float:
        """Σ loss / Σ targets over the last steps."""
        count = sum(n for _, n in self.losses)
        return sum(loss * n for loss, n in self.losses) / count if count else float("nan")


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this worker: the GPU's, or resident."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
