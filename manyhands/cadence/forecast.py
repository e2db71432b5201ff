"""A worker's own steps are a forecast of the agreed ones, which take their place (see `manyhands.train.forecast`).

The gradients of `every` steps are agreed at once, and arrive `delay` steps later, overlapped with these. Several fragments
take turns, as in Streaming DiLoCo (arXiv:2501.18512, section 2.2): each step carries a part of what one would carry at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from manyhands.cadence.every import HELP, arrives_before_the_next, at_least_one, take_turns_within
from manyhands.core.checked import checked
from manyhands.core.config import option
from manyhands.core.errors import UsageError


@dataclass(frozen=True)
@checked
class Forecast:
    """Agree on the gradients of `every` steps; meanwhile each worker walks ahead on its own."""

    every: int = option(4, help=HELP)
    delay: int = option(0, help="steps that pass between the start of an exchange and its use")
    fragments: int = option(1, help="parts of the parameters that take turns")
    method: ClassVar[str] = "manyhands.train.forecast:ForecastSteps"
    local: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("every", "fragments"):
            at_least_one(name, getattr(self, name))
        take_turns_within(self.fragments, self.every)
        arrives_before_the_next(self.delay, self.every)

    def check(self, *, exchange: Any, optimizer: Any) -> None:
        """Raises `UsageError` where the strategy's other parts do not go with it."""
        forgets = getattr(optimizer, "betas", (1.0, 1.0))[1] == 0.0 or getattr(optimizer, "alpha", 1.0) == 0.0
        if forgets and type(optimizer).__name__ != "AdamW":
            raise UsageError(
                f"outer = {optimizer!r} with cadence = {self!r}",
                "second moments are corrected in what an optimizer remembers of them",
                "give a decay of squares above 0 (betas, alpha), or use adamw",
            )
        if getattr(exchange, "bucket_mb", 25.0) not in (25.0, math.inf):
            raise UsageError(
                f"exchange = {exchange!r} with cadence = {self!r}",
                "the gradients of several steps travel as one, so bucket_mb would be ignored",
                "leave it out",
            )

    def due(self, step: int) -> bool:
        return bool(self.starts(step))

    def starts(self, step: int) -> tuple[int, ...]:
        """Fragments whose exchange begins after `step`; the first round of all but one is shorter."""
        turns = range(self.fragments)
        return tuple(f for f in turns if step % self.every == f * self.every // self.fragments)

    def finishes(self, step: int) -> tuple[int, ...]:
        return self.starts(step - self.delay) if step > self.delay else ()
