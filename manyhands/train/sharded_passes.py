"""Equally many passes on every worker.

A pass of a sharded model is collective: whoever computes needs the others' pieces. So the workers agree on the largest
number of passes of a step, and whoever has fewer fills up with passes over one row that count for nothing: their loss
is not added, and their gradients are replaced by zeros before they are (so that not even a NaN gets through). Workers
that compute each layer together run the micro-batches of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from manyhands.core.request import Gather
from manyhands.train.sharded_pieces import tell

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Wire
    from manyhands.train.method import Part

    Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Pass:
    """One forward and backward.

    Attributes:
        place: of the micro-batch in the global batch; None: it fills up and counts for nothing.
        mine: the micro-batch is this worker's own (not that of one which computes layers with it).
    """

    place: int | None
    batch: Batch
    mine: bool


class Passes:
    """Makes the passes of each step.

    Args:
        wire: all workers.
        tensor: those that compute each layer together.
    """

    def __init__(self, wire: Wire, tensor: Wire) -> None:
        self._wire, self._tensor = wire, tensor
        self._row: Batch | None = None  # one row, for passes that count for nothing

    def of(self, part: Part) -> list[Pass]:
        """My passes of a step, as many as everybody's. Collective; none if nobody has any."""
        found = [Pass(place, batch, True) for place, batch in part.micro_batches]
        if self._tensor.size > 1:
            found = self._together(found)
        if found and self._row is None:
            self._row = {name: tensor[:1].clone() for name, tensor in found[0].batch.items()}
        if self._wire.size == 1:
            return found
        mine = torch.tensor([len(found), self._row is not None], dtype=torch.int64)
        table = torch.stack(self._wire.begin(Gather(mine, even=True)).wait()).tolist()  # [workers, 2]
        longest = max(n for n, _ in table)
        if longest and not all(has for _, has in table):
            donor = next(rank for rank, (_, has) in enumerate(table) if has)
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
