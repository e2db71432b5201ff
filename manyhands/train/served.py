"""The worker's side of a parameter server: push (gradient sum, loss sum, targets, wishes), pull fresh parameters.

    accumulate my micro-batches -> push to every server -> (the servers apply it when their consistency says so) -> pull

``sync``: the answer comes when all workers' pushes of the step have made one update; Σ/Σ and clipping are the server's,
so the result is all-reduce's to rounding. Otherwise each push is clipped by its own norm and applied as it comes; the
workers meet only where all must (evaluation, checkpoints, the end), and there every one holds the same bits.

What a push says is the strategy's `exchange`: ``all-reduce`` stands for raw numbers, a codec for its bytes, and
``error-feedback(codec)`` keeps on the worker what the bytes left out.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from manyhands.core import config, rng, tls
from manyhands.core.environment import read_env
from manyhands.core.errors import CheckpointError, PeerLost, UsageError
from manyhands.core.request import Gather
from manyhands.exchange.allreduce import AllReduce
from manyhands.exchange.codec import wide
from manyhands.serve.client import Endpoint, Link, Servers, endpoints
from manyhands.train.gradients import FlatGradients
from manyhands.train.method import Part, StepResult, Wishes, accumulate
from manyhands.train.norm import norm_of
from manyhands.wire.solo import Solo

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.placement.served import Served as Placement
    from manyhands.train.method import Loss
    from manyhands.train.replica import Replica

LOOK_S = 0.05  # how often a push that waits looks whether somebody was lost
START_S = 120.0  # for servers that the launcher is starting


class Served:
    """See the module."""

    agrees = True
    comes_to_rest = False
    saves_alone = True

    def __init__(self, replica: Replica) -> None:
        strategy = replica.strategy
        placement: Any = strategy.placement
        self._codec, self._decay = codec_of(strategy.exchange)
        self._replica, self._placement = replica, placement
        self._sync = placement.bound == 0
        self._rested = True
        self.alone = not self._sync
        self._calls = ThreadPoolExecutor(1, thread_name_prefix="push")
        self._serial = int(replica.continues.get("serial", -1)) + 1
        self._loading: Mapping[str, Tensor] = replica.continues.get("optimizer", {})
        self._job = str(replica.continues.get("job") or self._agree_on(secrets.token_hex(16)))
        self.gradients = FlatGradients(
            replica.named, Solo(str(replica.device)), bucket_mb=math.inf, on_bucket=lambda *_: None
        )
        self._servers = Servers(
            _links(placement),
            member=f"worker-{replica.wire.rank}",
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
        self.states: list[Any] = [self._fresh(grads, i) for i, grads in enumerate(self._grads)]
        self._left: list[dict[int, Tensor]] = [{} for _ in self._grads]  # by the push on its way
        self._version = 0
        self._begin()

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
        if not self._sync and count:
            norm = norm_of(self.gradients.buckets) * nominal / count
        rows = sum(len(next(iter(batch.values()))) for _, batch in part.micro_batches)
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
        }
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
        if counted or skipped:
            replica.took(finite=not skipped, step=part.step, loss=everyones, norm=float(answer["norm"]))
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

    def salvage(self) -> dict[str, Any]:
        """What the servers hold, when workers were lost: the next set of workers continues with it."""
        answer, params, optimizer = self._servers.state()
        tokens = int(answer["tokens"])
        counters: dict[str, Any] = {"tokens": tokens, "job": self._job, "serial": self._serial}
        if self._sync:  # a step may have been applied of which nobody was told any more
            counters["steps"] = self._replica.steps + (tokens > self._replica.tokens)
        return {**counters, "params": params, "optimizer": optimizer}

    def refresh(self) -> None:
        """Take the servers' parameters."""
        self._pull()

    def figures(self) -> dict[str, Any]:
        """What the servers did, for the summary: updates, staleness of pushes, discarded ones."""
        status = self._servers.status()
        return {
            "consistency": self._placement.consistency,
            "updates": status[0]["version"],
            "staleness": status[0]["staleness"],
            "discarded": status[0]["discarded"],
            "parameter_bytes": [s["parameter_bytes"] for s in status],
        }

    def close(self) -> None:
        self.gradients.close()
        self._calls.shutdown(wait=False, cancel_futures=True)
        self._servers.close()

    # -- how

    def _begin(self) -> None:
        """Rank 0 hands the job to the servers; then everyone takes part."""
        replica = self._replica
        self._barrier()
        if replica.wire.rank == 0:
            self._servers.begin(
                self._rules(),
                dict(replica.named),
                self._loading,
                serial=self._serial,
                steps=replica.steps,
                tokens=replica.tokens,
            )
        self._loading = {}
        self._barrier()
        self._servers.join(replica.steps)
        self._barrier()  # nobody pushes before the servers wait for all
        self._version, self._rested = 0, True

    def _rules(self) -> dict[str, Any]:
        placement, replica = self._placement, self._replica
        rules: dict[str, Any] = {
            "consistency": placement.consistency,
            "accumulate": placement.accumulate,
            "compensation": placement.compensation,
            "optimizer": config.to_data(replica.strategy.outer, "optimizers"),
        }
        if placement.discard is not None:
            rules["discard"] = placement.discard
        if math.isfinite(replica.max_norm):
            rules["max_norm"] = replica.max_norm
        if replica.total:
            rules["total"] = float(replica.total)
        if self._codec is not None:
            rules["codec"] = config.to_data(self._codec, "exchanges")
        return rules

    def _push(self, header: Mapping[str, Any]) -> dict[str, Any]:
        """Push what the gradients hold; fresh parameters are in the buffers afterwards."""
        used = dict(zip(self.gradients.names, self.gradients.used, strict=True))
        self.gradients.attach([True] * len(used))
        with torch.no_grad():
            for _, grads in self._views:
                for name, view in grads.items():
                    view.copy_(self._named[name].grad)
        self.gradients.detach()
        payloads = [self._encoded(i, int(header["step"])) for i in range(len(self._grads))]
        traffic: Any = self._replica.wire.traffic
        before, start = self._servers.traffic, time.perf_counter()
        answer = self._unless_lost(lambda: self._servers.push(header, used, payloads, self._params))
        self._keep_left(answer["applied"])
        spent, after = time.perf_counter() - start, self._servers.traffic
        waited = min(spent, float(answer.get("served_s", 0.0)))
        traffic.idle_s += waited
        traffic.communicate_s += spent - waited
        traffic.count(after[0] - before[0], after[1] - before[1])
        return answer

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

    def _encoded(self, server: int, step: int) -> Tensor:
        """A server's payload: its gradients as they are, or encoded with what earlier pushes left out."""
        if self._codec is None:
            return self._grads[server]
        state, parts = self.states[server], []
        residuals = state.get("residual", ())
        for i, flat in enumerate(self._servers.layouts[server].flats(self._grads[server])):
            value = flat
            if self._decay is not None:
                value = flat.to(wide(flat.dtype)).add(residuals[i], alpha=self._decay)
            # without the step's number a random rounding would repeat itself
            key = rng.key(step, server * 1000 + i, self._replica.wire.rank)
            payload = self._codec.encode(value, key)
            parts.append(payload)
            if self._decay is not None:
                decoded = self._codec.decode(payload, flat.numel(), flat.dtype)
                self._left[server][i] = value - decoded.to(value.dtype)
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def _keep_left(self, applied: Sequence[bool]) -> None:
        """What a push left out is held back from now on, where a server has used the push.

        One that was dropped (late, too stale, another worker's not finite) leaves what was held back as it was.
        """
        for server, used in enumerate(applied):
            for i, left in self._left[server].items():
                if used and bool(torch.isfinite(left).all()):
                    self.states[server]["residual"][i].copy_(left)
            self._left[server].clear()

    def _fresh(self, grads: Tensor, server: int) -> dict[str, Any]:
        """The state of a server's exchange before the first push: only error feedback has any."""
        if self._codec is None or self._decay is None:
            return {}
        flats = self._servers.layouts[server].flats(grads)
        return {"residual": [torch.zeros(f.numel(), dtype=wide(f.dtype)) for f in flats]}

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


