"""Divided state put together again from those who are still there, and divided anew: in memory, without a checkpoint.

    who holds what      everybody tells the boxes that it holds (its own, and what those who left handed over)
    is all of it there  where no box is missing, those that several hold are taken from the one that has sent least
    divided anew        the new layout's owners take their boxes, lot by lot; no worker ever holds more than a lot beside them

A method whose state is divided gives `held` (its boxes at one step), `required` (what must be there) and `receive`. Where a
box is missing the job goes on from its last checkpoint instead (`manyhands.train.parts`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from manyhands.core.membership import REFORM
from manyhands.core.request import Gather
from manyhands.exchange.combine import is_own, leaves
from manyhands.train import carried
from manyhands.train.sharded_pieces import GATHER_BYTES, Piece, tell
from manyhands.train.sharded_state import COMMON

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Wire
    from manyhands.train.replica import Replica
    from manyhands.train.sharded_gradients import ShardGradients
    from manyhands.train.sharded_pieces import Owned
    from manyhands.train.standing import Standing
    from manyhands.wire.world import World

RESIDUAL = "residual/"  # keys of what is each worker's own: only the sum over workers matters
Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset, extent


@dataclass(frozen=True)
class Share:
    """A box that this worker holds, under ``part/name``."""

    key: str
    piece: Piece
    tensor: Tensor

    @property
    def box(self) -> Box:
        return self.piece.offset, self.piece.extent


class Pool:
    """What all workers of a set hold together. Making it is collective.

    Args:
        mine: what I hold; boxes without elements are left out.
        place: (which replica group I was in, of how many); None: I hold nothing.
        moved: called before each lot: it goes on, however long it takes.
    """

    def __init__(
        self,
        wire: Wire,
        mine: Sequence[Share],
        place: tuple[int, int] | None = None,
        *,
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        self._wire, self._moved = wire, moved
        self._mine: dict[tuple[str, tuple[int, ...], tuple[int, ...]], Tensor] = {}
        for share in mine:
            at = (share.key, *share.box)
            if at in self._mine and share.key.startswith(RESIDUAL):  # my own and what I was given
                self._mine[at] = self._mine[at] + share.tensor.to(self._mine[at].device)
            elif share.tensor.numel():
                self._mine[at] = share.tensor
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.holders: dict[str, dict[Box, list[int]]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        shapes = {s.key: s.piece.shape for s in mine}
        rows = [
            [key, str(tensor.dtype).removeprefix("torch."), shapes[key], offset, extent]
            for (key, offset, extent), tensor in self._mine.items()
        ]
        self._places: list[Sequence[int] | None] = []
        for rank, told in enumerate(tell(wire, {"place": place, "rows": rows})):
            self._places.append(told["place"])
            for key, dtype, shape, offset, extent in told["rows"]:
                self.shapes[key], self._dtypes[key] = tuple(shape), getattr(torch, dtype)
                box = tuple(offset), tuple(extent)
                self.holders.setdefault(key, {}).setdefault(box, []).append(rank)
        self._sources = self._choose()

    def lacking(self, required: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Keys of which not every element is there: of `required` (with their shapes), and of all that are told of."""
        wanted = {key: shape for key, shape in self.shapes.items() if not key.startswith(RESIDUAL)}
        return sorted(
            key
            for key, shape in {**wanted, **required}.items()
            if not covered(shape, self.holders.get(key, ()))
        )

    def rebuilt_from(self) -> list[int]:
        """The replica groups that alone have what others of their number have lost."""
        found = set()
        for key, by_box in self.holders.items():
            for holders in by_box.values():
                places = [place for rank in holders if (place := self._places[rank])]
                if not key.startswith(RESIDUAL) and places and len(holders) < places[0][1]:
                    found.add(places[0][0])
        return sorted(found)

    def take(self, wanted: Sequence[tuple[str, Piece]]) -> list[Tensor | None]:
        """Boxes by key, in host memory; None where nobody holds anything of that key. Collective.

        What is each worker's own comes as the sum over all that hold some.
        """
        asked = {key for told in tell(self._wire, sorted({key for key, _ in wanted})) for key in told}
        found: list[Tensor | None] = [
            torch.zeros(piece.extent, dtype=self._dtypes[key]) if key in self.shapes else None
            for key, piece in wanted
        ]
        places: dict[str, list[int]] = {}
        for i, (key, _) in enumerate(wanted):
            places.setdefault(key, []).append(i)
        for lot in self._lots(asked & self.shapes.keys()):
            self._moved()
            for key, box, values in self._gather(lot):
                for i in places.get(key, ()):
                    target, piece = found[i], wanted[i][1]
                    assert target is not None
                    _put(target, piece, box, values, add=key.startswith(RESIDUAL))
        return found

    # -- how

    def _choose(self) -> dict[str, list[tuple[Box, int]]]:
        """(box, rank that sends it) by key, in one order on all workers."""
        sent = [0] * self._wire.size
        chosen: dict[str, list[tuple[Box, int]]] = {}
        for key in sorted(self.holders):
            chosen[key] = []
            for box, holders in sorted(self.holders[key].items()):
                senders = holders if key.startswith(RESIDUAL) else [min(holders, key=lambda r: (sent[r], r))]
                for rank in senders:
                    sent[rank] += math.prod(box[1]) * self._dtypes[key].itemsize
                    chosen[key].append((box, rank))
        return chosen

    def _lots(self, keys: set[str]) -> list[list[str]]:
        """Keys of one type each, in lots of about `GATHER_BYTES`, in one order on all workers."""
        lots: list[list[str]] = []
        room = 0
        for key in sorted(keys, key=lambda k: (str(self._dtypes[k]), k)):
            size = math.prod(self.shapes[key]) * self._dtypes[key].itemsize
            if not lots or self._dtypes[lots[-1][0]] != self._dtypes[key] or size > room:
                lots.append([])
                room = GATHER_BYTES
            lots[-1].append(key)
            room -= size
        return lots

    def _gather(self, lot: Sequence[str]) -> Iterable[tuple[str, Box, Tensor]]:
        sources = [(key, box, rank) for key in lot for box, rank in self._sources[key]]
        mine = [
            self._mine[(key, *box)].detach().to("cpu").reshape(-1)
            for key, box, rank in sources
            if rank == self._wire.rank
        ]
        flat = torch.cat(mine) if mine else torch.empty(0, dtype=self._dtypes[lot[0]])
        parts = self._wire.begin(Gather(flat)).wait()
        begins = [0] * self._wire.size
        for key, box, rank in sources:
            begin, begins[rank] = begins[rank], begins[rank] + math.prod(box[1])
            yield key, box, parts[rank][begin : begins[rank]].reshape(box[1])


