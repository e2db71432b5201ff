"""Pushes that are applied one by one, as they come: bounded and asynchronous consistency.

With several servers a push has two halves, so that all of them apply it, or none: each keeps its piece, and when all have
theirs the worker says `commit`. One that only some were told to apply is then finished on the others, whoever was lost
(`Servers.halt`). How stale it is, is for all of them what the first server says: they drop the same pushes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from manyhands.serve.members import loads, slowest
from manyhands.serve.rules import integer, name, number
from manyhands.serve.store import finite

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.serve.members import Member
    from manyhands.serve.rules import Push
    from manyhands.serve.shard import Shard


def come(
    shard: Shard, push: Push, payload: Tensor, member: Member, alive: Callable[[], bool]
) -> tuple[dict[str, Any], Tensor | None]:
    """Apply a push (with several servers: keep it until `commit`), and answer when its worker may go on."""
    alone, new = shard.ready().rules.alone, push.step >= member.clock
    if not alone:
        held = shard.pending.get(push.member)
        if new and (held is None or held[0].step != push.step):
            shard.record_push("stage", push, payload)
            shard.pending[push.member] = (push, payload)
        staleness = behind(shard, push) if new else shard.judged.get(push.member, 0)
        return {"step": push.step, "staleness": staleness}, None
    if new:
        shard.record_push("push", push, payload)
        take(shard, push, payload, behind(shard, push))
    return _answered(shard, push.member, push.step, (push.norm, push.loss, push.count), alive)


def commit(
    shard: Shard, header: Mapping[str, Any], alive: Callable[[], bool]
) -> tuple[dict[str, Any], Tensor | None]:
    """The second half of a push to several servers: all have it.

    Args:
        header: names the push and its worker; ``finish``: asked by another one, after a halt.
    """
    who, step, finish = name(header), integer(header, "step"), bool(header.get("finish"))
    if not finish:
        shard.entered(who, step).seen = time.monotonic()
    if step >= (shard.members[who].clock if who in shard.members else shard.left.get(who, 0)):
        if shard.halted and not finish:
            return {"halted": True}, None
        held = shard.pending.get(who)
        if held is None or held[0].step != step:  # this server has lost it in a restart
            return {"again": True}, None
        staleness = integer(header, "staleness")
        shard.record({"op": "commit", "member": who, "step": step, "staleness": staleness}, "push")
        take_kept(shard, who, staleness)
    if finish:
        return {}, None
    said = number(header, "norm", math.nan), number(header, "loss"), integer(header, "count")
    return _answered(shard, who, step, said, alive)


def take_kept(shard: Shard, who: str, staleness: int) -> None:
    """Apply the push of `who` that waits for its second half."""
    take(shard, *shard.pending.pop(who), staleness)
    if who not in shard.members:  # `forget` has left it for this
        shard.ready().backups.pop(who, None)


def behind(shard: Shard, push: Push) -> int:
    """How many updates were applied since the parameters at which the push was computed."""
    return max(0, shard.version - push.version)


def take(shard: Shard, push: Push, payload: Tensor, staleness: int) -> None:
    """Put a push into the gradient, or drop it: too stale, not finite, or of no target."""
    store = shard.ready()
    if push.member in shard.members:
        shard.members[push.member].took(push)
    else:
        shard.left[push.member] = push.step + 1
    shard.judged[push.member] = staleness
    shard.progress += push.share
    if not push.count:
        return
    shard.staleness[staleness] += 1
    if store.rules.discard is not None and staleness > store.rules.discard:
        shard.discarded += 1
        # `Served.rewind` asks of no step before the slowest worker's last
        done = min([slowest(shard.members), *shard.left.values()]) - 2
        steps = [step for step in shard.unused.get(push.member, ()) if step >= done]
        shard.unused[push.member] = [*steps, push.step]
        return
    shard.tokens += push.count
    if not finite(push.norm, push.loss):
        shard.skipped += 1
        shard.unsound[push.member] = shard.unsound.get(push.member, 0) + 1
        return
    shard.loss += push.loss
    shard.count += push.count
    clip = min(1.0, store.rules.max_norm / (push.norm + 1e-6))
    nominal = shard.gathered[0].nominal if shard.gathered else push.nominal
    store.add(push, payload, weight=clip * push.nominal / nominal)
    shard.gathered.append(push)
    shard.applied[push.member] = push.step
    if len(shard.gathered) >= store.rules.accumulate:
        flush(shard)


def flush(shard: Shard) -> None:
    """One update of the gathered pushes, at their share of the rate (at most the whole)."""
    store = shard.ready()
    count = sum(p.count for p in shard.gathered)
    share = math.fsum(p.share for p in shard.gathered)
    factor = store.rules.factor(max(0.0, shard.progress - share), shard.tokens - count)
    store.update(shard.gathered[0].nominal / count, factor * min(1.0, share))
    shard.gathered = []
    shard.version += 1


def _answered(
    shard: Shard, who: str, step: int, said: tuple[float, float, int], alive: Callable[[], bool]
) -> tuple[dict[str, Any], Tensor | None]:
    """When the worker may go on: its push, of the norm, loss and targets that it `said`, and all losses since its last answer."""
    shard.cond.notify_all()
    shard.snapshot_if_due()
    store, member = shard.ready(), shard.entered(who, step)
    bound, since = store.rules.bound, time.monotonic()
    shard.wait(
        lambda: shard.halted or bound is None or step + 1 - slowest(shard.members) <= bound, member, alive
    )
    member.waited_s = time.monotonic() - since
    norm, loss, count = said
    answer: dict[str, Any] = {
        "step": step,
        "loss": shard.loss - member.loss,
        "count": shard.count - member.count,
        "norm": norm,
        "skipped": bool(count) and not finite(norm, loss),
        "applied": shard.applied.get(who) == step,
        "unsound": dict(shard.unsound),
        "lr": store.rules.factor(shard.progress, shard.tokens) * store.rules.optimizer.lr,
        "version": shard.version,
        "tokens": shard.tokens,
        "loads": loads(shard.members),
        "waited_s": member.waited_s,
        **shard.wishes.answer(step),
    }
    member.loss, member.count = shard.loss, shard.count
    return answer, shard.pulled(who)
