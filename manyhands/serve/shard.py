"""One server's state machine: members, rounds, staleness, and the order of everything.

All changes happen under one lock, in the order of the journal, and are a function of the events alone, so that
replaying the journal leads to the same bits. The events: begin, join, leave, push, round, pull, flush.

A push is named by (member, step): sent again after a lost answer or a restart, it is answered and not applied again.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from manyhands.core.errors import ManyhandsError, UsageError
from manyhands.serve.keeper import Keeper, opened, status_of
from manyhands.serve.members import Member, Wishes, slowest
from manyhands.serve.rules import Push, Rules, integer, name, number
from manyhands.serve.singly import answer_alone, flush, take
from manyhands.serve.store import Store, finite, split

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.serve.journal import Journal, Level

POLL_S = 0.25  # between looks whether a waiting worker still is there

Answer = dict[str, Any]
Alive = Callable[[], bool]


class Shard:
    """Parameters of one server and who works on them.

    Args:
        journal: where events and snapshots go; None: nowhere, and a restart begins anew.
        lease_s: a member that is silent for so long is no longer waited for.
        interval_s: between snapshots.
        log: called with one line for what an operator should know.
    """

    def __init__(
        self,
        journal: Journal | None = None,
        *,
        lease_s: float = 30.0,
        interval_s: float = 60.0,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.cond = threading.Condition()
        self.store: Store | None = None
        self.header: dict[str, Any] = {}
        self.lease_s, self.log = lease_s, log
        self._keeper: Keeper | None = None
        self._reset(0, 0)
        if journal is not None:
            self._keeper = opened(self, journal, interval_s, log)
            with self.cond:
                self._gather()  # a round that was complete when the server before died

    def _reset(self, steps: int, tokens: int, progress: float | None = None) -> None:
        self.members: dict[str, Member] = {}
        self.left: dict[str, int] = {}  # the clocks of those who are no longer waited for
        self._halted = False  # no push is taken until the job begins anew
        self.version = 0  # updates applied
        self.step = steps  # sync: the round that is being gathered
        self.progress = float(steps) if progress is None else progress  # in global batches
        self.tokens = tokens
        self.loss, self.count = 0.0, 0
        self.staleness: Counter[int] = Counter()
        self.discarded = self.skipped = 0
        self.pending: dict[str, tuple[Push, Tensor]] = {}
        self.folded: list[str] = []
        self._partial: float | None = None  # sync, several servers: Σ of squares here of a complete round
        self.last: Answer = {"step": steps - 1}  # sync: what the last round came to
        self.gathered: list[Push] = []  # not yet applied
        self.applied: dict[str, int] = {}  # by member: its latest step that is in the parameters, or will be
        self.wishes = Wishes(answered=steps - 1)
        self._image: tuple[int, Tensor] | None = None

    # -- requests

    def begin(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Answer:
        """Take over a job: its rules, parameters and (of a checkpoint) optimizer state. Durable when it returns."""
        rules = Rules.read(header.get("rules"))
        params, state, _ = split(tensors)
        key: dict[str, Any] = {"job": str(header.get("job", "")), "serial": integer(header, "serial", 0)}
        with self.cond:
            if self.store is not None and key == {k: self.header.get(k) for k in key}:
                return {"version": self.version}  # asked again after a lost answer
            active = [n for n, m in self.members.items() if time.monotonic() - m.seen < self.lease_s]
            if self.store is not None and active and key["job"] != self.header.get("job"):
                raise UsageError(
                    f"the server works for another job, with {', '.join(sorted(active))}",
                    "one job at a time",
                    "wait for its end, or start another server",
                )
            self.store = Store(rules, params, state)
            self.header = {**key, "rules": header.get("rules")}
            steps = integer(header, "steps", 0)
            self._reset(steps, integer(header, "tokens", 0), number(header, "progress", float(steps)))
            if self._keeper is not None:
                self._keeper.snapshot(self, wait=True)
            self.cond.notify_all()
            self.log(f"job {key['job'][:8]} begins with {len(params)} parameters, {self.size_bytes:,} bytes")
            return {"version": self.version}

    def join(self, header: Mapping[str, Any]) -> Answer:
        """A worker comes (or comes back). Answers the step that it takes part in next."""
        who = name(header)
        with self.cond:
            self.ready(header)
            if who not in self.members:
                self._enter(who, integer(header, "step") if header.get("exact") else self._first_step(header))
            self.members[who].seen = time.monotonic()
            return {"step": self.members[who].clock, "version": self.version}

    def leave(self, header: Mapping[str, Any]) -> Answer:
        """A worker goes; nobody waits for it any more."""
        with self.cond:
            self.ready(header)
            self.expire(name(header))
        return {}

    def halt(self, header: Mapping[str, Any]) -> Answer:
        """Take no push any more until the job begins anew; which step is everybody's next, also of those who have left.

        Where pushes are applied as they come, that tells which of them are in the parameters: of a worker that was
        lost, and of one whose answer is still on its way.
        """
        with self.cond:
            self.ready(header)
            self._halted = True
            self.cond.notify_all()
            return {"clocks": {**self.left, **{who: m.clock for who, m in self.members.items()}}}

    def beat(self, header: Mapping[str, Any]) -> Answer:
        """A worker is still there, though it computes."""
        with self.cond:
            self.ready(header)
            if name(header) in self.members:
                self.members[name(header)].seen = time.monotonic()
        return {}

    def push(
        self, push: Push, payload: Tensor, job: Any, serial: Any, alive: Alive
    ) -> tuple[Answer, Tensor | None]:
        """Apply a worker's push (or keep it for the round) and answer with fresh parameters when it may go on.

        Args:
            payload: uint8, of `Store.payload_bytes`.
            job, serial: the worker's: which job, and which of its beginnings (None: whichever).
            alive: whether the worker still waits for the answer.

        Returns:
            The answer, and the parameters (None after the first half of a round over several servers: see `agree`; and
            where the push came after `halt`).
        """
        with self.cond:
            store = self.ready({"job": job})
            if self._halted or serial not in (None, self.header["serial"]):
                return {"halted": True}, None
            if push.member not in self.members:
                self._enter(push.member, push.step)
            member = self.members[push.member]
            member.seen = time.monotonic()
            self.wishes.hear(push.step, stop=push.stop, save=push.save, change=push.change)
            if store.rules.sync:
                return self._push_round(push, payload, member, alive)
            if push.step >= member.clock:
                self._record({"op": "push", **push.header()}, "push", payload)
                take(self, push, payload)
                self.cond.notify_all()
                self._snapshot_if_due()
            bound = store.rules.bound
            self._wait(
                lambda: self._halted or bound is None or push.step + 1 - slowest(self.members) <= bound,
                member,
                alive,
            )
            return answer_alone(self, push, member), self._pulled(push.member)

    def agree(self, header: Mapping[str, Any]) -> tuple[Answer, Tensor | None]:
        """The second half of a round over several servers: the norm of the whole gradient is known now."""
        with self.cond:
            self.ready(header)
            step = integer(header, "step")
            if step >= self.step:
                self._gather()
                if self._partial is None:  # this server has lost the pushes in a restart
                    return {"again": True}, None
                self.apply_round(number(header, "norm_sq"))
            return self._round_answer(name(header), step), self._pulled(name(header))

    def pull(self, header: Mapping[str, Any]) -> tuple[Answer, Tensor]:
        """The parameters as they are now; pushes that wait for company (`accumulate`) are applied first on demand."""
        with self.cond:
            self.ready(header)
            if header.get("flush") and self.gathered:
                self._record({"op": "flush"}, "state")
                flush(self)
            return {"version": self.version, "tokens": self.tokens}, self._pulled(name(header))

    def state(self) -> tuple[Answer, dict[str, Tensor]]:
        """Copies of parameters and optimizer state."""
        with self.cond:
            tensors = self.ready().tensors()
            tensors = {n: t for n, t in tensors.items() if not n.startswith("backup/")}
            figures = {"version": self.version, "tokens": self.tokens, "skipped": self.skipped}
            return {**figures, "progress": self.progress}, tensors

    def status(self) -> Answer:
        """Figures for people."""
        with self.cond:
            return status_of(self)

    def expire(self, leaver: str = "") -> None:
        """Stop waiting for members whose lease has run out, and for one that leaves."""
        with self.cond:
            now = time.monotonic()
            if leaver:
                self._drop(leaver, "left")
            for who in [n for n, m in self.members.items() if now - m.seen > self.lease_s]:
                self._drop(who, f"silent for {self.lease_s:g} s")

    def close(self) -> None:
        """Write what is not yet written."""
        with self.cond:
            if self._keeper is None:
                return
            if self.store is not None and not self.pending and not self.gathered:
                self._keeper.snapshot(self, wait=True)
            self._keeper.close()

    # -- rounds (sync)

    def _push_round(
        self, push: Push, payload: Tensor, member: Member, alive: Alive
    ) -> tuple[Answer, Tensor | None]:
        held = self.pending.get(push.member)
        if push.step >= self.step and (held is None or held[0].step != push.step):
            self._record({"op": "push", **push.header()}, "push", payload)
            self.pending[push.member] = (push, payload)
            self.cond.notify_all()
        self._gather()
        self._wait(lambda: self.step > push.step or self._partial is not None, member, alive)
        if self.step <= push.step:
            return {"norm_sq": self._partial, "step": push.step}, None
        return self._round_answer(push.member, push.step), self._pulled(push.member)

    def _gather(self) -> None:
        """Go on with the round as far as the pushes go."""
        if self.pending:
            self._fold()
            self._advance()

    def _fold(self) -> None:
        """Add what has come, in the order of names, so that every run adds in the same order."""
        store = self.ready()
        for who in sorted(self.members):
            if who in self.folded:
                continue
            if who not in self.pending or self.pending[who][0].step != self.step:
                return
            push, payload = self.pending[who]
            store.add(push, payload)
            self.folded.append(who)

    def _advance(self) -> None:
        """Finish the round if all members have pushed."""
        if self._partial is not None or not set(self.members) <= set(self.pending):
            return
        store = self.ready()
        step = min(push.step for push, _ in self.pending.values())
        if step > self.step:  # updates of rounds in between were lost with an earlier server's life
            self.log(f"rounds {self.step} to {step - 1} are lost; going on with round {step}")
            self.step = step
        for who in sorted(self.pending):
            push, payload = self.pending[who]
            if who not in self.folded and push.step == step:
                store.add(push, payload)
                self.folded.append(who)
        if store.rules.alone:
            self.apply_round(store.norm_sq())
        else:
            self._partial = store.norm_sq()
        self.cond.notify_all()

    def apply_round(self, norm_sq: float) -> None:
        """One update of the round's pushes: Σ ∇ / Σ targets, clipped by the norm of the whole."""
        store = self.ready()
        self._record({"op": "round", "step": self.step, "norm_sq": norm_sq, "members": self.folded}, "push")
        pushes = [self.pending.pop(who)[0] for who in self.folded]
        count, loss = sum(p.count for p in pushes), math.fsum(p.loss for p in pushes)
        nominal = pushes[0].nominal
        norm = math.sqrt(norm_sq) * nominal / count if count and norm_sq >= 0 else math.nan
        skipped, factor = not finite(norm, loss), 0.0
        if not skipped:
            clip = min(1.0, store.rules.max_norm / (norm + 1e-6))
            factor = store.rules.factor(self.progress, self.tokens)
            store.update(nominal / count * clip, factor)
            self.version += 1
            self.staleness[0] += len(pushes)
            self.applied.update({p.member: p.step for p in pushes})
        else:
            store.drop()
            self.skipped += bool(count)
        self.tokens += count
        self.step += 1
        self.progress += 1.0
        own, self.folded, self._partial = self._partial, [], None
        for push in pushes:
            if push.member in self.members:
                self.members[push.member].clock = self.step
        self.last = {
            "step": self.step - 1,
            "loss": loss,
            "count": count,
            "norm": norm,
            "norm_sq": own,
            "skipped": skipped,
            "lr": factor * store.rules.optimizer.lr * (not skipped),
        }
        self.cond.notify_all()
        self._snapshot_if_due()

    def _round_answer(self, who: str, step: int) -> Answer:
        """A late worker goes on from the step that it is told, so it hears what is due after that one."""
        known = self.last if self.last["step"] == step else {"step": self.step - 1, "late": True}
        wishes = self.wishes.answer(int(known["step"]))
        applied = self.applied.get(who) == step
        return {**known, "applied": applied, "version": self.version, "tokens": self.tokens, **wishes}

    # -- members

    def _first_step(self, header: Mapping[str, Any]) -> int:
        store = self.ready()
        if store.rules.sync:
            return self.step
        wanted = integer(header, "step", 0)
        return max(wanted, slowest(self.members)) if self.members else max(wanted, int(self.progress))

    def _enter(self, who: str, step: int) -> None:
        self._record({"op": "join", "member": who, "step": step}, "member")
        self.members[who] = Member(step, loss=self.loss, count=self.count)
        self.log(f"{who} joins at step {step}")

    def _drop(self, who: str, why: str) -> None:
        if who not in self.members:
            return
        self._record({"op": "leave", "member": who}, "member")
        self.forget(who)
        self.log(f"{who} is no longer waited for: {why}")
        if self.store is not None and self.store.rules.sync:
            self._gather()
        self.cond.notify_all()

    def forget(self, who: str) -> None:
        """It has no part in the work any more; how far it came is kept."""
        if who in self.members:
            self.left[who] = self.members.pop(who).clock
        if self.store is not None:
            self.store.backups.pop(who, None)

    def _wait(self, until: Callable[[], bool], member: Member, alive: Alive) -> None:
        """Raises `ManyhandsError` where the worker has gone meanwhile; what it pushed stays."""
        while not self.cond.wait_for(until, POLL_S):
            if not alive():
                raise ManyhandsError("the worker went away while it waited for others", "", "")
            member.seen = time.monotonic()

    # -- parameters

    def ready(self, header: Mapping[str, Any] | None = None) -> Store:
        """The store. Raises `UsageError`: there is none, or a request's `header` is not of its job."""
        if self.store is None:
            raise UsageError("the server has no parameters yet", "a job begins first", "start its workers")
        if header is not None and header.get("job") != self.header.get("job"):
            raise UsageError("the server works for another job", "one job at a time", "start another server")
        return self.store

    def _pulled(self, who: str) -> Tensor:
        """The parameters for a worker: one copy for all who pull the same version."""
        store = self.ready()
        if store.rules.compensation and who in self.members:
            self._record({"op": "pull", "member": who}, "state")
            store.keep_backup(who)
        if self._image is None or self._image[0] != self.version:
            self._image = (self.version, store.flat.clone())
        return self._image[1]

    @property
    def size_bytes(self) -> int:
        """Of the parameters."""
        return self.store.layout.size_bytes if self.store is not None else 0

    # -- what survives

    def _record(self, header: Mapping[str, Any], level: Level, payload: Tensor | None = None) -> None:
        if self._keeper is not None:
            self._keeper.record(header, payload, level)

    def _snapshot_if_due(self) -> None:
        settled = not self.pending and not self.gathered
        if self._keeper is not None and settled and self._keeper.due(self.size_bytes):
            self._keeper.snapshot(self)
