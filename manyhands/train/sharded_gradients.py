"""The gradients of my pieces: where FSDP2 left them, or in flat buckets where groups exchange them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from manyhands.train.gradients import ALIGN_BYTES

if TYPE_CHECKING:
    from torch import Tensor, nn

    from manyhands.core.types import Wire
    from manyhands.train.sharded_pieces import Owned


class ShardGradients:
    """One gradient for each piece, in order.

    Args:
        owned: my pieces.
        wire: along which equal pieces are exchanged.
        bucket_mb: size of a bucket in MiB.

    Attributes:
        views: the gradients of this step, one for each piece, in its shape.
        buckets: flat tensors that hold them, after `lay_out`.
    """

    def __init__(self, owned: Sequence[Owned], wire: Wire, *, bucket_mb: float) -> None:
        self._owned, self._wire, self._bucket_mb = owned, wire, bucket_mb
        self._places: list[Tensor] = []
        self._spans: list[tuple[int, int]] = []  # of each piece: bucket, first element in it
        self._gaps: list[Tensor] = []  # between pieces
        self.views: list[Tensor] = []
        self.buckets: list[Tensor] = []

    def lay_out(self) -> list[Tensor]:
        """Make the buckets, on memory that the wire sends from. Collective."""
        groups: dict[torch.dtype, list[int]] = {}
        for i, each in enumerate(self._owned):
            groups.setdefault(each.param.dtype, []).append(i)
        places: dict[int, Tensor] = {}
        spans: dict[int, tuple[int, int]] = {}
        for dtype, members in groups.items():
            align = ALIGN_BYTES // dtype.itemsize
            sizes = [-(-self._owned[i].param.numel() // align) * align for i in members]
            flat = self._wire.buffer(sum(sizes), dtype)
            limit = self._bucket_mb * (1 << 20) / dtype.itemsize
            begin = offset = 0
            for i, size in zip(members, sizes, strict=True):
                if offset > begin and offset - begin >= limit:
                    self.buckets.append(flat[begin:offset])
                    begin = offset
                param = self._owned[i].param
                spans[i] = (len(self.buckets), offset - begin)
                places[i] = flat[offset : offset + param.numel()].view(param.shape)
                if param.numel() < size:
                    self._gaps.append(flat[offset + param.numel() : offset + size])
                offset += size
            self.buckets.append(flat[begin:offset])
        self._places = [places[i] for i in range(len(self._owned))]
        self._spans = [spans[i] for i in range(len(self._owned))]
        return self.buckets

    def cut(self, bucket: int, flat: Tensor) -> Iterator[tuple[int, Tensor]]:
        """A tensor laid out as a bucket is, as (piece, view in its shape)."""
        for i, (at, begin) in enumerate(self._spans):
            if at == bucket:
                param = self._owned[i].param
                yield i, flat[begin : begin + param.numel()].view(param.shape)

    def collect(self, params: Mapping[str, nn.Parameter]) -> None:
        """Take the gradients from the model's parameters; zero where there is none, and between pieces.

        What the last exchange made of a gap (a lossy one may make something of nothing) is not contributed again.
        """
        self.views = []
        for gap in self._gaps:
            gap.zero_()
        for i, each in enumerate(self._owned):
            param = params[each.name]
            grad = None if param.grad is None else local(_placed(param.grad, param))
            if self._places:
                place = self._places[i]
                if grad is None:
                    place.zero_()
                else:
                    place.copy_(grad)
                grad = place
            self.views.append(torch.zeros_like(each.param) if grad is None else grad)
        for param in params.values():
            param.grad = None

    def drop(self) -> None:
        """Forget this step's gradients."""
        self.views = []
        for each in self._owned:
            each.param.grad = None


def _placed(grad: Any, param: Any) -> Any:
    """A gradient divided as its parameter is. Collective among workers of a layer, alike on all of them."""
    if hasattr(grad, "placements") and grad.placements != param.placements:
        return grad.redistribute(placements=param.placements)
    return grad


def local(tensor: Any) -> Tensor:
    """This worker's part of a DTensor; a plain tensor itself."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part.detach()
