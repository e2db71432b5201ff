"""Checkpoints of sharded runs: the same files as everybody's, written by rank 0 from pieces and read as pieces.

Saving gathers one lot of tensors after another (no worker but rank 0 ever holds more than a lot); loading reads from
the files the rows that are this worker's. So a run may go on with another number of workers, another stage, or none.

What groups held back of earlier gradients (residuals) is kept by parameter and as a sum over groups: only the sum
matters (promise 4). The first group continues with it, the others with zero.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.core.errors import CheckpointError, ModelError
from manyhands.core.request import Sum
from manyhands.exchange.combine import is_own, leaves
from manyhands.train.checkpoint import Snapshot
from manyhands.train.sharded_pieces import Owned, Piece, Reader

if TYPE_CHECKING:
    from torch import Tensor, nn

    from manyhands.train.replica import Replica
    from manyhands.train.sharded_gradients import ShardGradients
    from manyhands.train.sharded_mesh import Mesh

COMMON = "all"  # in names of exchange state: of no parameter


class Config:
    """The files that say what the model is, read before it is divided."""

    def __init__(self, model: nn.Module) -> None:
        from manyhands.models.store import write_config

        self._files: dict[str, bytes] = {}
        self._error: ModelError | None = None
        with tempfile.TemporaryDirectory() as directory:
            try:
                write_config(model, Path(directory))
            except ModelError as error:  # of interest only to those who save
                self._error = error
            for path in Path(directory).iterdir():
                self._files[path.name] = path.read_bytes()

    def write(self, directory: Path) -> None:
        if self._error is not None:
            raise self._error
        for name, data in self._files.items():
            (directory / name).write_bytes(data)


def snapshot(
    replica: Replica,
    *,
    weights: Mapping[str, Tensor] | None,
    write_config: Callable[[Path], None],
    exchange: Mapping[str, Tensor],
    state: Mapping[str, Any],
    tokenizer: Path | None,
    began: float,
) -> Snapshot | None:
    """What a checkpoint holds, on rank 0; None elsewhere. Collective.

    Args:
        weights: the whole state dict on rank 0.
        began: `time.perf_counter` when training paused.
    """
    optimizer = replica.optimizer_state()
    if replica.wire.rank != 0:
        return None
    counters = {"step": replica.steps, "tokens": replica.tokens, "skipped": replica.skipped}
    return Snapshot(
        step=replica.steps,
        weights=weights or {},
        write_config=write_config,
        state=json.loads(json.dumps({**state, **counters})),
        optimizer=optimizer,
        exchange=exchange,
        tokenizer_dir=tokenizer,
        taken_s=time.perf_counter() - began,
    )


def exchange_pieces(
    states: Sequence[Any], gradients: ShardGradients, mesh: Mesh, owned: Sequence[Owned]
) -> dict[str, tuple[Piece, Tensor]]:
    """My pieces of the exchange's state by parameter. Collective."""
    mine: dict[str, tuple[Piece, Tensor]] = {}
    for bucket, state in enumerate(states):
        for path, leaf in leaves(state):
            name = ".".join(path)
            if leaf.shape != gradients.buckets[bucket].shape:
                if bucket == 0:
                    key = f"{COMMON}.{name}"
                    mine[key] = (Piece.all_of(key, leaf, counts=not any(mesh.place)), leaf)
                continue
            total = leaf
            if is_own(path):
                total = mesh.across.begin(Sum(leaf.clone())).wait()
            for i, view in gradients.cut(bucket, total):
                piece = owned[i].piece
                key = f"{piece.name}/{name}"
                mine[key] = (Piece(key, piece.shape, piece.offset, piece.extent, piece.counts), view)
    return mine


def read_exchange(
    path: Path, states: Sequence[Any], gradients: ShardGradients, mesh: Mesh, owned: Sequence[Owned]
) -> None:
    """A checkpoint's exchange state into `states`, in place. Raises `CheckpointError` if it is of another exchange."""
    file = path / "training" / "exchange.safetensors"
    wanted = {".".join(p) for state in states for p, _ in leaves(state)}
    if not file.exists():
        if wanted:
            raise _other(path, wanted)
        return
    with Reader(file) as stored:
        given = set(stored.shapes())
        kinds = {n.rpartition("/")[2] if "/" in n else n.removeprefix(f"{COMMON}.") for n in given}
        if kinds != wanted and states:
            raise _other(path, kinds ^ wanted)
        for bucket, state in enumerate(states):
            for parts, leaf in leaves(state):
                name = ".".join(parts)
                if leaf.shape != gradients.buckets[bucket].shape:
                    leaf.copy_(stored.whole(f"{COMMON}.{name}"))
                    continue
                leaf.zero_()
                if is_own(parts) and mesh.place[0] != 0:
                    continue
                for i, view in gradients.cut(bucket, leaf):
                    view.copy_(stored.piece(f"{owned[i].name}/{name}", owned[i].piece))


def _other(path: Path, names: set[str]) -> CheckpointError:
    return CheckpointError(
        f"{path}: the exchange's state {', '.join(sorted(names)[:3])} does not fit",
        "a checkpoint continues with the exchange it was written with",
        "give the same --strategy",
    )


def counters_of(path: Path) -> dict[str, Any]:
    """``training/state.json``. Raises `CheckpointError`."""
    file = path / "training" / "state.json"
    try:
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for name in ("step", "tokens"):
            int(state[name])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{file}: {error}",
            "a checkpoint that can be continued says how far it is",
            "give a checkpoint-N that manyhands wrote",
        ) from None
    return state


def restored(replica: Replica, state: Mapping[str, Any]) -> None:
    """Take over the counters of a checkpoint whose tensors were loaded."""
    replica.steps, replica.tokens = int(state["step"]), int(state["tokens"])
    replica.skipped = int(state.get("skipped", 0))
