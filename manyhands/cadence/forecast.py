"""A worker's own steps are a forecast of the agreed ones, which take their place (see `manyhands.train.forecast`).

The gradients of `every` steps are agreed at once, and arrive `delay` steps later, overlapped with these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from manyhands.cadence.every import HELP, at_least_one
from manyhands.core.config import option
from manyhands.core.errors import UsageError


@dataclass(frozen=True)
class Forecast:
    """Agree on the gradients of `every` steps; meanwhile each worker walks ahead on its own."""

    every: int = option(4, help=HELP)
    delay: int = option(0, help="steps that pass between the start of an exchange and its use")
    fragments: ClassVar[int] = 1

    def __post_init__(self) -> None:
        at_least_one("every", self.every)
        if not 0 <= self.delay < self.every:
            raise UsageError(
                f"delay = {self.delay} with every = {self.every}",
                "an exchange ends before the next one starts",
                f"give 0 <= delay < {self.every}",
            )

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def starts(self, step: int) -> tuple[int, ...]:
        return (0,) if self.due(step) else ()

    def finishes(self, step: int) -> tuple[int, ...]:
        return self.starts(step - self.delay) if step > self.delay else ()
