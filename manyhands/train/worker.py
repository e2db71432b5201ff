"""One worker of a training job, from its environment to its summary. Started by a launcher by its dotted name."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.core import config, rng
from manyhands.core.errors import PeerLost, Stopped, UsageError
from manyhands.core.events import Finished, Planned, Resumed, Sampled, Served, Warned
from manyhands.train.job import Job

if TYPE_CHECKING:
    import torch

    from manyhands.core.signals import Interrupts
    from manyhands.train.checkpoint import AsyncSaver
    from manyhands.train.crew import Crew
    from manyhands.train.enlist import Enlisted
    from manyhands.train.ledger import Ledger
    from manyhands.train.loop import Loop
    from manyhands.train.plan import Facts, Plan
    from manyhands.train.replica import Replica
    from manyhands.wire.world import World

DRAWN = 0x5A  # stream of random numbers for the sampled continuation


@dataclasses.dataclass(frozen=True)
class Order:
    """What a launcher hands to each worker: the job, where its values came from, how it was started."""

    job: Job
    origins: Mapping[str, str]
    started: float = 0.0

    def to_json(self) -> str:
        return json.dumps(
            {"job": config.to_data(self.job), "origins": dict(self.origins), "started": self.started}
        )

    @staticmethod
    def from_json(text: str) -> Order:
        data = json.loads(text)
        return Order(config.from_data(Job, data["job"]), data["origins"], data["started"])


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
        self.device, self.interrupts, self.allocator = device, interrupts, allocator
        self.output = Path(self.job.output)
        self.emit = Voice(self.job)
        self.world: World | None = None
        self.loop: Loop | None = None
        self.crew: Crew | None = None
        self._enlisted = enlisted
        self._catching_up = False
        if enlisted is not None:
            self.crew = Crew(
                enlisted.membership,
                enlisted.join,
                enlisted.offer,
                fetch=enlisted.fetch,
                replica=self._replica,
                rebuild=self._rebuild,
            )

    def run(self) -> dict[str, Any]:
        """Returns the summary. Raises `ManyhandsError` and `Stopped`."""
        loop = self._ready()
        reason = "done"
        try:
            loop.run()
            if self._samples(loop):
                with loop.replica.agreed():
                    if loop.world.rank == 0:
                        self._sample(loop)
        except Stopped as stopped:
            if self.crew is not None and self.crew.leaving:
                raise
            reason = str(stopped)
            loop.save_now()
            self._finish(loop, reason, collective=False)
            raise
        finally:
            if loop.saver is not None:
                loop.saver.close()
        while True:
            try:
                return self._finish(loop, reason, collective=True)
            except PeerLost as lost:
                if self.crew is None:
                    raise
                self.crew.renew(loop, lost)
                loop.run()  # what is left to do after the last step

    def close(self) -> None:
        """Whatever is open is closed; nobody waits for this worker any more."""
        if self.loop is not None:
            self.loop.replica.close()
            if self.loop.ledger is not None:
                self.loop.ledger.close()
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
                self._enter(self.crew.meet())
                if self.crew.all_fresh(self.the_world):
                    return self._begin()
                self.crew.membership.suspect(None, "a newcomer has to get ready first")
            except PeerLost as lost:  # before the first step there is nothing to go on with: it begins anew
                if self.crew is None:
                    raise
                self.crew.membership.suspect(lost.rank, str(lost))
                self.the_world.wire.close()

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
        self._write_config()
        if self.crew is not None:
            self.crew.fresh = False
            if self.the_world.rank == 0:
                order = Order(self.effective, dict(self.origins), self.started)
                self.crew.membership.publish("job", order.to_json())
        return loop

    def _catch_up(self) -> Loop:
        """The job runs: get ready alone, then take part and get the state from a peer."""
        from manyhands.train.crew import Position
        from manyhands.train.enlist import alone

        assert self.crew is not None
        order = Order.from_json(self.crew.membership.facts()["job"])
        self.job, self.origins, self.started = order.job, order.origins, order.started
        self.world, self.world_sizes = alone(self.device), []
        self._catching_up = True
        loop = self._build_all(lambda: None)
        begun = time.perf_counter()
        while True:
            world = self.crew.meet()
            mine = Position(seat=self.crew.membership.me.id, fresh=True, steps=0)
            try:
                self.crew.settle(loop, world, mine, begun=begun)
                return loop
            except PeerLost as lost:
                world.wire.close()
                self.crew.membership.suspect(lost.rank, str(lost))

    def _build_all(self, resume_path: Callable[[], Path | None]) -> Loop:
        from manyhands.train.material import gather_material

        if self.loop is not None:
            self.loop.replica.close()
        with self.interrupts.phase("prepare", interruptible=True):
            self._at("prepare")
            resume = resume_path()
            self.material = gather_material(self.job, self.the_world, self.emit)
        with self.interrupts.phase("build", interruptible=True):
            self._at("build")
            model = self._build()
            self.facts = self._facts(model)
            self.plan = self._plan(self.facts)
            self._announce(model, self.facts, self.plan)
            self.loop = loop = self._loop(model)
            if resume is not None:
                self._restore(loop, resume)
        return loop

    def _at(self, phase: str) -> None:
        if self.crew is not None:
            self.crew.membership.at(phase, 0)

    # -- parts

    def _resume_path(self) -> Path | None:
        from manyhands.train import checkpoint

        if self.job.resume is None:
            if self.the_world.rank == 0 and checkpoint.checkpoints(self.output):
                raise UsageError(
                    f"{self.output} already holds checkpoints of another run",
                    "a run does not mix with an earlier one",
                    f"continue it with --resume {self.output}, or give another --output",
                )
            return None
        path = checkpoint.resolve_resume(self.job.resume, self.output)
        checkpoint.verify(path)
        return path

    def _build(self) -> torch.nn.Module:
        from manyhands.models.build import build
        from manyhands.train.forward import quicken

        model = build(
            self.job.model if self.job.model != "auto" else self.material.default_model,
            task=self.job.task_name,
            vocab_size=self.material.vocab_size,
            seq_len=self.job.seq_len,
            n_labels=self.material.n_labels,
            seed=self.job.seed,
            tokenizer_dir=self.material.tokenizer,
        )
        if self.job.gradient_checkpointing:
            from manyhands.train.forward import checkpoint_activations

            checkpoint_activations(model, self.job.model)
        if self.job.precision == "fp64":
            model.double()
        model.train()
        quicken(model)
        return model.to(self.device)

    def _facts(self, model: torch.nn.Module) -> Facts:
        import torch

        from manyhands.core import hardware
        from manyhands.models.build import describe, draws_random
        from manyhands.train.plan import Facts, choose_precision
        from manyhands.wire.world import hosts

        has_bf16 = torch.cuda.is_bf16_supported() if self.device.type == "cuda" else hardware.cpu_has_bf16()
        precision, _ = choose_precision(self.job, self.device.type, has_bf16)
        about = describe(model, seq_len=self.job.seq_len)
        dtype = {"bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}.get(precision, "float32")
        peak = hardware.peak_flops(str(self.device), dtype, torch.get_num_threads())
        return Facts(
            rows=len(self.material.train),
            # who catches up plans like those that began
            world_size=self.job.workers if self._catching_up and self.job.workers else self.the_world.size,
            hosts=hosts(self.the_world.members),
            device_type=self.device.type,
            device_name=hardware.device_name(str(self.device)),
            threads=torch.get_num_threads(),
            has_bf16=has_bf16,
            draws_random=draws_random(model),
            parameters=about.parameters,
            flops_per_token=about.flops_per_token,
            peak_flops=math.fsum(self.the_world.gather(peak)),
        )

    def _plan(self, facts: Facts) -> Plan:
        from manyhands.train.plan import derive

        return derive(self.job, facts)

    def _announce(self, model: torch.nn.Module, facts: Facts, plan: Plan) -> None:
        from manyhands.train.explain import explain

        effective = dataclasses.replace(
            self.job,
            model=self.job.model if self.job.model != "auto" else self.material.default_model,
            tokenizer=self.job.tokenizer if self.job.tokenizer != "auto" else self.material.tokenizer_spec,
            precision=plan.precision,  # type: ignore[arg-type]
            compile="on" if plan.compile else "off",
            micro_batch=plan.micro_batch,
            device_batch=None if self.job.reproducible else plan.device_batch,
            steps=None if self.job.epochs is not None else plan.steps,
            workers=self.the_world.size,
            eval_fraction=0.05 if self.job.eval_data else self.job.eval_fraction,
            resume=None,
        )
        self.effective = effective
        if self.the_world.rank != 0 or (self.crew is not None and self._catching_up):
            return
        rows = explain(self.job, self.origins, self.material, facts, plan, self.the_world, self.allocator)
        self.emit(Planned(rows=rows))

    def _write_config(self) -> None:
        """Once it is sure that the run begins: a refused one leaves an earlier run's configuration alone."""
        from manyhands.train.durable import write_text

        if self.the_world.rank == 0:
            write_text(self.output / "config.toml", config.to_toml(self.effective))

    def _replica(self, world: World, compare: bool) -> Replica:
        """A replica around the model, on a wire."""
        from manyhands.exchange.ordered import Ordered
        from manyhands.train import session
        from manyhands.train.replica import Replica

        strategy = self.job.strategy
        if self.job.reproducible:
            strategy = dataclasses.replace(strategy, exchange=Ordered())
        in_tokens = getattr(strategy.outer.schedule, "unit", "steps") == "tokens"
        steps, per_row = self.plan.steps, self.material.targets_per_row
        return Replica(
            self.model,
            strategy,
            world.wire,
            max_grad_norm=self.job.max_grad_norm,
            targets_per_row=per_row,
            total=steps * self.job.global_batch * per_row if in_tokens else steps,
            autocast=session.autocast_for(self.plan.precision, self.device.type),
            forward=self.forward,
            over=self.crew.membership.over if self.crew is not None else None,
            compare=compare,
        )

    def _rebuild(self, world: World) -> tuple[Replica, str]:
        """A replica whose state was divided among workers that are gone: from the last checkpoint, or the beginning."""
        from manyhands.train import checkpoint, session

        assert self.loop is not None
        if self.loop.saver is not None:
            self.loop.saver.wait()
        newest = checkpoint.latest(self.output) if world.rank == 0 else None
        found = world.gather(str(newest) if newest else "")[0]
        self.model = self._build()
        self.forward = None
        replica = self._replica(world, True)
        if not found:
            return replica, "nothing: no checkpoint was there, and training begins anew"
        session.restore_replica(replica, Path(found))
        return replica, found

    def _loop(self, model: torch.nn.Module) -> Loop:
        from manyhands.data.sample import Order as SampleOrder
        from manyhands.train import session
        from manyhands.train.balancing import balancer_for
        from manyhands.train.feed import Feed
        from manyhands.train.forward import compiled
        from manyhands.train.ledger import next_attempt
        from manyhands.train.loop import Loop, Schedule

        plan, world = self.plan, self.the_world
        self.model, self.forward = model, compiled(model) if plan.compile else None
        feed = Feed(
            rows=self.material.train,
            order=SampleOrder(len(self.material.train), self.job.global_batch, self.job.seed),
            rank=world.rank,
            weights=plan.weights,
            micro_batch=plan.micro_batch,
            device_batch=plan.device_batch,
            coalesce=plan.coalesce,
            device=self.device,
            seed=self.job.seed,
        )
        return Loop(
            replica=self._replica(world, True),
            feed=feed,
            task=self.job.task,
            world=world,
            schedule=Schedule(
                total_steps=plan.steps,
                log_every=self.job.log_every,
                eval_every=self.job.eval_every,
                save_every=self.job.save_every,
                check_every=self.job.check_every,
            ),
            interrupts=self.interrupts,
            emit=self.emit,
            autocast=session.autocast_for(plan.precision, self.device.type),
            balancer=balancer_for(plan, self._seats(), self.job.global_batch),
            eval_rows=self.material.evaluation,
            eval_batch=plan.device_batch,
            promote=self._promote,
            next_attempt=lambda: next_attempt(self.output),
            open_ledger=self._open_ledger,
            state=self._state,
            tokenizer=self.material.tokenizer,
            flops_per_token=self.facts.flops_per_token,
            peak_flops=self.facts.peak_flops,
            crew=self.crew,
        )

    def _seats(self) -> list[str]:
        if self.crew is not None and self.crew.epoch is not None:
            return [seat.id for seat in self.crew.epoch.seats]
        return [f"w{rank}" for rank in range(self.the_world.size)]

    def _promote(self, world: World) -> AsyncSaver | None:
        """The set of workers that begins: its rank 0 speaks for the job, and saves."""
        from manyhands.train.checkpoint import AsyncSaver

        self.world = world
        if self.world_sizes[-1:] != [world.size]:
            self.world_sizes.append(world.size)
        self.emit.take(world.rank)
        return AsyncSaver(self.output, self.job.keep, self.emit) if world.rank == 0 else None

    def _open_ledger(self, attempt: int, resumed_at: int) -> Ledger:
        from manyhands.train.ledger import Batches, Ledger

        assert self.loop is not None
        order = self.loop.feed.order
        batches = Batches(
            n=order.n,
            global_batch=order.global_batch,
            seed=order.seed,
            micro_batch=self.plan.micro_batch,
            drop_last=order.drop_last,
        )
        seat = self.crew.membership.me.id if self.crew is not None else f"w{self.the_world.rank}"
        return Ledger(self.output, seat, batches, attempt=attempt, resumed_at=resumed_at, emit=self.emit)

    def _state(self) -> dict[str, Any]:
        return {
            "job": config.to_data(self.effective),
            "strategy": config.to_data(self.job.strategy),
            "data": self.material.identity,
            "world_sizes": self.world_sizes,
            "labels": self.material.labels,
        }

    def _restore(self, loop: Loop, path: Path) -> None:
        from manyhands.train import checkpoint, exchange_state, session
        from manyhands.train.resume import same_order

        before = checkpoint.load_state(path).state
        same_order(path, before, self.job, self.material)
        session.restore_replica(loop.replica, path, verified=True)
        lost = exchange_state.missing(before)
        if lost and self.the_world.rank == 0:
            self.emit(Warned(message=lost, where="resume"))
        earlier = list(before.get("world_sizes", []))
        self.world_sizes = [*earlier, self.the_world.size]
        if self.the_world.rank == 0:
            self.emit(
                Resumed(
                    step=loop.replica.steps,
                    path=str(path),
                    from_workers=earlier[-1] if earlier else 0,
                    workers=self.the_world.size,
                )
            )

    def _samples(self, loop: Loop) -> bool:
        """Whether a continuation is drawn at the end; the same on every worker."""
        model = loop.replica.model
        if getattr(loop.replica.method, "share", None) is not None:  # no worker computes alone
            return False
        return self.job.task_name == "pretrain" and self.job.prompt != "" and hasattr(model, "generate")

    def _sample(self, loop: Loop) -> None:
        from manyhands.train.generate import continuation

        prompt = self.job.prompt if self.job.prompt is not None else self.material.default_prompt
        with self.interrupts.phase("generate", interruptible=True), loop.autocast():
            rng.seed_torch(self.job.seed, DRAWN)
            text = continuation(loop.replica.model, self.material.tokenizer, prompt, new_tokens=96)
        self.emit(Sampled(step=loop.replica.steps, prompt=prompt, text=text))

    def _finish(self, loop: Loop, reason: str, *, collective: bool) -> dict[str, Any]:
        from manyhands.train.summary import summarize

        summary = summarize(
            self.job,
            loop,
            self.facts,
            self.plan,
            self.material,
            reason,
            self.world_sizes,
            time.time() - self.started,
            collective=collective,
        )
        if self.crew is not None:
            self.crew.membership.leave(reason)
        if loop.world.rank == 0:
            from manyhands.train.durable import write_text

            path = self.output / "summary.json"
            write_text(path, json.dumps(summary, indent=2) + "\n")
            if "served" in summary:
                told = summary["served"]
                names = ("consistency", "updates", "discarded", "staleness")
                self.emit(Served(**{name: told[name] for name in names}))
            self.emit(
                Finished(step=loop.replica.steps, reason=reason, wall_s=summary["wall_s"], summary=str(path))
            )
        return summary
