"""How a loop passes from one set of workers to the next, inside the same processes.

    somebody is lost (`PeerLost`), joins, or leaves
      -> rewind      back to the last agreement, keeping what was computed and can be used
      -> re-form     the coordinator names the next epoch; its members are joined by a new wire
      -> compare     who is how far, who holds which micro-batches of the unfinished steps
      -> adopt       a new replica around the same model; state is carried over in memory
      -> go on       with the same step: what nobody holds is divided among all

Who is behind (an agreement reached some and not others) or fresh gets the whole state from the first of those that
are ahead. With methods that touch no parameter before the step's agreement that happens while the others already compute:
the newcomer takes part in its first step with nothing to compute.
"""

from __future__ import annotations

import dataclasses
import functools
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from manyhands.core.errors import PeerLost
from manyhands.core.events import Joined, Left, Lost, Reformed, Warned
from manyhands.core.membership import REFORM
from manyhands.train import carried, exchange_state, saving, sharded_rebuild
from manyhands.train.standing import Held, Position, Standing, conclude

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.events import Emit
    from manyhands.core.membership import Epoch, Loss, Membership
    from manyhands.train.loop import Loop
    from manyhands.train.replica import Replica
    from manyhands.wire.world import World


SURVIVORS = "survivors"
UNDONE = "a worker was lost before the next agreement"
QUICK = 0.1  # of a step: to wait for a newcomer's state costs less than to go without it


