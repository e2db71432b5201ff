"""Where everything of a sharded model is: its mesh, its units, and the pieces that this worker holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from manyhands.core.errors import CheckpointError, ModelError
from manyhands.train import sharded_mesh
from manyhands.train.sharded_gradients import local
from manyhands.train.sharded_mesh import Root
from manyhands.train.sharded_pieces import Owned, Piece, Reader

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from manyhands.core.types import Wire
    from manyhands.placement.sharded import Sharded


class Layout:
    """Divides a model, in place.

    Args:
        model: the same on every worker.
        forward: runs it: itself, or what was compiled of it.

    Attributes:
        root: call this for a forward pass.
        owned: my pieces of the trainable parameters, those without elements left out.
        used: names of the parameters that got a gradient since it was cleared, in passes that count.
    """

    def __init__(self, model: nn.Module, forward: Any, wire: Wire, placement: Sharded) -> None:
        self.model = model
        self.mesh = sharded_mesh.join(wire, placement)
        self.root = Root(model, forward)
        self.used: set[str] = set()
        self._placement = placement
        self._counts = True
        self._watched: dict[str, int] = {}
        self._handles: list[Any] = []
        self._open = 0
        self._fsdp: Any = None
        _, shard, tensor = self.mesh.sizes
        for name, param in model.named_parameters():
            if param.dim() == 0 and shard > 1:
                raise ModelError(
                    f"parameter {name} has no dimension",
                    "FSDP2 divides parameters along their first dimension",
                    "give it the shape [1], or use zero1",
                )
        devices = {p.device.type for p in model.parameters()} or {"cpu"}
        device_mesh: Any = None
        if shard > 1 or tensor > 1:
            device_mesh = sharded_mesh.device_mesh(self.mesh, next(iter(devices)))
        if tensor > 1:
            from manyhands.train.sharded_tensor import parallelize

            parallelize(model, device_mesh["tensor"])
        boxes = {name: _box(name, tensor_) for name, tensor_ in model.named_parameters()}
        self._units = sharded_mesh.units(model, placement.units) if shard > 1 else []
        if shard > 1:
            self._fsdp = sharded_mesh.shard(
                self.root,
                self._units,
                device_mesh["shard"],
                self.mesh.shard,
                reshard=placement.stage == 3,
            )
        self._watch()
        self._pieces = {name: self._piece(boxes[name], p) for name, p in model.named_parameters()}
        self.owned = [
            Owned(self._pieces[name], nn.Parameter(local(p)))
            for name, p in model.named_parameters()
            if p.requires_grad and local(p).numel()
        ]
        self._kept = _once(model)
        state = model.state_dict()
        self._held = {name: local(state[name]) for name in self._kept}

    def begin_pass(self, *, last: bool, reduce: bool, counts: bool) -> None:
        """Before each forward pass.

        Args:
            last: of this step.
            reduce: gradients are reduced after this pass, too, if it is not the last.
            counts: its gradients are not to be zero.
        """
        self._counts = counts
        if self._fsdp is not None:
            self._fsdp.set_requires_gradient_sync(last or reduce)
            if self._placement.stage == 2:
                self._fsdp.set_reshard_after_backward(last)

    def reset(self) -> None:
        """After a failure in the middle of a pass."""
        if self._fsdp is not None:
            with contextlib.suppress(RuntimeError):
                self._fsdp.reset_iter_state()

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Inside it every worker holds the whole parameters, and passes are not collective. Entering it is."""
        if self._fsdp is None:
            yield
            return
        parts: list[Any] = [self.root, *self._units]
        if not self._open:
            for part in parts:
                part.set_reshard_after_forward(False, recurse=False)
                part.unshard()
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                for part in parts:
                    if self._placement.stage == 3 and part is not self.root:
                        part.set_reshard_after_forward(True, recurse=False)
                    part.reshard()
                # the next backward fetches ahead by the order of all forward passes since the last one: those of an
                # evaluation, of which workers have different numbers, must not be among them
                self._fsdp.reset_iter_state()

    def weights(self) -> dict[str, tuple[Piece, Tensor]]:
        """My pieces of the state dict, tied tensors once."""
        state = self.model.state_dict()
        found = {}
        for name in self._kept:
            tensor = local(state[name])
            piece = self._pieces.get(name)
            if piece is None:  # a buffer: everybody has it
                first = not any(self.mesh.place)
                piece = Piece.all_of(name, tensor, counts=first)
            found[name] = (piece, tensor)
        return found

    def held(self) -> dict[str, tuple[Piece, Tensor]]:
        """The same memory, at any time, in the middle of a pass, too; whoever speaks for others or not."""
        return {n: (self._pieces.get(n) or Piece.all_of(n, t), t) for n, t in self._held.items()}

    def with_aliases(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the state dict under all names, tied ones included."""
        return found | {alias: found[n] for n, names in _ties(self.model).items() for alias in names[1:]}

    def load(self, path: Path) -> None:
        """My pieces of a safetensors file into the model, after all of them were found to fit."""
        mine = self.weights()
        with Reader(path) as file:
            shapes = file.shapes()
            ties = _ties(self.model)
            wrong = sorted(
                {n for n in mine if not any(alias in shapes for alias in ties.get(n, [n]))}
            ) or sorted(set(shapes) - {alias for n in mine for alias in ties.get(n, [n])})
            if wrong:
                raise CheckpointError(
                    f"{path}: parameters {', '.join(wrong[:3])} are missing or unknown",
                    "a checkpoint continues with the model it was written for",
                    "give the same --model",
                )
            found = {n: next(a for a in ties.get(n, [n]) if a in shapes) for n in mine}
            for name, (piece, _) in mine.items():
                if shapes[found[name]] != piece.shape:
                    raise CheckpointError(
                        f"{path}: {name} has shape {list(shapes[found[name]])}, the model's has {list(piece.shape)}",
                        "a checkpoint continues with the model it was written for",
                        "give the same --model",
                    )
            with torch.no_grad():
                for name, (piece, tensor) in mine.items():
                    tensor.copy_(file.piece(found[name], piece))

    def fingerprint(self) -> Tensor:
        """Two words over the bits of all that I hold: [2] int64."""
        from manyhands.train.replica import fingerprint

        return fingerprint(_Held({name: tensor for name, (_, tensor) in self.weights().items()}))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    # -- how

    def _watch(self) -> None:
        """See which parameters get gradients, and replace those of passes that count for nothing by zeros."""
        taken: set[nn.Module] = set()
        for part in (*self._units, self.root):  # inner units first
            owners = [m for m in part.modules() if m not in taken]
            taken.update(owners)
            names = {m: n for n, m in self.model.named_modules()}
            places = [
                (owner, attribute, f"{names[owner]}.{attribute}" if names[owner] else attribute)
                for owner in owners
                if owner in names
                for attribute, param in owner._parameters.items()
                if param is not None and param.requires_grad
            ]
            if self._fsdp is None:
                for place in places:
                    self._hook(*place)
            elif places:
                self._handles.append(part.register_forward_pre_hook(self._before(places)))

    def _before(self, places: list[tuple[nn.Module, str, str]]) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            for place in places:
                self._hook(*place)

        return hook

    def _hook(self, owner: nn.Module, attribute: str, name: str) -> None:
        param: Any = getattr(owner, attribute)
        if self._watched.get(name) == id(param) or id(param) in self._watched.values():
            return
        self._watched[name] = id(param)

        def arrived(grad: Tensor) -> Tensor | None:
            if not self._counts:
                return torch.zeros_like(grad)
            self.used.add(name)
            return None

        self._handles.append(param.register_hook(arrived))

    def _piece(self, box: Piece, param: nn.Parameter) -> Piece:
        """Where my part of a parameter is in the whole, after division along the first dimension."""
        _, shard, _ = self.mesh.sizes
        group, mine, layer = self.mesh.place
        divided_by_layer = not box.whole
        counts = group == 0 and (divided_by_layer or layer == 0)
        if shard == 1:
            return Piece(box.name, box.shape, box.offset, box.extent, counts)
        rows = box.extent[0]
        first = min(mine * -(-rows // shard), rows)
        extent = tuple(local(param).shape)
        offset = (box.offset[0] + first, *box.offset[1:])
        return Piece(box.name, box.shape, offset, extent, counts)


class _Held(nn.Module):
    """Tensors as the state of a module."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._tensors


def _box(name: str, tensor: Any) -> Piece:
    """The piece of a tensor that lies here before FSDP2 divides it: all, or one worker's part of a layer."""
    if not hasattr(tensor, "to_local"):
        return Piece.all_of(name, tensor)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    extent, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return Piece(name, tuple(tensor.shape), tuple(offset), tuple(extent))


def _once(model: nn.Module) -> list[str]:
    """The names of the state dict, those of tied tensors once, under the first (as Transformers writes them)."""
    aliases = {alias for names in _ties(model).values() for alias in names[1:]}
    return [name for name in model.state_dict() if name not in aliases]


def _ties(model: nn.Module) -> dict[str, list[str]]:
    """Names of tied parameters by the first of them."""
    by_id: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(param), []).append(name)
    return {names[0]: names for names in by_id.values() if len(names) > 1}
