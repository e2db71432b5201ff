"""One server's state machine: members, rounds, staleness, and the order of everything.

All changes happen under one lock, in the order of the journal, and are a function of the events alone, so that
replaying the journal leads to the same bits. The events: begin, join, leave, push, round, pull, flush.

A push is named by (member, step): sent again after a lost answer or a restart, it is answered and not applied again.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from manyhands.core.errors import ManyhandsError, UsageError
from manyhands.serve.keeper import Keeper, opened, status_of
from manyhands.serve.members import Member, Wishes, first_step
from manyhands.serve.rules import Push, Rules, integer, name, number
from manyhands.serve.singly import come, commit, flush
from manyhands.serve.store import Store, split
from manyhands.serve.together import answer_together, apply_round, gather, take_part

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
                gather(self)  # a round that was complete when the server before died

    def _reset(self, steps: int, tokens: int, progress: float | None = None) -> None:
        self.members: dict[str, Member] = {}
        self.left: dict[str, int] = {}  # the clocks of those who are no longer waited for
        self.unused: dict[str, list[int]] = {}  # by member: the steps of its pushes that `discard` dropped
        self.halted = False  # no push is taken until the job begins anew
        self.lost = ""  # whose end has halted it
        self.version, self.earlier = 0, 0  # updates applied since the job began, and when it had begun before
        self.step = steps  # sync: the round that is being gathered
        self.progress = float(steps) if progress is None else progress  # in global batches
        self.tokens = tokens
        self.loss, self.count = 0.0, 0
        self.staleness: Counter[int] = Counter()
        self.discarded = self.skipped = 0
        self.unsound: dict[str, int] = {}  # by member: how many of its pushes were not finite
        self.pending: dict[str, tuple[Push, Tensor]] = {}  # by member: a push that is not yet applied
        self.folded: list[str] = []
        self.partial: float | None = None  # sync, several servers: Σ of squares here of a complete round
        self.last: Answer = {"step": steps - 1}  # sync: what the last round came to
        self.gathered: list[Push] = []  # not yet applied
        self.applied: dict[str, int] = {}  # by member: its latest step that is in the parameters, or will be
        self.judged: dict[str, int] = {}  # not sync, by member: how stale its latest push was
        self.wishes = Wishes(answered=steps - 1)
        self._image: tuple[int, Tensor] | None = None

    # -- requests

    def begin(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Answer:
        """Take over a job: its rules, parameters and (of a checkpoint) optimizer state. Durable when it returns."""
        rules = Rules.read(header.get("rules"))
        params, state, _ = split(tensors)
        key: dict[str, Any] = {"job": str(header.get("job", "")), "serial": integer(header, "serial", 0)}
        part = integer(header, "part", 0)  # of the job's servers, which this one is
        with self.cond:
            if self.store is not None and key == {k: self.header.get(k) for k in key}:
                if part != self.header["part"]:
                    raise UsageError(
                        f"addresses {self.header['part'] + 1} and {part + 1} lead to one parameter server",
                        "each keeps a part of its own",
                        "give each server's address once",
                    )
                return {"version": self.version}  # asked again after a lost answer
            active = [n for n, m in self.members.items() if time.monotonic() - m.seen < self.lease_s]
            if self.store is not None and active and key["job"] != self.header.get("job"):
                raise UsageError(
                    f"the server works for another job, with {', '.join(sorted(active))}",
                    "one job at a time",
                    "wait for its end, or start another server",
                )
            again = self.store is not None and key["job"] == self.header.get("job")
            before = self.earlier + self.version, self.staleness, self.discarded, self.skipped
            self.store = Store(rules, params, state)
            self.header = {**key, "part": part, "rules": header.get("rules")}
            steps = integer(header, "steps", 0)
            self._reset(steps, integer(header, "tokens", 0), number(header, "progress", float(steps)))
            self.wishes.answered = integer(header, "reached", steps) - 1
            if again:  # its workers have met anew: figures are the job's
                self.earlier, self.staleness, self.discarded, self.skipped = before
            try:
                if self._keeper is not None:
                    self._keeper.snapshot(self, wait=True)
            except BaseException:
                self.store = None  # whoever asks again is not told that it is kept
                raise
            self.cond.notify_all()
            self.log(f"job {key['job'][:8]} begins with {len(params)} parameters, {self.size_bytes:,} bytes")
            return {"version": self.version}

    def join(self, header: Mapping[str, Any]) -> Answer:
        """A worker comes (or comes back). Answers the step that it takes part in next."""
        who = name(header)
        with self.cond:
            self.ready(header)
            if self.stale(header):
                raise ManyhandsError(f"{who} is late", "the job has begun anew without it", "see its log")
            if who not in self.members:
                step = integer(header, "step", 0)
                if not header.get("exact"):
                    sync = self.ready().rules.sync
                    step = self.step if sync else first_step(self.members, step, self.progress)
                self._enter(who, step)
            self.members[who].seen = time.monotonic()
            clock = self.members[who].clock
            return {"step": clock, "version": self.version, "lease_s": self.lease_s}

    def leave(self, header: Mapping[str, Any]) -> Answer:
        """A worker goes; nobody waits for it any more."""
        with self.cond:
            self.ready(header)
            if not self.stale(header):
                self.expire(name(header))
        return {}

    def halt(self, header: Mapping[str, Any]) -> Answer:
        """Take no push any more until the job begins anew, and tell what has been applied.

        Where pushes are applied as they come, each worker's next step tells which of them are in the parameters: of a
        worker that was lost, and of one whose answer is still on its way. Where they are applied together, the round does,
        and whether the asker's push is in it. (`Servers.halt` finishes what only some of several servers have applied; it
        asks twice then, and what waits for company is applied when it asks to ``flush``.)
        """
        with self.cond:
            self.ready(header)
            if self.stale(header):
                return {"over": True}
            if header.get("flush"):
                self._flush()  # what waits for company is in nobody's state
            self.record({"op": "halt"}, "member")
            self.halted = True
            self.cond.notify_all()
            clocks = {**self.left, **{who: m.clock for who, m in self.members.items()}}
            told: Answer = {"clocks": clocks, "unused": self.unused, "step": self.step, "tokens": self.tokens}
            told |= {"judged": self.judged, "sync": self.ready().rules.sync}
            told["keeps"] = self._keeper is not None and self._keeper.keeps
            mine = self.applied.get(name(header))
            return {**told, "applied": mine == self.step - 1, "norm_sq": self.last.get("norm_sq_of_all")}

    def beat(self, header: Mapping[str, Any]) -> Answer:
        """A worker is still there, though it computes."""
        with self.cond:
            self.ready(header)
            if name(header) in self.members and not self.stale(header):
                self.members[name(header)].seen = time.monotonic()
        return {}

    def push(
        self, push: Push, payload: Tensor, header: Mapping[str, Any], alive: Alive
    ) -> tuple[Answer, Tensor | None]:
        """Apply a worker's push (or keep it for the round) and answer with fresh parameters when it may go on.

        Args:
            payload: uint8, of `Store.payload_bytes`.
            header: the request's, which names the job and which of its beginnings.
            alive: whether the worker still waits for the answer.

        Returns:
            The answer, and the parameters (None after the first half of a push to several servers: see `agree`; and where
            the push came after `halt`).
        """
        with self.cond:
            store = self.ready(header)
            if self.stale(header):
                return {"halted": True}, None
            told_again = store.rules.sync and push.step < self.step  # its round is made: the answer was lost
            if self.halted and not told_again:
                return self.halts, None
            member = self.entered(push.member, push.step)
            member.seen = time.monotonic()
            self.wishes.hear(push.step, stop=push.stop, save=push.save, change=push.change)
            if store.rules.sync:
                return take_part(self, push, payload, member, alive)
            return come(self, push, payload, member, alive)

    def agree(self, header: Mapping[str, Any], alive: Alive) -> tuple[Answer, Tensor | None]:
        """The second half of a push to several servers: all have it, and its round's norm (sync) or its staleness is known."""
        with self.cond:
            store = self.ready(header)
            if self.stale(header):
                return {"halted": True}, None
            if not store.rules.sync:
                return commit(self, header, alive)
            step = integer(header, "step")
            if step >= self.step:
                if self.halted and not header.get("finish"):
                    return self.halts, None
                gather(self)
                if self.partial is None:  # this server has lost the pushes in a restart
                    return {"again": True}, None
                apply_round(self, number(header, "norm_sq"))
            return answer_together(self, name(header), step), self.pulled(name(header))

    def pull(self, header: Mapping[str, Any]) -> tuple[Answer, Tensor]:
        """The parameters as they are now; pushes that wait for company (`accumulate`) are applied first on demand."""
        with self.cond:
            self.ready(header)
            if header.get("flush"):
                self._flush()
            return {"version": self.version, "tokens": self.tokens}, self.pulled(name(header))

    def _flush(self) -> None:
        """Apply the pushes that wait for company (`accumulate`)."""
        if self.gathered:
            self.record({"op": "flush"}, "state")
            flush(self)

    def state(self, header: Mapping[str, Any]) -> tuple[Answer, dict[str, Tensor]]:
        """Copies of parameters and optimizer state."""
        with self.cond:
            tensors = self.ready(header).tensors()
            tensors = {n: t for n, t in tensors.items() if not n.startswith("backup/")}
            figures = {"version": self.version, "tokens": self.tokens, "skipped": self.skipped}
            return {**figures, "progress": self.progress, "serial": self.header["serial"]}, tensors

    def status(self) -> Answer:
        """Figures for people."""
        with self.cond:
            return status_of(self)

    def expire(self, leaver: str = "") -> None:
        """Stop waiting for members whose lease has run out, and for one that leaves."""
        now = time.monotonic()  # before it waits for a long update, in which nobody can be heard
        with self.cond:
            if leaver:
                self._drop(leaver, "left")
            for who in [n for n, m in self.members.items() if now - m.seen > self.lease_s]:
                self._drop(who, f"silent for {self.lease_s:g} s")

    def hear_all(self) -> None:
        """Nobody could be heard for a while: all are given their time anew."""
        with self.cond:
            for member in self.members.values():
                member.seen = time.monotonic()

    def close(self) -> None:
        """Write what is not yet written."""
        with self.cond:
            if self._keeper is None:
                return
            try:
                if self.store is not None and self.settled:
                    self._keeper.snapshot(self, wait=True)
            finally:
                self._keeper.close()

    # -- members

    def entered(self, who: str, step: int) -> Member:
        """One that pushes `step`; one whose lease has ended is back, with what is known of it."""
        if who not in self.members:
            known = 0 if self.ready().rules.sync else self.left.get(who, 0)
            self._enter(who, max(step, known))
        return self.members[who]

    def _enter(self, who: str, step: int) -> None:
        self.record({"op": "join", "member": who, "step": step}, "member")
        self.members[who] = Member(step, loss=self.loss, count=self.count)
        self.log(f"{who} joins at step {step}")

    def _drop(self, who: str, why: str) -> None:
        if who not in self.members:
            return
        self.record({"op": "leave", "member": who}, "member")
        self.forget(who)
        self.log(f"{who} is no longer waited for: {why}")
        if self.store is not None and self.store.rules.sync:
            gather(self)
        self.cond.notify_all()

    def forget(self, who: str) -> None:
        """It has no part in the work any more; how far it came is kept."""
        if who in self.members:
            self.left[who] = self.members.pop(who).clock
        if self.store is not None and self.store.rules.sync and self.store.rules.whole:
            self.halted, self.lost = True, self.lost or who
        if self.store is not None and who not in self.pending:
            self.store.backups.pop(who, None)

    def wait(self, until: Callable[[], bool], member: Member, alive: Alive) -> None:
        """Raises `ManyhandsError` where the worker has gone meanwhile; what it pushed stays."""
        while not self.cond.wait_for(until, POLL_S):
            if not alive():
                raise ManyhandsError("the worker went away while it waited for others", "", "")
            member.seen = time.monotonic()

    # -- parameters

    def ready(self, header: Mapping[str, Any] | None = None) -> Store:
        """The store. Raises `UsageError`: there is none, or a request's `header` is not of its job."""
        if self.store is None:
            raise UsageError(
                "the server has no parameters",
                "a job begins first; a server without --state forgets them when it is started anew",
                "start the workers, or continue from the last checkpoint with --resume",
            )
        if header is not None and header.get("job") != self.header.get("job"):
            raise UsageError("the server works for another job", "one job at a time", "start another server")
        return self.store

    def stale(self, header: Mapping[str, Any]) -> bool:
        """Whether a request is of an earlier beginning of the job: its worker may be another one by now."""
        return header.get("serial") not in (None, self.header["serial"])

    def pulled(self, who: str) -> Tensor:
        """The parameters for a worker: one copy for all who pull the same version."""
        store = self.ready()
        if store.rules.compensation and who in self.members:
            self.record({"op": "pull", "member": who}, "state")
            store.keep_backup(who)
        if self._image is None or self._image[0] != self.version:
            self._image = (self.version, store.flat.clone())
        return self._image[1]

    @property
    def size_bytes(self) -> int:
        """Of the parameters."""
        return self.store.layout.size_bytes if self.store is not None else 0

    # -- what survives

    def record(self, header: Mapping[str, Any], level: Level, payload: Tensor | None = None) -> None:
        if self._keeper is not None:
            self._keeper.record(header, payload, level)

    def record_push(self, op: str, push: Push, payload: Tensor) -> None:
        """With what has been decided of the workers' wishes: it depends on what was answered by then."""
        self.record({"op": op, **push.header(), "wishes": {**vars(self.wishes)}}, "push", payload)

    @property
    def halts(self) -> Answer:
        """The answer to whoever pushes after a halt."""
        return {"halted": True, **({"lost": self.lost} if self.lost else {})}

    @property
    def settled(self) -> bool:
        """Whether a snapshot, and the pushes that wait for their second half, are all there is."""
        return not self.gathered and not (self.pending and self.ready().rules.sync)

    def snapshot_if_due(self) -> None:
        if self._keeper is not None and self.settled and self._keeper.due(self.size_bytes):
            self._keeper.snapshot(self)
