"""Optimizer state divided among workers (ZeRO 1): gradients agree as with `ddp`, then each updates its own rows.

The sums, the norm and the updates are those of `ddp`, element by element, so the parameters are the same bits. Where an
update needs whole matrices (Muon, Adafactor) whole tensors are dealt out instead of rows. Afterwards everybody gathers
everybody's rows, in lots of bounded size. Where groups of workers hold the state once each, the first group tells its rows:
the others' are the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from manyhands.core.request import Gather
from manyhands.placement.sharded import elementwise
from manyhands.train import exchange_state, sharded_rebuild
from manyhands.train.checkpoint import OPTIMIZER
from manyhands.train.header import Header
from manyhands.train.mending import shared_of
from manyhands.train.norm import clip_factor
from manyhands.train.sharded_pieces import Owned, Piece, cut, gather_whole, state_pieces
from manyhands.train.sharded_rebuild import Pool, Share
from manyhands.train.synchronous import Synchronous

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.placement.sharded import Sharded
    from manyhands.strategy.named import NamedOptimizer
    from manyhands.train.replica import Replica

LOT_BYTES = 1 << 22  # of one worker's rows that travel at once


class ShardedOptimizer(Synchronous):
    """ZeRO 1: see the module."""

    divided = True  # the optimizer's state is put together collectively
    keeps_sums = False  # but to divide it anew costs more than a newcomer gains in a part of a step

    def __init__(self, replica: Replica) -> None:
        spec = replica.strategy.outer
        groups, size, _ = cast("Sharded", replica.strategy.placement).mesh(replica.wire.size)
        group, mine = divmod(replica.wire.rank, size)
        self.place = group, groups
        shapes = [tuple(p.shape) for _, p in replica.named]
        dealt = deal_rows(shapes, size) if elementwise(spec) else deal_tensors(shapes, size)
        self.owned = [_own(replica.named[i], rows, counts=group == 0) for i, rows in dealt[mine]]
        self._lots = [
            _lots([_rows(replica.named[i][1].detach(), rows).reshape(-1) for i, rows in theirs])
            for theirs in dealt
        ]
        self.inherited: list[Share] = []  # what others held who have left
        self._torn = -1  # my rows are those after so many steps, and others' may not be
        super().__init__(replica)

    def _build_optimizer(self) -> NamedOptimizer:
        """Over my rows alone: what it keeps is divided among the workers."""
        from manyhands.strategy.named import NamedOptimizer

        named = [(each.name, each.param) for each in self.owned]
        if not named:
            return NamedOptimizer([])
        built: NamedOptimizer = self._replica.strategy.outer.build(named, self._replica.device.type)
        return built

    def shared(self) -> dict[str, dict[str, Tensor]]:
        """Parameters and the exchange's part; the optimizer's state is divided."""
        return shared_of(self._replica, {})

    def pieces(self) -> dict[str, dict[str, tuple[Piece, Tensor]]]:
        """What I alone have of the files of a checkpoint."""
        return {OPTIMIZER: state_pieces(self.owned, self.optimizer.state_by_name())}

    def optimizer_state(self) -> dict[str, Tensor]:
        """The whole state by name on rank 0's CPU; empty elsewhere. Collective."""
        return gather_whole(self._replica.wire, state_pieces(self.owned, self.optimizer.state_by_name()))

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """From the whole state, of which my rows are taken."""
        names = [name for name, _ in self._replica.named]
        self.optimizer.load_state_by_name(cut(state, self.owned, names))

    # -- from one set of workers to the next (see `manyhands.train.sharded_rebuild`)

    def adopt(self, other: Synchronous) -> None:
        """Gradients and the exchange's state; `receive` brings the optimizer's."""
        self._adopt_sums(other)

    def held(self, steps: int) -> list[Share]:
        """What I have after `steps` steps: everything, or only my rows where the last update was interrupted."""
        replica, found = self._replica, []
        if replica.steps == steps and self._torn < 0:
            for name, tensor in replica.model.state_dict().items():
                found.append(Share(f"model/{name}", Piece.all_of(name, tensor), tensor.detach()))
            for name, leaf, own in exchange_state.named_leaves(self.states):
                if not own:
                    found.append(Share(f"exchange/{name}", Piece.all_of(name, leaf), leaf))
        if steps == (replica.steps if self._torn < 0 else self._torn):
            state = state_pieces(self.owned, self.optimizer.state_by_name())
            found += [Share(f"optimizer/{name}", *held) for name, held in state.items()]
            if state:
                found += [Share(f"rows/{each.name}", each.piece, each.param.detach()) for each in self.owned]
        return found + self.inherited

    def required(self, pool: Pool) -> dict[str, tuple[int, ...]]:
        """What must be there: an optimizer that keeps nothing has nothing to lose."""
        named = {f"model/{name}": tuple(t.shape) for name, t in self._replica.model.state_dict().items()}
        if any(key.startswith("optimizer/") for key in pool.shapes):
            named |= {f"rows/{name}": tuple(p.shape) for name, p in self._replica.named if p.numel()}
        return named

    def receive(self, pool: Pool, *, behind: bool) -> None:
        """My rows of what all hold, and where I am `behind` everything else. Collective."""
        self.optimizer.load_state_by_name(sharded_rebuild.take_optimizer(pool, self.owned))
        targets = {}
        if behind:
            targets = {f"model/{name}": tensor for name, tensor in self._replica.model.state_dict().items()}
            for name, leaf, own in exchange_state.named_leaves(self.states):
                if own:  # of a step that I did not see the end of
                    leaf.zero_()
                else:
                    targets[f"exchange/{name}"] = leaf
        wanted = [(key, Piece.all_of(key, tensor)) for key, tensor in targets.items()]
        with torch.no_grad():
            for tensor, found in zip(targets.values(), pool.take(wanted), strict=True):
                if found is not None:
                    tensor.copy_(found)

    # -- how

    def _update(self, told: Header, scale: float, norm: float, *, behind: int) -> float:
        """Scale, clip and step my rows, then gather everybody's. Returns the rate used."""
        replica = self._replica
        factor = scale * clip_factor(norm, replica.max_norm)
        self.gradients.attach(told.used)
        grads: dict[str, Any] = {name: param.grad for name, param in replica.named}
        for each in self.owned:
            whole = grads[each.name]
            each.param.grad = None if whole is None else _rows(whole, _range(each.piece))
            if each.param.grad is not None and factor != 1.0:
                each.param.grad.mul_(factor)
        rate, lr = replica.rate(replica.strategy.outer, behind=behind)
        self.optimizer.set_lr(rate)
        self._torn = replica.steps + 1 - behind
        self.optimizer.step()
        for each in self.owned:
            each.param.grad = None
        self._gather()
        self._torn = -1
        return lr

    @torch.no_grad()
    def _gather(self) -> None:
        wire, (group, _) = self._replica.wire, self.place
        size = len(self._lots)
        if size == 1:
            return
        like = self._replica.named[0][1]
        for turn in range(max(len(lots) for lots in self._lots)):
            lots = [lots[turn] if turn < len(lots) else [] for lots in self._lots]
            mine = lots[wire.rank % size] if group == 0 else []  # the other groups have the same rows
            flat = (
                torch.cat([v.view(torch.uint8) for v in mine])
                if mine
                else like.new_empty(0, dtype=torch.uint8)
            )
            for rank, part in enumerate(wire.begin(Gather(flat)).wait()[:size]):
                if rank == wire.rank % size:
                    continue
                begin = 0
                for view in lots[rank]:
                    end = begin + view.numel() * view.element_size()
                    view.view(torch.uint8).copy_(part[begin:end])
                    begin = end


