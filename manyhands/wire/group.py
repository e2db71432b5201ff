"""Workers of several hosts, or with GPUs, agree through a `torch.distributed` process group.

NCCL carries tensors of GPUs where every worker has a GPU of its own; gloo carries everything else. In a job with CPU and
GPU workers all speak gloo, and GPU tensors are staged through pinned host memory.

Narrower axes are wires of their own, made when first asked for: the workers of one host (shared memory between CPUs),
and the workers of equal local rank across hosts (a process group).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from manyhands.core.errors import Diverged, PeerLost, UsageError
from manyhands.core.request import (
    ACROSS,
    NODE,
    REPLICA,
    Gather,
    Place,
    Request,
    Scatter,
    Swap,
    Where,
    partner,
)
from manyhands.wire.solo import Ready, Solo
from manyhands.wire.traffic import Traffic

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Handle, Wire

SMALL_BYTES = 1 << 16  # a request this small measures how long others took to arrive, not the network


class GroupWire:
    """The wire over a process group.

    Args:
        store: where the ranks meet.
        rank, size: this worker's place and how many there are.
        device: this worker's device.
        nccl: whether GPU tensors travel by NCCL; the same on every rank.
        timeout_s: a collective that takes longer raises `PeerLost`.
        nodes: which host each rank is on, as numbers from 0; None: all on one.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        *,
        device: torch.device,
        nccl: bool,
        timeout_s: float = 1800.0,
        nodes: Sequence[int] | None = None,
    ) -> None:
        self.rank, self.size = rank, size
        self.traffic = Traffic()
        self.phase = "joining"
        self.group: Any = None  # the default group
        self.ranks = list(range(size))
        self._device, self._nccl = device, nccl
        self._store, self._timeout_s = store, timeout_s
        self._nodes = list(nodes) if nodes is not None else [0] * size
        self._cpus = device.type == "cpu"
        self._made = 0  # wires within, so far
        self._axes: dict[str, Wire] = {}
        self._owns = not dist.is_initialized()
        if self._owns:
            if nccl:
                torch.cuda.set_device(device)
            try:
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if nccl else "gloo",
                    store=store,
                    rank=rank,
                    world_size=size,
                    timeout=timedelta(seconds=timeout_s),
                )
            except (RuntimeError, dist.DistError) as error:
                raise PeerLost(None, "joining", str(error).split("\n")[0]) from error

    def begin(self, request: Request) -> Handle:
        if request.axis != REPLICA:
            return self._axis(request.axis).begin(dataclasses.replace(request, axis=REPLICA))
        if isinstance(request, Where):
            return Ready(Place(self.rank, self.size))
        try:
            if isinstance(request, Gather):
                return (_EvenGatherFlying if request.even else _GatherFlying)(self, request.tensor)
            if isinstance(request, Scatter):
                return _ScatterFlying(self, request.tensors)
            if isinstance(request, Swap):
                return _SwapFlying(self, request.tensor, partner(self.rank, self.size, request.key))
            return _SumFlying(self, request.tensor)
        except RuntimeError as error:
            raise self.lost(error) from error

    def buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A zeroed flat tensor [numel] on this worker's device."""
        return torch.zeros(numel, dtype=dtype, device=self._device)

    def close(self) -> None:
        for wire in self._axes.values():
            wire.close()
        if self._owns and dist.is_initialized():
            dist.destroy_process_group()

    def within(self, groups: Sequence[Sequence[int]]) -> Wire:
        """The wire of that group of ranks which this worker is in, with axes of its own. Collective over all ranks.

        Args:
            groups: every rank once. CPU workers of one host are joined by shared memory.
        """
        mine = next(list(group) for group in groups if self.rank in group)
        self._made += 1
        return self._join([list(group) for group in groups], mine, f"within{self._made}/{mine[0]}")

    def _axis(self, axis: str) -> Wire:
        """The wire of a narrower axis. The first call is collective: all ranks ask for the same axes in one order."""
        if axis not in self._axes:
            self._axes[axis] = self._make_axis(axis)
        return self._axes[axis]

    def _make_axis(self, axis: str) -> Wire:
        mine = self._nodes[self.rank]
        local = [sum(n == node for n in self._nodes[:r]) for r, node in enumerate(self._nodes)]
        if axis == NODE:
            groups = [
                [r for r, n in enumerate(self._nodes) if n == node] for node in dict.fromkeys(self._nodes)
            ]
        elif axis == ACROSS:
            groups = [[r for r, at in enumerate(local) if at == place] for place in range(max(local) + 1)]
        else:
            raise UsageError(f"axis {axis!r}", "a wire has the axes replica, node and across", "")
        if len({len(group) for group in groups}) > 1:
            counts = [self._nodes.count(node) for node in dict.fromkeys(self._nodes)]
            raise UsageError(
                f"hosts with {counts} workers",
                "exchanges within and across hosts need equally many workers on each",
                "start as many on each host, or use an exchange without that distinction",
            )
        ranks = next(group for group in groups if self.rank in group)
        return self._join(groups, ranks, f"node{mine}")

    def _join(self, groups: list[list[int]], ranks: list[int], name: str) -> Wire:
        """My wire among `groups`; `name` is unique among this worker's wires and the same for all of `ranks`."""
        if all(len(group) == 1 for group in groups):
            return Solo(str(self._device))
        alike = [len({self._nodes[r] for r in group}) == 1 for group in groups]
        if self._cpus and all(alike):  # the same on every rank: making process groups is collective
            from manyhands.wire.shared import SharedWire

            if len(ranks) == 1:
                return Solo(str(self._device))
            store = PrefixStore(name, self._store)
            shared = SharedWire(store, ranks.index(self.rank), len(ranks), timeout_s=self._timeout_s)
            shared.traffic = self.traffic
            return shared
        return _SubGroupWire(self, groups, ranks)

    def lost(self, error: RuntimeError) -> PeerLost:
        return PeerLost(None, self.phase, str(error).split("\n")[0])

    def staged(self, tensor: Tensor) -> Tensor:
        """The tensor where the group can carry it: itself, or a copy in host memory."""
        if tensor.device.type == "cpu" or self._nccl:
            return tensor
        return tensor.cpu()


