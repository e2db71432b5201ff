"""Changes of membership, and who waits for whom, in words for people: one line each."""

from __future__ import annotations

from collections.abc import Sequence

from manyhands.core import events as e
from manyhands.core.membership import SUMS

BESIDE = ("evaluate", "save", "check", "meet", "wait", "generate", "finish")  # phases between two steps
MOST = 8  # workers that are listed one by one
HOW = {"death": "died", "hang": "hung", "failed": "failed", "evicted": "was evicted"}


def lost(event: e.Lost) -> str:
    """
    >>> lost(e.Lost(seat="w2", rank=2, host="n1", how="hang", detail="no heartbeat", phase="step", step=16,
    ...             stack="loop.py:120 in run\\nreplica.py:80 in step", silent_s=10.2))
    'lost w2 (rank 2, n1), which hung in step 17 at replica.py:80 in step: no heartbeat; last heard of 10.2 s before'
    """
    where = f" in step {event.step + 1:,}" if event.phase in ("step", SUMS) else ""
    if event.phase in BESIDE:
        where = f" during {event.phase} after step {event.step:,}"
    elif event.phase and not where:
        where = f" during {event.phase}" + (f" of step {event.step + 1:,}" if event.step else "")
    at = event.stack.strip().splitlines()
    last = f" at {at[-1].strip()}" if at else ""
    silent = f"; last heard of {event.silent_s:.1f} s before" if event.silent_s >= 0.05 else ""
    detail = f": {event.detail}" if event.detail else ""
    then = f"; {event.then}" if event.then else ""
    return f"lost {_who(event)}, which {HOW.get(event.how, event.how)}{where}{last}{detail}{silent}{then}"


def left(event: e.Left) -> str:
    return f"{_who(event)} left after step {event.step:,}" + (f": {event.detail}" if event.detail else "")


def joined(event: e.Joined) -> str:
    got = ""
    if event.size_bytes:
        got = f"; fetched {event.size_bytes / 2**20:.1f} MiB of state in {event.wall_s:.1f} s meanwhile"
    return f"{_who(event)} joined before step {event.step + 1:,}{got}"


def reformed(event: e.Reformed) -> str:
    """
    >>> reformed(e.Reformed(epoch=3, workers=2, step=16, wall_s=0.41, kept_places=5, redone_places=3))
    '2 workers go on with step 17 after 0.41 s (epoch 3): 5 micro-batches of it kept, 3 to compute'
    >>> reformed(e.Reformed(epoch=3, workers=3, step=16, wall_s=0.41, kept_places=0, redone_places=8,
    ...                     rebuilt="shards rebuilt from replica group 1"))
    '3 workers go on with step 17 after 0.41 s (epoch 3): shards rebuilt from replica group 1'
    >>> reformed(e.Reformed(epoch=3, workers=1, step=120, wall_s=0.41, kept_places=0, redone_places=0,
    ...                     by="runs/checkpoint-120", redone_steps=7))
    '1 worker goes on with step 121 after 0.41 s (epoch 3), from checkpoint-120: 7 steps are done again'
    """
    workers = f"{event.workers} workers go" if event.workers != 1 else "1 worker goes"
    text = f"{workers} on with step {event.step + 1:,} after {event.wall_s:.2f} s (epoch {event.epoch})"
    if event.by != "survivors":
        steps = "1 step is" if event.redone_steps == 1 else f"{event.redone_steps:,} steps are"
        again = f": {steps} done again" if event.redone_steps else ""
        return f"{text}, from {event.by.rpartition('/')[2]}{again}"
    if event.rebuilt:
        text += f": {event.rebuilt}"
    if event.kept_places:
        text += f": {event.kept_places} micro-batches of it kept, {event.redone_places} to compute"
    return text


def mended(event: e.Mended) -> str:
    return (
        f"mended {_who(event)} after step {event.step:,}: its {event.what} differed from the majority's; "
        f"given {event.source}'s ({event.size_bytes / 2**20:.1f} MiB in {event.wall_s:.1f} s)"
    )


def aligned(event: e.Aligned) -> str:
    many = len(event.ranks) > 1
    return (
        f"worker{'s' * many} {', '.join(map(str, event.ranks))} compute{'s' * (not many)} on another kind of device, which rounds "
        f"differently: after step {event.step:,} a relative {event.drift:.1e} apart, and given the others' state, "
        "as at every comparison (--check-every)"
    )


def blamed(event: e.Balance) -> str:
    """Who waits for whom and why; empty where all is well."""
    if event.reason == "network" and not event.slowest:
        share = max(load.network_s for load in event.workers) / event.wall_s
        return f"all wait for the network, {share:.0%} of the time"
    if not event.slowest:
        return ""
    waits = [load for load in event.workers if load.seat != event.slowest]
    longest = max(waits, key=lambda load: load.wait_s)
    who = longest.seat if len(waits) == 1 else "the others"
    verb = "waits" if len(waits) == 1 else "wait"
    up_to = "" if len(waits) == 1 else "up to "
    why = {"data": "its data", "compute": "its computing", "network": "its network"}.get(
        event.reason, event.reason
    )
    return f"{who} {verb} for {event.slowest} ({why}), {up_to}{longest.wait_s / event.wall_s:.0%} of the time"


def load_lines(event: e.Balance, *, short: bool = False) -> list[tuple[str, str]]:
    """(text, style) of each worker's share and time, the slowest marked, and who waits for whom.

    `short`: for one line of a log. Of many workers those are listed that wait least: the others wait for them.
    """
    rows = sum(load.rows for load in event.workers) or 1
    shown: Sequence[e.Load] = event.workers
    if len(shown) > MOST:
        shown = sorted(sorted(shown, key=lambda load: load.wait_s)[: MOST - 1], key=lambda load: load.rank)
    width = max(len(load.seat) for load in shown)
    lines = []
    for load in shown:
        parts = [
            (name, seconds / event.wall_s)
            for name, seconds in (
                ("compute", load.compute_s),
                ("wait", load.wait_s),
                ("data", load.data_s),
                ("network", load.network_s),
            )
        ]
        slow = load.seat == event.slowest
        if short:
            said = " ".join(f"{name} {share:.0%}" for name, share in parts if share >= 0.005)
            lines.append((f"{load.seat} {load.rows / rows:.0%} of rows ({said})", ""))
        else:
            said = "  ".join(f"{name} {share:>4.0%}" for name, share in parts)
            mark = "  ← slowest" if slow else ""
            text = f"{load.seat:<{width}} {load.rows / rows:>4.0%} of rows  {said}{mark}"
            lines.append((text, "yellow" if slow else "dim"))
    if len(shown) < len(event.workers):
        lines.append((f"and {len(event.workers) - len(shown)} more, which wait longer", "dim"))
    why = blamed(event)
    if why:
        lines.append((why, "yellow"))
    return lines


def _who(event: e.Lost | e.Left | e.Joined | e.Mended) -> str:
    return f"{event.seat} (rank {event.rank}, {event.host})"