def covered(shape: Sequence[int], boxes: Iterable[Box]) -> bool:
    """Whether `boxes`, which may overlap, fill `shape`.

    >>> covered((4, 2), [((0, 0), (2, 2)), ((1, 0), (3, 2))]), covered((4, 2), [((0, 0), (3, 2))])
    (True, False)
    """
    boxes = list(boxes)
    cuts = [
        sorted({0, n, *(b[0][d] for b in boxes), *(b[0][d] + b[1][d] for b in boxes)})[:-1]
        for d, n in enumerate(shape)
    ]
    return math.prod(shape) == 0 or all(
        any(all(o <= c < o + n for c, o, n in zip(cell, *box, strict=True)) for box in boxes)
        for cell in itertools.product(*cuts)
    )


def _put(target: Tensor, piece: Piece, box: Box, values: Tensor, *, add: bool) -> None:
    """What of `values`, which fill `box`, belongs to `piece`."""
    to, of = [], []
    for o, n, at, extent in zip(piece.offset, piece.extent, *box, strict=True):
        first, last = max(o, at), min(o + n, at + extent)
        if first >= last:
            return
        to.append(slice(first - o, last - o))
        of.append(slice(first - at, last - at))
    if add:
        target[tuple(to)] += values[tuple(of)]
    else:
        target[tuple(to)] = values[tuple(of)]


# ------------------------------------------------------------------------------------- from one set to the next


def redivide(
    world: World, old: Replica, make: Callable[[World], Replica], standing: Standing, *, fresh: bool
) -> tuple[Replica, str] | None:
    """A replica of the new set with the state that its members hold together, and words for where that came from.

    None where something is missing. Collective. `old` is left as it was, so that all of it can be done again.

    Args:
        fresh: I hold no state.
    """
    method: Any = old.method
    prepared = not fresh and bool(getattr(method, "prepared", False)) and old.steps == standing.steps - 1
    if any(world.gather(prepared)):  # an agreement reached some and not me
        table = world.gather(method.table() if world.rank == standing.leader else None)[standing.leader]
        if prepared:
            method.finish(table)
    behind = fresh or old.steps != standing.steps
    shares = [] if fresh else method.held(standing.steps)
    place = None if fresh else method.place
    pool = Pool(world.wire, shares, place, moved=lambda: old.tell_phase(REFORM, old.steps))
    if pool.lacking(method.required(pool)):
        return None
    counters = {"steps": old.steps, "tokens": old.tokens, "skipped": old.skipped}
    told = world.gather(counters)[standing.leader]
    new = make(world)
    try:
        if not fresh:
            new.adopt(old)
        new.steps, new.tokens, new.skipped = told["steps"], told["tokens"], told["skipped"]
        if behind:
            new.method.restart()
        new.method.receive(pool, behind=behind)  # type: ignore[attr-defined]
        world.gather(None)  # nobody moves before everybody has it
    except BaseException:
        new.close()  # it may be around the same model as the next one
        raise
    groups = pool.rebuilt_from()
    if not groups:
        return new, "shards divided anew"
    names = " and ".join(map(str, groups))
    return new, f"shards rebuilt from replica group{'s' if len(groups) > 1 else ''} {names}"


