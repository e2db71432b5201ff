"""Agree after each step, or after every H-th: the cadences of synchronous methods and of local steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from manyhands.core.checked import checked
from manyhands.core.config import option
from manyhands.core.errors import UsageError

HELP = "steps between two exchanges"


@dataclass(frozen=True)
@checked
class EveryStep:
    """Agree after each step."""

    fragments: ClassVar[int] = 1
    delay: ClassVar[int] = 0

    def due(self, step: int) -> bool:
        return True

    def starts(self, step: int) -> tuple[int, ...]:
        return (0,)

    def finishes(self, step: int) -> tuple[int, ...]:
        return (0,)


@dataclass(frozen=True)
@checked
class Every:
    """Agree after every `every`-th step; between them each worker goes its own way (local SGD, arXiv:1805.09767)."""

    every: int = option(32, help=HELP)
    fragments: ClassVar[int] = 1
    delay: ClassVar[int] = 0

    def __post_init__(self) -> None:
        at_least_one("every", self.every)

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def starts(self, step: int) -> tuple[int, ...]:
        return (0,) if self.due(step) else ()

    def finishes(self, step: int) -> tuple[int, ...]:
        return self.starts(step)


@dataclass(frozen=True)
@checked
class PostLocal:
    """Agree after each step up to step `start`, then after every `every`-th (post-local SGD, arXiv:1808.07217)."""

    every: int = option(16, help=HELP)
    start: int = option(1000, help="the first steps, which are synchronous")
    fragments: ClassVar[int] = 1
    delay: ClassVar[int] = 0

    def __post_init__(self) -> None:
        at_least_one("every", self.every)
        if self.start < 0:
            raise UsageError(f"start = {self.start}", "it counts steps", "give start >= 0")

    def due(self, step: int) -> bool:
        return step <= self.start or (step - self.start) % self.every == 0

    def starts(self, step: int) -> tuple[int, ...]:
        return (0,) if self.due(step) else ()

    def finishes(self, step: int) -> tuple[int, ...]:
        return self.starts(step)


def at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{name} = {value}", "it is at least 1", f"give {name} >= 1")


def arrives_before_the_next(delay: int, every: int) -> None:
    if not 0 <= delay < every:
        raise UsageError(
            f"delay = {delay} with every = {every}",
            "an exchange ends before the next one of the same values starts",
            f"give 0 <= delay < {every}",
        )


def take_turns_within(fragments: int, every: int) -> None:
    if fragments > every:
        raise UsageError(
            f"fragments = {fragments} with every = {every}",
            "the fragments take turns within `every` steps",
            f"give fragments <= {every}",
        )
