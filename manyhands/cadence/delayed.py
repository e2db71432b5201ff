"""The agreement of a step is used one step later, so that it travels while the next one is computed.

With `correct` each worker goes on from a forecast instead of the outdated parameters: what the agreed update would be if
the others' contributions were what they were a step ago,

    forecast(t) = mean(t−1) + own(t) − own(t−1)

(the eager update of arXiv:2502.12996, equation 2, for gradients at every step). When mean(t) arrives the forecast is taken
back and the true update is made, so no error stays: the agreed parameters are the same on all workers, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from manyhands.core.checked import checked
from manyhands.core.config import option


@dataclass(frozen=True)
@checked
class Delayed:
    """Use the agreement of each step one step later, overlapped with that step."""

    correct: bool = option(
        True, help="compute on a forecast of the outstanding update, taken back when it arrives"
    )
    fragments: ClassVar[int] = 1
    delay: ClassVar[int] = 1
    method: ClassVar[str] = "manyhands.train.delayed:DelayedSteps"

    def due(self, step: int) -> bool:
        return True

    def starts(self, step: int) -> tuple[int, ...]:
        return (0,)

    def finishes(self, step: int) -> tuple[int, ...]:
        return (0,) if step > 1 else ()
