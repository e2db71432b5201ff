"""Workers of several hosts, or with GPUs, agree through a `torch.distributed` process group.

NCCL carries tensors of GPUs where every worker has a GPU of its own; gloo carries everything else. In a job with CPU and
GPU workers all speak gloo, and GPU tensors are staged through pinned host memory.

Narrower axes are wires of their own, made when first asked for: the workers of one host (shared memory between CPUs),
and the workers of equal local rank across hosts (a process group).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from manyhands.core.errors import PeerLost, UsageError
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
from manyhands.wire.breaker import Breaker
from manyhands.wire.flying import EvenGatherFlying, GatherFlying, ScatterFlying, SumFlying, SwapFlying
from manyhands.wire.solo import Ready, Solo
from manyhands.wire.traffic import Traffic
from manyhands.wire.watch import LOOK_S, Watch

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Handle, Wire


class GroupWire:
    """The wire over a process group.

    Args:
        store: where the ranks meet.
        rank, size: this worker's place and how many there are.
        device: this worker's device.
        nccl: whether GPU tensors travel by NCCL; the same on every rank.
        timeout_s: a collective that takes longer raises `PeerLost`.
        nodes: which host each rank is on, as numbers from 0; None: all on one.
        watch: the membership epoch that the wire belongs to. All waits (also of collectives that others start on the
            default group) end with it.
        uneven: hosts may hold unequal numbers of workers, as after a loss; then all workers are one level, across hosts.
        address: with a `watch`: this host's, at which the others reach it; empty: what gloo finds by the host's name.
    """

    lazy = False  # what is begun travels at once

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
        watch: Watch | None = None,
        uneven: bool = False,
        address: str = "",
    ) -> None:
        self.rank, self.size = rank, size
        self.traffic = Traffic()
        self.phase = "joining"
        self.group: Any = None  # the default group
        self.ranks = list(range(size))
        self._device, self._nccl = device, nccl
        self._store, self._timeout_s = store, timeout_s
        self._nodes = list(nodes) if nodes is not None else [0] * size
        self._uneven = uneven
        self.flattened: str | None = (
            None  # how hosts are unequal; "": they are not; None: nobody has asked for axes
        )
        self._cpus = device.type == "cpu"
        self._made = 0  # wires within, so far
        self._axes: dict[str, Wire] = {}
        self._within: list[Wire] = []
        self._watch, self._breaker = watch, None
        if nccl:
            torch.cuda.set_device(device)
        if watch is not None:
            try:
                self._breaker = Breaker(
                    watch, store, rank, size, nccl=nccl, timeout_s=timeout_s, address=address
                )
            except RuntimeError as error:
                raise self.lost(error) from error
        self._owns = not dist.is_initialized()
        if self._owns:
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
        self.check()
        try:
            if isinstance(request, Gather):
                return (EvenGatherFlying if request.even else GatherFlying)(self, request.tensor)
            if isinstance(request, Scatter):
                return ScatterFlying(self, request.tensors)
            if isinstance(request, Swap):
                return SwapFlying(self, request.tensor, partner(self.rank, self.size, request.key))
            return SumFlying(self, request.tensor)
        except torch.OutOfMemoryError:  # of mine, and nobody's loss
            raise
        except RuntimeError as error:
            raise self.lost(error) from error

    def buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A zeroed flat tensor [numel] on this worker's device."""
        return torch.zeros(numel, dtype=dtype, device=self._device)

    def close(self) -> None:
        """Leave the group. With a `watch` this never waits for a peer; what is in flight fails."""
        for wire in (*self._axes.values(), *self._within):
            wire.close()
        self._axes.clear()
        self._within.clear()
        if self._breaker is not None:
            self._breaker.leave()
        elif self._owns and dist.is_initialized():
            dist.destroy_process_group()
        self._store = None  # rank 0 serves it

    def within(self, groups: Sequence[Sequence[int]]) -> Wire:
        """The wire of that group of ranks which this worker is in, with axes of its own. Collective over all ranks.

        Args:
            groups: every rank once. CPU workers of one host are joined by shared memory.
        """
        mine = next(list(group) for group in groups if self.rank in group)
        self._made += 1
        wire = self._join([list(group) for group in groups], mine, f"within{self._made}/{mine[0]}")
        self._within.append(wire)
        return wire

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
        self.flattened = ""
        if len({len(group) for group in groups}) > 1:
            counts = [self._nodes.count(node) for node in dict.fromkeys(self._nodes)]
            if not self._uneven:
                raise UsageError(
                    f"hosts with {counts} workers",
                    "exchanges within and across hosts need equally many workers on each",
                    "start as many on each host, or use an exchange without that distinction",
                )
            self.flattened = f"hosts with {counts} workers"
            everybody = list(range(self.size))
            groups = [[rank] for rank in everybody] if axis == NODE else [everybody]
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
            shared = SharedWire(
                PrefixStore(name, self._store),
                ranks.index(self.rank),
                len(ranks),
                timeout_s=self._timeout_s,
                watch=self._watch.among(ranks) if self._watch is not None else None,
            )
            shared.traffic = self.traffic
            return shared
        try:
            return _SubGroupWire(self, groups, ranks)
        except RuntimeError as error:
            raise self.lost(error) from error

    def check(self) -> None:
        """Raises `PeerLost` where the epoch is known to be over."""
        if self._watch is not None and self._watch.over.is_set():
            raise self._watch.ended(self.phase)

    def lost(self, error: RuntimeError) -> PeerLost:
        """What to raise for a failed collective. The others learn of it at once: the group is broken."""
        detail = str(error).split("\n")[0]
        if self._watch is None:
            return PeerLost(None, self.phase, detail)
        if self._breaker is not None:
            self._breaker.abort()
        if self._watch.over.is_set():
            return self._watch.ended(self.phase)
        return self._watch.failed(self.phase, None, detail)

    @property
    def nccl(self) -> bool:
        """Whether GPU tensors travel by NCCL."""
        return self._nccl

    def ended(self, *works: Any) -> None:
        """Wait for collectives. Raises `RuntimeError`, and `PeerLost` where the epoch's end ends the wait."""
        for work in works:
            if self._watch is None:
                work.wait()
            elif self._nccl:  # NCCL's own wait is the stream's, which nothing interrupts
                while not work.is_completed():
                    self.check()
                    time.sleep(50e-6)
                work.wait()
            else:
                self._ended_gloo(work)

    def arrived(self, *works: Any) -> None:
        """The same for messages, for which gloo knows no wait that ends without breaking the group."""
        if self._watch is None or self._nccl:
            self.ended(*works)
        elif works:
            self._watch.call(lambda: [work.wait() for work in works], self.phase)

    def _ended_gloo(self, work: Any) -> None:
        while True:
            try:
                work.wait(timedelta(seconds=LOOK_S))
                return
            except RuntimeError:
                if work.is_completed():
                    break
            self.check()
        work.wait()  # says how it ended

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
        self._watch, self._breaker = whole._watch, whole._breaker
        self._nodes = [whole._nodes[rank] for rank in ranks]
        self._whole, self._uneven = whole, whole._uneven

    def _make_axis(self, axis: str) -> Wire:
        """Either all of my ranks are on one host or each is on one of its own; else they are one level, if any."""
        hosts = len(set(self._nodes))
        if self._uneven and hosts not in (1, self.size):
            self._whole.flattened = f"parts of workers on {hosts} hosts"
        elif axis not in (NODE, ACROSS) or hosts not in (1, self.size):
            raise UsageError(
                f"axis {axis!r} among workers {self.ranks}",
                "a part of the workers has the axes of its hosts only where they hold one worker each",
                "use an exchange without that distinction",
            )
        return self if (hosts == 1) == (axis == NODE) else Solo(str(self._device))

    def close(self) -> None:
        """The process group ends with the whole one's."""
