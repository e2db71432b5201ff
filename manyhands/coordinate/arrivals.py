"""Workers that are being started, from then to their first word: how long that may take, and who takes longer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from manyhands.coordinate.judge import PATIENCE, SLOWLY
from manyhands.coordinate.words import Member, Rules
from manyhands.core.membership import Seat


@dataclass
class Arrivals:
    """Who is on its way, by id, and since when. No clock of its own.

    Attributes:
        longest_s: the longest that any has taken so far; None: nobody has come yet.
    """

    since: dict[str, float] = field(default_factory=dict)
    longest_s: float | None = None

    def __contains__(self, id: str) -> bool:
        return id in self.since

    def __iter__(self) -> Iterator[str]:
        return iter(self.since)

    def __len__(self) -> int:
        return len(self.since)

    def expect(self, id: str, now: float) -> None:
        """It is being started, from now on or since this was said first."""
        self.since.setdefault(id, now)

    def came(self, id: str, now: float) -> None:
        """It has said its first word."""
        since = self.since.pop(id, None)
        if since is not None:
            self.longest_s = max(self.longest_s or 0.0, now - since)

    def give_up(self, id: str, now: float) -> Member:
        """It will not come; what is known of it."""
        if (since := self.since.pop(id, None)) is None:
            return Member(Seat(id=id, host=""), now, now)
        return Member(Seat(id=id, host=""), since, since, phase="start")

    def shift(self, seconds: float) -> None:
        """So much time has gone by in which nobody could come."""
        self.since = {id: since + seconds for id, since in self.since.items()}

    def limit_s(self, rules: Rules) -> float:
        """How long a worker may take: `stuck_s`, or five times the slowest of the others; before any has come, six times `stuck_s`.

        What it does until then (imports, finding its device) takes alike on all, and nobody knows how long on the first.
        """
        if self.longest_s is None:
            return max(rules.start_s, SLOWLY * rules.stuck_s)
        return max(rules.start_s, rules.stuck_s, PATIENCE * self.longest_s)

    def late(self, rules: Rules, now: float) -> list[tuple[str, str]]:
        """Who has taken longer, and that in words."""
        limit_s = self.limit_s(rules)
        return [
            (id, f"it has not reached the coordinator {now - since:.0f} s after its start")
            for id, since in self.since.items()
            if now - since >= limit_s
        ]
