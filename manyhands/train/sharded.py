"""One model divided among workers: ZeRO 2 and 3 by FSDP2, replicated over groups by any exchange.

    passes (equally many on every worker)   gradients are reduced to their owners, inside backward
    exchange                                equal pieces of all groups agree (nothing to do with one group)
    header                                  exact sums, the squared norm among them
    update                                  each worker its own pieces, as plain tensors

Averaging is the house's: contributions are weighted before they travel and only ever added, then scaled by nominal /
Σ targets, so the update is Σ/Σ for any split. With one pass a step the sums are those of `ddp` to the bit.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from manyhands.core import rng
from manyhands.core.errors import ManyhandsError, OutOfMemory, PeerLost
from manyhands.core.request import Gather
from manyhands.train import memory, sharded_check, sharded_rebuild, sharded_state
from manyhands.train.checkpoint import EXCHANGE, OPTIMIZER, WEIGHTS
from manyhands.train.header import Header, Unsound, Wishes
from manyhands.train.method import Part, StepResult, rows_of
from manyhands.train.norm import clip_factor, is_finite
from manyhands.train.owed import owed
from manyhands.train.reading import summed_of
from manyhands.train.sharded_gradients import ShardGradients
from manyhands.train.sharded_layout import Layout
from manyhands.train.sharded_passes import Pass, Passes
from manyhands.train.sharded_pieces import Piece, Reader, cut, gather_whole, state_pieces
from manyhands.train.sharded_rebuild import Pool, Share
from manyhands.wire.drive import Interleave

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from manyhands.core.types import Wire
    from manyhands.placement.sharded import Sharded
    from manyhands.train.checkpoint import Snapshot
    from manyhands.train.method import Loss
    from manyhands.train.replica import Replica


@dataclass(frozen=True)
class _Ready:
    """A step whose gradients are agreed upon."""

    part: Part
    nominal: float
    count: float
    states: list[Any]


class ShardedModel:
    """ZeRO 2 and 3: see the module."""

    agrees = joint = True
    comes_to_rest = True
    at_rest = True
    divided = True  # what it holds is put together collectively

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        strategy = replica.strategy
        self._placement = cast("Sharded", strategy.placement)
        self._exchange = strategy.exchange
        self.write_config = sharded_state.Config(replica.model).write
        self.layout = Layout(replica.model, replica.forward, replica.wire, self._placement)
        replica.forward = self.layout.root
        replica.named[:] = [(n, p) for n, p in replica.model.named_parameters() if p.requires_grad]
        self._params = dict(replica.named)
        mesh = self.layout.mesh
        self._passes = Passes(replica.wire, mesh.tensor)
        self.gradients = ShardGradients(
            self.layout.owned, mesh.across, bucket_mb=getattr(self._exchange, "bucket_mb", math.inf)
        )
        self._talks = Interleave(mesh.across)
        self._says_nothing = mesh.across.size == 1 and type(self._exchange).__name__ == "AllReduce"
        if self._says_nothing:
            self.states: list[Any] = []
        else:
            self.states = [self._exchange.init([b]) for b in self.gradients.lay_out()]
        named = [(each.name, each.param) for each in self.layout.owned]
        if named:
            self.optimizer = strategy.outer.build(named, replica.device.type)
        else:  # fewer rows than workers
            from manyhands.strategy.named import NamedOptimizer

            self.optimizer = NamedOptimizer([])
        self.inherited: list[Share] = []  # what others held who have left
        self._ready: _Ready | None = None
        self._table: Tensor | None = None

    @property
    def committed(self) -> int:
        return self._replica.steps

    def step(self, part: Part, loss: Loss, wishes: Wishes) -> StepResult:
        replica, self._ready, short = self._replica, None, ""
        nominal = float(part.rows * replica.per_row)
        passes = self._passes.of(part, replica.fits)
        try:
            loss_sum, count = self._run(passes, part, loss, nominal)
            self.gradients.collect(self._params)
            states = self._agree()
        except BaseException as error:
            self._abort()
            if not isinstance(error, Exception) or not memory.is_out_of_memory(error):
                raise
            short = memory.first_line(error)
        if short:  # here nothing holds any more what the pass has left
            raise self._begin_anew(passes, part, short)
        used = self._used()
        flags = [float(name in used) for name in self._params]
        row = Header.row(loss_sum, count, wishes, replica.work, [*flags, self._square()])
        self._ready = _Ready(part, nominal, count, states)
        return self._apply(torch.stack(replica.wire.begin(Gather(row, even=True)).wait()))

    def _apply(self, table: Tensor) -> StepResult:
        """The update, once everybody's row [workers, 13 + parameters] is there. Not collective."""
        replica, ready = self._replica, self._ready
        assert ready is not None
        part, nominal = ready.part, ready.nominal
        self._table, self._ready = table, None
        told = Header.of(table[:, :-1])
        square = float(table[:, -1].sum())
        known = told.count and is_finite(square)
        norm = math.sqrt(square) * nominal / told.count if known else math.nan
        mean, lr = math.nan, 0.0
        finite = is_finite(norm, told.loss_sum)
        if told.count:
            mean = told.loss_sum / told.count
            whose = Unsound(told.unsound.losses)  # gradients are added up on their way to their owners
            replica.took(finite=finite, step=part.step, loss=mean, norm=norm, whose=whose)
        if finite:
            self.states[:] = ready.states
            lr = self._update(told, nominal / told.count, norm)
        self.gradients.drop()
        replica.steps += 1
        replica.tokens += told.count
        return StepResult(
            mean,
            told.count,
            part.rows,
            norm,
            lr,
            not finite,
            told.stop,
            told.save,
            int(ready.count),
            change=told.change,
            work=told.work,
            spent=told.spent,
        )

    @property
    def across(self) -> Wire:
        """Joins those who hold my pieces in other groups."""
        return self.layout.mesh.across

    @property
    def share(self) -> tuple[int, int, bool] | None:
        """(which share of the data, of how many, whether I tell of it) where several workers compute each layer."""
        groups, shard, tensor = self.layout.mesh.sizes
        group, mine, layer = self.layout.mesh.place
        return (group * shard + mine, groups * shard, layer == 0) if tensor > 1 else None

    @property
    def layer(self) -> Wire | None:
        """Joins the workers that compute each layer together, where they are several."""
        return self.layout.mesh.tensor if self.layout.mesh.sizes[2] > 1 else None

    def meet(self) -> None:
        """Nothing is ever in flight between steps."""

    @contextlib.contextmanager
    def agreed(self, *, collective: bool = True) -> Iterator[None]:
        """Inside it every worker holds the whole parameters, and passes are no longer collective."""
        with self.layout.whole() if collective else contextlib.nullcontext():
            yield

    def check(self) -> str:
        """Compare the pieces of all groups. Raises `Diverged`. Collective."""
        return sharded_check.check(self._replica, self.layout, self.optimizer)

    def weights(self) -> dict[str, Tensor] | None:
        """The whole state dict, tied tensors once, on rank 0's CPU; None elsewhere. Collective."""
        found = gather_whole(self._replica.wire, self.layout.weights())
        return found if self._replica.wire.rank == 0 else None

    def whole_weights(self) -> dict[str, Tensor] | None:
        """The same under all names, tied ones included."""
        found = self.weights()
        return None if found is None else self.layout.with_aliases(found)

    def optimizer_state(self) -> dict[str, Tensor]:
        """The whole state by name on rank 0's CPU; empty elsewhere. Collective."""
        return gather_whole(
            self._replica.wire, state_pieces(self.layout.owned, self.optimizer.state_by_name())
        )

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """From the whole state, of which my pieces are taken."""
        self.optimizer.load_state_by_name(cut(state, self.layout.owned, list(self._params)))

    def pieces(self) -> dict[str, dict[str, tuple[Piece, Tensor]]]:
        """What I have of each file of a checkpoint. Collective."""
        return {
            WEIGHTS: self.layout.weights(),
            OPTIMIZER: state_pieces(self.layout.owned, self.optimizer.state_by_name()),
            EXCHANGE: sharded_state.exchange_pieces(
                self.states, self.gradients, self.layout.mesh, self.layout.owned
            ),
        }

    def snapshot(self, state: Mapping[str, Any], tokenizer: Path | None) -> Snapshot | None:
        """What a checkpoint holds, on rank 0; None elsewhere. Collective."""
        began = time.perf_counter()
        return sharded_state.snapshot(
            self._replica,
            weights=self.weights(),
            write_config=self.write_config,
            exchange=self.exchange_state(),
            state=state,
            tokenizer=tokenizer,
            began=began,
        )

    def exchange_state(self) -> dict[str, Tensor]:
        """The exchange's state by parameter on rank 0; empty elsewhere. Collective."""
        layout = self.layout
        mine = sharded_state.exchange_pieces(self.states, self.gradients, layout.mesh, layout.owned)
        return gather_whole(self._replica.wire, mine)

    def restore(self, path: Path) -> None:
        """Continue from a verified checkpoint. Raises `CheckpointError` where it does not fit."""
        state = sharded_state.counters_of(path)
        with Reader(path / "training" / "optimizer.safetensors") as file:
            optimizer = cut(file, self.layout.owned, list(self._params))
        sharded_state.read_exchange(path, self.states, self.gradients, self.layout.mesh, self.layout.owned)
        self.optimizer.load_state_by_name(optimizer)
        self.layout.load(path / "model.safetensors")
        sharded_state.restored(self._replica, state)

    def local_state(self) -> dict[str, Tensor]:
        return {}

    def load_local_state(self, state: Mapping[str, Tensor]) -> None:
        pass

    def restart(self) -> None:
        pass

    def close(self) -> None:
        self.layout.close()

    # -- from one set of workers to the next (see `manyhands.train.sharded_rebuild`)

    @property
    def place(self) -> tuple[int, int]:
        return self.layout.mesh.place[0], self.layout.mesh.sizes[0]

    @property
    def prepared(self) -> bool:
        """All gradients are agreed upon, and only everybody's row is missing."""
        return self._ready is not None

    def table(self) -> list[list[float]]:
        """Everybody's rows of the last step."""
        found: list[list[float]] = self._table.tolist() if self._table is not None else []
        return found

    def finish(self, table: list[list[float]]) -> None:
        """Do the update that others have done, with the rows that they had."""
        self._apply(torch.tensor(table, dtype=torch.float64))

    def rewind(self) -> dict[int, list[int]]:
        """My pieces are those of the last agreement; what was computed since is in pieces that others lack."""
        if not self.prepared:
            self._abort()
        return {}

    def adopt(self, other: ShardedModel) -> None:
        pass  # `receive` brings the pieces

    def held(self, steps: int) -> list[Share]:
        """My pieces after `steps` steps."""
        if self._replica.steps != steps:
            return []
        found = [Share(f"model/{name}", *held) for name, held in self.layout.held().items()]
        state = state_pieces(self.layout.owned, self.optimizer.state_by_name())
        found += [Share(f"optimizer/{name}", *held) for name, held in state.items()]
        found += sharded_rebuild.exchange_shares(self.states, self.gradients, self.layout.owned)
        return found + self.inherited

    def required(self, pool: Pool) -> dict[str, tuple[int, ...]]:
        """What must be there: whoever has a piece of a parameter has its optimizer's state, too."""
        return {f"model/{name}": piece.shape for name, (piece, _) in self.layout.held().items()}

    def receive(self, pool: Pool, *, behind: bool) -> None:
        """My pieces of what all hold. Collective."""
        mine = self.layout.held()
        wanted = [(f"model/{name}", piece) for name, (piece, _) in mine.items()]
        with torch.no_grad():
            for (_, tensor), found in zip(mine.values(), pool.take(wanted), strict=True):
                if found is not None:
                    tensor.copy_(found)
        self.optimizer.load_state_by_name(sharded_rebuild.take_optimizer(pool, self.layout.owned))
        first = self.layout.mesh.speaks
        sharded_rebuild.take_exchange(pool, self.states, self.gradients, self.layout.owned, first=first)

    # -- how

    def _run(self, passes: list[Pass], part: Part, loss: Loss, nominal: float) -> tuple[float, float]:
        """Forward and backward of my passes. Returns loss sum and count of those that I tell of."""
        replica, layout = self._replica, self.layout
        layout.used.clear()
        loss_sum: Tensor | None = None
        count: int | Tensor = 0
        begun, traffic = time.perf_counter(), replica.wire.traffic
        before = traffic.idle_s + traffic.communicate_s
        for i, each in enumerate(passes):
            if replica.interrupted:
                raise PeerLost(None, "forward", "the set of workers has changed")
            replica.tell_pass()
            layout.begin_pass(
                last=i == len(passes) - 1,
                reduce=self._placement.accumulate == "sharded",
                counts=each.place is not None,
            )
            rng.seed_torch(part.seed, part.step, each.place or 0, *([each.begin] if each.begin else []))
            with replica.autocast():
                summed = summed_of(loss(replica.forward, each.batch))
            (summed.loss_sum / nominal).backward()  # type: ignore[no-untyped-call]
            if each.mine:
                detached = summed.loss_sum.detach().double()
                loss_sum = detached if loss_sum is None else loss_sum + detached
                count = count + summed.count
                replica.work.add(0.0, rows_of(each.batch))
        # the wire has counted the gathering and reducing inside (NCCL's and DTensor's own it does not see: they are computing)
        others_s = traffic.idle_s + traffic.communicate_s - before
        replica.work.add(time.perf_counter() - begun - others_s, 0)
        return (0.0 if loss_sum is None else float(loss_sum)), float(count)

    def _agree(self) -> list[Any]:
        """The gradients hold Σ over all groups afterwards. Returns the exchange's next states."""
        if self._says_nothing:
            return []
        buckets = self.gradients.buckets
        for bucket, state in zip(buckets, self.states, strict=True):
            self._talks.start(self._exchange.talk([bucket], state))
        agreed = self._talks.finish()
        for bucket, each in zip(buckets, agreed, strict=True):
            (mean,) = each.mean
            if mean is not bucket:
                bucket.copy_(mean)
        return [each.state for each in agreed]

    def _used(self) -> set[str]:
        """Names of the parameters that a pass of mine used, or of which my pieces hold something back."""
        found = set(self.layout.used)
        for bucket, state in enumerate(self.states if len(found) < len(self._params) else ()):
            (left,) = owed(self._exchange, state, [self.gradients.buckets[bucket]])
            for i, part in self.gradients.cut(bucket, left) if left is not None else ():
                if bool(part.any()):
                    found.add(self.layout.owned[i].name)
        return found

    def _begin_anew(self, passes: Sequence[Pass], part: Part, short: str) -> ManyhandsError:
        """After a pass of mine found no memory, in which the others wait for me: all meet again, and have smaller ones."""
        rows = max((rows_of(each.batch) for each in passes), default=0)
        replica, what = self._replica, f"no memory for a forward and backward of {rows} rows: {short}"
        if replica.over is not None and part.divisible and rows > 1:
            replica.fits.most = (rows + 1) // 2
            return PeerLost(replica.wire.rank, "forward", what)
        memory.tell_launcher(rows, divisible=part.divisible)
        return OutOfMemory(
            what,
            "a pass of a divided model is everybody's, and is not cut by one worker",
            "give a smaller --device-batch (or --micro-batch), --gradient-checkpointing or a shorter --seq-len",
        )

    def _square(self) -> float:
        """The squared norm of the gradients that I speak for."""
        squares = [
            torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32)).double() ** 2
            for each, grad in zip(self.layout.owned, self.gradients.views, strict=True)
            if each.piece.counts
        ]
        return float(torch.stack(squares).sum()) if squares else 0.0

    def _update(self, told: Header, scale: float, norm: float) -> float:
        """Scale, clip, optimizer step on my pieces. Returns the rate used."""
        replica, start = self._replica, time.perf_counter()
        factor = scale * clip_factor(norm, replica.max_norm)
        used = dict(zip(self._params, told.used, strict=True))
        for each, grad in zip(self.layout.owned, self.gradients.views, strict=True):
            if factor != 1.0:
                grad.mul_(factor)
            each.param.grad = grad if used[each.name] else None
        rate, lr = replica.rate(replica.strategy.outer)
        self.optimizer.set_lr(rate)
        self.optimizer.step()
        replica.optimized(start)
        return lr

    def _abort(self) -> None:
        """After a failure inside a pass: begin anew, as if the step had not begun."""
        self.layout.reset()
        for param in self._params.values():
            param.grad = None
        self.gradients.drop()
