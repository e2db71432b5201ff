"""Fragments of the parameters in turn, each overlapped with the steps that follow: Streaming DiLoCo (arXiv:2501.18512).

Fragment f starts its exchange after steps t with t ≡ offset(f) modulo `every` (section 2.2), with offsets spread
evenly, and finishes it `delay` steps later (τ in section 2.3, overlapping communication).
"""

from __future__ import annotations

from dataclasses import dataclass

from manyhands.cadence.every import HELP, arrives_before_the_next, at_least_one, take_turns_within
from manyhands.core.checked import checked
from manyhands.core.config import option


@dataclass(frozen=True)
@checked
class Staggered:
    """Each of `fragments` parts agrees after every `every`-th step, in turn, `delay` steps in flight."""

    every: int = option(96, help=HELP + " of one fragment")
    fragments: int = option(4, help="parts of the parameters that take turns")
    delay: int = option(4, help="steps that pass between the start of an exchange and its use")

    def __post_init__(self) -> None:
        for name in ("every", "fragments"):
            at_least_one(name, getattr(self, name))
        take_turns_within(self.fragments, self.every)
        arrives_before_the_next(self.delay, self.every)

    def offset(self, fragment: int) -> int:
        return fragment * self.every // self.fragments

    def due(self, step: int) -> bool:
        return bool(self.starts(step))

    def starts(self, step: int) -> tuple[int, ...]:
        """Fragments whose exchange begins after `step`. None before its offset: there is nothing to tell yet."""
        return tuple(
            f
            for f in range(self.fragments)
            if step > self.offset(f) and (step - self.offset(f)) % self.every == 0
        )

    def finishes(self, step: int) -> tuple[int, ...]:
        return self.starts(step - self.delay) if step > self.delay else ()
