"""Pieces of tensors that are divided among workers: put together on rank 0, and cut out of a checkpoint.

A checkpoint knows nothing of workers: every tensor is whole and has a name. So a run with sharded state is saved by
gathering one tensor after another (no worker but rank 0 ever holds more than one whole tensor), and loaded by reading
from the file only the rows that are this worker's.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from manyhands.core.errors import CheckpointError, nearest
from manyhands.core.request import Gather

if TYPE_CHECKING:
    from torch import Tensor, nn

    from manyhands.core.types import Wire

GATHER_BYTES = 1 << 24  # small tensors travel together, up to about this much


@dataclass(frozen=True)
class Piece:
    """A box of one parameter that this worker holds.

    Attributes:
        name: of the parameter.
        shape: of the whole.
        offset: where the piece begins, one index for each dimension.
        extent: its own shape.
        counts: among several workers with the same piece this one speaks for it.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    extent: tuple[int, ...]
    counts: bool = True

    @property
    def whole(self) -> bool:
        return self.extent == self.shape

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.extent, strict=True))

    @staticmethod
    def all_of(name: str, tensor: Tensor, *, counts: bool = True) -> Piece:
        shape = tuple(tensor.shape)
        return Piece(name, shape, (0,) * len(shape), shape, counts)


@dataclass(frozen=True)
class Owned:
    """A piece and the parameter that is updated in its place: a view of this worker's memory."""

    piece: Piece
    param: nn.Parameter

    @property
    def name(self) -> str:
        return self.piece.name


def tell(wire: Wire, value: Any) -> list[Any]:
    """Everybody's JSON value, in rank order."""
    data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(bytes(part.tolist())) for part in wire.begin(Gather(data)).wait()]


def gather_whole(wire: Wire, mine: Mapping[str, tuple[Piece, Tensor]]) -> dict[str, Tensor]:
    """Everybody's pieces put together, by key, on rank 0 (CPU tensors); empty elsewhere. Collective.

    Args:
        mine: key -> (where it belongs, my tensor of the piece's extent). Pieces that do not count are left out.
    """
    told = {k: (p, t) for k, (p, t) in mine.items() if p.counts and t.numel() == _numel(p.extent)}
    table = tell(wire, [[k, _dtype_name(t), p.shape, p.offset, p.extent] for k, (p, t) in told.items()])
    boxes: dict[str, list[tuple[int, Piece]]] = {}
    dtypes: dict[str, str] = {}
    for rank, rows in enumerate(table):
        for key, dtype, shape, offset, extent in rows:
            piece = Piece(key, tuple(shape), tuple(offset), tuple(extent))
            boxes.setdefault(key, []).append((rank, piece))
            dtypes[key] = dtype
    whole: dict[str, Tensor] = {}
    for keys in _lots(boxes, dtypes):
        dtype = getattr(torch, dtypes[keys[0]])
        flat = [told[key][1].detach().to("cpu").reshape(-1) for key in keys if key in told]
        parts = wire.begin(Gather(torch.cat(flat) if flat else torch.empty(0, dtype=dtype))).wait()
        if wire.rank == 0:
            places = [0] * wire.size
            for key in keys:
                whole[key] = torch.empty(boxes[key][0][1].shape, dtype=dtype)
                for rank, piece in boxes[key]:
                    begin, places[rank] = places[rank], places[rank] + _numel(piece.extent)
                    whole[key][piece.slices] = parts[rank][begin : places[rank]].reshape(piece.extent)
    return dict(sorted(whole.items()))


def _lots(boxes: Mapping[str, Sequence[tuple[int, Piece]]], dtypes: Mapping[str, str]) -> Iterator[list[str]]:
    """The keys, in one order on all workers, in lots of one type and about `GATHER_BYTES`."""
    lot: list[str] = []
    size = 0
    for key in sorted(boxes, key=lambda k: (dtypes[k], k)):
        numel = _numel(boxes[key][0][1].shape)
        if lot and (dtypes[key] != dtypes[lot[0]] or size + 4 * numel > GATHER_BYTES):
            yield lot
            lot, size = [], 0
        lot.append(key)
        size += 4 * numel
    if lot:
        yield lot


def state_pieces(owned: Sequence[Owned], state: Mapping[str, Tensor]) -> dict[str, tuple[Piece, Tensor]]:
    """An optimizer's state by name (``PARAMETER.KEY``) as pieces of the whole parameters' state.

    State of the piece's own shape is cut as the parameter is; anything else (a step counter, Adafactor's rows and
    columns) belongs to the whole and is told by the worker that holds the parameter's first element.
    """
    by_name = {each.name: each.piece for each in owned}
    found = {}
    for key, tensor in state.items():
        piece = by_name[key.rpartition(".")[0]]
        if tuple(tensor.shape) == piece.extent and piece.extent != ():
            found[key] = (Piece(key, piece.shape, piece.offset, piece.extent, piece.counts), tensor)
        else:
            first = piece.counts and not any(piece.offset)
            found[key] = (Piece.all_of(key, tensor, counts=first), tensor)
    return found


class Reader:
    """A safetensors file from which pieces are read. A context manager.

    Raises:
        CheckpointError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Reader:
        from safetensors import SafetensorError, safe_open

        self._stack = contextlib.ExitStack()
        try:
            self._file: Any = self._stack.enter_context(safe_open(str(self.path), framework="pt"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.path}: {error}", "a checkpoint holds named tensors", "give another one"
            ) from None
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118

    def whole(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def piece(self, name: str, piece: Piece) -> Tensor:
        if piece.whole or not piece.shape:
            return self.whole(name)
        tensor: Tensor = self._file.get_slice(name)[piece.slices]
        return tensor


def cut(
    state: Mapping[str, Tensor] | Reader, owned: Sequence[Owned], known: Sequence[str]
) -> dict[str, Tensor]:
    """My part of an optimizer's whole state, as `NamedOptimizer.load_state_by_name` takes it.

    Args:
        state: by name; from a file only my rows are read.
        known: names of all trainable parameters, mine or not.

    Raises:
        CheckpointError: the state of a parameter that is not there.
    """
    mine = {each.name: each.piece for each in owned}
    shapes = state.shapes() if isinstance(state, Reader) else {k: tuple(t.shape) for k, t in state.items()}
    found = {}
    for key, shape in shapes.items():
        name = key.rpartition(".")[0]
        if name not in known:
            raise CheckpointError(
                f"optimizer state of {name!r}",
                "the model has no such trainable parameter",
                nearest(name, known),
            )
        if name in mine:
            piece = mine[name] if shape == mine[name].shape else Piece(key, shape, (0,) * len(shape), shape)
            found[key] = state.piece(key, piece) if isinstance(state, Reader) else state[key][piece.slices]
    return found


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
