"""Pushes that are applied one by one, as they come: bounded and asynchronous consistency."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from manyhands.serve.store import finite

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.serve.members import Member
    from manyhands.serve.rules import Push
    from manyhands.serve.shard import Shard


def take(shard: Shard, push: Push, payload: Tensor) -> None:
    """Put a push into the gradient, or drop it: too stale, not finite, or of no target."""
    store = shard.ready()
    shard.members[push.member].clock = push.step + 1
    shard.progress += push.share
    if not push.count:
        return
    staleness = max(0, shard.version - push.version)
    shard.staleness[staleness] += 1
    if store.rules.discard is not None and staleness > store.rules.discard:
        shard.discarded += 1
        shard.unused.setdefault(push.member, []).append(push.step)
        return
    shard.tokens += push.count
    if not finite(push.norm, push.loss):
        shard.skipped += 1
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


def answer_alone(shard: Shard, push: Push, member: Member) -> dict[str, Any]:
    """What a worker hears: its push, and the losses of all since its last answer."""
    store = shard.ready()
    factor = store.rules.factor(shard.progress, shard.tokens)
    skipped = bool(push.count) and not finite(push.norm, push.loss)
    answer: dict[str, Any] = {
        "step": push.step,
        "loss": shard.loss - member.loss,
        "count": shard.count - member.count,
        "norm": push.norm,
        "skipped": skipped,
        "applied": shard.applied.get(push.member) == push.step,
        "lr": factor * store.rules.optimizer.lr,
        "version": shard.version,
        "tokens": shard.tokens,
        **shard.wishes.answer(push.step),
    }
    member.loss, member.count = shard.loss, shard.count
    return answer
