"""Requests that are on their way through a process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from manyhands.core.errors import Diverged

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.wire.group import GroupWire

SMALL_BYTES = 1 << 16  # a request this small measures how long others took to arrive, not the network

PIECE_BYTES = 1 << 20
MOST_PIECES = 16


class Flying:
    wire: GroupWire

    def wait(self) -> Any:
        raise NotImplementedError


class SumFlying(Flying):
    def __init__(self, wire: GroupWire, tensor: Tensor) -> None:
        self.wire, self._tensor = wire, tensor
        self._moving = wire.staged(tensor if tensor.is_contiguous() else tensor.contiguous())
        self._work = dist.all_reduce(self._moving, group=wire.group, async_op=True)

    def wait(self) -> Tensor:
        size_bytes = self._moving.numel() * self._moving.element_size()
        traffic = self.wire.traffic
        # what a ring sends and receives: 2 (N-1)/N of the payload
        share = 2 * size_bytes * (self.wire.size - 1) // self.wire.size
        traffic.count(share, share)
        with traffic.waiting() if size_bytes <= SMALL_BYTES else traffic.communicating():
            try:
                self.wire.ended(self._work)
            except RuntimeError as error:
                raise self.wire.lost(error) from error
        if self._moving is self._tensor:
            return self._tensor
        if self._tensor.is_contiguous():
            return self._tensor.copy_(self._moving)
        return self._moving.to(self._tensor.device)


class GatherFlying(Flying):
    """Uneven all-gather: shapes first, then padded bytes (gloo has no uneven one)."""

    def __init__(self, wire: GroupWire, tensor: Tensor) -> None:
        self.wire, self._tensor = wire, tensor
        self._source = wire.staged(tensor.detach().contiguous())
        header = torch.zeros(16, dtype=torch.int64)
        header[0] = self._source.dim()
        header[1 : 1 + self._source.dim()] = torch.tensor(list(self._source.shape), dtype=torch.int64)
        header = header.to(self._source.device)
        self._headers = [torch.zeros_like(header) for _ in range(wire.size)]
        self._work = dist.all_gather(self._headers, header, group=wire.group, async_op=True)

    def wait(self) -> list[Tensor]:
        traffic = self.wire.traffic
        try:
            with traffic.waiting():
                self.wire.ended(self._work)
                headers = [h.tolist() for h in self._headers]
            with traffic.communicating():
                return self._collect([h[1 : 1 + h[0]] for h in headers])
        except RuntimeError as error:
            raise self.wire.lost(error) from error

    def _collect(self, shapes: list[list[int]]) -> list[Tensor]:
        itemsize = self._tensor.element_size()
        sizes = [torch.Size(shape).numel() * itemsize for shape in shapes]
        largest = max(sizes)
        if largest == 0:
            return [
                torch.empty(shape, dtype=self._tensor.dtype, device=self._tensor.device) for shape in shapes
            ]
        mine = torch.zeros(largest, dtype=torch.uint8, device=self._source.device)
        if self._source.numel():
            mine[: sizes[self.wire.rank]] = self._source.reshape(-1).view(torch.uint8)
        parts = [torch.empty_like(mine) for _ in shapes]
        self.wire.ended(*_all_gather(self.wire, parts, mine))
        self.wire.traffic.count(largest * (self.wire.size - 1), largest * (self.wire.size - 1))
        return [
            part[:size].view(self._tensor.dtype).reshape(shape).to(self._tensor.device)
            for part, size, shape in zip(parts, sizes, shapes, strict=True)
        ]


class EvenGatherFlying(Flying):
    """All-gather of equal shapes: the bytes travel at once."""

    def __init__(self, wire: GroupWire, tensor: Tensor) -> None:
        self.wire, self._tensor = wire, tensor
        self._source = _bytes(wire, tensor)  # gloo does not know every type
        self._parts = [torch.empty_like(self._source) for _ in range(wire.size)]
        self._works = _all_gather(wire, self._parts, self._source)

    def wait(self) -> list[Tensor]:
        size_bytes = self._source.numel() * (self.wire.size - 1)
        self.wire.traffic.count(size_bytes, size_bytes)
        with self.wire.traffic.communicating():
            try:
                self.wire.ended(*self._works)
            except RuntimeError as error:
                raise self.wire.lost(error) from error
        return [_like(part, self._tensor) for part in self._parts]


class ScatterFlying(Flying):
    """All-to-all by point-to-point messages (gloo's own wants equal shapes)."""

    def __init__(self, wire: GroupWire, tensors: Sequence[Tensor]) -> None:
        if len(tensors) != wire.size:
            raise Diverged(f"{len(tensors)} parts for {wire.size} workers", "one part each", "")
        self.wire, self._mine = wire, tensors[wire.rank]
        self._sources = [_bytes(wire, t) for t in tensors]
        own = self._sources[wire.rank]
        self._parts = [own.clone() if r == wire.rank else torch.empty_like(own) for r in range(wire.size)]
        self._works, self._sent, self._received = [], 0, 0
        operations = []
        for step in range(1, wire.size):
            to, sender = (wire.rank + step) % wire.size, (wire.rank - step) % wire.size
            for kind, tensor, peer in (
                (dist.isend, self._sources[to], to),
                (dist.irecv, self._parts[sender], sender),
            ):
                if tensor.numel():
                    operations += _messages(wire, kind, tensor, wire.ranks[peer])
                    self._sent += tensor.numel() if kind is dist.isend else 0
                    self._received += tensor.numel() if kind is dist.irecv else 0
        if operations:
            self._works = _exchange(operations)

    def wait(self) -> list[Tensor]:
        self.wire.traffic.count(self._sent, self._received)
        with self.wire.traffic.communicating():
            try:
                self.wire.arrived(*self._works)
            except RuntimeError as error:
                raise self.wire.lost(error) from error
        return [_like(part, self._mine) for part in self._parts]


class SwapFlying(Flying):
    """One message each way."""

    def __init__(self, wire: GroupWire, tensor: Tensor, other: int) -> None:
        self.wire, self._tensor, self._works = wire, tensor, []
        self._source = _bytes(wire, tensor)
        self._taken = self._source
        if other != wire.rank and tensor.numel():
            self._taken = torch.empty_like(self._source)
            peer = wire.ranks[other]
            self._works = _exchange(
                [
                    *_messages(wire, dist.isend, self._source, peer),
                    *_messages(wire, dist.irecv, self._taken, peer),
                ]
            )

    def wait(self) -> Tensor:
        if self._works:
            size_bytes = self._source.numel()
            self.wire.traffic.count(size_bytes, size_bytes)
        with self.wire.traffic.communicating():
            try:
                self.wire.arrived(*self._works)
            except RuntimeError as error:
                raise self.wire.lost(error) from error
        return _like(self._taken, self._tensor)


def _pieces(wire: GroupWire, flat: Tensor) -> Sequence[Tensor]:
    """Gloo sends a long message, and then receives one: in pieces both directions of a link are busy at once."""
    if wire.nccl or flat.numel() <= PIECE_BYTES:
        return (flat,)
    return torch.split(flat, max(PIECE_BYTES, -(-flat.numel() // MOST_PIECES)))


def _all_gather(wire: GroupWire, parts: Sequence[Tensor], source: Tensor) -> list[Any]:
    """All-gather of bytes into `parts`, which each have the length of `source`."""
    columns = zip(*(_pieces(wire, part) for part in parts), strict=True)
    return [
        dist.all_gather(list(column), piece, group=wire.group, async_op=True)
        for column, piece in zip(columns, _pieces(wire, source), strict=True)
    ]


def _messages(wire: GroupWire, kind: Any, flat: Tensor, peer: int) -> list[dist.P2POp]:
    pieces = _pieces(wire, flat)
    return [dist.P2POp(kind, piece, peer, group=wire.group, tag=i) for i, piece in enumerate(pieces)]


def _exchange(operations: Sequence[dist.P2POp]) -> list[Any]:
    """Begin them piece by piece, so that none of a message waits for all of another's."""
    return dist.batch_isend_irecv(sorted(operations, key=lambda operation: operation.tag))


def _bytes(wire: GroupWire, tensor: Tensor) -> Tensor:
    """The tensor's bytes, flat, where the group can carry them."""
    source = wire.staged(tensor.detach().contiguous()).reshape(-1)
    return source.view(torch.uint8) if source.numel() else source.new_empty(0, dtype=torch.uint8)


def _like(part: Tensor, tensor: Tensor) -> Tensor:
    """Bytes as a tensor of `tensor`'s type, shape and device."""
    return part.view(tensor.dtype).reshape(tensor.shape).to(tensor.device)