class Offer(Protocol):
    """Where a worker hands out its state (`manyhands.wire.transfer`)."""

    def put(self, version: int, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None: ...

    def withdraw(self) -> None: ...


@dataclasses.dataclass
class _Back:
    """What of my work is where, when I have gone back to the last agreement.

    Attributes:
        held: what I have done since, by step; applied: what each of the set has, where that stays.
        committed: steps of which everybody's work is agreed upon; settled: the same of my own agreements.
        undone: what I have done since is lost.
    """

    held: Held
    applied: Mapping[str, Held]
    committed: int
    settled: int
    undone: bool


@dataclasses.dataclass
class _Offered:
    """The state that I hand out: to whom, since when, and how long it took them where all waited for it."""

    standing: Standing
    size_bytes: int
    begun: float
    wall_s: float | None = None


class Crew:
    """One worker's place in the changing set.

    Args:
        membership: the connection to the coordinator.
        join: makes the world of an epoch (`manyhands.wire.form.form`, with this worker's device and transport).
        offer: where this worker hands its state to others.
        fetch: gets what a peer offers: (address, version, what to call as long as it comes) -> tensors and facts.
        replica: makes a replica of this job around the model.
        rebuild: for methods that can't be taken over: a replica from the last checkpoint, and what it was made of.

    Attributes:
        epoch: the current set.
        fresh: this worker holds no state yet.
        leaving: the signal that asked this worker, alone, to leave; 0: none.
    """

    def __init__(
        self,
        membership: Membership,
        join: Callable[[Epoch], World],
        offer: Offer,
        *,
        fetch: Callable[[str, int, Callable[[], None]], tuple[dict[str, Tensor], dict[str, Any]]],
        replica: Callable[[World], Replica],
        rebuild: Callable[[World, Mapping[str, Any], int], tuple[Replica, str]],
    ) -> None:
        self.membership = membership
        self._join, self._offer, self._fetch = join, offer, fetch
        self._replica, self._rebuild = replica, rebuild
        self.epoch: Epoch | None = None
        self.fresh = True
        self.leaving = 0
        self._told_left: set[str] = set()
        self._offered: _Offered | None = None
        self._waiting: Standing | None = None  # I have not fetched the state yet
        self._flattened = ""  # how the workers lie on hosts, where that has made exchanges of two levels one
        self._losses: list[Loss] = []  # since the job last went on: somebody may be lost while it re-forms

    def meet(self) -> World:
        """Wait for the next epoch and join its members, as often as it takes. Raises what the coordinator says."""
        world = self.meet_or("")
        assert world is not None
        return world

    def meet_or(self, fact: str) -> World | None:
        """As `meet`; but None as soon as this fact is known and no epoch has come."""
        while True:
            epoch = self.membership.next_or(fact) if fact else self.membership.next()
            if epoch is None:
                return None
            self.epoch = epoch
            self._losses += epoch.losses
            try:
                return self._join(self.epoch)
            except PeerLost as lost:
                self.failed(lost)

    def failed(self, lost: PeerLost) -> None:
        """Tell the others, unless they know."""
        if not self.membership.over.is_set():
            self.membership.suspect(lost.rank, str(lost))

    def all_fresh(self, world: World) -> bool:
        """Whether nobody has any state: the job begins now. Collective."""
        mine = Position(seat=self.membership.me.id, fresh=self.fresh, steps=0)
        return all(Position.of(data).fresh for data in world.gather(mine.to_data()))

    def wishes(self, asked: int) -> tuple[int, bool]:
        """(signal that asks the job to stop, whether the set of workers is to change), of this worker in this step."""
        if asked and not self.membership.stopping:
            self.leaving = asked
        change = bool(self.leaving) or self.membership.change_wanted
        return (0 if self.leaving else asked), change

    # -- passing from one set to the next

    def change(self, loop: Loop) -> None:
        """Everybody has agreed to change the set after this step. Collective."""
        leaving = loop.world.gather(self.leaving)
        if all(leaving):
            self.leaving = 0
            loop.stop(max(leaving))
            return
        if any(leaving):
            whose = [bool(each) for each in leaving]
            if hasattr(loop.replica.method, "held"):
                sharded_rebuild.hand_over(loop.replica, whose)
            else:
                carried.hand_over(loop.replica, whose)
            for rank, seat in enumerate(loop.seats):
                if leaving[rank]:
                    self._told_left.add(seat.id)
                    detail, step = signal.Signals(leaving[rank]).name, loop.replica.steps
                    loop.emit(Left(seat=seat.id, rank=rank, host=seat.host, step=step, detail=detail))
        if self.leaving:
            saving.finish_part(loop)
            self.membership.leave("asked to leave")
            loop.leave(self.leaving)
        self.renew(loop, None)

    def renew(self, loop: Loop, cause: PeerLost | None) -> None:
        """Go on with the next set of workers; `cause`: None where it was agreed upon. Raises what the coordinator says."""
        begun = time.perf_counter()
        old = loop.replica
        if cause is not None:
            self.failed(cause)
        self.membership.at(REFORM, old.steps)
        back = self._go_back(loop)
        dropped = loop.division.begun() if getattr(old.method, "drops", False) else {}
        while True:
            loop.replica.wire.close()
            world = self.meet()
            assert self.epoch is not None
            staying = {seat.id for seat in self.epoch.seats}
            mine = Position(
                seat=self.membership.me.id,
                fresh=self.fresh,
                steps=loop.replica.steps,
                agreements=getattr(loop.replica.method, "agreements", 0),
                committed=back.committed,
                chores=loop.chores_at(loop.replica.steps),
                held=back.held,
                gone={seat: by for seat, by in back.applied.items() if seat not in staying},
                dropped={seat: by for seat, by in dropped.items() if seat not in staying},
                closing=loop.closing,
                saved=loop.saved_step,
                first=loop.seats[0].id,
                incomplete=saving.lost(loop, {seat.id for seat in loop.seats} - staying),
                quick=carried.fetch_s(loop.replica) < QUICK * loop.tally.step_s,
            )
            try:
                self.settle(loop, world, mine, begun=begun, back=back)
                return
            except PeerLost as lost:
                world.wire.close()
                self.failed(lost)
            if loop.replica is not old and getattr(loop.replica.method, "alone", False):
                old = loop.replica  # who was quicker may have pushed a step in this set
                back = self._go_back(loop)

    def _go_back(self, loop: Loop) -> _Back:
        """To the last agreement."""
        loop.hear_notes()
        replica, method, held, undone = loop.replica, loop.replica.method, {}, False
        committed = method.committed
        settled = getattr(method, "settled", committed)
        if hasattr(method, "rewind") and not self.fresh:
            steps, alone = replica.steps, bool(getattr(method, "alone", False))
            if not alone:  # an agreement was made, and then a peer was lost in the same step
                loop.books.commit(loop.division, method, loop.seats)
            held = method.rewind()
            if replica.steps > steps:  # an update was made of which nobody was told
                loop.books.commit(loop.division, method, loop.seats)
            if alone:  # and what I had pushed when the last set met
                for step, places in loop.division.held().get(self.membership.me.id, {}).items():
                    held.setdefault(step, []).extend(places)
            undone = replica.steps == steps and steps > committed and not held
        return _Back(held, applied_by(loop), committed, settled, undone)

    def settle(
        self, loop: Loop, world: World, mine: Position, *, begun: float, back: _Back | None = None
    ) -> None:
        """Agree on where the job stands, and take over. Collective. Raises `PeerLost`."""
        assert self.epoch is not None
        if not self.fresh:  # who holds nothing is no sign that the job has begun
            self.membership.at(REFORM, loop.replica.steps)
        still = bool(getattr(loop.replica.method, "still", False))
        standing = conclude([Position.of(data) for data in world.gather(mine.to_data())], still=still)
        if back is not None and back.undone and world.rank not in standing.behind:
            here = {seat.id for rank, seat in enumerate(self.epoch.seats) if rank not in standing.behind}
            loop.books.left_out(loop.division, standing, back.settled, here, UNDONE)
        made_of, rebuilt = SURVIVORS, ""
        traffic = loop.replica.wire.traffic
        world.wire.traffic = traffic  # type: ignore[misc]  # the counters of the whole run
        salvage = getattr(loop.replica.method, "salvage", None)
        salvaged = salvage() if salvage is not None and world.rank == 0 else {}
        loop.replica.close()
        goal, redivided = standing.steps, None
        if hasattr(loop.replica.method, "held"):
            redivided = sharded_rebuild.redivide(
                world, loop.replica, self._replica, standing, fresh=self.fresh
            )
        if redivided is not None:
            loop.replica, rebuilt = redivided
            standing = dataclasses.replace(standing, behind=(), resting=())
        elif carried.carries(loop.replica):
            old, loop.replica = loop.replica, self._replica(world)
            loop.replica.adopt(old)
        else:
            kept = [] if self.fresh or salvage is None else loop.replica.states
            loop.replica, made_of = self._rebuild(world, salvaged, standing.steps)
            if len(kept) == len(loop.replica.states):  # what I hold back is mine, wherever the parameters are
                loop.replica.states[:] = kept
            if salvage is not None and loop.replica.steps == standing.steps:
                standing = dataclasses.replace(standing, leader=0, behind=(), resting=())
            else:
                standing = Standing(steps=loop.replica.steps, leader=0, fresh=standing.fresh)
        loop.enter(world, standing, self.epoch)
        if made_of != SURVIVORS:  # steps may be done again
            loop.begin_attempt(standing)
        if made_of != SURVIVORS or redivided is not None:
            loop.take_facts(world.gather(loop.facts())[standing.leader])  # shares, too, are the leader's
            self.fresh = False
        exchange_state.resum(loop.replica.states, loop.replica.exchange_wire)
        self._hand_out(loop, standing)
        again, wall_s = max(0, goal - loop.replica.steps), time.perf_counter() - begun
        self._tell(loop, standing, made_of, wall_s, rebuilt=rebuilt, redone_steps=again)
        for rank in standing.fresh if made_of != SURVIVORS or redivided is not None else ():
            seat, step = self.epoch.seats[rank], standing.steps  # it has its part already
            loop.emit(Joined(seat=seat.id, rank=rank, host=seat.host, step=step, size_bytes=0, wall_s=wall_s))

    # -- state for those who lack it

    def _hand_out(self, loop: Loop, standing: Standing) -> None:
        self._waiting = None  # for somebody of the last set
        if self._offered is not None:  # to a set that has ended before its first step
            self._offered = None
            self._offer.withdraw()
        if not standing.behind:
            return
        assert self.epoch is not None
        if loop.world.rank == standing.leader:
            tensors, facts = carried.state_of(loop.replica)
            self._offer.put(self.epoch.number, tensors, {**facts, **loop.facts()})
            size = sum(t.numel() * t.element_size() for t in tensors.values())
            self._offered = _Offered(standing, size, time.perf_counter())
        if loop.world.rank in standing.behind:
            self._waiting = standing
        if not standing.resting:
            self.receive(loop)
            self.membership.at(REFORM, loop.replica.steps)
            loop.world.gather(None)  # nobody moves before everybody has it
            if self._offered is not None:
                self._offered.wall_s = time.perf_counter() - self._offered.begun

    def receive(self, loop: Loop) -> bool:
        """Get the state that I am waiting for, if any; whether there was any. Raises `PeerLost`."""
        if self._waiting is None:
            return False
        assert self.epoch is not None
        leader = self._waiting.leader
        moved = functools.partial(self.membership.at, "fetch", loop.replica.steps)
        tensors, facts = self._fetch(self.epoch.seats[leader].address, self.epoch.number, moved)
        carried.load(loop.replica, tensors, facts, leader)
        loop.take_facts(facts)
        self.fresh, self._waiting = False, None
        return True

    def position(self, loop: Loop) -> int:
        """How many steps the job has done, also while I have not got its state."""
        return self._waiting.steps if self._waiting is not None else loop.replica.steps

    def committed(self, loop: Loop) -> None:
        """A step was agreed upon: what was offered before it is no longer true."""
        self._tell_levels(loop)
        if self._offered is None:
            return
        offered, self._offered = self._offered, None
        self._offer.withdraw()
        wall_s = offered.wall_s if offered.wall_s is not None else time.perf_counter() - offered.begun
        for rank in offered.standing.fresh:
            seat, step = loop.seats[rank], offered.standing.steps
            size = offered.size_bytes
            loop.emit(
                Joined(seat=seat.id, rank=rank, host=seat.host, step=step, size_bytes=size, wall_s=wall_s)
            )

    # -- words

    def _tell_levels(self, loop: Loop) -> None:
        """Exchanges within and across hosts have come to work otherwise than was asked for, or do as asked again."""
        now = getattr(loop.world.wire, "flattened", "")
        if now is None or now == self._flattened:
            return
        self._flattened = now
        words = (
            f"{now}: exchanges within and across hosts need equally many on each, "
            "so until then all workers exchange across hosts"
            if now
            else "hosts hold equally many workers again: exchanges work within and across them"
        )
        loop.emit(Warned(message=words, where="exchange"))

    def tell_losses(self, emit: Emit) -> None:
        """Who was lost since this was told last."""
        for loss in self._losses:
            if loss.seat.id not in self._told_left:
                emit(_words(loss))
        self._losses.clear()

    def _tell(
        self, loop: Loop, standing: Standing, made_of: str, wall_s: float, *, rebuilt: str, redone_steps: int
    ) -> None:
        assert self.epoch is not None
        self.tell_losses(loop.emit)
        open_ = [by for step, by in standing.held.items() if step >= standing.steps]
        kept = sum(len(places) for by in open_ for places in by.values())
        loop.emit(
            Reformed(
                epoch=self.epoch.number,
                workers=loop.world.size,
                step=standing.steps,
                wall_s=wall_s,
                kept_places=kept,
                redone_places=max(0, loop.division.open_places() - kept),
                by=made_of,
                rebuilt=rebuilt,
                redone_steps=redone_steps,
            )
        )


def _words(loss: Loss) -> Left | Lost:
    seat = loss.seat
    if loss.how == "left":
        return Left(seat=seat.id, rank=loss.rank, host=seat.host, step=loss.step, detail=loss.detail)
    return Lost(
        seat=seat.id,
        rank=loss.rank,
        host=seat.host,
        how=loss.how,
        detail=loss.detail,
        phase=loss.phase,
        step=loss.step,
        stack=loss.stack,
        silent_s=loss.silent_s,
        then=loss.then,
    )


def applied_by(loop: Loop) -> Mapping[str, Held]:
    """What every worker of the set that ends has applied since the last agreement, where that can be seen from outside."""
    applied: Sequence[Sequence[int]] = getattr(loop.replica.method, "applied", ())
    if not applied:
        return {}
    found = loop.division.held()  # also of those who were lost before the last set
    for rank, seat in enumerate(loop.seats[: len(applied)]):
        for step, places in loop.division.of_rank(rank, applied[rank]).items():
            found.setdefault(seat.id, {}).setdefault(step, []).extend(places)
    return found