def hand_over(replica: Replica, leaving: Sequence[bool]) -> None:
    """What those who leave hold, and nobody who stays, goes to those who stay. Collective."""
    method: Any = replica.method
    wire = replica.wire
    stay = [rank for rank, leaves_now in enumerate(leaving) if not leaves_now]
    mine = method.held(replica.steps)
    kept = tell(wire, [] if leaving[wire.rank] else [[s.key, *s.box] for s in mine])
    have = {(key, tuple(offset), tuple(extent)) for rows in kept for key, offset, extent in rows}
    given_up = mine if leaving[wire.rank] else []
    pool = Pool(wire, given_up, moved=lambda: replica.tell_phase("change", replica.steps))
    wanted = []
    turn = itertools.cycle(stay)
    for key in sorted(pool.holders):
        for box in sorted(pool.holders[key]):
            if key.startswith(RESIDUAL) or (key, *box) not in have:
                wanted.append((next(turn), key, Piece(key, pool.shapes[key], *box)))
    given = [(key, piece) for heir, key, piece in wanted if heir == wire.rank]
    found = pool.take(given)
    method.inherited += [
        Share(key, piece, tensor)
        for (key, piece), tensor in zip(given, found, strict=True)
        if tensor is not None
    ]
    if replica.exchange_wire is wire:  # whole buckets are held back, and not among what is `held`
        carried.hand_over(replica, leaving)


def take_optimizer(pool: Pool, owned: Sequence[Owned]) -> dict[str, Tensor]:
    """My part of the optimizer's state, as `NamedOptimizer.load_state_by_name` takes it. Collective."""
    mine = {each.name: each.piece for each in owned}
    names, wanted = [], []
    for key, shape in pool.shapes.items():
        part, _, full = key.partition("/")
        name = full.rpartition(".")[0]
        if part == "optimizer" and name in mine:
            own = mine[name]
            whole = Piece(key, shape, (0,) * len(shape), shape)
            names.append(full)
            wanted.append((key, own if shape == own.shape else whole))
    found = pool.take(wanted)
    return {name: tensor for name, tensor in zip(names, found, strict=True) if tensor is not None}


def exchange_shares(states: Sequence[Any], gradients: ShardGradients, owned: Sequence[Owned]) -> list[Share]:
    """The exchange's state on buckets of pieces, by parameter."""
    found = []
    for bucket, state in enumerate(states):
        for path, leaf in leaves(state):
            name = ".".join(path)
            if leaf.shape != gradients.buckets[bucket].shape:
                if bucket == 0:
                    key = f"exchange/{COMMON}.{name}"
                    found.append(Share(key, Piece.all_of(key, leaf), leaf))
                continue
            part = RESIDUAL if is_own(path) else "exchange/"
            for i, view in gradients.cut(bucket, leaf):
                found.append(Share(f"{part}{owned[i].name}/{name}", owned[i].piece, view))
    return found


def take_exchange(
    pool: Pool, states: Sequence[Any], gradients: ShardGradients, owned: Sequence[Owned], *, first: bool
) -> None:
    """The same into `states`, in place; what groups held back goes to the `first`. Collective."""
    targets: list[Tensor] = []
    wanted: list[tuple[str, Piece]] = []
    for bucket, state in enumerate(states):
        for path, leaf in leaves(state):
            name = ".".join(path)
            if leaf.shape != gradients.buckets[bucket].shape:
                key = f"exchange/{COMMON}.{name}"
                targets.append(leaf)
                wanted.append((key, Piece.all_of(key, leaf)))
                continue
            leaf.zero_()
            if is_own(path) and not first:
                continue
            part = RESIDUAL if is_own(path) else "exchange/"
            for i, view in gradients.cut(bucket, leaf):
                targets.append(view)
                wanted.append((f"{part}{owned[i].name}/{name}", owned[i].piece))
    for target, tensor in zip(targets, pool.take(wanted), strict=True):
        if tensor is not None:
            target.copy_(tensor)
