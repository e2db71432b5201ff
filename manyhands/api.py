"""For people with their own loop: join, replicate, share, step, save."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.core import rng
from manyhands.core.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from manyhands.strategy.base import Strategy
    from manyhands.train.replica import Part, Replica
    from manyhands.wire.world import World

SAMPLES = 0x5A3D  # sets what a dataset draws apart from what a pass does


def join(*, device: str = "auto", transport: str = "auto") -> Hands:
    """Join the other workers of this job, as the launcher's environment says; a world of one without any.

    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda", or "mixed" (a GPU of my own, or the CPU).
        transport: "auto", "shared" (one host's memory) or "group" (gloo or NCCL).

    Raises:
        UsageError: the environment contradicts itself.
        PeerLost: the others did not come.
    """
    from manyhands.train.session import connect_from_environment

    return Hands(connect_from_environment(device=device, transport=transport))


class Hands:
    """The workers of a job, seen from one of them.

    Attributes:
        world: members, rank and wire.
        device: where this worker computes.
    """

    def __init__(self, joined: tuple[World, torch.device]) -> None:
        self.world, self.device = joined
        self._draws_random = True

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def size(self) -> int:
        return self.world.size

    def replicate(
        self,
        model: nn.Module,
        strategy: Strategy | str,
        *,
        max_grad_norm: float | None = None,
        targets_per_row: int = 1,
        total: float | Mapping[str, float] | None = None,
        precision: str = "fp32",
    ) -> Replica:
        """Keep `model` in agreement with the other workers' copies.

        The model is moved to this worker's device and must be initialised the same everywhere (seed it); this is
        checked bitwise.

        Args:
            strategy: a value, or its call form: ``"ddp(lr=3e-4)"``.
            max_grad_norm: clip the global gradient norm.
            targets_per_row: targets of a full row, for example its length in tokens (only scaling inside).
            total: length of the schedule in steps or tokens, as it counts; where an inner and an outer optimizer count
                differently, both: {"steps": 1000, "tokens": 4e6}; None: a constant rate.
            precision: "fp32", "bf16" or "fp16" autocast of forward passes, or "fp64".

        Raises:
            Diverged: the initial parameters differ between workers.
        """
        from manyhands.core import config
        from manyhands.models.build import draws_random
        from manyhands.strategy.base import Strategy
        from manyhands.train.replica import Replica
        from manyhands.train.session import autocast_for

        if isinstance(strategy, str):
            strategy = config.from_text("strategies", strategy, "strategy")
        if not isinstance(strategy, Strategy):
            raise UsageError(
                f"strategy = {strategy!r}",
                "it is a Strategy or its call form",
                'for example manyhands.presets.ddp(lr=3e-4), or "ddp(lr=3e-4)"',
            )
        model.to(self.device)
        if precision == "fp64":
            model.double()
        self._draws_random = draws_random(model)
        return Replica(
            model,
            strategy,
            self.world.wire,
            max_grad_norm=max_grad_norm,
            targets_per_row=targets_per_row,
            total=total,
            autocast=autocast_for(precision, self.device.type),
        )

    def share(
        self,
        dataset: Any,
        *,
        global_batch: int,
        seed: int = 0,
        epochs: float = 1,
        start: int = 0,
        micro_batch: int | None = None,
        device_batch: int | None = None,
        weights: Sequence[float] | None = None,
        drop_last: bool = False,
    ) -> Iterator[Part]:
        """My part of each global batch, in order, for `epochs` passes; the same batches for any number of workers.

        Args:
            dataset: anything with ``len`` and ``[i]`` (items are collated by `default_collate`), or with
                ``take(ids) -> batch`` (see `manyhands.core.types.Rows`).
            global_batch: rows of one step over all workers.
            start: first step, when resuming; there is nothing to skip over.
            micro_batch: rows of the unit of randomness and ownership; default: see `manyhands.train.feed.unit_rows`.
            device_batch: most rows of one forward pass; default: all of my part.
            weights: relative share of each worker; default: equal.
            drop_last: leave out an epoch's last, smaller batch.

        Raises:
            UsageError, DataError: sizes that cannot be, an empty data set.
        """
        from manyhands.data.sample import Order
        from manyhands.train.feed import Feed, unit_rows

        if not 0 <= epochs < math.inf:
            raise UsageError(
                f"epochs = {epochs}",
                "the data are passed over so often",
                "give a number, and leave the loop when done",
            )
        if micro_batch is not None and device_batch is not None and micro_batch > device_batch:
            raise UsageError(
                f"micro_batch = {micro_batch} with device_batch = {device_batch}",
                "a micro-batch is computed in one forward pass",
                "give a smaller micro_batch, or leave it out",
            )
        unit = unit_rows(global_batch, one_pass=not self._draws_random)
        rows = dataset if hasattr(dataset, "bytes_per_target") else _MapRows(dataset)
        order = Order(len(rows), global_batch, seed, drop_last)
        for name, given in (("micro_batch", micro_batch), ("device_batch", device_batch)):
            if given is not None and given < 1:
                raise UsageError(f"{name} = {given}", "it has at least one row", f"leave out {name}")
        if weights is not None and len(weights) != self.size:
            raise UsageError(
                f"weights = {list(weights)} for {self.size} workers",
                "each worker has one share",
                "give as many",
            )
        feed = Feed(
            rows=rows,
            order=order,
            rank=self.rank,
            weights=weights if weights is not None else [1.0] * self.size,
            micro_batch=micro_batch or min(unit, device_batch or unit),
            device_batch=device_batch or global_batch,
            coalesce=not self._draws_random,
            device=self.device,
            seed=seed,
        )
        for step in range(start, math.ceil(epochs * order.steps_per_epoch - 1e-9)):
            yield feed.part(step)

    def save(self, replica: Replica, directory: str | Path, *, tokenizer: Any = None) -> Path:
        """Write a checkpoint ``directory/checkpoint-N`` (rank 0; the others wait) and return its path.

        Its root loads with Transformers' ``from_pretrained`` where the model is one of Transformers'. A model of your own code
        is loaded with ``manyhands.load(path, into=model)``. `tokenizer` is anything with ``save_pretrained``.
        """
        from manyhands.train.session import save_replica

        return save_replica(self.world, replica, Path(directory), tokenizer=tokenizer)

    def restore(self, replica: Replica, path: str | Path) -> int:
        """Load a checkpoint that `save` wrote, on any number of workers; returns the step to continue with."""
        from manyhands.train.session import restore_replica

        return restore_replica(replica, Path(path))

    def close(self) -> None:
        """Leave. Collective."""
        self.world.wire.close()


class _MapRows:
    """A map-style dataset as `Rows`. What it draws (augmentation) follows from seed, step and the row's place."""

    bytes_per_target = 1.0

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise UsageError(
                f"a dataset of type {type(dataset).__name__}",
                "the global batch of a step is found by index, so a dataset needs len() and [i]",
                "read a stream into a list first, or prepare it with manyhands prepare",
            )
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def take(self, ids: Any) -> Any:
        from torch.utils.data import default_collate

        return default_collate([self._dataset[int(i)] for i in ids])

    def take_at(self, ids: Any, seed: int, step: int, begin: int) -> Any:
        from torch.utils.data import default_collate

        found = []
        with rng.undisturbed():
            for place, i in enumerate(ids, begin):
                rng.seed_everything(seed, step, place, SAMPLES)
                found.append(self._dataset[int(i)])
        return default_collate(found)


def load(path: str | Path, *, trust: bool = False, into: nn.Module | None = None) -> nn.Module:
    """The model of a checkpoint or output directory, of any kind that manyhands writes, in evaluation mode.

    Args:
        into: a model as the saved one was made, which gets its weights: for models of your own code.
        trust: call the ``module:function`` that the checkpoint names as its model's maker.
    """
    from manyhands.models.build import load_model, load_weights
    from manyhands.train.checkpoint import resolve_resume, verify

    found = resolve_resume(str(path), Path(path))
    verify(found)
    if into is not None:
        load_weights(into, found)
        return into.eval()
    return load_model(found, trust=trust)
