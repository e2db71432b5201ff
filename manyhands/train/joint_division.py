"""Who writes what of a checkpoint that several workers write together (`manyhands.train.joint`). Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from manyhands.core.errors import CheckpointError
from manyhands.train import tensors
from manyhands.train.checkpoint import EXCHANGE, OPTIMIZER, WEIGHTS
from manyhands.train.tensors import Layout, size_of, type_name

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.train.sharded_pieces import Piece

FILES = (WEIGHTS, OPTIMIZER, EXCHANGE)
GRAIN_BYTES = 1 << 16  # no worker is asked to write less of what all have


@dataclass(frozen=True)
class Holdings:
    """What this worker has of a checkpoint, by file and name.

    Attributes:
        common: what all workers have alike.
        own: where each of my pieces belongs, and its elements (of the piece's extent).
    """

    common: Mapping[str, Mapping[str, Tensor]]
    own: Mapping[str, Mapping[str, tuple[Piece, Tensor]]]


class Run(NamedTuple):
    """Bytes `begin` to `end` of the tensor `name` of `file`."""

    file: str
    name: str
    begin: int
    end: int


class Table(NamedTuple):
    """What everybody has.

    Attributes:
        layouts: of each file.
        common: the runs that all have, in the files' order.
        own: by rank: those that one worker writes for all.
    """

    layouts: Mapping[str, Layout]
    common: Sequence[Run]
    own: Sequence[Sequence[Run]]


def told(holdings: Holdings, *, first: bool) -> dict[str, Any]:
    """What a worker tells the others, as JSON data.

    Args:
        first: whether it speaks for what all have.
    """
    own: list[list[Any]] = []
    for file, named in holdings.own.items():
        for name, (piece, tensor) in named.items():
            if not piece.counts or tensor.numel() != math.prod(piece.extent):
                continue
            kind, row = type_name(tensor), size_of(type_name(tensor), piece.shape[1:])
            begin = piece.offset[0] * row if piece.offset else 0
            rows = piece.extent[1:] == piece.shape[1:]  # else its bytes lie apart
            own.append([file, name, kind, list(piece.shape), begin, size_of(kind, piece.extent), rows])
    common = [
        [file, name, type_name(tensor), list(tensor.shape)]
        for file, named in (holdings.common if first else {}).items()
        for name, tensor in named.items()
    ]
    return {"own": own, "common": common}


def understood(everyones: Sequence[Mapping[str, Any]]) -> Table | None:
    """The same on every worker; None where the parts do not make whole tensors, or are not rows of them."""
    kinds: dict[str, dict[str, tuple[str, list[int]]]] = {file: {} for file in FILES}
    for file, name, kind, shape in everyones[0]["common"]:
        kinds[file][name] = (kind, shape)
    common = {(file, name) for file in kinds for name in kinds[file]}
    seen: dict[tuple[str, str], dict[tuple[int, int], int]] = {}  # by name: who has which bytes
    for rank, each in enumerate(everyones):
        for file, name, kind, shape, begin, size, rows in each["own"]:
            if (
                not rows
                or (file, name) in common
                or kinds[file].setdefault(name, (kind, shape)) != (kind, shape)
            ):
                return None
            holders = seen.setdefault((file, name), {})
            if size:
                holders.setdefault((begin, begin + size), rank)
    own: list[list[Run]] = [[] for _ in everyones]
    for (file, name), holders in seen.items():
        if not covers(holders, size_of(*kinds[file][name])):
            return None
        for (begin, end), rank in holders.items():
            own[rank].append(Run(file, name, begin, end))
    metadata = {WEIGHTS: {"format": "pt"}}
    try:
        layouts = {
            file: tensors.layout(named, metadata.get(file))
            for file, named in kinds.items()
            if named or file != EXCHANGE
        }
    except CheckpointError:  # a type that has no name: whoever writes alone says so
        return None
    shared = [
        Run(file, name, 0, size_of(*kinds[file][name]))
        for file, planned in layouts.items()
        for name in planned.places
        if (file, name) in common
    ]
    return Table(layouts, shared, own)


def divide(table: Table, writers: Sequence[int]) -> dict[int, list[Run]]:
    """The runs of each of the ranks in `writers`: its own, and in turn of what all have up to a fair share.

    >>> table = Table({}, [Run("f", "a", 0, 300_000), Run("f", "b", 0, 100_000)], [[], [Run("f", "c", 0, 100_000)]])
    >>> {rank: sum(end - begin for *_, begin, end in runs) for rank, runs in divide(table, [0, 1]).items()}
    {0: 262144, 1: 237856}
    """
    mine = {rank: list(table.own[rank]) for rank in writers}
    have = {rank: sum(run.end - run.begin for run in runs) for rank, runs in mine.items()}
    left = sum(run.end - run.begin for run in table.common)
    waiting = list(table.common)
    for at, rank in enumerate(writers):
        others = writers[at:]
        fair = (left + sum(have[r] for r in others)) / len(others)
        quota = max(0, -int(-(fair - have[rank]) // GRAIN_BYTES) * GRAIN_BYTES)  # whole grains, rounded up
        if rank == writers[-1]:
            quota = left
        while quota > 0 and waiting:
            file, name, begin, end = waiting.pop(0)
            cut = min(end, begin + quota)
            mine[rank].append(Run(file, name, begin, cut))
            quota, left = quota - (cut - begin), left - (cut - begin)
            if cut < end:
                waiting.insert(0, Run(file, name, cut, end))
    return mine


def covers(ranges: Iterable[tuple[int, int]], size: int) -> bool:
    """Whether these are all bytes up to `size`, each once."""
    at = 0
    for begin, end in sorted(ranges):
        if begin != at:
            return False
        at = end
    return at == size
