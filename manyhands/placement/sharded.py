"""Optimizer state, gradients and parameters divided among the workers (ZeRO, arXiv:1910.02054, section 5).

Per parameter in float32 with Adam a worker of a group of N holds, in bytes (parameter + gradient + two moments):

    stage 0 (ddp)   4 + 4 + 8            everything whole
    stage 1         4 + 4 + 8/N          optimizer state divided
    stage 2         4 + (4 + 8)/N        gradients, too
    stage 3         (4 + 4 + 8)/N        parameters, too (plus the unit that is being computed)

Stage 1 exchanges whole gradients with any exchange, as ddp does; each worker then updates its own rows, and the rows
are gathered. Stages 2 and 3 are PyTorch's FSDP2 (`torch.distributed.fsdp.fully_shard`), whose collectives travel on
our wire: sums in rank order, bytes and seconds counted.

With ``shard=S`` on N workers, groups of S hold one model (stage 1: one optimizer's state) between them and N/S groups
replicate it, so that a lost worker's part is still there. In stages 2 and 3, within a group
gradients are reduced to their owners, then equal shards of all groups are exchanged as the strategy's `exchange`
says (sharded within, replicated and compressed across).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from manyhands.core.checked import checked
from manyhands.core.config import option
from manyhands.core.errors import UsageError
from manyhands.core.registry import name_of

if TYPE_CHECKING:
    from collections.abc import Sequence

STAGES = (1, 2, 3)
ELEMENTWISE = (
    "SGD",
    "Adam",
    "AdamW",
    "Adagrad",
    "RMSprop",
    "SignSGD",
    "DelayedNesterov",
)  # ours whose update of a row needs that row alone
PROBES = (4096, 8192)  # elements of buckets for which exchanges are asked what they keep


@dataclass(frozen=True, kw_only=True)
@checked
class Sharded:
    """One model divided among the workers of a group; the groups replicate it.

    Attributes:
        stage: what is divided: 1 the optimizer's state, 2 gradients, too, 3 parameters, too.
        shard: workers of one group; 0: all.
        tensor_parallel: workers that compute each layer together, by the model's own plan; they lie next to each
            other and see the same micro-batches.
        accumulate: with several passes a step, "sharded" reduces gradients after each (least memory), "whole" after
            the last (fewest bytes, but gradients are whole until then).
        units: classes of modules (patterns) whose parameters are gathered together; "auto": the blocks of the model.
    """

    stage: int = option(3, help="divided: 1 optimizer state, 2 and gradients, 3 and parameters")
    shard: int = option(0, help="workers of one group that share a model; 0: all")
    tensor_parallel: int = option(1, help="workers that compute each layer together")
    accumulate: Literal["sharded", "whole"] = option(
        "sharded", help="reduce gradients after each pass, or keep them whole until the last"
    )
    units: tuple[str, ...] = option(("auto",), help="classes of modules that are gathered as one")

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise UsageError(
                f"stage = {self.stage}",
                "1 divides optimizer state, 2 gradients, too, 3 parameters, too",
                "use ddp for stage 0" if self.stage == 0 else "give 1, 2 or 3",
            )
        if self.shard < 0:
            raise UsageError(f"shard = {self.shard}", "a group has workers", "0 means all of them")
        if self.tensor_parallel < 1:
            raise UsageError(
                f"tensor_parallel = {self.tensor_parallel}",
                "it is a number of workers",
                "1 means that each computes whole layers",
            )
        if self.stage == 1:
            self._check_first_stage()

    def _check_first_stage(self) -> None:
        """Refuse what stage 1 would ignore."""
        given = {
            "tensor_parallel": (self.tensor_parallel, 1),
            "accumulate": (self.accumulate, "sharded"),
            "units": (self.units, ("auto",)),
        }
        for name, (value, default) in given.items():
            if value != default:
                raise UsageError(
                    f"{name} = {value!r} with stage = 1",
                    "stage 1 keeps parameters and gradients whole on every worker",
                    "use stage = 2 or 3, or leave it out",
                )

    @property
    def method(self) -> str:
        """``module:class`` of the worker's side."""
        if self.stage == 1:
            return "manyhands.train.sharded_optimizer:ShardedOptimizer"
        return "manyhands.train.sharded:ShardedModel"

    @property
    def needs_group(self) -> bool:
        """Whether PyTorch's process group must carry it (FSDP2 asks for one)."""
        return self.stage > 1

    def check(self, *, exchange: Any, optimizer: Any, cadence: Any) -> None:
        """Refuse what cannot be combined with it. Raises `UsageError` with the nearest possible choice."""
        cadences = ("EveryStep", "Every") if self.stage == 1 else ("EveryStep",)
        if type(cadence).__name__ not in cadences:
            raise UsageError(
                f"cadence = {cadence!r} with stage = {self.stage}",
                "workers that share one model make every step together",
                "use cadence = 'every-step', or placement = 'replicated'",
            )
        if getattr(exchange, "by_place", False):
            raise UsageError(
                f"exchange = {exchange!r} with stage = {self.stage}",
                "the fixed order adds whole micro-batch gradients on every worker",
                "use ddp for --reproducible, or leave that out",
            )
        if self.stage == 1:
            return
        if not self.shard and not (type(exchange).__name__ == "AllReduce" and exchange == type(exchange)()):
            raise UsageError(
                f"exchange = {exchange!r} with shard = 0",
                "an exchange is between groups, and here all workers are one group",
                "give shard=2 (workers of a group), or leave out the exchange",
            )
        if getattr(exchange, "by_tensor", False):
            raise UsageError(
                f"exchange = {exchange!r} with stage = {self.stage}",
                "it needs whole matrices, and here every worker holds some rows of each",
                "use zero1 with this exchange, or one that works on flat tensors: int8, topk, sign",
            )
        kept = _of_whole_buckets(exchange)
        if kept:
            raise UsageError(
                f"exchange = {exchange!r} with stage = {self.stage}",
                f"it keeps {kept} of a whole bucket, and here each worker of a group has buckets of its own: a checkpoint "
                "could not divide it anew",
                "use zero1 with this exchange, or one that keeps something of each element or nothing: "
                "error-feedback(int8), topk",
            )
        if not elementwise(optimizer):
            name = name_of("optimizers", type(optimizer))
            raise UsageError(
                f"optimizer = {name} with stage = {self.stage}",
                "its update needs whole matrices, and here every worker holds some rows of each",
                f"use zero1(optimizer={name!r}), or optimizer = 'adamw'",
            )

    def mesh(self, size: int) -> tuple[int, int, int]:
        """(groups, workers of a group, tensor-parallel workers) for `size` workers. Raises `UsageError`."""
        tp = self.tensor_parallel
        if size % tp:
            raise UsageError(
                f"tensor_parallel = {tp} with {size} workers",
                "it divides the number of workers",
                f"give {_nearest(tp, _divisors(size))}",
            )
        rest = size // tp
        shard = self.shard or rest
        if rest % shard:
            raise UsageError(
                f"shard = {shard} with {size} workers" + (f", {tp} of them on each layer" if tp > 1 else ""),
                "groups are equally large",
                f"give {_nearest(shard, _divisors(rest))}, or 0 for one group of all",
            )
        return rest // shard, shard, tp

    def fitted(self, size: int) -> Sharded:
        """For `size` workers, which are what a running job has left or gained: itself where it divides them.

        Else no worker holds more than it was asked to, if that can be: the smallest group not below `shard` that
        divides them, or one group of all. Fewer workers compute each layer where their number asks for it.

        >>> Sharded(shard=2).fitted(3).mesh(3), Sharded(shard=2).fitted(6).mesh(6), Sharded(shard=4).fitted(2).mesh(2)
        ((1, 3, 1), (3, 2, 1), (1, 2, 1))
        """
        tp = math.gcd(self.tensor_parallel, size)
        rest = size // tp
        wanted = -(-self.shard * self.tensor_parallel // tp)
        shard = min((d for d in _divisors(rest) if d >= wanted), default=rest) if self.shard else 0
        if (tp, shard) == (self.tensor_parallel, self.shard):
            return self
        return dataclasses.replace(self, tensor_parallel=tp, shard=shard)


def elementwise(optimizer: Any) -> bool:
    """Whether an optimizer's update of some rows needs those rows alone: ours, or one that says so."""
    return bool(getattr(optimizer, "elementwise", type(optimizer).__name__ in ELEMENTWISE))


def _of_whole_buckets(exchange: Any) -> str:
    """What an exchange keeps that is neither of single elements nor of the run as a whole (a sketch, say), by name.

    Found by asking: such a state is not shaped like its bucket, and another for a bucket of another size.
    """
    if type(exchange).__name__ == "AllReduce":
        return ""
    import torch

    from manyhands.exchange.combine import leaves

    found: list[dict[tuple[str, ...], Any]] = []
    for numel in PROBES:
        state = exchange.init([torch.zeros(numel)])
        found.append({path: leaf.shape for path, leaf in leaves(state) if leaf.shape != (numel,)})
    small, large = found
    return next((".".join(path) for path in small | large if small.get(path) != large.get(path)), "")


def _divisors(n: int) -> Sequence[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _nearest(value: int, among: Sequence[int]) -> int:
    return min(among, key=lambda d: (abs(d - value), d))