Rows = range | None  # of the first dimension; None: of a tensor without dimensions


def deal_rows(shapes: Sequence[tuple[int, ...]], size: int) -> list[list[tuple[int, Rows]]]:
    """For each of `size` workers its (tensor, rows): contiguous, equally many elements up to a row.

    >>> deal_rows([(4, 2), (3,)], 2)
    [[(0, range(0, 3))], [(0, range(3, 4)), (1, range(0, 3))]]
    """
    total = sum(torch.Size(s).numel() for s in shapes)
    dealt: list[list[tuple[int, Rows]]] = [[] for _ in range(size)]
    begin = 0  # of the tensor among all elements
    for i, shape in enumerate(shapes):
        numel = torch.Size(shape).numel()
        if not shape:
            dealt[min(size - 1, begin * size // max(1, total))].append((i, None))
        elif numel:
            width = numel // shape[0]
            cuts = [min(shape[0], max(0, round((total * r / size - begin) / width))) for r in range(size)]
            for rank, (first, last) in enumerate(zip(cuts, [*cuts[1:], shape[0]], strict=True)):
                if last > first:
                    dealt[rank].append((i, range(first, last)))
        begin += numel
    return dealt


def deal_tensors(shapes: Sequence[tuple[int, ...]], size: int) -> list[list[tuple[int, Rows]]]:
    """For each of `size` workers whole tensors: the largest first, each to the one with the least.

    >>> deal_tensors([(2, 2), (3,), (2, 3)], 2)
    [[(2, range(0, 2))], [(0, range(0, 2)), (1, range(0, 3))]]
    """
    sizes = [torch.Size(s).numel() for s in shapes]
    dealt: list[list[tuple[int, Rows]]] = [[] for _ in range(size)]
    loads = [0] * size
    for i in sorted(range(len(shapes)), key=lambda i: (-sizes[i], i)):
        if sizes[i]:
            rank = loads.index(min(loads))
            loads[rank] += sizes[i]
            dealt[rank].append((i, range(shapes[i][0]) if shapes[i] else None))
    return [sorted(theirs, key=lambda item: item[0]) for theirs in dealt]


def _own(named: tuple[str, nn.Parameter], rows: Rows, *, counts: bool) -> Owned:
    name, param = named
    view = _rows(param.detach(), rows)
    shape = tuple(param.shape)
    offset = (rows.start, *[0] * (len(shape) - 1)) if rows is not None else ()
    return Owned(Piece(name, shape, offset, tuple(view.shape), counts), nn.Parameter(view))


def _range(piece: Piece) -> Rows:
    return range(piece.offset[0], piece.offset[0] + piece.extent[0]) if piece.shape else None


def _rows(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor if rows is None else tensor[rows.start : rows.stop]


def _lots(views: Sequence[Tensor]) -> list[list[Tensor]]:
    """Flat views cut into lots of at most `LOT_BYTES`."""
    lots: list[list[Tensor]] = []
    room = 0
    for view in views:
        begin = 0
        while begin < view.numel():
            if room < view.element_size():
                lots.append([])
                room = LOT_BYTES
            n = min(view.numel() - begin, room // view.element_size())
            lots[-1].append(view[begin : begin + n])
            begin, room = begin + n, room - n * view.element_size()
    return lots
