"""How long a step takes, from what the workers say of themselves. No clock of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from manyhands.coordinate.judge import PATIENCE
from manyhands.coordinate.words import Member
from manyhands.core.membership import SUMS

STEP = frozenset({"step", SUMS})  # phases that are the step itself
AFTER = frozenset({"meet", "check", "evaluate", "save", "wait", "change"})  # what is done between two steps


@dataclass
class Pace:
    """The longest step so far.

    One member's, from its beginning to its end, each as the member said it. Steps that were interrupted are none (whoever re-forms
    keeps a part of what is done), nor are those in which another one did something else, for which the others may have waited.

    Attributes:
        longest_s: None: no step has been measured.
    """

    longest_s: float | None = None

    def hear(self, member: Member, inside: Iterable[Member], *, phase: str, step: int, now: float) -> None:
        """What a member says, before it is written down in it.

        Args:
            inside: the members of its epoch.
        """
        onward = step > member.step
        if onward and member.begun_s is not None:
            self.longest_s = max(self.longest_s or 0.0, now - member.begun_s)
        awaits = any(m.phase not in STEP and m.step <= step for m in inside if m is not member)
        if phase not in STEP or step < member.step or awaits:
            member.begun_s = None
        elif onward or member.phase in AFTER:
            member.begun_s = now

    def limit_s(self, stuck_s: float) -> float:
        """How long a main thread may stand still in a step: a step may take long."""
        return max(stuck_s, PATIENCE * (self.longest_s or 0.0))
