"""Pushes that make one update together, one of each worker: synchronous consistency."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from manyhands.serve.members import loads
from manyhands.serve.store import finite

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from manyhands.serve.members import Member
    from manyhands.serve.rules import Push
    from manyhands.serve.shard import Shard


def take_part(
    shard: Shard, push: Push, payload: Tensor, member: Member, alive: Callable[[], bool]
) -> tuple[dict[str, Any], Tensor | None]:
    """Keep a push for its round; the answer when the round is complete (see `Shard.push`)."""
    held = shard.pending.get(push.member)
    if push.step >= shard.step and (held is None or held[0].step != push.step):
        shard.record_push("push", push, payload)
        shard.pending[push.member], member.came_s = (push, payload), time.monotonic()
        shard.cond.notify_all()
    gather(shard)
    shard.wait(lambda: shard.step > push.step or shard.partial is not None or shard.halted, member, alive)
    if shard.step <= push.step:
        if shard.halted:
            return shard.halts, None
        return {"norm_sq": shard.partial, "step": push.step}, None
    return answer_together(shard, push.member, push.step), shard.pulled(push.member)


def gather(shard: Shard) -> None:
    """Go on with the round as far as the pushes go; nothing where they are applied one by one."""
    if shard.pending and shard.ready().rules.sync:
        _fold(shard)
        _advance(shard)


def _fold(shard: Shard) -> None:
    """Add what has come, in the order of names, so that every run adds in the same order."""
    for who in sorted(shard.members):
        if who in shard.folded:
            continue
        if who not in shard.pending or shard.pending[who][0].step != shard.step:
            return
        _add(shard, who)


def _add(shard: Shard, who: str) -> None:
    """Add a push to the round; what it said is kept, its numbers are not: a round of many workers needs no more memory."""
    push, payload = shard.pending[who]
    shard.ready().add(push, payload)
    shard.pending[who] = (push, payload.new_empty(0))
    shard.folded.append(who)


def _advance(shard: Shard) -> None:
    """Finish the round if all members have pushed."""
    if shard.partial is not None or not set(shard.members) <= set(shard.pending):
        return
    store = shard.ready()
    step = min(push.step for push, _ in shard.pending.values())
    if step > shard.step:  # updates of rounds in between were lost with an earlier server's life
        shard.log(f"rounds {shard.step} to {step - 1} are lost; going on with round {step}")
        shard.step = step
    for who in sorted(shard.pending):
        if who not in shard.folded and shard.pending[who][0].step == step:
            _add(shard, who)
    if not store.rules.alone:
        shard.partial = store.norm_sq()
    elif not shard.halted:
        apply_round(shard, store.norm_sq())
    shard.cond.notify_all()


def apply_round(shard: Shard, norm_sq: float) -> None:
    """One update of the round's pushes: Σ ∇ / Σ targets, clipped by the norm of the whole."""
    store = shard.ready()
    shard.record({"op": "round", "step": shard.step, "norm_sq": norm_sq, "members": shard.folded}, "push")
    pushes = [shard.pending.pop(who)[0] for who in shard.folded]
    count, loss = sum(p.count for p in pushes), math.fsum(p.loss for p in pushes)
    nominal = pushes[0].nominal
    norm = math.sqrt(norm_sq) * nominal / count if count and norm_sq >= 0 else math.nan
    skipped, factor = not finite(norm, loss), 0.0
    if not skipped:
        clip = min(1.0, store.rules.max_norm / (norm + 1e-6))
        factor = store.rules.factor(shard.progress, shard.tokens)
        store.update(nominal / count * clip, factor)
        shard.version += 1
        shard.staleness[0] += len(pushes)
        shard.applied.update({p.member: p.step for p in pushes})
    else:
        store.drop()
        shard.skipped += bool(count)
    shard.tokens += count
    shard.step += 1
    shard.progress += 1.0
    own, shard.folded, shard.partial = shard.partial, [], None
    there = [(shard.members[push.member], push) for push in pushes if push.member in shard.members]
    whole_s = max((member.came_s for member, _ in there), default=0.0)
    for member, push in there:
        member.took(push)
        member.waited_s = whole_s - member.came_s  # what comes after the last push is the server's own work
    losses, gradients = unsound(pushes) if skipped else ([], [])
    shard.last = {
        "step": shard.step - 1,
        "loss": loss,
        "count": count,
        "norm": norm,
        "norm_sq": own,
        "norm_sq_of_all": norm_sq,
        "skipped": skipped,
        "unsound_losses": losses,
        "unsound_gradients": gradients,
        "lr": factor * store.rules.optimizer.lr * (not skipped),
    }
    shard.cond.notify_all()
    shard.snapshot_if_due()


def unsound(pushes: Sequence[Push]) -> tuple[list[str], list[str]]:
    """(whose loss, whose gradient alone) was not finite."""
    counting = [push for push in pushes if push.count]
    losses = [push.member for push in counting if not finite(push.loss)]
    return losses, [p.member for p in counting if finite(p.loss) and not finite(p.norm)]


def answer_together(shard: Shard, who: str, step: int) -> dict[str, Any]:
    """A late worker goes on from the step that it is told, so it hears what is due after that one."""
    known = shard.last if shard.last["step"] == step else {"step": shard.step - 1, "late": True}
    wishes = shard.wishes.answer(int(known["step"]))
    found = {"applied": shard.applied.get(who) == step, "version": shard.version, "tokens": shard.tokens}
    waited_s = shard.members[who].waited_s if who in shard.members else 0.0
    return {**known, **found, **wishes, "loads": loads(shard.members), "waited_s": waited_s}
