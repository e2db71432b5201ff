"""One worker of a training job, from its environment to its summary. Started by a launcher by its dotted name."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.core import config, rng
from manyhands.core.errors import Stopped, UsageError
from manyhands.core.events import Emit, Finished, Planned, Resumed, Sampled, Served, Warned
from manyhands.train.job import Job

if TYPE_CHECKING:
    import torch

    from manyhands.core.signals import Interrupts
    from manyhands.train.loop import Loop
    from manyhands.train.plan import Facts, Plan
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

    interrupts = Interrupts()
    with interrupts:
        with interrupts.phase("start", interruptible=True):
            allocator = enable_allocator()
            compute.enable()
            world, device = _join(order.job)
        try:
            with _sinks(order.job, world) as emit:
                return _Run(order, world, device, interrupts, emit, allocator).run()
        finally:
            world.wire.close()


def _join(job: Job) -> tuple[World, torch.device]:
    import torch

    from manyhands.train import session

    if job.reproducible:
        torch.use_deterministic_algorithms(True)
    transport = session.transport_for(job.strategy.placement, job.transport)
    world, device = session.connect_from_environment(device=job.device, transport=transport)
    if job.reproducible:
        torch.set_num_threads(job.threads or 1)  # the order of additions inside a kernel depends on it
    elif job.threads is not None:
        torch.set_num_threads(job.threads)
    return world, device


@contextlib.contextmanager
def _sinks(job: Job, world: World) -> Iterator[Emit]:
    from manyhands.core.environment import console
    from manyhands.core.registry import resolve
    from manyhands.train.sinks import JsonLines, Terminal, fan_out

    if world.rank != 0:
        yield _log_warnings
        return
    output = Path(job.output)
    output.mkdir(parents=True, exist_ok=True)
    sinks: list[Any] = [Terminal(console()), JsonLines(output / "metrics.jsonl")]
    for name in job.report_to:
        sinks.append(resolve("sinks", name)(output / name))
    try:
        yield fan_out(sinks)
    finally:
        for sink in sinks:
            sink.close()


def _log_warnings(event: Any) -> None:
    if isinstance(event, Warned):
        print(f"warning: {event.where}: {event.message}", flush=True)


class _Run:
    """The parts of one run, in order. A class only because they share what they have found."""

    def __init__(
        self,
        order: Order,
        world: World,
        device: torch.device,
        interrupts: Interrupts,
        emit: Emit,
        allocator: str,
    ) -> None:
        self.job, self.origins, self.started = order.job, order.origins, order.started or time.time()
        self.world, self.device, self.interrupts, self.emit = world, device, interrupts, emit
        self.allocator = allocator
        self.output = Path(self.job.output)
        self.world_sizes = [world.size]
        self.resumed_samples = 0

    def run(self) -> dict[str, Any]:
        from manyhands.train.material import gather_material

        with self.interrupts.phase("prepare", interruptible=True):
            resume = self._resume_path()
            self.material = gather_material(self.job, self.world, self.emit)
        with self.interrupts.phase("build", interruptible=True):
            model = self._build()
            facts = self._facts(model)
            plan = self._plan(facts)
            self._announce(model, facts, plan)
            loop = self._loop(model, facts, plan)
            if resume is not None:
                self._restore(loop, resume)
            self._write_config()
        reason = "done"
        try:
            loop.run()
            if self._samples(loop):
                with loop.replica.agreed():
                    if self.world.rank == 0:
                        self._sample(loop, plan)
        except Stopped as stopped:
            reason = str(stopped)
            loop.save_now()
            self._finish(loop, facts, plan, reason, collective=False)
            loop.replica.close()
            raise
        finally:
            if loop.saver is not None:
                loop.saver.close()
        summary = self._finish(loop, facts, plan, reason, collective=True)
        loop.replica.close()
        return summary

    # -- parts

    def _resume_path(self) -> Path | None:
        from manyhands.train import checkpoint

        if self.job.resume is None:
            if self.world.rank == 0 and checkpoint.checkpoints(self.output):
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
            world_size=self.world.size,
            hosts=hosts(self.world.members),
            device_type=self.device.type,
            device_name=hardware.device_name(str(self.device)),
            threads=torch.get_num_threads(),
            has_bf16=has_bf16,
            draws_random=draws_random(model),
            parameters=about.parameters,
            flops_per_token=about.flops_per_token,
            peak_flops=math.fsum(self.world.gather(peak)),
        )

    def _plan(self, facts: Facts) -> Plan:
        from manyhands.train.plan import derive

        return derive(self.job, facts)

    def _announce(self, model: torch.nn.Module, facts: Facts, plan: Plan) -> None:
        from manyhands.train.explain import explain

        if self.world.rank != 0:
            return
        rows = explain(self.job, self.origins, self.material, facts, plan, self.world, self.allocator)
        self.emit(Planned(rows=rows))
        effective = dataclasses.replace(
            self.job,
            model=self.job.model if self.job.model != "auto" else self.material.default_model,
            tokenizer=self.job.tokenizer if self.job.tokenizer != "auto" else self.material.tokenizer_spec,
            precision=plan.precision,  # type: ignore[arg-type]
            compile="on" if plan.compile else "off",
            micro_batch=plan.micro_batch,
            device_batch=None if self.job.reproducible else plan.device_batch,
            steps=None if self.job.epochs is not None else plan.steps,
            workers=self.world.size,
            eval_fraction=0.05 if self.job.eval_data else self.job.eval_fraction,
            resume=None,
        )
        self.effective = effective

    def _write_config(self) -> None:
        """Once it is sure that the run begins: a refused one leaves an earlier run's configuration alone."""
        from manyhands.train.durable import write_text

        if self.world.rank == 0:
            write_text(self.output / "config.toml", config.to_toml(self.effective))

    def _loop(self, model: torch.nn.Module, facts: Facts, plan: Plan) -> Loop:
        from manyhands.data.sample import Order as SampleOrder
        from manyhands.exchange.ordered import Ordered
        from manyhands.train import session
        from manyhands.train.balancing import balancer_for
        from manyhands.train.checkpoint import AsyncSaver
        from manyhands.train.feed import Feed
        from manyhands.train.forward import compiled
        from manyhands.train.loop import Loop, Schedule
        from manyhands.train.replica import Replica

        strategy = self.job.strategy
        if self.job.reproducible:
            strategy = dataclasses.replace(strategy, exchange=Ordered())
        autocast = session.autocast_for(plan.precision, self.device.type)
        schedule = strategy.outer.schedule
        in_tokens = getattr(schedule, "unit", "steps") == "tokens"
        replica = Replica(
            model,
            strategy,
            self.world.wire,
            max_grad_norm=self.job.max_grad_norm,
            targets_per_row=self.material.targets_per_row,
            total=plan.steps * self.job.global_batch * self.material.targets_per_row
            if in_tokens
            else plan.steps,
            autocast=autocast,
            forward=compiled(model) if plan.compile else None,
        )
        feed = Feed(
            rows=self.material.train,
            order=SampleOrder(len(self.material.train), self.job.global_batch, self.job.seed),
            rank=self.world.rank,
            weights=plan.weights,
            micro_batch=plan.micro_batch,
            device_batch=plan.device_batch,
            coalesce=plan.coalesce,
            device=self.device,
            seed=self.job.seed,
        )
        return Loop(
            replica=replica,
            feed=feed,
            task=self.job.task,
            world=self.world,
            schedule=Schedule(
                total_steps=plan.steps,
                log_every=self.job.log_every,
                eval_every=self.job.eval_every,
                save_every=self.job.save_every,
                check_every=self.job.check_every,
            ),
            interrupts=self.interrupts,
            emit=self.emit,
            autocast=autocast,
            balancer=balancer_for(plan, [str(r) for r in range(self.world.size)], self.job.global_batch),
            eval_rows=self.material.evaluation,
            eval_batch=plan.device_batch,
            saver=AsyncSaver(self.output, self.job.keep, self.emit) if self.world.rank == 0 else None,
            state=self._state,
            tokenizer=self.material.tokenizer,
            flops_per_token=facts.flops_per_token,
            peak_flops=facts.peak_flops,
        )

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
        if lost and self.world.rank == 0:
            self.emit(Warned(message=lost, where="resume"))
        earlier = list(before.get("world_sizes", []))
        self.world_sizes = [*earlier, self.world.size]
        if self.world.rank == 0:
            self.emit(
                Resumed(
                    step=loop.replica.steps,
                    path=str(path),
                    from_workers=earlier[-1] if earlier else 0,
                    workers=self.world.size,
                )
            )

    def _samples(self, loop: Loop) -> bool:
        """Whether a continuation is drawn at the end; the same on every worker."""
        model = loop.replica.model
        if getattr(loop.replica.method, "share", None) is not None:  # no worker computes alone
            return False
        return self.job.task_name == "pretrain" and self.job.prompt != "" and hasattr(model, "generate")

    def _sample(self, loop: Loop, plan: Plan) -> None:
        from manyhands.train.generate import continuation

        prompt = self.job.prompt if self.job.prompt is not None else self.material.default_prompt
        with self.interrupts.phase("generate", interruptible=True), loop.autocast():
            rng.seed_torch(self.job.seed, DRAWN)
            text = continuation(loop.replica.model, self.material.tokenizer, prompt, new_tokens=96)
        self.emit(Sampled(step=loop.replica.steps, prompt=prompt, text=text))

    def _finish(
        self, loop: Loop, facts: Facts, plan: Plan, reason: str, *, collective: bool
    ) -> dict[str, Any]:
        from manyhands.train.summary import summarize

        summary = summarize(
            self.job,
            loop,
            facts,
            plan,
            self.material,
            reason,
            self.world_sizes,
            time.time() - self.started,
            collective=collective,
        )
        if self.world.rank == 0:
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
