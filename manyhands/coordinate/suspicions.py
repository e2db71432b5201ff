"""Who is to blame for collectives that fail again and again, from what the workers suspect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from manyhands.coordinate.words import Member
from manyhands.core.membership import Epoch

SUSPICIONS = 3  # epochs that end by suspicion, one after the other without a step, until somebody is evicted
UNNAMED = 6  # the same where nobody is suspected by name: the job fails
OWN = 40  # epochs in a row, whoever ended them: more than halves of rows


@dataclass
class Suspicions:
    """Who suspected whom.

    Attributes:
        rounds: of each epoch that failed since the last step: the suspect ("": nobody by name) by who suspects. Who names
            itself has ended the epoch, to begin anew with smaller passes: then nobody is to blame for it.
    """

    rounds: list[dict[str, str]] = field(default_factory=list)

    def begin(self) -> None:
        """One more epoch has failed."""
        self.rounds.append({})

    def add(self, id: str, suspect: str) -> None:
        """What a worker said first of it counts."""
        if self.rounds:
            self.rounds[-1].setdefault(id, suspect)

    def verdict(
        self, members: Mapping[str, Member], epoch: Epoch | None, detail: str
    ) -> tuple[str | None, str]:
        """(whom to give up, why); (None, why): the job cannot go on; (None, ""): it does. Who was suspected most is given up."""
        failed = [found for found in self.rounds if all(id != name for id, name in found.items())]
        times = len(failed)
        blamed = Counter(name for found in failed for name in found.values() if name in members)
        if times >= SUSPICIONS and blamed and epoch is not None:
            ranks = {seat.id: rank for rank, seat in enumerate(epoch.seats)}
            worst = max(blamed, key=lambda id: (blamed[id], ranks.get(id, -1)))
            self.rounds.clear()
            return worst, f"collectives failed {times} times in a row because of it: {detail}"
        if times >= UNNAMED or len(self.rounds) >= OWN:
            return None, (
                f"collectives failed {len(self.rounds)} times in a row: {detail}. The workers are alive, but cannot reach "
                "each other. See to the network between them"
            )
        return None, ""
