"""Whom the coordinator gives up: pure functions of what it knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from manyhands.coordinate.words import Member, Rules
from manyhands.core.membership import Epoch, Loss

SUSPICIONS = 3  # epochs that end by suspicion, one after the other without a step, until somebody is evicted
PATIENCE = 5  # times the longest step so far, before a worker counts as stuck
UNNAMED = 6  # the same where nobody is suspected by name: the job fails
SLOW = frozenset(
    {"start", "prepare", "build", "compile", "fetch", "evaluate", "generate", "save", "finish"}
)  # phases that may take long: who stands still in one is not stuck


def stuck(inside: Sequence[Member], stuck_s: float, now: float) -> Member | None:
    """The member that stands still and holds up the others: passed by two steps, or the first where all stand still."""
    if len(inside) < 2:
        return None
    first = min(inside, key=lambda member: member.moved_s)
    if now - first.moved_s < stuck_s or first.phase in SLOW:
        return None
    passed = max(member.step for member in inside) >= first.step + 2
    latest = max(member.moved_s for member in inside)
    all_still = now - latest > stuck_s / 2 and not any(member.phase in SLOW for member in inside)
    return first if passed or all_still else None


def still(member: Member, now: float) -> str:
    """How long it has stood still, in words."""
    of = f"{member.phase} of " if member.phase not in ("", "step") else ""
    where = f"{of}step {member.step + 1}"
    return f"its main thread has stood still in {where} for {now - member.moved_s:.0f} s"


def most_suspected(
    rounds: Sequence[Mapping[str, str]], members: Mapping[str, Member], epoch: Epoch | None
) -> str | None:
    """The id of the member that is most often the reason of failed collectives, once there are enough of them.

    Args:
        rounds: of each failed epoch since the last step: who suspected whom ("": nobody by name).
    """
    blamed = Counter(name for found in rounds for name in found.values() if name in members)
    if len(rounds) < SUSPICIONS or not blamed or epoch is None:
        return None
    ranks = {seat.id: rank for rank, seat in enumerate(epoch.seats)}
    return max(blamed, key=lambda id: (blamed[id], ranks.get(id, -1)))


def deadly(losses: Sequence[Loss], step: int, rules: Rules) -> str:
    """Why the job must fail, if so many were lost at this step that the step itself is to blame; else empty."""
    own = sum(1 for loss in losses if loss.how == "failed")
    if own < rules.faults and len(losses) < rules.kills:
        return ""
    return (
        f"step {step} has ended {own if own >= rules.faults else len(losses)} workers, the last by: "
        f"{losses[-1].detail}. What it computes ends whoever computes it. See the logs of these workers"
    )
