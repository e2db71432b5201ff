"""FSDP2 on our wire: who shares a model, which modules are gathered as one, and how their tensors travel.

Workers stand in a mesh [group, shard, tensor]: worker ``(g·S + s)·T + t``. Along "shard" the parameters of one model are
divided, along "group" that model is replicated, and along "tensor" each layer is computed by several workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from manyhands.core.errors import ModelError, UsageError
from manyhands.core.request import Gather, Scatter

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Wire
    from manyhands.placement.sharded import Sharded

AXES = ("group", "shard", "tensor")


@dataclass(frozen=True)
class Mesh:
    """My place among the workers, and the wires along each axis.

    Attributes:
        sizes, place: groups, workers of a group, workers of a layer; and which of each I am.
        across: workers that hold the same piece in every group.
        shard: workers that hold one model's pieces.
        tensor: workers that compute one layer together.
    """

    sizes: tuple[int, int, int]
    place: tuple[int, int, int]
    across: Wire
    shard: Wire
    tensor: Wire

    @property
    def speaks(self) -> bool:
        """Among workers with the same pieces (those of other groups) I am the one that speaks for them."""
        return self.place[0] == 0


def join(wire: Wire, placement: Sharded) -> Mesh:
    """The mesh of all workers. Collective.

    Raises:
        UsageError: their number does not divide so, or the wire is not a process group.
    """
    sizes = placement.mesh(wire.size)
    _, shard, tensor = sizes
    if wire.size == 1:
        return Mesh(sizes, (0, 0, 0), wire, wire, wire)
    if not hasattr(wire, "within"):
        raise UsageError(
            f"stage = {placement.stage} over {type(wire).__name__}",
            "FSDP2 needs a process group",
            "use transport = 'group' (--transport group)",
        )
    rank = torch.arange(wire.size).reshape(sizes)
    place = divmod(wire.rank, shard * tensor)
    mine = (place[0], *divmod(place[1], tensor))
    rows = [rank.movedim(axis, -1).reshape(-1, sizes[axis]).tolist() for axis in range(3)]
    across, within, layer = (wire.within(row) for row in rows)
    return Mesh(sizes, mine, across, within, layer)


def device_mesh(mesh: Mesh, device_type: str) -> Any:
    """PyTorch's view of it (process groups are made; collective)."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, mesh.sizes, mesh_dim_names=AXES)


class Root(nn.Module):
    """A model within the module that FSDP2 takes as its root, so that the model keeps its class and its names."""

    def __init__(self, module: nn.Module, forward: Any) -> None:
        super().__init__()
        self.module = module
        self._call = [forward]  # in a list: not a submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call[0](*args, **kwargs)


def units(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """The modules whose parameters are gathered as one, inner ones first; the rest belongs to the root.

    A module that shares a parameter with the outside (tied weights) is none.

    Raises:
        UsageError: no module is of a class that was asked for.
    """
    if list(patterns) == ["auto"]:
        found = _blocks(model)
    else:
        found = [m for m in model.modules() if any(fnmatchcase(type(m).__name__, p) for p in patterns)]
        if not found:
            classes = sorted({type(m).__name__ for m in model.modules()})
            raise UsageError(
                f"units = {list(patterns)}",
                "they are classes of the model's modules",
                f"known: {', '.join(classes[:20])}",
            )
    uses: dict[nn.Parameter, int] = {}
    for _, _, param in _places(model):
        uses[param] = uses.get(param, 0) + 1
    chosen = []
    for unit in found:
        own: dict[nn.Parameter, int] = {}
        for _, _, param in _places(unit):
            own[param] = own.get(param, 0) + 1
        if own and unit is not model and all(uses[p] == n for p, n in own.items()):
            chosen.append(unit)
    return list(reversed(chosen))


def _blocks(model: nn.Module) -> list[nn.Module]:
    """What Transformers says must not be split, else the members of the outermost module lists."""
    names = getattr(model, "_no_split_modules", None)
    if names:
        return [m for m in model.modules() if type(m).__name__ in names]
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.extend(child.children())
            else:
                visit(child)

    visit(model)
    return found


def _places(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for owner in module.modules():
        for attribute, param in owner._parameters.items():
            if param is not None:
                yield owner, attribute, param


def shard(root: Root, parts: Sequence[nn.Module], mesh: Any, wire: Wire, *, reshard: bool) -> Any:
    """Divide the parameters along `mesh` (one dimension): FSDP2, with sums instead of means, on our wire.

    Raises:
        ModelError: parameters of one unit are of different types.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for module in (*parts, root):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    fsdp: Any = root
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # contributions are weighted: their sum is the mean
            module.set_force_sum_reduction_for_comms(True)
            comms: tuple[Any, Any] = AllGather(wire), ReduceScatter(wire)
            module.set_custom_all_gather(comms[0])
            module.set_custom_reduce_scatter(comms[1])
    fsdp.set_reduce_scatter_unused_params(True)  # workers may use different parameters in a step
    try:
        fsdp._get_fsdp_state()._lazy_init()  # now, so that units may run before the root does
    except AssertionError as error:
        raise ModelError(
            f"{error}".split("\n")[0],
            "trainable parameters that are gathered as one are of one type",
            "give the model one type, or name smaller units",
        ) from None
    return fsdp


class _Travels:
    """What FSDP2 asks of a collective: memory, and the transfer."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._native = getattr(wire, "_nccl", False)

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def _counted(self, size_bytes: int) -> None:
        """What a ring sends and receives of a payload that is `size_bytes` long where it is whole."""
        share = size_bytes * (self._wire.size - 1) // self._wire.size
        self._wire.traffic.count(share, share)  # type: ignore[attr-defined]


class AllGather(_Travels):
    """Everybody's piece to everybody."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        if self._native:
            self._counted(output_tensor.numel() * output_tensor.element_size())
            return torch.distributed.all_gather_into_tensor(
                output_tensor, input_tensor, group=group, async_op=async_op
            )
        parts = self._wire.begin(Gather(input_tensor, even=True)).wait()
        for rank, (place, part) in enumerate(zip(output_tensor.chunk(self._wire.size), parts, strict=True)):
            if rank != self._wire.rank:  # mine is there: FSDP2 gathers in place
                place.copy_(part)
        return None


class ReduceScatter(_Travels):
    """Σ of everybody's for me, added in rank order (in float32 where it is of half precision)."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> Any:
        if self._native:
            self._counted(input_tensor.numel() * input_tensor.element_size())
            return torch.distributed.reduce_scatter_tensor(
                output_tensor, input_tensor, op=op, group=group, async_op=async_op
            )
        parts = self._wire.begin(Scatter(input_tensor.chunk(self._wire.size))).wait()
        if input_tensor.dtype in (torch.bfloat16, torch.float16):
            total = parts[0].float()
            for part in parts[1:]:
                total += part
            output_tensor.copy_(total)
            return None
        torch.add(parts[0], parts[1], out=output_tensor)
        for part in parts[2:]:
            output_tensor += part
        return None
