"""Equally many passes on every worker.

A pass of a sharded model is collective: whoever computes needs the others' pieces. So the workers agree on the largest
number of passes of a step, and whoever has fewer fills up with passes over one row that count for nothing: their loss
is not added, and their gradients are replaced by zeros before they are (so that not even a NaN gets through). Workers
that compute each layer together run the micro-batches of all of them. Where memory has run out on one of them, all run
passes of as many rows as that one has room for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from manyhands.core.request import Gather
from manyhands.train.method import rows_of
from manyhands.train.sharded_pieces import tell

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Wire
    from manyhands.train.memory import Fits
    from manyhands.train.method import Part

    Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Pass:
    """One forward and backward.

    Attributes:
        place: of the micro-batch in the global batch; None: it fills up and counts for nothing.
        mine: the micro-batch is this worker's own (not that of one which computes layers with it).
        begin: its first row in the micro-batch, where that is run in pieces.
    """

    place: int | None
    batch: Batch
    mine: bool
    begin: int = 0


class Passes:
    """Makes the passes of each step.

    Args:
        wire: all workers.
        tensor: those that compute each layer together.
    """

    def __init__(self, wire: Wire, tensor: Wire) -> None:
        self._wire, self._tensor = wire, tensor
        self._row: Batch | None = None  # one row, for passes that count for nothing

    def of(self, part: Part, fits: Fits) -> list[Pass]:
        """My passes of a step, as many as everybody's. Collective; none if nobody has any.

        Args:
            fits: the rows that I have memory for; afterwards those that everybody has.
        """
        whole = [Pass(place, batch, True) for place, batch in part.micro_batches]
        if self._tensor.size > 1:
            whole = self._together(whole)
        if whole and self._row is None:
            self._row = {name: tensor[:1].clone() for name, tensor in whole[0].batch.items()}
        while True:
            found = _cut(whole, fits.most if part.divisible else None)
            if self._wire.size == 1:
                return found
            mine = torch.tensor([len(found), self._row is not None, fits.most or 0], dtype=torch.int64)
            table = torch.stack(self._wire.begin(Gather(mine, even=True)).wait()).tolist()  # [workers, 3]
            limits = {most for *_, most in table}
            if len(limits) == 1:
                break
            fits.most = min(limits - {0})
        longest = max(n for n, *_ in table)
        if longest and not all(has for _, has, _ in table):
            donor = next(rank for rank, (_, has, _) in enumerate(table) if has)
            row = share(self._wire, [self._row] if self._wire.rank == donor and self._row else [])[donor][0]
            self._row = self._row or row
        if len(found) < longest:
            assert self._row is not None
            found += [Pass(None, self._row, False)] * (longest - len(found))
        return found

    def _together(self, found: Sequence[Pass]) -> list[Pass]:
        """The passes of all that compute layers with me, in their order."""
        batches = share(self._tensor, [each.batch for each in found])
        places = tell(self._tensor, [each.place for each in found])
        return [
            Pass(place, batch, rank == self._tensor.rank)
            for rank, (theirs, at) in enumerate(zip(batches, places, strict=True))
            for batch, place in zip(theirs, at, strict=True)
        ]


def _cut(passes: Sequence[Pass], most: int | None) -> list[Pass]:
    """The same in pieces of at most `most` rows; None: as they are."""
    found = []
    for each in passes:
        rows = rows_of(each.batch)
        if not most or rows <= most:
            found.append(each)
            continue
        for begin in range(0, rows, most):
            piece = {name: tensor[begin : begin + most] for name, tensor in each.batch.items()}
            found.append(Pass(each.place, piece, each.mine, begin))
    return found


def share(wire: Wire, batches: Sequence[Batch]) -> list[list[Batch]]:
    """Everybody's batches, in rank order. Collective."""
    shapes = [
        {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in batch.items()}
        for batch in batches
    ]
    table = tell(wire, shapes)
    kinds = {name: dtype for rows in table for row in rows for name, (dtype, _) in row.items()}
    found: list[list[dict[str, Any]]] = [[{} for _ in rows] for rows in table]
    for name, kind in sorted(kinds.items()):
        flat = [batch[name].reshape(-1) for batch in batches if name in batch]
        mine = torch.cat(flat) if flat else torch.empty(0, dtype=getattr(torch, kind))
        for rank, part in enumerate(wire.begin(Gather(mine)).wait()):
            begin = 0
            for row, batch in zip(table[rank], found[rank], strict=True):
                if name in row:
                    shape = torch.Size(row[name][1])
                    batch[name] = part[begin : begin + shape.numel()].reshape(shape)
                    begin += shape.numel()
    return [list(rows) for rows in found]
