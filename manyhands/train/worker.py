"""One worker of a training job, from its environment to its summary. Started by a launcher by its dotted name."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from manyhands.core import config
from manyhands.core.environment import read_env
from manyhands.core.errors import Diverged, PeerLost, Stopped
from manyhands.core.events import Planned
from manyhands.train import chaos_hook, ending
from manyhands.train.order import Order
from manyhands.train.parts import Parts

if TYPE_CHECKING:
    import torch

    from manyhands.core.signals import Interrupts
    from manyhands.train.checkpoint import AsyncSaver
    from manyhands.train.crew import Crew
    from manyhands.train.enlist import Enlisted
    from manyhands.train.loop import Loop
    from manyhands.train.replica import Replica
    from manyhands.wire.world import World

T = TypeVar("T")


def main(argument: str) -> int:
    """Entry point of a worker. `argument` is an `Order` in JSON. Returns the exit code."""
    work(Order.from_json(argument))
    return 0


def work(order: Order) -> dict[str, Any]:
    """Run my share of the job; returns the summary (on every rank). Raises `ManyhandsError` and `Stopped`."""
    from manyhands.core import compute
    from manyhands.core.native import enable_allocator
    from manyhands.core.signals import Interrupts
    from manyhands.train.enlist import device_of, enlist

    interrupts = Interrupts()
    with interrupts:
        with interrupts.phase("start", interruptible=True):
            allocator = enable_allocator()
            compute.enable()
            device = device_of(order.job)
            enlisted = enlist(order.job, device)
        run = _Run(order, device, interrupts, enlisted, allocator)
        try:
            return run.run()
        except (
            Diverged
        ) as error:  # all workers see it: no worker's failure, and a successor would see it, too
            if enlisted is not None:
                enlisted.membership.fail(str(error))
            raise
        finally:
            run.close()


class _Run:
    """The parts of one run, in order. A class only because they share what they have found.

    Attributes:
        world: the workers that it has now.
        crew: how the set of workers changes; None: it never does.
    """

    def __init__(
        self,
        order: Order,
        device: torch.device,
        interrupts: Interrupts,
        enlisted: Enlisted | None,
        allocator: str,
    ) -> None:
        from manyhands.train.crew import Crew
        from manyhands.train.voice import Voice

        self.job, self.origins, self.started = order.job, order.origins, order.started or time.time()
        self._given = order.job
        self.device, self.interrupts, self.allocator = device, interrupts, allocator
        self.output = Path(self.job.output)
        self.emit = Voice(self.job)
        self.world: World | None = None
        self.loop: Loop | None = None
        self.crew: Crew | None = None
        self._enlisted = enlisted
        if enlisted is not None:
            self.crew = Crew(
                enlisted.membership,
                enlisted.join,
                enlisted.offer,
                fetch=enlisted.fetch,
                replica=lambda world: self.parts.replica(world, compare=False, regrouped=True),
                rebuild=self._rebuild,
            )

    def run(self) -> dict[str, Any]:
        """Returns the summary. Raises `ManyhandsError` and `Stopped`."""
        loop = self._ready()
        reason = "done"
        try:
            self._surviving(
                loop, lambda: ending.sample(loop, self.job, self.parts.material, self.interrupts, self.emit)
            )
        except Stopped as stopped:
            alone = self.crew is not None and not (loop.together or self.crew.membership.stopping)
            if alone and self.crew is not None:  # the others go on
                self.crew.membership.leave(str(stopped))
                raise
            reason = str(stopped)
            loop.save_now()
            self._finish(loop, reason, collective=False)
            raise
        finally:
            if loop.saver is not None:
                loop.saver.close()
        return self._surviving(loop, lambda: self._finish(loop, reason, collective=True))

    def _surviving(self, loop: Loop, what: Callable[[], T]) -> T:
        """`what()` after the last step, done again where a lost worker has interrupted it."""
        while True:
            try:
                loop.run()  # the steps, or what is left to do after the last one
                return what()
            except PeerLost as lost:
                if self.crew is None:
                    raise
                self.crew.renew(loop, lost)

    def close(self) -> None:
        """Whatever is open is closed; nobody waits for this worker any more."""
        if self.loop is not None:
            self.loop.replica.close()
            self.loop.books.close()
        for world in (self.world, self.loop.world if self.loop is not None else None):
            if world is not None:
                world.wire.close()
        if self._enlisted is not None:
            self._enlisted.close()
        self.emit.close()

    # -- getting ready

    def _ready(self) -> Loop:
        """A loop that stands where the job stands, whether it begins now or runs already."""
        while True:
            try:
                if self.crew is None:
                    self._enter(self._connect())
                    return self._begin()
                if "job" in self.crew.membership.facts():
                    return self._catch_up()
                with self.interrupts.phase("start", interruptible=True):
                    world = self.crew.meet_or("job")
                    if world is None:
                        continue
                    self._enter(world)
                    together = self.crew.all_fresh(world)
                if together:
                    return self._begin()
                self.crew.membership.suspect(None, "a newcomer has to get ready first")
            except PeerLost as lost:  # nothing to go on with yet: it begins anew, with what is prepared
                if self.crew is None:
                    raise
                self.crew.failed(lost)
                self.the_world.wire.close()
                self._tell_phase("start", 0)

    @property
    def the_world(self) -> World:
        assert self.world is not None
        return self.world

    def _enter(self, world: World) -> None:
        self.world, self.world_sizes = world, [world.size]
        self.emit.take(world.rank)

    def _connect(self) -> World:
        """The fixed world that the launcher's variables describe."""
        from manyhands.train import session

        transport = session.transport_for(self.job.strategy.placement, self.job.transport)
        return session.connect_from_environment(device=self.job.device, transport=transport)[0]

    def _begin(self) -> Loop:
        """Everybody prepares and builds together."""
        loop = self._build_all(self._resume_path)
        if self.crew is not None:
            self.crew.fresh = False
        if self.the_world.rank == 0:
            self._publish()
        if self.crew is not None:
            self.crew.tell_losses(self.emit)
        return loop

    def _publish(self) -> None:
        """The run begins: what it consists of, for newcomers and for later. A refused one leaves an earlier one's alone."""
        from manyhands.train.anchor import anchored
        from manyhands.train.durable import write_text

        write_text(self.output / "config.toml", config.to_toml(anchored(self.effective)))
        if self.crew is not None:
            kind, data = self.device.type, self.parts.material.identity
            order = Order.running(self.effective, self._given, kind, self.origins, self.started, data)
            self.crew.membership.publish("job", order.to_json())

    def _catch_up(self) -> Loop:
        """The job runs: get ready alone, then take part and get the state from a peer."""
        from manyhands.train.enlist import alone
        from manyhands.train.standing import NobodyHolds, Position

        assert self.crew is not None
        order = Order.from_json(self.crew.membership.facts()["job"])
        self.job, self.origins, self.started = order.job_on(self.device.type), order.origins, order.started
        self.world, self.world_sizes = alone(self.device), []
        loop = self._build_all(lambda: None, planned_for=self.job.workers or 1, data=order.data)
        self.parts.warm_up(loop.replica, loop.feed)
        begun = time.perf_counter()
        while True:
            with self.interrupts.phase("start", interruptible=True):
                world = self.crew.meet()
            mine = Position(seat=self.crew.membership.me.id, fresh=True, steps=0)
            try:
                self.crew.settle(loop, world, mine, begun=begun)
                return loop
            except NobodyHolds:  # whoever had begun died before the first step: all are newcomers
                self.job = self._given
                self._enter(world)
                return self._begin()
            except PeerLost as lost:
                world.wire.close()
                self.crew.failed(lost)

    def _build_all(
        self, resume_path: Callable[[], Path | None], planned_for: int | None = None, data: str = ""
    ) -> Loop:
        """Data (a newcomer's are those that the job trains on), model, plan, loop; nothing is kept of an earlier attempt."""
        from manyhands.train.material import check_joins
        from manyhands.train.resume import restore

        if self.loop is not None:
            self.loop.replica.close()
            self.loop = None
        shares, asked = self.job.shares, self.job.workers or read_env().world_size
        if shares is not None and self.crew is not None and len(shares) == asked != self.the_world.size:
            self.job = dataclasses.replace(self.job, shares=None)  # somebody was lost who isn't replaced
        over = self.crew.membership.over if self.crew is not None else None
        self.parts = parts = Parts(self.job, self.device, over, self._tell_in_step, planned_for)
        with self.interrupts.phase("prepare", interruptible=True):
            self._tell_phase("prepare", 0)
            resume = resume_path()
            parts.prepare(self.the_world, self.emit)
            if planned_for is not None:
                check_joins(self.job, parts.material, data)
        with self.interrupts.phase("build", interruptible=True):
            self._tell_phase("build", 0)
            parts.build(self.the_world)
            self.effective = parts.effective(planned_for or self.the_world.size)
            if planned_for is None:
                self._announce()
            self.loop = loop = self._loop()
            chaos_hook.tell(loop.replica, self._seat())
            if resume is not None:
                sizes = restore(loop, resume, self.job, parts.material, self.emit)
                self.world_sizes = [*sizes, self.the_world.size]
                loop.tally.resumed_from = loop.replica.steps
        return loop

    def _announce(self) -> None:
        from manyhands.train.explain import explain

        parts, world = self.parts, self.the_world
        if world.rank == 0:
            rows = explain(
                self.job, self.origins, parts.material, parts.facts, parts.plan, world, self.allocator
            )
            self.emit(Planned(rows=rows))

    def _tell_phase(self, phase: str, steps: int) -> None:
        if self.crew is not None:
            self.crew.membership.at(phase, steps)

    def _tell_in_step(self, phase: str, steps: int) -> None:
        if self.loop is not None:  # compiling may take longer than a step
            self._tell_phase("compile" if self.loop.compiling else phase, steps)

    # -- parts

    def _resume_path(self) -> Path | None:
        from manyhands.train import checkpoint, manifest

        if self.the_world.rank == 0:
            manifest.check_fresh(self.output, self.job.resume)
        path, step = None, -1
        if self.job.resume is not None:
            path = checkpoint.resolve_resume(self.job.resume, self.output)
            step = int(checkpoint.verify(path)["step"])
        if self.crew is None:  # each has looked for itself
            manifest.check_alike(self.output, [int(found) for found in self.the_world.gather(step)])
        return path

    def _rebuild(self, world: World, salvaged: Mapping[str, Any], steps: int) -> tuple[Replica, str]:
        """For methods whose state was divided among workers that are gone."""
        assert self.loop is not None
        if self.loop.saver is not None:
            self.loop.saver.wait()
        return self.parts.rebuilt(world, self.output, salvaged, steps)

    def _loop(self) -> Loop:
        from manyhands.train import session
        from manyhands.train.balancing import balancer_for
        from manyhands.train.books import Books
        from manyhands.train.loop import Loop
        from manyhands.train.tally import Schedule

        parts, world, job = self.parts, self.the_world, self.job
        plan = parts.plan
        return Loop(
            replica=parts.replica(world),
            feed=parts.feed(world.rank),
            task=job.task,
            world=world,
            schedule=Schedule(
                total_steps=plan.steps,
                log_every=job.log_every,
                eval_every=job.eval_every,
                save_every=job.save_every,
                check_every=job.check_every,
            ),
            interrupts=self.interrupts,
            emit=self.emit,
            autocast=session.autocast_for(plan.precision, self.device.type),
            balancer=balancer_for(plan, self._seats(), job.global_batch),
            eval_rows=parts.material.evaluation,
            eval_batch=parts.pass_rows,
            promote=self._promote,
            books=Books(self.output, self._seat(), parts.batches(), self.emit, parts.sizes),
            state=self._state,
            tokenizer=parts.material.tokenizer,
            flops_per_token=parts.facts.flops_per_token,
            peak_flops=parts.facts.peak_flops,
            crew=self.crew,
            mend=job.on_divergence == "mend",
        )

    def _seat(self) -> str:
        return self.crew.membership.me.id if self.crew is not None else f"w{self.the_world.rank}"

    def _seats(self) -> list[str]:
        if self.crew is not None and self.crew.epoch is not None:
            return [seat.id for seat in self.crew.epoch.seats]
        return [f"w{rank}" for rank in range(self.the_world.size)]

    def _promote(self, world: World) -> AsyncSaver:
        """The set of workers that begins: its rank 0 speaks for the job, and saves."""
        from manyhands.train.checkpoint import AsyncSaver

        self.world = world
        if self.world_sizes[-1:] != [world.size]:
            self.world_sizes.append(world.size)
        self.emit.take(world.rank)
        if self.crew is not None and world.rank == 0 and "job" not in self.crew.membership.facts():
            self._publish()  # the first one died before it could
        return AsyncSaver(self.output, self.job.keep, self.emit)

    def _state(self) -> dict[str, Any]:
        from manyhands.data.prepare import VERSION as PREPARED

        return {
            "job": config.to_data(self.effective),
            "strategy": config.to_data(self.job.strategy),
            "data": self.parts.material.identity,
            "prepared": PREPARED,
            "eval_data": self.parts.material.held_out_identity,
            "rows": len(self.parts.material.train),
            "world_sizes": self.world_sizes,
            "labels": self.parts.material.labels,
        }

    def _finish(self, loop: Loop, reason: str, *, collective: bool) -> dict[str, Any]:
        from manyhands.train.summary import summarize

        summary = summarize(
            self.job,
            loop,
            self.parts.facts,
            self.parts.plan,
            self.parts.material,
            reason,
            self.world_sizes,
            time.time() - self.started,
            collective=collective,
        )
        if loop.world.rank == 0:
            summary = ending.tell(loop, summary, self.output, self.emit)
        if self.crew is not None:  # whoever leaves has nothing left to do
            self.crew.membership.leave(reason)
        if self.crew is None and collective:
            # nobody goes before it is written: who called us from Python reads it next
            loop.world.gather(None)
        return summary
