"""Who is to blame for collectives that fail again and again, from what the workers suspect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from manyhands.coordinate.words import Member
from manyhands.core.membership import Epoch

SUSPICIONS = 3  # epochs that end by suspicion in the same step, until somebody is evicted
UNNAMED = 6  # the same where nobody is suspected by name: the job fails
OWN = 40  # epochs in a row, whoever ended them: more than halves of rows


@dataclass
class Suspicions:
    """Who suspected whom.

    Attributes:
        rounds: of each epoch that failed in a step that is not done since: how many steps were done, and the suspect ("": nobody
            by name) by who suspects. Who names itself has ended the epoch, to begin anew with smaller passes: then nobody is to
            blame for it.
    """

    rounds: list[tuple[int, dict[str, str]]] = field(default_factory=list)

    def begin(self, steps: int) -> None:
        """One more epoch has failed."""
        self.rounds.append((steps, {}))

    def add(self, id: str, suspect: str) -> None:
        """What a worker said first of it counts."""
        if self.rounds:
            self.rounds[-1][1].setdefault(id, suspect)

    def done(self, steps: int) -> None:
        """So many steps are done: what failed in them was overcome."""
        self.rounds = [(at, found) for at, found in self.rounds if at >= steps]

    def verdict(
        self, members: Mapping[str, Member], epoch: Epoch | None, detail: str
    ) -> tuple[str | None, str]:
        """(whom to give up, why); (None, why): the job cannot go on; (None, ""): it does. Who was suspected most is given up."""
        here = [found for at, found in self.rounds if at == self.rounds[-1][0]]
        failed = [found for found in here if all(id != name for id, name in found.items())]
        times = len(failed)
        blamed = Counter(name for found in failed for name in found.values() if name in members)
        if times >= SUSPICIONS and blamed and epoch is not None:
            ranks = {seat.id: rank for rank, seat in enumerate(epoch.seats)}
            worst = max(blamed, key=lambda id: (blamed[id], ranks.get(id, -1)))
            self.rounds.clear()
            return worst, f"collectives failed {times} times in a row because of it: {detail}"
        if times >= UNNAMED or len(here) >= OWN:
            return None, (
                f"collectives failed {len(here)} times in a row: {detail}. The workers are alive, but cannot reach "
                "each other. See to the network between them"
            )
        return None, ""
