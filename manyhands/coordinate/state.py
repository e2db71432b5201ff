"""The coordinator's policy: who takes part, when an epoch ends and the next begins, who is given up. No I/O, no clock.

Every method takes the time and returns nothing; what is to be said and done lies in `out` afterwards, in order. Time is
any clock in seconds that does not jump (`shift` moves it on where the whole machine was asleep).

1. The first epoch begins when all expected workers are ready. So does any further one while the job begins, that is, while
   nobody holds a state to go on with: where a replacement is on its way, it is awaited. A loss that no other attempt would
   mend (`final`) fails the job before its first step.
2. A lost worker ends the epoch at once (`over`). The next begins when every living member is ready again, with those
   newcomers that are ready then. A worker whose connection ends is lost when its launcher says so, or when it has not come
   back after `BACK_S`.
3. A ready newcomer, or a member that wants to leave, is announced (`wanted`); the members end the epoch at a step of theirs.
   A newcomer that has waited for `judge.ENTER_S` ends it in the middle of a step where that costs nobody's work.
4. A worker unheard of for `hang_s` is evicted, as is one that is started and says nothing (`arrivals`). So is one that stands
   still for `stuck_s` (or five times the longest step, if that is more; see `Pace`) while the others passed it or wait for it, or,
   where all stand still, the one that did so first; six times as long in a slow phase, alone, or before a step is measured.
5. A step that `faults` workers die of by themselves (or `kills` per three workers of any cause) fails the job, as does one whose
   collectives fail again and again without anybody to blame; else whoever is suspected most is evicted.
6. Where fewer than `min_workers` are alive and none comes, or nobody is left who holds the state, it fails: not when all is done.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from manyhands.coordinate import judge
from manyhands.coordinate.arrivals import Arrivals
from manyhands.coordinate.messages import FACTS, Garbage, epoch_to
from manyhands.coordinate.pace import Pace
from manyhands.coordinate.suspicions import Suspicions
from manyhands.coordinate.words import Happening, Member, Note, Rules, Say
from manyhands.core.membership import REFORM, Epoch, Loss, Seat, current, outlived

BACK_S = 1.5  # for a worker whose connection has ended to come back in
EXPLAIN_S = 0.3  # how long a better reason than "its connection ended" is awaited before the loss is told
LEFT_S = 1.0  # a member that has left is not missed for so long: the others reach the same step boundary


@dataclass
class State:
    """A job's membership."""

    rules: Rules
    number: int = 0
    before: int = 0  # epochs up to this one were a job's that was ended
    epoch: Epoch | None = None
    over: bool = False
    began: bool = False  # the job has committed a step
    stopping: bool = False
    ended: tuple[int, str] | None = None
    facts: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)  # expected ids: the first epoch's ranks
    coming: Arrivals = field(default_factory=Arrivals)
    members: dict[str, Member] = field(default_factory=dict)
    gone: dict[str, Loss] = field(default_factory=dict)
    out: list[Say | Note | Happening] = field(default_factory=list)
    _losses: list[str] = field(default_factory=list)  # ids lost since the epoch began
    _unexplained: dict[str, float] = field(default_factory=dict)
    _departed: float | None = None  # when somebody left whom the others may still wait for
    _wanted: bool = False
    _pace: Pace = field(default_factory=Pace)
    _deaths: list[Loss] = field(default_factory=list)  # in steps that are not done since
    _suspicions: Suspicions = field(default_factory=Suspicions)
    _short_s: float | None = None
    _done: bool = False  # somebody has said so: what is left at the end is anybody's, however few there are

    # -- from workers

    def hello(self, seat: Seat, *, holding: Epoch | None, step: int, version: int, now: float) -> None:
        """A worker (re)connects; `holding` is the epoch that it takes part in. Raises `Refused`."""
        member = self.members.get(seat.id)
        anew = holding is not None and holding.number <= self.before
        self.coming.came(seat.id, now)
        if anew and self.ended is None and member is None:  # the job does not depend on what becomes of it
            self.lose(seat.id, how="left", detail=judge.BEFORE, now=now)
        judge.admit(seat, member, self.gone.get(seat.id), version=version, ended=self.ended, anew=anew)
        if self.rules.shared and (refusal := judge.apart(seat, self.members.values())) is not None:
            self.order = [id for id in self.order if id != seat.id]  # the first epoch does not wait for it
            raise refusal
        if holding is not None and holding.number > self.number:  # our journal was lost: numbers never repeat
            self.adopt(holding, now)
        if member is None or not judge.same(seat, member):
            member = Member(seat, now, now)
        member.connected, member.ready, member.heard_s = True, False, now
        self.members[seat.id] = member
        self._stepped(member, step, member.phase, now)
        self._say(seat.id, "welcome", facts=dict(self.facts), stopping=self.stopping, wanted=self._wanted)
        self.out.append(Happening(kind="joined", seat_id=seat.id))
        if self.epoch is not None and self._inside(seat.id):
            if holding is None or holding.number < self.epoch.number:  # a restart came before it was told
                self._say(seat.id, "epoch", **epoch_to(self.epoch))
            if self.over:
                self._tell_over([seat.id])

    def beat(self, id: str, *, phase: str, step: int, calls: int, stack: str, now: float) -> None:
        """A sign of life. `calls`: how often its main thread has said what it does."""
        member = self.members[id]
        member.heard_s, member.stack = now, stack
        if calls != member.calls:
            member.calls, member.moved_s = calls, now
        self._stepped(member, step, phase, now)

    def ready(
        self, id: str, *, epoch: int, step: int, now: float, phase: str = "", waits: bool = True
    ) -> None:
        """It waits for the epoch after `epoch`; not `waits`: no longer, it has to do something first."""
        member = self.members[id]
        member.heard_s = member.moved_s = now
        self._stepped(member, step, phase or member.phase, now)
        if waits and self.epoch is not None and self._inside(id) and epoch < self.epoch.number:
            self._say(id, "epoch", **epoch_to(self.epoch))
            return
        member.ready = waits
        self._want()
        self._form(now)

    def suspect(
        self, id: str, *, epoch: int, rank: int | None, detail: str, now: float, step: int = 0
    ) -> None:
        """A collective of `epoch` failed for it after so many steps, by `rank` as it seems (itself: it begins anew with less)."""
        current = self.epoch
        if current is None or epoch != current.number or not self._inside(id):
            return
        name = current.seats[rank].id if rank is not None and rank < len(current.seats) else ""
        if not self.over:
            self.over = True
            self._suspicions.begin(judge.furthest(self.members.values(), step))
            self._tell_over(self._living())
        self._suspicions.add(id, name)
        worst, words = self._suspicions.verdict(self.members, self.epoch, detail)
        if worst is not None:
            self._evict(worst, words, now)
        elif words:
            self.end(words)

    def leaving(self, id: str, *, detail: str, now: float) -> None:
        """It will end in an orderly way; "done": because the job is done."""
        self.members[id].leaving = detail or "left"
        self._done |= detail == "done"
        self._say(id, "left")
        self._want()
        self._form(now)

    def publish(self, key: str, value: str) -> None:
        """A fact for everybody."""
        if key not in self.facts and len(self.facts) >= FACTS:
            raise Garbage(f"fact {key!r}", f"a job has at most {FACTS:,}", "")
        if self.facts.get(key) != value and not outlived(key, self.number):
            self.facts[key] = value
            self.out.append(Note({"kind": "fact", "key": key, "text": value}))
        for id in self._living():
            self._say(id, "fact", key=key, text=value)

    # -- from launchers, connections and the journal

    def adopt(self, epoch: Epoch, now: float) -> None:
        """Go on from an epoch of before a restart; its members have `judge.back_s` to come back."""
        self.epoch, self.number, self.over, self._losses = epoch, epoch.number, False, []
        self.facts = current(self.facts, self.number)
        for seat in epoch.seats:
            if seat.id not in self.members and seat.id not in self.gone:
                self.members[seat.id] = Member(seat, now, now, connected=False, holds=True)

    def recall(self, loss: Loss) -> None:
        """Somebody was lost before a restart."""
        self.gone[loss.seat.id] = loss
        self._done |= (loss.how, loss.detail) == ("left", "done")
        self.members.pop(loss.seat.id, None)
        if self._inside(loss.seat.id):
            self._losses.append(loss.seat.id)
            self.over = True

    def expect(self, ids: Iterable[str], now: float) -> None:
        """These workers are being started."""
        for id in ids:
            if id not in self.members and id not in self.gone:
                self.coming.expect(id, now)
                if self.epoch is None:
                    self.order.append(id)

    def cut(self, id: str, now: float) -> None:
        """Its connection has ended: it has left, it is dead, or it comes back."""
        if (member := self.members.get(id)) is None:
            return
        if member.leaving is not None:
            self.lose(id, how="left", detail=member.leaving, now=now)
        else:
            member.connected, member.cut_s = False, now

    def lose(
        self,
        id: str,
        *,
        how: str,
        detail: str,
        now: float,
        explained: bool = True,
        final: bool = False,
        then: str = "",
    ) -> None:
        """It is no longer there. Told a second time with a better reason (or none), only the reason changes.

        `final`: whoever took its place would meet the same; `then`: what is done about it, in words.
        """
        if id in self.gone:
            if id in self._unexplained and explained:
                known = self.gone[id]
                if known.how == "hang" or not detail:  # of which its process's end is only the consequence
                    how, detail = known.how, known.detail
                self.gone[id] = replace(known, how=how, detail=detail, then=then)
                self._explain(id, now, final)
                self._form(now)
            return
        member = self.members.pop(id, None) or self.coming.give_up(id, now)
        if member.leaving is not None and how != "failed":
            how, detail = "left", member.leaving
        inside = self.epoch is not None and self._inside(id)
        rank = self.epoch.rank_of(id) if self.epoch is not None and inside else -1
        self.gone[id] = judge.loss(member, rank, how=how, detail=detail, then=then, now=now)
        self.out.append(Note({"kind": "lost", "loss": asdict(self.gone[id])}))
        if inside:
            self._losses.append(id)
            if how == "left" and self.began and (detail != "done" or member.leaving):
                if not self.over and detail != "done" and self._departed is None:
                    self._departed = now
            else:
                self.over = True
                self._tell_over(self._living())
        self._unexplained[id] = now
        if explained:
            self._explain(id, now, final)
        self._want()
        self._form(now)

    def stop(self, now: float) -> None:
        """The whole job is asked to stop: however few are left, they meet, to save."""
        self.stopping = True
        for id in self._living():
            self._say(id, "stop")
        self._form(now)

    def shift(self, seconds: float) -> None:
        """Nobody was heard for so long because this process (or machine) slept."""
        self.coming.shift(seconds)
        for member in self.members.values():
            member.shift(seconds)
        self._unexplained = {id: since + seconds for id, since in self._unexplained.items()}
        for name in ("_departed", "_short_s"):
            setattr(self, name, None if (at := getattr(self, name)) is None else at + seconds)

    def tick(self, now: float) -> None:
        """What time brings about; to be called some times a second."""
        if self.ended is not None:
            return
        for id in [id for id, since in self._unexplained.items() if now - since >= EXPLAIN_S]:
            self._explain(id, now)
            self._form(now)
        departed = self._departed is not None and now - self._departed >= LEFT_S
        if not self.over and (departed or judge.let_in(self._staying(), self._newcomers(), now)):
            self.over = True
            self._tell_over(self._living())
        for id, member in list(self.members.items()):
            if member.cut_s and not member.connected and now - member.cut_s > BACK_S:
                detail = f"its connection ended, and it has not come back within {BACK_S} s"
                self.out.append(Happening(kind="evict", seat_id=id, detail=detail))  # should it run still
                self.lose(id, how="death", detail=detail, now=now, explained=False)
            elif why := judge.silent(member, self.rules, now, inside=self._inside(id)):
                self._evict(id, why, now)
        for id, why in self.coming.late(self.rules, now):
            self._evict(id, why, now)
        judge.spare(self._staying(), now)
        limit, begun = self._pace.limit_s(self.rules.stuck_s), self._pace.longest_s is not None
        if (found := judge.late(self._staying(), limit, now, over=self.over, begun=begun)) is not None:
            self._evict(found.seat.id, judge.still(found, now), now)
            for member in self._staying():  # they may have waited for it, and now have to notice
                member.moved_s = now
        self._enough(now)

    # -- how

    def _say(self, to: str, op: str, **fields: Any) -> None:
        self.out.append(Say(to, {"op": op, **fields}))

    def _living(self) -> list[str]:
        return [id for id, member in self.members.items() if member.connected]

    def _inside(self, id: str) -> bool:
        return self.epoch is not None and any(seat.id == id for seat in self.epoch.seats)

    def _staying(self) -> list[Member]:
        """Members of the epoch that are alive and go on, in rank order."""
        seats = self.epoch.seats if self.epoch is not None else ()
        found = (self.members.get(seat.id) for seat in seats)
        return [member for member in found if member is not None and member.leaving is None]

    def _newcomers(self) -> list[Member]:
        """Ready workers that take part in no epoch yet, as they came."""
        return [m for id, m in self.members.items() if m.ready and m.leaving is None and not self._inside(id)]

    def _stepped(self, member: Member, step: int, phase: str, now: float) -> None:
        self._pace.hear(member, self._staying(), phase=phase, step=step, now=now)
        member.step, member.phase, member.holds = step, phase, member.holds or step >= 1
        if phase != REFORM:  # else what only some have done of it may be done again
            self._deaths = [loss for loss in self._deaths if loss.step >= step]
            self._suspicions.done(step)
        if step >= 1 and not self.began:
            self.began = True
            self.out.append(Note({"kind": "began"}))

    def _tell_over(self, ids: Iterable[str]) -> None:
        assert self.epoch is not None
        losses = [asdict(self.gone[id]) for id in self._losses]
        for id in ids:
            if self._inside(id):
                self._say(id, "over", epoch=self.epoch.number, losses=losses)

    def _want(self) -> None:
        if self.epoch is None:
            return
        wanted = bool(self._newcomers()) or any(self._inside(i) for i, m in self.members.items() if m.leaving)
        if wanted != self._wanted:
            self._wanted = wanted
            for id in self._living():
                self._say(id, "wanted", on=wanted)

    def _form(self, now: float) -> None:
        """Begin the next epoch if everybody is there."""
        if self.ended is not None:
            return
        staying, newcomers = self._staying(), self._newcomers()
        if not self.began and judge.beginning(staying):
            everybody = {id for id, m in self.members.items() if m.leaving is None}
            if self.epoch is None:
                everybody |= set(self.order) - set(self.gone)
            ready = {member.seat.id for member in (*staying, *newcomers) if member.ready}
            few = self.epoch is None and len(ready) < self.rules.awaited
            if self.coming or self._unexplained or not ready or ready != everybody or few:
                return
            if self.epoch is None:
                newcomers.sort(key=lambda m: (*self.order, m.seat.id).index(m.seat.id))
        elif not staying or not all(member.ready for member in staying):
            return
        ids = [member.seat.id for member in (*staying, *newcomers)]
        if len(ids) < self.rules.min_workers and not (self.stopping or self._done):
            return
        steps = judge.furthest(staying, 0)  # all have told by now
        self._deaths = judge.placed(self._deaths, self._losses, steps)
        if not self.stopping and (words := judge.deadly(self._deaths, self.rules, self.epoch)):
            self.end(words)
            return
        self.number += 1
        self.facts = current(self.facts, self.number)
        self.epoch = Epoch(
            number=self.number,
            seats=tuple(self.members[id].seat for id in ids),
            fresh=frozenset(id for id in ids if not (self.began and self.members[id].holds)),
            losses=tuple(self.gone[id] for id in self._losses),
        )
        self.over, self._departed, self._wanted, self._losses = False, None, False, []
        told = epoch_to(self.epoch)
        self.out.append(Note({"kind": "epoch", **told}))
        for id in ids:
            self.members[id].ready, self.members[id].moved_s = False, now
            self._say(id, "epoch", **told)
        self.out.append(Happening(kind="epoch", epoch=self.epoch))
        self._want()

    def _explain(self, id: str, now: float, final: bool = False) -> None:
        """The reason of a loss is as good as it will get: tell it, and see whether the job can go on."""
        del self._unexplained[id]
        loss = self.gone[id]
        self.out.append(Happening(kind="lost", seat_id=id, loss=loss))
        if self.stopping or self.ended is not None:
            return
        if found := judge.finished(self.members.values(), self.gone, self.epoch):
            self.end(*found)
        if loss.how == "left" or self.ended is not None:
            return
        if final and not self.began and (loss.rank >= 0 or id in self.order):
            self.end(f"worker {id} was lost before the first step ({loss.how}: {loss.detail})")
            return
        if loss.rank >= 0:
            self._deaths += judge.placed([loss], [id], judge.furthest(self.members.values(), loss.step))
        if words := judge.deadly(self._deaths, self.rules, self.epoch):
            self.end(words)
        self._enough(now)

    def _evict(self, id: str, detail: str, now: float) -> None:
        self._say(id, "evicted", detail=detail)
        self.out.append(Happening(kind="evict", seat_id=id, detail=detail))
        self.lose(id, how="hang", detail=detail, now=now, explained=False)

    def _enough(self, now: float) -> None:
        """Rule 6."""
        if self.ended is not None or self.stopping or self._unexplained or not (self.epoch or self.order):
            return
        alive, gone = sum(m.leaving is None for m in self.members.values()), tuple(self.gone.values())
        stateless = self.began and not any(m.holds for m in self.members.values())
        if judge.closing(self._staying(), gone, done=self._done, stateless=stateless):
            return
        if not stateless and alive + len(self.coming) >= self.rules.min_workers:
            self._short_s = None
            return
        self._short_s = now if self._short_s is None else self._short_s
        if stateless or now - self._short_s >= self.rules.patience_s:
            self.end(judge.shortage(alive, self.rules, gone, stateless=stateless, began=self.began))

    def end(self, words: str, code: int = 1) -> None:
        """The job cannot go on; with code 0 it is done."""
        if self.ended is None:
            self.ended = code, words
            self.out.append(Note({"kind": "ended", "code": code, "detail": words}))
            for id in self._living():
                self._say(id, "ended", code=code, detail=words)
            self.out.append(Happening(kind="failed" if code else "done", detail=words))
            for id in () if code else (*self.coming, *self.members):
                if not self._inside(id):  # too late, whatever it prepares
                    self.out.append(Happening(kind="evict", seat_id=id, detail=words))
