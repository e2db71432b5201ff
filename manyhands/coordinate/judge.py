"""Whom the coordinator takes in, whom it gives up, and when the job: pure functions of what it knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from manyhands.coordinate.messages import VERSION, Refused
from manyhands.coordinate.words import BEGINNING, Member, Rules
from manyhands.core.membership import REFORM, SUMS, Epoch, Loss, Seat

ENTER_S = 1.5  # for a newcomer to wait for the end of a step; to re-form costs about half a second
PATIENCE = 5  # times the longest step so far, before a worker counts as stuck
SLOW = frozenset(
    {"start", "prepare", "build", "compile", "fetch", "evaluate", "generate", "save", "wait", "finish"}
    | {"check", "change", REFORM}  # state may travel, or be read
)  # phases that may take long: who stands still in one is not stuck, for so many times as long:
SLOWLY = 6
RETURN_S = 3.0  # for workers to find a coordinator that is back, however soon silence counts as a hang
BEFORE = "it took part before the job began anew"
SHRINKING = 3  # workers that bear `Rules.kills` at one step: each may come from passes of 4,096 rows down to one, by 12 ends
GUESS = frozenset({"prepare", "build"})  # before the first step nobody knows how long these may take


def same(seat: Seat, member: Member) -> bool:
    """Whether it is the same process."""
    return (seat.host, seat.pid) == (member.seat.host, member.seat.pid)


def admit(
    seat: Seat,
    member: Member | None,
    lost: Loss | None,
    *,
    version: int,
    ended: tuple[int, str] | None,
    anew: bool = False,
) -> None:
    """Whether who says hello may take part. Raises `Refused`.

    Args:
        anew: it takes part in an epoch of a job that was ended.
        member: who has this id already; lost: who had it.
    """
    if version != VERSION:
        raise Refused("FAILED_PRECONDITION", f"protocol version {version}", f"this is {VERSION}", "")
    if ended is not None:
        raise Refused("FAILED_PRECONDITION", f"the job has ended: {ended[1]}")
    if anew:
        raise Refused(
            "ABORTED", "the job has begun anew from its checkpoint, without this worker", "", "join it again"
        )
    if lost is not None:
        raise Refused("FAILED_PRECONDITION", f"worker {seat.id} was given up ({lost.how}: {lost.detail})")
    if member is not None and member.connected and not (seat.pid and same(seat, member)):
        raise Refused(
            "ALREADY_EXISTS",
            f"worker {seat.id} takes part already (process {member.seat.pid} on {member.seat.host})",
            "an id is one process's, for its life",
            "give another id",
        )


def apart(seat: Seat, others: Iterable[Member]) -> Refused | None:
    """Why shared memory cannot join it to those that are there, the first of whom says which host it is; None: it can."""
    host = next((member.seat.host for member in others if member.seat.id != seat.id), seat.host)
    if (seat.host, seat.device) == (host, "cpu"):
        return None
    return Refused(
        "PERMISSION_DENIED",
        f"worker {seat.id} on {seat.host} ({seat.device})",
        f"this job's workers share the memory of one host, {host}, and are on its CPUs",
        f"take part from {host}, with --device cpu; or give a strategy other than hogwild, and --transport auto",
    )


def loss(member: Member, rank: int, *, how: str, detail: str, then: str, now: float) -> Loss:
    """What is known of a member that is no longer there."""
    return Loss(
        seat=member.seat,
        rank=rank,
        how=how,
        detail=detail,
        phase=member.phase,
        step=member.step,
        stack=member.stack,
        silent_s=round(max(0.0, now - member.heard_s), 3),
        then=then,
    )


def beginning(inside: Sequence[Member]) -> bool:
    """Whether none of these has got so far that the job could go on from it: the next epoch begins it anew."""
    return all(member.phase in ("", *BEGINNING) for member in inside)


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


def spare(inside: Sequence[Member], now: float) -> None:
    """Who re-forms while another fetches the state waits for that, and is given time anew when it has come."""
    if any(member.phase == "fetch" and not member.ready for member in inside):
        for member in inside:
            if member.phase == REFORM and not member.ready:
                member.moved_s = now


def late(
    inside: Sequence[Member], stuck_s: float, now: float, *, over: bool, begun: bool = True
) -> Member | None:
    """The member that holds up the others: as `stuck`, or it stands still in a slow phase, or they wait for it to be `ready`.

    Args:
        over: the epoch is over: whoever is ready waits for the next.
        begun: a step has been measured. Before that who has stood still for longest is late, as the others wait for it, unless
            it, or one that it may be waiting for, prepares data or builds the model.

    The only one (nobody else has come, is left, or has anything left to do) has time as in a slow phase.
    """
    awaited = [m for m in inside if not m.ready]
    if not begun:
        first = min(awaited, key=lambda member: member.moved_s, default=None)
        asked = [first] if any(member.ready for member in inside) else inside
        if first is None or any(m is None or m.phase in GUESS for m in asked):
            return None
        return first if now - first.moved_s >= SLOWLY * stuck_s else None
    alone = len(inside) == 1
    for member in awaited:
        slow = alone or member.phase in SLOW
        waited = now - member.moved_s >= (SLOWLY * stuck_s if slow else stuck_s)
        if waited and (slow or any(m.ready for m in inside)):
            return member
    return None if over else stuck(inside, stuck_s, now)


def back_s(rules: Rules) -> float:
    """How long a restarted coordinator waits for those of before."""
    return max(rules.hang_s, RETURN_S)


def silent(member: Member, rules: Rules, now: float, *, inside: bool) -> str:
    """Why a member is given up for its own silence, in words; empty: it is not.

    Args:
        inside: it takes part in the epoch, beside whose members `late` judges its standing still.
    """
    silent_s = now - member.heard_s
    if silent_s > (rules.hang_s if member.connected else back_s(rules)):
        what = "no sign of life" if member.connected else "it has not come back since the restart"
        return f"{what} for {silent_s:.1f} s"
    idle = not (inside or member.ready or member.leaving is not None or member.phase in GUESS)
    limit_s = max(rules.start_s, SLOWLY * rules.stuck_s)  # what it begins with, imports, takes its time, too
    return still(member, now) if idle and now - member.moved_s >= limit_s else ""


def let_in(inside: Sequence[Member], newcomers: Sequence[Member], now: float) -> bool:
    """Whether a long step is interrupted for newcomers: they have waited, and nobody would lose what it has computed."""
    if not inside or not newcomers or any(member.phase != SUMS for member in inside):
        return False
    return now - min(member.moved_s for member in newcomers) >= ENTER_S


def still(member: Member, now: float) -> str:
    """How long it has stood still, in words."""
    of = f"{member.phase} of " if member.phase not in ("", "step", SUMS) else ""
    where = "" if member.phase in BEGINNING else f" in {of}step {member.step + 1}"
    return f"its main thread has stood still{where} for {now - member.moved_s:.0f} s"


def finished(
    members: Iterable[Member], gone: Mapping[str, Loss], epoch: Epoch | None
) -> tuple[str, int] | None:
    """(why, exit code) of the job's end, once somebody has said that it is done and nobody is left who took part; else None.

    Newcomers that are still getting ready are too late. The first rank has the last word: who sums up the run.
    """
    if any(m.holds for m in members) or not any(x.detail == "done" for x in gone.values()):
        return None
    first = gone.get(epoch.seats[0].id) if epoch is not None else None
    if first is None or first.how == "left":
        return "done", 0
    return (
        f"worker {first.seat.id}, which sums up the run, was lost at its end ({first.how}: {first.detail}). "
        "All steps are done. See its log, and --output for what is written"
    ), 1


def closing(staying: Iterable[Member], gone: Iterable[Loss], *, done: bool, stateless: bool) -> bool:
    """Whether who is left does what is left after the last step, however few they are: as somebody has said, or it seems."""
    waits = any(member.ready for member in staying)
    if done and not stateless:
        return True
    return not waits and (done or any(loss.detail == "done" for loss in gone))


def furthest(members: Iterable[Member], steps: int) -> int:
    """How many steps are done, where one knows of `steps`."""
    return max([steps, *(member.step for member in members)])


def placed(losses: Iterable[Loss], ids: Sequence[str], steps: int) -> list[Loss]:
    """The same, those of `ids` with how many steps were done: what they said themselves may be older than their end."""
    return [replace(loss, step=steps) if loss.seat.id in ids else loss for loss in losses]


def deadly(losses: Sequence[Loss], rules: Rules, epoch: Epoch | None) -> str:
    """Why the job must fail, if so many were lost in the last one's step that the step itself is to blame; else empty.

    Every end for want of memory makes the passes of one worker smaller: the more workers there are, the more are borne.
    """
    here = [loss for loss in losses if loss.step == losses[-1].step]
    own = sum(1 for loss in here if loss.how == "failed")
    workers = len(epoch.seats) if epoch is not None else 1
    if own < rules.faults and len(here) < rules.kills * -(-workers // SHRINKING):
        return ""
    return (
        f"step {here[-1].step + 1} has ended {own if own >= rules.faults else len(here)} workers, the last by: "
        f"{here[-1].detail}. What it computes ends whoever computes it. See the logs of these workers"
    )


def shortage(alive: int, rules: Rules, gone: Sequence[Loss] = (), *, stateless: bool, began: bool) -> str:
    """Why the job cannot go on with those that are there: too few, or (`stateless`) none that holds its state."""
    value, rule = f"{alive} workers are left and no replacement comes", f"min_workers = {rules.min_workers}"
    if stateless:
        value, rule = "no worker is left that holds the job's state", "at least one must survive"
        if gone and gone[-1].how == "left":
            value, rule = f"all workers have left, the last one {gone[-1].detail}", "it saved what it held"
    remedy = f"continue from the last checkpoint by {rules.resume}"
    if not began:
        remedy = (
            "the job had not made its first step: see the logs of those that were lost, and start it again"
        )
    return f"{value}. {rule}. {remedy}"
