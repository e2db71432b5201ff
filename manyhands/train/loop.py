"""The loop of the main job: feed, step, and at their times evaluate, save, compare, report.

After each step there are chores. They can be done again, so that whatever of them a lost worker interrupts is repeated by the
others; a step is done once (see `manyhands.train.crew`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.core.errors import PeerLost, Stopped
from manyhands.core.events import Emit, Evaluated, Event, Mended, Stepped
from manyhands.core.membership import Seat
from manyhands.train import asked, chaos_hook, saving
from manyhands.train.balancing import rebalance, regroup, shares_of, take_shares
from manyhands.train.carried import carries
from manyhands.train.division import Division
from manyhands.train.evaluate import evaluate
from manyhands.train.leftout import Spoilt
from manyhands.train.loads import Loads
from manyhands.train.memory import Fits, heed
from manyhands.train.tally import Schedule, Tally, memory_bytes

if TYPE_CHECKING:
    from manyhands.balance.balancer import Balancer
    from manyhands.core.membership import Epoch
    from manyhands.core.signals import Interrupts
    from manyhands.core.types import Rows, Task
    from manyhands.train.books import Books
    from manyhands.train.checkpoint import AsyncSaver
    from manyhands.train.crew import Crew
    from manyhands.train.feed import Feed
    from manyhands.train.replica import Replica, StepResult
    from manyhands.train.standing import Standing
    from manyhands.wire.world import World

LOG_S = 2.0


@dataclass
class Loop:
    """One run over `schedule`. All workers run it in step.

    Attributes:
        state: what a checkpoint needs beyond the replica, as a function (rank 0's is written).
        promote: told of each set of workers; its rank 0 speaks for all. Gives what saves (on others: their parts).
        books: what this worker tells the ledger.
        crew: how the loop passes from one set of workers to the next; None: the set never changes.
        seats: the workers, in rank order; division: who of them computes what.
        mend: mend replicas that differ (else stop); flops_per_token, peak_flops (of all workers): for MFU.
    """

    replica: Replica
    feed: Feed
    balancer: Balancer | None
    task: Task
    world: World
    schedule: Schedule
    interrupts: Interrupts
    emit: Emit
    autocast: Callable[[], Any]
    eval_rows: Rows | None
    eval_batch: int
    promote: Callable[[World], AsyncSaver | None]
    state: Callable[[], dict[str, Any]]
    tokenizer: Path | None
    flops_per_token: float
    peak_flops: float
    books: Books
    crew: Crew | None = None
    mend: bool = False
    tally: Tally = field(default_factory=Tally)
    saver: AsyncSaver | None = None

    def __post_init__(self) -> None:
        self.seats: tuple[Seat, ...] = tuple(
            Seat(id=f"w{m.rank}", host=m.host, device=m.device) for m in self.world.members
        )
        self._epoch, self._loads = 1, Loads()
        self._spoilt, self._eval_fits = Spoilt(), Fits()
        self.division = Division(self.feed)
        self._chores: list[str] = []
        self._chores_of = -1  # the step that they belong to
        self._entered = False  # into a set of workers that had begun
        self.closing, self.save_again, self._begun_at = False, False, 0.0
        self.saved_at, self.saved_step, self._save_due, self._torn = time.monotonic(), -1, False, False
        self.compiling, self.together = True, False
        self._mark = self._begun = time.perf_counter()
        self._marked = (0, 0, 0.0)

    def run(self) -> str:
        """Train to the end or until told to stop; returns "done" or the signal's name. Raises as the parts do."""
        if not self._begun_at:
            self._begin()
        while True:
            try:
                if self._chores:
                    chores = self._chores
                    self._do(chores[0])
                    del chores[:1]  # where another list took its place, nothing of that
                elif self.replica.steps < self.schedule.total_steps:
                    self._advance()
                elif not self.closing:
                    self.closing = True
                    self._set_chores(["meet", "save", "evaluate", "wait"])
                else:
                    return "done"
            except PeerLost as lost:
                if self.crew is None:
                    raise
                self.tally.settle()
                self.crew.renew(self, lost)

    def _begin(self) -> None:
        self._mark = self._begun = time.perf_counter()
        self._set_mark()
        self.saved_at, self._begun_at = time.monotonic(), time.time()
        if not self._entered:
            self.saved_step = self.replica.steps
        self.saver = self.promote(self.world)
        if self.crew is not None and self.crew.epoch is not None:
            self.seats, self._epoch = self.crew.epoch.seats, self.crew.epoch.number
        if not self._entered:  # else the others are in the middle of an attempt
            self.books.begin_attempt(self.world, self.replica.steps)

    def _advance(self) -> None:
        """One step, and its chores. Raises `ManyhandsError` where the others are to go on without me."""
        if self.crew is not None and carries(self.replica) and not self.replica.interrupted:
            self._spoilt.leave(self.world.rank, self.seats)
        phase = "compile" if self.compiling else "step"
        self._tell_phase(phase)
        with self.interrupts.phase(phase, interruptible=self.compiling):
            self._torn = True
            at = self.crew.position(self) if self.crew is not None else self.replica.steps
            result = self._step(at, phase)
            self._torn = False
        self.compiling, done = False, self.replica.steps
        if self._due_log(done) and (result.agreed or result.own_tokens):
            self._log(self.tally.settle() or result)
        every, chores = self.schedule, []
        if result.stop:
            self.stop(result.stop)
            return
        if result.check or (every.check_every and done % every.check_every == 0):
            chores.append("check")
        if result.save or (every.save_every and done % every.save_every == 0):
            self._save_due = True
        rests = self.replica.at_rest or not self.replica.method.comes_to_rest
        whole = done >= self.division.open_until  # else some have done steps beyond this one
        if self._save_due and rests and whole:
            chores += ["meet", "save"]  # first: an evaluation that fails takes no step along
        if result.change:  # before what may take long: whoever leaves may not have the time
            chores += ["meet", "change"] if getattr(self.replica.method, "meets_first", False) else ["change"]
        if every.eval_every and done % every.eval_every == 0 and done < every.total_steps:
            chores.append("evaluate")
        self._set_chores(chores)

    def _set_chores(self, chores: list[str]) -> None:
        self._chores, self._chores_of = chores, self.replica.steps

    def do_first(self, chores: list[str]) -> None:
        """Before the chore that I am at, which is done again."""
        self._set_chores([*chores, *self._chores])

    def _do(self, chore: str) -> None:
        self.tally.settle()
        self._tell_phase(chore)
        if chore == "meet":
            self.replica.meet()
            self._commit()
        elif chore == "check":
            self._check()
        elif chore == "evaluate":
            self.evaluate()
        elif chore == "save":
            self._save()
        elif chore == "wait":
            if not saving.wait(self):
                self.saved_step = -1
                self._set_chores(["meet", "save", *self._chores])
        elif chore.startswith("stop"):
            self.together = True
            raise Stopped(int(chore.partition(":")[2]) & 0xFF)
        elif chore == "change":
            assert self.crew is not None
            self._chores = self._chores[1:]  # for the next set
            self.crew.change(self)

    def _tell_phase(self, phase: str) -> None:
        if self.crew is not None:
            self.crew.membership.at(phase, self.replica.steps)

    def _step(self, step: int, phase: str) -> StepResult:
        start = time.perf_counter()
        self.division.begin(step, self.seats, self._epoch)
        part = self.division.part(step)
        loaded = time.perf_counter()
        self.replica.work.data_s += loaded - start
        traffic = self.replica.wire.traffic
        before = traffic.communicate_s + traffic.idle_s
        if self.crew is not None and self.crew.receive(self):  # with the others' shares
            self.division.begin(step, self.seats, self._epoch)
            self._tell_phase(phase)  # the job could go on from me
        wishes = self._wishes()
        self.replica.fits.announce(part, self.feed.device)
        try:
            result = self.replica.step(part, self.task.loss, late=True, **wishes)
        except PeerLost:
            self.tally.interrupted_s += time.perf_counter() - start
            raise
        now = time.perf_counter()
        self._commit()
        rebalance(self.balancer, self.feed, result, self.replica.steps, self.emit)
        heed(self.feed, self.replica.fits, self.replica.steps, self.emit)
        self.tally.add(
            part,
            result,
            data_s=loaded - start,
            compute_s=now - loaded - (traffic.communicate_s + traffic.idle_s - before),
            wall_s=now - start,
        )
        self.tally.train_s = now - self._begun
        self._loads.add(result.work, result.spent, wall_s=now - start)
        self.tally.take(result)
        return result

    def _wishes(self) -> dict[str, Any]:
        """What I ask of all at the next agreement, as `Replica.step` takes it."""
        asked = self.interrupts.requested or 0
        stop, change = self.crew.wishes(asked) if self.crew is not None else (asked, False)
        odd = self.tally.take_skipped() and getattr(self.replica.method, "skips_alike", False)
        return {"stop": stop, "save": saving.wished(self), "change": change, "check": odd}

    def _commit(self) -> None:
        """Steps whose work is in the agreed parameters by now go into the ledger, and what was left out of them."""
        self.hear_notes()
        self.books.commit(self.division, self.replica.method, self.seats)
        if self.crew is not None:
            self.crew.committed(self)

    # -- other workers (called by the crew)

    def hear_notes(self) -> None:
        """What the replica has noted of updates that were left out: ranks in it are those of now."""
        notes = self.replica.take_notes()
        self._spoilt.hear(notes, self.world.rank, self.seats)
        self.tally.tell(notes, self.seats, self.emit)
        self.books.leave_out(notes, self.seats)

    def chores_at(self, steps: int) -> list[str]:
        """What is still to be done after `steps` steps."""
        return list(self._chores) if self._chores_of == steps else []

    def begin_attempt(self, standing: Standing) -> None:
        """Steps may be done again: the ledger counts anew from where the job stands. Collective."""
        alone = bool(getattr(self.replica.method, "alone", False))
        self.books.begin_attempt(self.world, self.replica.steps, goes_on=alone and bool(standing.held))
        rows = self.feed.order.rows(max(0, standing.steps - 1))
        self.books.tell_of_last(standing, self.replica.method, self.seats, epoch=self._epoch, rows=rows)

    def enter(self, world: World, standing: Standing, epoch: Epoch) -> None:
        """Go on in another set of workers. Collective."""
        before, self._entered = self.world.rank, True
        self.world, self.seats, self._epoch = world, epoch.seats, epoch.number
        self._chores, self._chores_of = list(standing.chores), standing.steps
        self.closing = standing.closing and standing.steps >= self.schedule.total_steps
        self.saved_step = standing.saved
        self._torn, self._save_due = False, False
        self.feed.rank = world.rank
        self.division.go_on(standing)
        chaos_hook.tell(self.replica, self.seats[world.rank].id)
        made = self.promote(world)
        self.saver = self.saver or made
        if world.rank == 0 and (before != 0 or standing.saved < 0):
            self.save_again = (
                True  # what the last first worker was writing may be lost with it, or lack a part
            )
        ids = [seat.id for seat in epoch.seats]
        self.balancer = regroup(self.balancer, self.feed, world, ids, leader=standing.leader)

    def stop(self, signum: int) -> None:
        """The whole job ends here in an orderly way."""
        self._set_chores(["meet", "save", "wait", f"stop:{signum}"])

    def leave(self, signum: int) -> None:
        """I alone end here; raises `Stopped`."""
        self.saved_step = self.replica.steps  # the others go on: there is nothing for me to save
        raise Stopped(signum & 0xFF)

    def facts(self) -> dict[str, Any]:
        """What a newcomer must know beside the replica's state."""
        return {
            "saved_step": self.saved_step,
            **shares_of(self.balancer, self.feed),
            "attempt": list(self.books.attempt),
            **self.tally.facts(),
        }

    def take_facts(self, facts: Mapping[str, Any]) -> None:
        """What `facts` said on another worker."""
        self.saved_step = int(facts["saved_step"])
        self.balancer = take_shares(self.balancer, self.feed, facts)
        if self.tally.take_facts(facts):
            self._begun = time.perf_counter() - self.tally.train_s
        self.books.take_part(facts["attempt"])
        self._set_mark()

    def _due_log(self, done: int) -> bool:
        if self.world.rank != 0:
            return False
        if done == self.schedule.total_steps or done == 1:
            return True
        if self.schedule.log_every is not None:
            return done % self.schedule.log_every == 0
        return time.perf_counter() - self._mark > LOG_S

    def _log(self, result: StepResult) -> None:
        now = time.perf_counter()
        traffic = self.replica.wire.traffic
        steps, tokens, communicated = self._marked
        elapsed = max(now - self._mark, 1e-9)
        rate = (self.replica.tokens - tokens) / elapsed
        spent = traffic.communicate_s + traffic.idle_s
        per_step = elapsed / max(1, self.replica.steps - steps)
        self.emit(
            Stepped(
                step=self.replica.steps,
                total_steps=self.schedule.total_steps,
                epoch=self.feed.order.epoch(self.replica.steps),
                loss=result.loss,
                lr=result.lr,
                grad_norm=result.grad_norm,
                samples=result.rows,
                target_tokens=self.replica.tokens,
                tokens_per_s=rate,
                mfu=rate * self.flops_per_token / self.peak_flops if self.peak_flops else 0.0,
                communicate_share=min(1.0, (spent - communicated) / elapsed),
                memory_bytes=memory_bytes(self.feed.device),
                eta_s=per_step * (self.schedule.total_steps - self.replica.steps),
            )
        )
        self._mark = now
        self._set_mark()
        balance = self._loads.take(self.replica.steps, self.seats)
        if balance is not None:
            self.emit(balance)

    def _set_mark(self) -> None:
        """What the next line's figures count from."""
        traffic = self.replica.wire.traffic
        self._marked = (self.replica.steps, self.replica.tokens, traffic.communicate_s + traffic.idle_s)

    def evaluate(self) -> None:
        """Score the held-out rows now; keeps and emits the metrics. Broken off where somebody is asked to end."""
        if self.eval_rows is None:
            return
        start = time.perf_counter()
        # without a coordinator those who are not asked do not hear of it: nobody waits for the end of their shares
        alone = self.crew is None and not getattr(self.replica.method, "divided", False)
        with self.interrupts.phase("evaluate", interruptible=alone), self.replica.agreed():
            metrics = evaluate(
                self.replica.model,
                self.task,
                self.eval_rows,
                self.world,
                batch_rows=self.eval_batch,
                device=self.feed.device,
                autocast=self.autocast,
                emit=self._told_in_evaluation,
                share=getattr(self.replica.method, "share", None),
                fits=self._eval_fits,
                asked=lambda: asked.heard(self),
            )
        pause = time.perf_counter() - start
        self._mark += pause
        self._begun += pause
        if metrics is None:
            asked.heed(self)
            return
        self.tally.eval = metrics
        if self.world.rank == 0:
            self.emit(Evaluated(step=self.replica.steps, metrics=metrics, wall_s=pause))

    def _told_in_evaluation(self, event: Event) -> None:
        self._tell_phase("evaluate")  # it goes on, however long it takes
        self.emit(event)

    def _save(self) -> None:
        """Collective, at rest."""
        if self.saved_step != self.replica.steps:
            self._check()
            self.books.sync()
            saving.save(self)
            self.saved_at = time.monotonic()
        self._save_due = self.save_again = False

    def _check(self) -> None:
        """Replicas are equal, or the job stops, or they are made so. Collective."""
        who = [(seat.id, seat.host) for seat in self.seats]
        self.replica.check_agreement(mend=self.mend, who=who, emit=self._told_of_mending)

    def _told_of_mending(self, event: Event) -> None:
        if isinstance(event, Mended) and event.rank == self.world.rank:
            self._spoilt.forget()  # what I was named for is no longer there
        self.emit(event)

    def save_now(self) -> None:
        """After an interruption inside a phase: keep what the last finished step left (rank 0 only, no collective).

        Between agreements, and within a step, that is nothing: the last checkpoint stands.
        """
        method = self.replica.method
        whole = not self._torn and (method.at_rest or getattr(method, "saves_alone", False))
        saving.save_now(self, whole=whole)
