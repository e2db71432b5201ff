"""Workers of several hosts, or with GPUs, agree through a `torch.distributed` process group.

NCCL carries tensors of GPUs where every worker has a GPU of its own; gloo carries everything else. In a job with CPU and
GPU workers all speak gloo, and GPU tensors are staged through pinned host memory.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from manyhands.core.errors import PeerLost
from manyhands.core.request import Gather, Request
from manyhands.wire.traffic import Traffic

if TYPE_CHECKING:
    from torch import Tensor

SMALL_BYTES = 1 << 16  # a request this small measures how long others took to arrive, not the network


class GroupWire:
    """The wire over a process group.

    Args:
        store: where the ranks meet.
        rank, size: this worker's place and how many there are.
        device: this worker's device.
        nccl: whether GPU tensors travel by NCCL; the same on every rank.
        timeout_s: a collective that takes longer raises `PeerLost`.
    """

    def __init__(
        self, store: Any, rank: int, size: int, *, device: torch.device, nccl: bool, timeout_s: float = 1800.0
    ) -> None:
        self.rank, self.size = rank, size
        self.traffic = Traffic()
        self.phase = "joining"
        self._device, self._nccl = device, nccl
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

    def begin(self, request: Request) -> _Flying:
        try:
            if isinstance(request, Gather):
                return _GatherFlying(self, request.tensor)
            return _SumFlying(self, request.tensor)
        except RuntimeError as error:
            raise self.lost(error) from error

    def buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A zeroed flat tensor [numel] on this worker's device."""
        return torch.zeros(numel, dtype=dtype, device=self._device)

    def close(self) -> None:
        if self._owns and dist.is_initialized():
            dist.destroy_process_group()

    def lost(self, error: RuntimeError) -> PeerLost:
        return PeerLost(None, self.phase, str(error).split("\n")[0])

    def staged(self, tensor: Tensor) -> Tensor:
        """The tensor where the group can carry it: itself, or a copy in host memory."""
        if tensor.device.type == "cpu" or self._nccl:
            return tensor
        return tensor.cpu()


class _Flying:
    wire: GroupWire

    def wait(self) -> Any:
        raise NotImplementedError


class _SumFlying(_Flying):
    def __init__(self, wire: GroupWire, tensor: Tensor) -> None:
        self.wire, self._tensor = wire, tensor
        self._moving = wire.staged(tensor if tensor.is_contiguous() else tensor.contiguous())
        self._work = dist.all_reduce(self._moving, async_op=True)

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
        self._work = dist.all_gather(self._headers, header, async_op=True)

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
        dist.all_gather(parts, mine)
        self.wire.traffic.count(largest * (self.wire.size - 1), largest * (self.wire.size - 1))
        return [
            part[:size].view(self._tensor.dtype).reshape(shape).to(self._tensor.device)
            for part, size, shape in zip(parts, sizes, shapes, strict=True)
        ]
