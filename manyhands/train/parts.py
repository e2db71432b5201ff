"""What a worker trains with: data, model, plan, and a replica around the model for any set of workers."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.core.environment import pass_rows
from manyhands.train.job import Job

if TYPE_CHECKING:
    import torch

    from manyhands.core.events import Emit
    from manyhands.train.feed import Feed
    from manyhands.train.ledger import Batches
    from manyhands.train.replica import Replica
    from manyhands.wire.world import World


class Parts:
    """Made from a job, in the order of the methods.

    Args:
        job: what to train.
        device: this worker's.
        over: set when somebody was lost.
        tell_phase: see `Replica`.
        planned_for: how many workers the plan is for, where that is not the number there is (a worker that joins later).

    Attributes:
        material, facts, plan: of the job, once they are made.
        model, forward: the model, and its compiled form where the plan says so.
        fits: the rows of a pass that there was memory for: learnt once, whatever becomes of a replica.
    """

    def __init__(
        self,
        job: Job,
        device: torch.device,
        over: threading.Event | None,
        tell_phase: Callable[[str, int], None],
        planned_for: int | None = None,
    ) -> None:
        from manyhands.train.memory import Fits

        self.job, self.device = job, device
        self.fits = Fits(most=pass_rows(), told=pass_rows())  # its launcher has told of it
        self._over, self._tell_phase, self._planned_for = over, tell_phase, planned_for
        self._guest = planned_for is not None  # until the job's workers take me in

    def prepare(self, world: World, emit: Emit) -> None:
        """The rows, which are everybody's. Collective."""
        from manyhands.train.material import check_alike, gather_material

        self.material = gather_material(self.job, world, emit)
        check_alike(self.job, self.material, world)

    def build(self, world: World) -> None:
        """Model, facts and plan. Collective."""
        from manyhands.train.forward import compiled
        from manyhands.train.material import check_same
        from manyhands.train.plan import derive

        self.model = self.fresh_model()
        self.facts = self._facts(world)
        self.plan = derive(self.job, self.facts)
        check_same(world, {"steps": self.plan.steps, "micro_batch": self.plan.micro_batch})
        self.forward: Any = compiled(self.model) if self.plan.compile else None

    def fresh_model(self) -> torch.nn.Module:
        """The model as training begins with it."""
        from manyhands.models.build import build
        from manyhands.train.forward import checkpoint_activations, narrow_residual, quicken

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
            checkpoint_activations(model, self.job.model)
        if self.job.precision == "fp64":
            model.double()
        model.train()
        quicken(model)
        if self.job.residual == "bf16":
            narrow_residual(model)
        return model.to(self.device)

    def effective(self, workers: int) -> Job:
        """The job with every derived value in place of its "auto"."""
        job, plan, material = self.job, self.plan, self.material
        return dataclasses.replace(
            job,
            model=job.model if job.model != "auto" else material.default_model,
            tokenizer=job.tokenizer if job.tokenizer != "auto" else material.tokenizer_spec,
            precision=plan.precision,  # type: ignore[arg-type]
            compile="on" if plan.compile else "off",
            micro_batch=plan.micro_batch,
            device_batch=None if job.reproducible else plan.device_batch,
            steps=None if job.epochs is not None else plan.steps,
            workers=workers,
            eval_fraction=0.05 if job.eval_data else job.eval_fraction,
            resume=None,
        )

    def replica(
        self,
        world: World,
        compare: bool = True,
        continues: Mapping[str, Any] | None = None,
        regrouped: bool = False,
    ) -> Replica:
        """A replica around the model, on the world's wire. Collective.

        Args:
            regrouped: the job began with another set of workers: groups of them may have to be of another size, and a
                model that was divided among them is made anew.
        """
        from manyhands.exchange.ordered import Ordered
        from manyhands.train import session
        from manyhands.train.replica import Replica

        strategy = self.job.strategy
        if self.job.reproducible:
            strategy = dataclasses.replace(strategy, exchange=Ordered())
        placement: Any = strategy.placement
        began = self._planned_for is not None or self.job.resume is not None
        if hasattr(placement, "fitted") and (regrouped or began):
            strategy = dataclasses.replace(strategy, placement=placement.fitted(world.size))
        if regrouped and getattr(placement, "needs_group", False):
            self.model, self.forward = self.fresh_model(), None
        if self._guest:
            continues, self._guest = {"guest": True}, False
        steps, per_row = self.plan.steps, self.material.targets_per_row
        replica = Replica(
            self.model,
            strategy,
            world.wire,
            max_grad_norm=self.job.max_grad_norm,
            targets_per_row=per_row,
            total={"steps": steps, "tokens": steps * self.job.global_batch * per_row},
            autocast=session.autocast_for(self.plan.precision, self.device.type),
            forward=self.forward,
            over=self._over,
            tell_phase=self._tell_phase,
            lost_round=self.job.lost_round,
            compare=compare,
            continues=continues,
        )
        replica.fits = self.fits
        return replica

    def rebuilt(
        self, world: World, output: Path, salvaged: Mapping[str, Any], steps: int
    ) -> tuple[Replica, str]:
        """A replica where the state was divided: as `salvaged` on rank 0, else from `output`'s last checkpoint, if any.

        Collective. Also says what it was made of.
        """
        import torch

        from manyhands.train import checkpoint, session

        newest = checkpoint.latest(output) if world.rank == 0 else None
        found = world.gather(str(newest) if newest else "")[0]
        counters = {key: value for key, value in salvaged.items() if isinstance(value, (int, float, str))}
        told = world.gather(counters)[0]
        if told:
            own = self.model.state_dict()
            with torch.no_grad():
                for name, tensor in salvaged.get("params", {}).items():
                    own[name].copy_(tensor)
            rest = {"steps": told.get("steps", steps), "optimizer": salvaged.get("optimizer", {})}
            replica = self.replica(world, compare=False, continues={**told, **rest})
            replica.method.refresh()  # type: ignore[attr-defined]  # whoever salvages has it
            return replica, "the parameter servers"
        if not getattr(self.job.strategy.placement, "needs_group", False):
            self.model, self.forward = self.fresh_model(), None
        replica = self.replica(world, regrouped=True)
        if not found:
            return replica, "the beginning: there is no checkpoint yet"
        session.restore_replica(replica, Path(found))
        return replica, found

    def feed(self, rank: int) -> Feed:
        """Reads a worker's part of any step."""
        from manyhands.data.sample import Order
        from manyhands.train.feed import Feed

        job, plan, rows = self.job, self.plan, self.material.train
        return Feed(
            rows=rows,
            order=Order(
                len(rows),
                job.global_batch,
                job.seed,
                **self.sizes,
            ),
            rank=rank,
            weights=plan.weights,
            micro_batch=plan.micro_batch,
            device_batch=self.pass_rows,
            coalesce=plan.coalesce,
            divisible=not job.reproducible,
            device=self.device,
            seed=job.seed,
            by_speed=job.inner_steps == "by-speed",
        )

    @property
    def sizes(self) -> dict[str, Any]:
        """What the order goes by beside numbers: classes and lengths of the rows."""
        wanted = {"stratified": ("classes", "lengths"), "by-length": ("lengths",)}.get(self.job.order, ())
        found = {name: getattr(self.material.train, name, None) for name in wanted}
        return {name: each for name, each in found.items() if each is not None}

    @property
    def pass_rows(self) -> int:
        """The most rows of a pass of this worker: what the plan says, or less where its predecessor found no memory for it."""
        return min(self.plan.device_batch, pass_rows() or self.plan.device_batch)

    def warm_up(self, replica: Replica, feed: Feed) -> None:
        """One pass for nothing: what is imported and compiled on the way keeps nobody waiting later."""
        from manyhands.core.types import Summed
        from manyhands.train.carried import carries
        from manyhands.train.memory import is_out_of_memory, release

        if not carries(replica):  # its passes are everybody's
            return
        ((_, batch),) = feed.part(0, places=[0]).micro_batches
        try:
            with replica.autocast():
                loss = Summed(*self.job.task.loss(replica.forward, batch))
            loss.loss_sum.backward()  # type: ignore[no-untyped-call]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            release()  # the first step finds out what fits
        for _, param in replica.named:
            param.grad = None

    def batches(self) -> Batches:
        """What the ledger must know of the order of samples."""
        from manyhands.train.ledger import Batches

        return Batches(
            n=len(self.material.train),
            global_batch=self.job.global_batch,
            seed=self.job.seed,
            order=self.job.order,
            micro_batch=self.plan.micro_batch,
        )

    def _facts(self, world: World) -> Any:
        import torch

        from manyhands.core import hardware
        from manyhands.models.build import describe, draws_random
        from manyhands.train.plan import Facts, choose_precision
        from manyhands.wire.world import hosts

        has_bf16 = torch.cuda.is_bf16_supported() if self.device.type == "cuda" else hardware.cpu_has_bf16()
        precision, _ = choose_precision(self.job, self.device.type, has_bf16)
        about = describe(self.model, seq_len=self.job.seq_len)
        dtype = {"bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}.get(precision, "float32")
        peak = hardware.peak_flops(str(self.device), dtype, torch.get_num_threads())
        random = draws_random(self.model)
        everybody = world.gather((peak, hardware.device_name(str(self.device))))
        return Facts(
            rows=len(self.material.train),
            world_size=self._planned_for or world.size,
            hosts=hosts(world.members),
            device_type=self.device.type,
            device_name=" and ".join(dict.fromkeys(name for _, name in everybody)),
            threads=torch.get_num_threads(),
            has_bf16=has_bf16,
            draws_random=random,
            memory_rows=None if random else self._memory_rows(world, precision),
            parameters=about.parameters,
            flops_per_token=about.flops_per_token,
            peak_flops=math.fsum(flops for flops, _ in everybody),
            elastic=self._over is not None,
        )

    def _memory_rows(self, world: World, precision: str) -> int | None:
        """The rows that fit into a pass of this worker; None where nobody asks."""
        from manyhands.train import memory, session
        from manyhands.train.plan import busy_rows
        from manyhands.train.state_bytes import bytes_per_parameter

        job = self.job
        divided = getattr(job.strategy.placement, "needs_group", False)  # the whole model may not even fit
        if job.device_batch is not None or job.reproducible or divided or pass_rows() is not None:
            return None
        me = world.members[world.rank]
        here = [m for m in world.members if m.host == me.host and m.device == me.device]
        return memory.rows_that_fit(
            self.model,
            job.task,
            self.material.train,
            autocast=session.autocast_for(precision, self.device.type),
            wanted=busy_rows(self.device.type, job.seq_len)[0],
            workers_here=len(here),
            state_bytes=bytes_per_parameter(job.strategy),
            key={
                "seq_len": job.seq_len,
                "precision": precision,
                "residual": job.residual,
                "checkpointing": job.gradient_checkpointing,
            },
        )