class _SubGroupWire(GroupWire):
    """Some of a group's ranks. Making it is collective over the whole group."""

    def __init__(self, whole: GroupWire, groups: list[list[int]], ranks: list[int]) -> None:
        made = [dist.new_group(group, timeout=timedelta(seconds=whole._timeout_s)) for group in groups]
        self.rank, self.size, self.ranks = ranks.index(whole.rank), len(ranks), ranks
        self.traffic, self.phase = whole.traffic, whole.phase
        self.group = made[groups.index(ranks)]
        self._device, self._nccl, self._owns, self._axes = whole._device, whole._nccl, False, {}
        self._nodes = [whole._nodes[rank] for rank in ranks]

    def _make_axis(self, axis: str) -> Wire:
        """Either all of my ranks are on one host or each is on one of its own; else there are no axes."""
        hosts = len(set(self._nodes))
        if axis in (NODE, ACROSS) and hosts in (1, self.size):
            return self if (hosts == 1) == (axis == NODE) else Solo(str(self._device))
        raise UsageError(
            f"axis {axis!r} among workers {self.ranks}",
            "a part of the workers has the axes of its hosts only where they hold one worker each",
            "use an exchange without that distinction",
        )

    def close(self) -> None:
        """The process group ends with the whole one's."""


class _Flying:
    wire: GroupWire

    def wait(self) -> Any:
        raise NotImplementedError


class _SumFlying(_Flying):
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
                self._work.wait()
            except RuntimeError as error:
                raise self.wire.lost(error) from error
        if self._moving is self._tensor:
            return self._tensor
        if self._tensor.is_contiguous():
            return self._tensor.copy_(self._moving)
        return self._moving.to(self._tensor.device)


class _GatherFlying(_Flying):
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
                self._work.wait()
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
        dist.all_gather(parts, mine, group=self.wire.group)
        self.wire.traffic.count(largest * (self.wire.size - 1), largest * (self.wire.size - 1))
        return [
            part[:size].view(self._tensor.dtype).reshape(shape).to(self._tensor.device)
            for part, size, shape in zip(parts, sizes, shapes, strict=True)
        ]


class _EvenGatherFlying(_Flying):
    """All-gather of equal shapes: the bytes travel at once."""

    def __init__(self, wire: GroupWire, tensor: Tensor) -> None:
        self.wire, self._tensor = wire, tensor
        self._source = _bytes(wire, tensor)  # gloo does not know every type
        self._parts = [torch.empty_like(self._source) for _ in range(wire.size)]
        self._work = dist.all_gather(self._parts, self._source, group=wire.group, async_op=True)

    def wait(self) -> list[Tensor]:
        size_bytes = self._source.numel() * (self.wire.size - 1)
        self.wire.traffic.count(size_bytes, size_bytes)
        with self.wire.traffic.communicating():
            try:
                self._work.wait()
            except RuntimeError as error:
                raise self.wire.lost(error) from error
        return [_like(part, self._tensor) for part in self._parts]


class _ScatterFlying(_Flying):
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
                    operations.append(dist.P2POp(kind, tensor, wire.ranks[peer], group=wire.group))
                    self._sent += tensor.numel() if kind is dist.isend else 0
                    self._received += tensor.numel() if kind is dist.irecv else 0
        if operations:
            self._works = dist.batch_isend_irecv(operations)

    def wait(self) -> list[Tensor]:
        self.wire.traffic.count(self._sent, self._received)
        with self.wire.traffic.communicating():
            try:
                for work in self._works:
                    work.wait()
            except RuntimeError as error:
                raise self.wire.lost(error) from error
        return [_like(part, self._mine) for part in self._parts]


class _SwapFlying(_Flying):
    """One message each way."""

    def __init__(self, wire: GroupWire, tensor: Tensor, other: int) -> None:
        self.wire, self._tensor, self._works = wire, tensor, []
        self._source = _bytes(wire, tensor)
        self._taken = self._source
        if other != wire.rank and tensor.numel():
            self._taken = torch.empty_like(self._source)
            peer = wire.ranks[other]
            self._works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, self._source, peer, group=wire.group),
                    dist.P2POp(dist.irecv, self._taken, peer, group=wire.group),
                ]
            )

    def wait(self) -> Tensor:
        if self._works:
            size_bytes = self._source.numel()
            self.wire.traffic.count(size_bytes, size_bytes)
        with self.wire.traffic.communicating():
            try:
                for work in self._works:
                    work.wait()
            except RuntimeError as error:
                raise self.wire.lost(error) from error
        return _like(self._taken, self._tensor)


def _bytes(wire: GroupWire, tensor: Tensor) -> Tensor:
    """The tensor's bytes, flat, where the group can carry them."""
    source = wire.staged(tensor.detach().contiguous()).reshape(-1)
    return source.view(torch.uint8) if source.numel() else source.new_empty(0, dtype=torch.uint8)


def _like(part: Tensor, tensor: Tensor) -> Tensor:
    """Bytes as a tensor of `tensor`'s type, shape and device."""
    return part.view(tensor.dtype).reshape(tensor.shape).to(tensor.device)