def codec_of(exchange: Any) -> tuple[Any, float | None]:
    """(codec, decay of error feedback) of a strategy's exchange; (None, None) for raw numbers. Raises `UsageError`."""
    if isinstance(exchange, AllReduce) and exchange.precision == "as-is":
        return None, None
    kind = type(exchange).__name__
    decay = float(exchange.decay) if kind == "ErrorFeedback" else None
    inner = exchange.inner if kind == "ErrorFeedback" else exchange
    if not all(callable(getattr(inner, part, None)) for part in ("encode", "decode", "size_bytes")):
        raise UsageError(
            f"exchange = {exchange!r} with placement = 'served'",
            "a push goes one way: it is raw (all-reduce) or encoded by a codec, with error feedback or without",
            "use for example exchange = 'error-feedback(int8)' or 'bf16'",
        )
    return inner, decay


def _links(placement: Placement) -> list[Link]:
    """Connections to the servers that the placement names, or that the launcher has started."""
    if placement.address:
        token = tls.read_token(placement.token_file)
        prints = placement.fingerprints or ("",) * len(placement.addresses)
        known = [Endpoint(a, f) for a, f in zip(placement.addresses, prints, strict=True)]
        return [_fixed(where, token, placement.patience_s) for where in known]
    store = read_env().store
    if store is None or not (Path(store) / "token").exists():
        raise UsageError(
            "placement = 'served' without address",
            "only manyhands' own launcher starts servers beside the workers",
            "start `manyhands serve-parameters` and give address=host:port, token_file=…, fingerprint=…",
        )
    token = tls.read_token(str(Path(store) / "token"))
    files = [str(Path(store) / f"server-{i}.json") for i in range(placement.servers)]
    return [_announced(file, token, placement.patience_s) for file in files]


def _fixed(where: Endpoint, token: str, patience_s: float) -> Link:
    return Link(lambda: where, token, patience_s=patience_s)


def _announced(file: str, token: str, patience_s: float) -> Link:
    """A server that tells its address in a file, anew after each start."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and not Path(file).exists():
        time.sleep(0.02)
    return Link(lambda: next(endpoints(file)), token, patience_s=patience_s)


__all__ = ["Served", "codec_of"]
