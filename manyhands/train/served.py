"""The worker's side of a parameter server: push (gradient sum, loss sum, targets, wishes), pull fresh parameters.

    accumulate my micro-batches -> push to every server -> (the servers apply it when their consistency says so) -> pull

``sync``: the answer comes when all workers' pushes of the step have made one update; Σ/Σ and clipping are the server's,
so the result is all-reduce's to rounding. Otherwise each push is clipped by its own norm and applied as it comes; the
workers meet only where all must (evaluation, checkpoints, a change of their set, the end), and there every one holds
the same bits. When one is lost the servers take no more pushes and tell whose are in the parameters: what is missing of
a step is then computed by those who are left. Of several servers all have a push, or none.

What a push says is the strategy's `exchange`: ``all-reduce`` stands for raw numbers, a codec for its bytes, and
``error-feedback(codec)`` keeps on the worker what the bytes left out.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from manyhands.core import config
from manyhands.core.aside import Aside
from manyhands.core.errors import CheckpointError, PeerLost
from manyhands.core.request import Gather
from manyhands.serve.client import Servers
from manyhands.serve.reach import links, store_of
from manyhands.train.gradients import FlatGradients
from manyhands.train.header import Wishes
from manyhands.train.leftout import own
from manyhands.train.loads import Totals
from manyhands.train.method import Part, StepResult, accumulate, rows_of
from manyhands.train.norm import norm_of
from manyhands.train.pushes import PushCodec, left_out, member_of, whose
from manyhands.wire.solo import Solo

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.train.method import Loss
    from manyhands.train.replica import Replica

LOOK_S = 0.05  # how often a push that waits looks whether somebody was lost


class Served:
    """See the module."""

    agrees = True
    comes_to_rest = False
    saves_alone = True

    def __init__(self, replica: Replica) -> None:
        strategy = replica.strategy
        placement: Any = strategy.placement
        self._codec = PushCodec(strategy.exchange)
        self._replica, self._placement = replica, placement
        self._sync = placement.bound == 0
        self._rested = True
        self.alone = not self._sync
        self.states: list[Any] = []
        self._guest = bool(replica.continues.get("guest"))
        if self._guest:  # the servers hear of me when I am one of the workers
            return
        self._calls = Aside("push")
        self._serial = int(replica.continues.get("serial", -1)) + 1
        self._store = store_of(str(replica.continues.get("servers", "")))
        self._loading: Mapping[str, Tensor] = replica.continues.get("optimizer", {})
        self._progress: float | None = replica.continues.get("progress")
        self._job = str(replica.continues.get("job") or self._agree_on(secrets.token_hex(16)))
        self.gradients = FlatGradients(
            replica.named, Solo(str(replica.device)), bucket_mb=math.inf, on_bucket=lambda *_: None
        )
        self._servers = Servers(
            links(placement, self._store),
            member=member_of(replica.wire.rank),
            job=self._job,
            lease_s=placement.lease_s,
        )
        self._named: dict[str, Any] = dict(replica.named)
        self._servers.lay_out(self._named)
        layouts = self._servers.layouts
        self._params = [torch.zeros(layout.size_bytes, dtype=torch.uint8) for layout in layouts]
        self._grads = [torch.zeros(layout.size_bytes, dtype=torch.uint8) for layout in layouts]
        self._views = [
            (layout.views(params), layout.views(grads))
            for layout, params, grads in zip(layouts, self._params, self._grads, strict=True)
        ]
        self.states += [self._codec.fresh(self._flats(i)) for i in range(len(layouts))]
        self._version = 0
        self.unused: tuple[int, ...] = ()  # places of my last push, where it was dropped by rule
        self._members, self._totals = [member_of(rank) for rank in range(replica.wire.size)], Totals()
        self._left_out = [0] * replica.wire.size  # pushes of each rank, as I last heard
        self._held: dict[int, list[int]] = {}  # places that I have pushed since the workers last met, by step
        self.applied: list[list[int]] = []  # after `rewind`: of which steps each rank's pushes count
        self._reached = int(replica.continues.get("reached", replica.steps))  # by the furthest of all
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    @property
    def committed(self) -> int:
        return self._replica.steps

    @property
    def at_rest(self) -> bool:
        return self._sync or self._rested

    def step(self, part: Part, loss: Loss, wishes: Wishes) -> StepResult:
        replica = self._replica
        self._rested = False
        nominal = float(part.rows * replica.per_row)
        done = accumulate(replica, self.gradients, part, loss, nominal, announce=False).require()
        loss_sum, count = done.loss_sum, done.count
        self.gradients.finish()
        norm = math.nan
        if count:
            norm = norm_of(self.gradients.buckets) * nominal / count
        rows = sum(rows_of(batch) for _, batch in part.micro_batches)
        header = {
            "step": part.step,
            "version": self._version,
            "share": rows / part.rows,
            "nominal": nominal,
            "loss": loss_sum,
            "count": int(count),
            "norm": norm,
            "stop": wishes.stop,
            "save": wishes.save,
            "change": wishes.change,
            "load": self._totals.add(replica.work.take()),
        }
        if self.alone:
            self._held.setdefault(part.step, []).extend(done.places)
        answer = self._push(header)
        self._take_parameters()
        self._version = int(answer["version"])
        if answer.get("late"):  # the others went on without this worker: it takes part from their step on
            replica.steps = int(answer["step"])
        replica.steps += 1
        replica.tokens = int(answer["tokens"])
        counted = int(answer.get("count", 0))
        everyones = float(answer.get("loss", math.nan)) / counted if counted else math.nan
        skipped = bool(answer.get("skipped", False))
        dropped = self.alone and bool(count) and not skipped and not answer["applied"][0]
        self.unused = tuple(done.places) if dropped else ()
        mine = own(replica.wire.rank, loss_is_finite=math.isfinite(loss_sum))
        if counted or skipped:
            replica.took(
                finite=not skipped,
                step=part.step,
                loss=loss_sum / count if self.alone and count else everyones,
                norm=float(answer["norm"]),
                whose=mine if self.alone else whose(answer),
                places={part.step: done.places} if self.alone else None,
            )
        now = left_out(answer, replica.wire.size)
        replica.hear([max(0, n - before) for n, before in zip(now, self._left_out, strict=True)])
        self._left_out = now
        work, spent = self._totals.new(answer.get("loads", {}), self._members)
        return StepResult(
            everyones,
            counted,
            part.rows,
            float(answer.get("norm", math.nan)),
            float(answer.get("lr", 0.0)),
            skipped,
            int(answer["stop"]),
            bool(answer["save"]),
            int(count),
            change=bool(answer["change"]),
            work=work,
            spent=spent,
        )

    def meet(self) -> None:
        """All pushes are applied, and all workers hold the same version."""
        if self.at_rest:
            return
        self._barrier()
        if self._replica.wire.rank == 0:
            self._pull(flush=True)
        self._barrier()
        if self._replica.wire.rank != 0:
            self._pull()
        self._rested = True
        self._held.clear()

    @contextmanager
    def agreed(self, *, collective: bool = True) -> Iterator[None]:
        """Nobody pushes while somebody is inside. Alone, rank 0 takes what the servers have just then."""
        if collective:
            self.meet()
        elif not self.at_rest:
            self._pull()
        yield
        if collective and not self._sync:
            self._barrier()

    def optimizer_state(self) -> dict[str, Tensor]:
        """The servers' state, on rank 0; its parameters are then those of the same moment."""
        if self._replica.wire.rank != 0:
            return {}
        _, params, optimizer = self._servers.state()
        with torch.no_grad():
            for name, param in self._replica.named:
                param.copy_(params[name])
        self._rested = True
        return optimizer

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Kept until `restart` hands it to the servers with the parameters."""
        known = {name for name, _ in self._replica.named}
        for full in state:
            if full.rpartition(".")[0] not in known:
                raise CheckpointError(
                    f"optimizer state {full!r}", "the model has no such trainable parameter", ""
                )
        self._loading = state if self._replica.wire.rank == 0 else {}

    def local_state(self) -> dict[str, Tensor]:
        return {}

    def load_local_state(self, state: Mapping[str, Tensor]) -> None:
        pass

    def restart(self) -> None:
        self._serial += 1
        self._begin()

    def rewind(self) -> dict[int, list[int]]:
        """Pushes that the servers have stay; the job goes on with the first step that not all have pushed."""
        replica = self._replica
        halted = self._servers.halt()
        if halted is None:  # the others have gone on without me
            return {}
        if self._sync:
            if halted.step > replica.steps:  # applied, though the answer did not come to me
                replica.steps, replica.tokens = halted.step, halted.tokens
                self._codec.keep(self.states, halted.applied)
            return {}
        reached = [halted.clocks.get(who, self._begun) for who in self._members]
        replica.steps, self._reached = min(reached), max(reached)
        # whoever was lost may not have told of its last step; and I not of mine, if its answer was still on its way
        first = max(self._begun, replica.steps - 1)
        self.applied = [
            [step for step in range(first, clock) if step not in halted.unused.get(who, ())]
            for who, clock in zip(self._members, reached, strict=True)
        ]
        mine = self.applied[replica.wire.rank]
        self._codec.keep(self.states, [max(self._held, default=-1) in mine] * len(self.states))
        return {step: list(places) for step, places in self._held.items() if step in mine}

    def salvage(self) -> dict[str, Any]:
        """What the servers hold, when workers were lost: the next set of workers continues with it."""
        servers = Servers(links(self._placement, self._store), member="", job=self._job)  # mine may be closed
        servers.layouts = self._servers.layouts
        try:
            answer, params, optimizer = servers.state()
        finally:
            servers.hang_up()
        tokens = int(answer["tokens"])
        serial = max(self._serial, int(answer["serial"]))  # a beginning may have come to no end
        counters: dict[str, Any] = {"tokens": tokens, "job": self._job, "serial": serial}
        counters |= {"skipped": self._replica.skipped, "servers": self._store}
        if self._sync:
            counters["steps"] = self._replica.steps
        else:
            counters |= {"progress": float(answer["progress"]), "reached": self._reached}
        return {**counters, "params": params, "optimizer": optimizer}

    def refresh(self) -> None:
        """Take the servers' parameters."""
        self._pull()

    def figures(self) -> dict[str, Any]:
        """What the servers did, for the summary: updates, staleness of pushes, discarded ones."""
        status = self._servers.status()
        return {
            "consistency": self._placement.consistency,
            "updates": status[0]["updates"],
            "staleness": status[0]["staleness"],
            "discarded": status[0]["discarded"],
            "parameter_bytes": [s["parameter_bytes"] for s in status],
        }

    def close(self) -> None:
        if self._guest:
            return
        self.gradients.close()
        self._calls.close()
        self._servers.close()

    # -- how

    def _begin(self) -> None:
        """Rank 0 hands the job to the servers; then everyone takes part."""
        replica = self._replica
        self._servers.serial, self._begun = self._serial, replica.steps
        self._barrier()
        if replica.wire.rank == 0:
            self._servers.begin(
                self._rules(),
                dict(replica.named),
                self._loading,
                serial=self._serial,
                steps=replica.steps,
                tokens=replica.tokens,
                progress=self._progress,
                reached=self._reached,
            )
        self._loading, self._progress = {}, None
        self._left_out = [0] * replica.wire.size
        self._barrier()
        self._servers.join(replica.steps, exact=True)
        self._barrier()  # nobody pushes before the servers wait for all
        self._version, self._rested = 0, True

    def _rules(self) -> dict[str, Any]:
        placement, replica = self._placement, self._replica
        rules: dict[str, Any] = {
            "consistency": placement.consistency,
            "accumulate": placement.accumulate,
            "compensation": placement.compensation,
            "whole": replica.wire.size > 1,  # one alone misses nobody, however long it is silent
            "optimizer": config.to_data(replica.strategy.outer, "optimizers"),
        }
        if placement.discard is not None:
            rules["discard"] = placement.discard
        if math.isfinite(replica.max_norm):
            rules["max_norm"] = replica.max_norm
        if total := replica.length(replica.strategy.outer.schedule):
            rules["total"] = float(total)
        if self._codec.codec is not None:
            rules["codec"] = config.to_data(self._codec.codec, "exchanges")
        return rules

    def _push(self, header: Mapping[str, Any]) -> dict[str, Any]:
        """Push what the gradients hold; fresh parameters are in the buffers afterwards."""
        used = dict(zip(self.gradients.names, self.gradients.used, strict=True))
        if not all(used.values()):
            for layout, state in zip(self._servers.layouts, self.states, strict=True):
                used |= dict.fromkeys(self._codec.owed(layout, state), True)
        self.gradients.attach([True] * len(used))
        with torch.no_grad():
            for _, grads in self._views:
                for name, view in grads.items():
                    view.copy_(self._named[name].grad)
        self.gradients.detach()
        payloads = list(self._grads)
        if self._codec.codec is not None:
            step, rank, self._codec.square = int(header["step"]), self._replica.wire.rank, 0.0
            payloads = [
                self._codec.encode(i, self._flats(i), state, step=step, rank=rank)
                for i, state in enumerate(self.states)
            ]
            if header["count"] and math.isfinite(header["norm"]):
                unit = header["nominal"] / header["count"]
                header = {**header, "norm": math.sqrt(self._codec.square) * unit}
        traffic: Any = self._replica.wire.traffic
        before, start = self._servers.traffic, time.perf_counter()
        answer = self._unless_lost(lambda: self._servers.push(header, used, payloads, self._params))
        lost = answer.get("lost")
        if lost in self._members:  # a server has noticed first
            whom = None if lost == self._servers.member else self._members.index(lost)
            raise PeerLost(whom, "push", "it has left, or was silent for too long")
        if answer.get("halted"):  # another worker knows already that somebody was lost
            if self._replica.over is not None:
                self._replica.over.wait(self._placement.patience_s)
            raise PeerLost(None, "push", "the workers meet anew")
        self._codec.keep(self.states, answer["applied"])
        spent, after = time.perf_counter() - start, self._servers.traffic
        waited = min(spent, float(answer.get("waited_s", 0.0)))  # for others; a server's own work is moving
        traffic.idle_s += waited
        traffic.communicate_s += spent - waited
        traffic.count(after[0] - before[0], after[1] - before[1])
        return answer

    def _flats(self, server: int) -> list[Tensor]:
        """The gradients that a server gets, by type."""
        return self._servers.layouts[server].flats(self._grads[server])

    def _unless_lost(self, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """`call()`, which may wait for a worker that is gone: then it is left alone. Raises `PeerLost`."""
        over = self._replica.over
        if over is None:
            return call()
        answer = self._calls.submit(call)
        while True:
            try:
                return answer.result(timeout=LOOK_S)
            except NotYet:
                if over.is_set() and not answer.done():
                    raise PeerLost(None, "push", "the set of workers has changed") from None

    def _pull(self, *, flush: bool = False) -> None:
        answer = self._servers.pull(self._params, flush=flush)
        self._version, self._replica.tokens = int(answer["version"]), int(answer["tokens"])
        self._take_parameters()

    @torch.no_grad()
    def _take_parameters(self) -> None:
        for params, _ in self._views:
            for name, view in params.items():
                self._named[name].copy_(view)

    def _barrier(self) -> None:
        self._replica.wire.begin(Gather(torch.zeros(1, dtype=torch.uint8), even=True)).wait()

    def _agree_on(self, text: str) -> str:
        """Rank 0's text."""
        mine = torch.tensor(list(text.encode()), dtype=torch.uint8)
        return bytes(self._replica.wire.begin(Gather(mine)).wait()[0].tolist()).decode()
