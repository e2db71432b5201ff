"""When a loop does what, and what it has done."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

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


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this worker: the GPU's, or resident."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
