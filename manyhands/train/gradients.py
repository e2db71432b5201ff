"""Gradients in flat buffers, in buckets that start their talk while backward still runs.

Every trainable parameter's gradient is a view of one flat buffer that the wire sends from directly: nothing is packed
or unpacked. Buckets are cut from it in the order in which backward fills them (the reverse of registration), each
parameter starting on a 64-byte boundary.

Backward hands each gradient over as a fresh tensor; the first one of a step is copied into its view, later ones
(accumulation) are added in place. A parameter that nobody used in a step gets no gradient at all, as in one process,
so that optimizers skip it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from manyhands.core.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from manyhands.core.types import Wire

ALIGN_BYTES = 64


class FlatGradients:
    """The gradients of one replica.

    Args:
        named: trainable parameters by name; tied ones once.
        wire: where the flat buffers come from.
        bucket_mb: size of a bucket in MiB.
        on_bucket: called with (position, flat tensor) when a bucket is complete, in the order of positions,
            during the last backward of a step; every bucket not announced by then is announced by `finish`.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        wire: Wire,
        *,
        bucket_mb: float,
        on_bucket: Callable[[int, Tensor], None],
    ) -> None:
        if not named:
            raise ModelError(
                "the model has no trainable parameter", "training changes at least one", "unfreeze some"
            )
        self.names = [name for name, _ in named]
        self.params = [param for _, param in named]
        self._on_bucket = on_bucket
        self._views: list[Tensor] = [torch.empty(0)] * len(self.params)
        self._bucket_of: list[int] = [0] * len(self.params)
        self.buckets: list[Tensor] = []
        self._gaps: list[tuple[int, int, int]] = []  # bucket, first element in it, end
        self._lay_out(wire, bucket_mb)
        self.used = [False] * len(self.params)  # in this step
        self._fresh = [False] * len(self.params)  # in this micro-batch
        self._announce = False
        self._waiting: list[int] = []
        self._next = 0
        self.arrived = 0  # gradients that this micro-batch's backward has handed over
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._hook(i))  # type: ignore[no-untyped-call]
            for i, p in enumerate(self.params)
        ]

    @property
    def announced(self) -> bool:
        """Whether a bucket of this micro-batch's backward is on its way."""
        return self._announce and self._next > 0

    def start(self) -> None:
        """Begin a step: no gradient yet."""
        self.used = [False] * len(self.params)
        self.start_micro_batch(last=False)
        for param in self.params:
            param.grad = None

    def start_micro_batch(self, *, last: bool, separate: bool = False) -> None:
        """Before a forward pass. `last`: complete buckets are announced during its backward.

        `separate`: its gradients replace earlier ones instead of adding to them.
        """
        self._announce = last
        self._next = 0
        self.arrived = 0
        if last:
            self._waiting = [self._bucket_of.count(b) for b in range(len(self.buckets))]
        if separate:
            self._fresh = [False] * len(self.params)
            for param in self.params:
                param.grad = None

    def members(self, position: int) -> list[int]:
        """The parameters of a bucket, in its order."""
        return [i for i in reversed(range(len(self.params))) if self._bucket_of[i] == position]

    def tensors(self, position: int) -> list[Tensor]:
        """The gradients of a bucket as views in their parameters' shapes, in the order of the bucket."""
        return [self._views[i] for i in self.members(position)]

    def names_of(self, position: int) -> list[str]:
        """The parameters of `tensors`."""
        return [self.names[i] for i in self.members(position)]

    def cut(self, position: int, flat: Tensor) -> Iterator[tuple[int, Tensor]]:
        """A tensor laid out as a bucket is, as (parameter, view in its shape), in the order of the bucket."""
        base = self.buckets[position].data_ptr()
        for i in self.members(position):
            view = self._views[i]
            begin = (view.data_ptr() - base) // view.element_size() if view.numel() else 0
            yield i, flat[begin : begin + view.numel()].view(view.shape)

    def telling(self, position: int) -> list[Tensor]:
        """Those of a bucket that tell at little cost whether a backward pass was finite: of vectors, such as biases.

        They are sums over all that is above them, and what is not finite there reaches them. Without any, the whole bucket.
        """
        if all(view.ndim > 1 for view in self._views):
            return [self.buckets[position]]
        return [view for view in self.tensors(position) if view.ndim <= 1]

    def by_parameter(self) -> list[Tensor]:
        """The gradients in the buffers as views in their parameters' shapes, in the order of `params`."""
        return list(self._views)

    def zero_gaps(self, buckets: Sequence[Tensor] | None = None) -> None:
        """Zero the alignment gaps between parameters, which a lossy exchange may have filled; of `buckets`: laid out alike."""
        for position, begin, end in self._gaps:
            (buckets or self.buckets)[position][begin:end].zero_()

    def zero_unused(self, flags: Sequence[bool]) -> None:
        """Parameters that got no gradient contribute zero."""
        for view, used in zip(self._views, flags, strict=True):
            if not used:
                view.zero_()

    def micro_batch(self) -> list[Tensor]:
        """The buckets of the last micro-batch alone (after a `separate` one)."""
        self.zero_unused(self._fresh)
        return self.buckets

    def finish(self) -> None:
        """End of the last backward (or of a step with nothing to do): announce what was not."""
        self._announce = False
        self.zero_unused(self.used)
        while self._next < len(self.buckets):
            self._advance()

    def attach(self, used: Sequence[bool]) -> None:
        """Give each parameter its agreed gradient, or none where nobody used it."""
        for param, view, is_used in zip(self.params, self._views, used, strict=True):
            param.grad = view if is_used else None

    def detach(self) -> None:
        """Drop the gradients (they stay in the buffers)."""
        for param in self.params:
            param.grad = None

    def adopt(self, other: FlatGradients) -> None:
        """Go on with what `other`, of the same parameters, has added up."""
        for mine, theirs in zip(self.buckets, other.buckets, strict=True):
            mine.copy_(theirs)
        self.used = list(other.used)
        self.attach(self.used)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.detach()

    # -- how

    def _lay_out(self, wire: Wire, bucket_mb: float) -> None:
        groups: dict[torch.dtype, list[int]] = {}
        for i in reversed(range(len(self.params))):
            groups.setdefault(self.params[i].dtype, []).append(i)
        for dtype, members in groups.items():
            align = ALIGN_BYTES // dtype.itemsize
            offsets, total = [], 0
            for i in members:
                offsets.append(total)
                total += -(-self.params[i].numel() // align) * align
            flat = wire.buffer(total, dtype)
            limit = bucket_mb * (1 << 20) / dtype.itemsize
            begin = 0
            for i, offset in zip(members, offsets, strict=True):
                if offset > begin and offset - begin >= limit:
                    self.buckets.append(flat[begin:offset])
                    begin = offset
                self._bucket_of[i] = len(self.buckets)
                param = self.params[i]
                self._views[i] = flat[offset : offset + param.numel()].view(param.shape)
                end = offset + -(-param.numel() // align) * align
                if offset + param.numel() < end:
                    self._gaps.append((len(self.buckets), offset + param.numel() - begin, end - begin))
            self.buckets.append(flat[begin:total])

    def _hook(self, i: int) -> Callable[[Tensor], None]:
        def arrived(param: Tensor) -> None:
            view = self._views[i]
            if param.grad is not view and param.grad is not None:
                if param.grad.layout is not torch.strided:
                    raise _sparse(self.names[i])
                view.copy_(param.grad)
                param.grad = view
            self.used[i] = self._fresh[i] = True
            self.arrived += 1
            if self._announce:
                bucket = self._bucket_of[i]
                self._waiting[bucket] -= 1
                while self._next < len(self.buckets) and self._waiting[self._next] == 0:
                    self._advance()

        return arrived

    def _advance(self) -> None:
        position = self._next
        self._next += 1
        self._on_bucket(position, self.buckets[position])


def refuse_sparse(model: nn.Module) -> None:
    """Raises `ModelError` where a layer is made to hand over sparse gradients; others' are found as they come."""
    for name, module in model.named_modules():
        embedding = module if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)) else None
        if embedding is not None and embedding.sparse and embedding.weight.requires_grad:
            raise _sparse(f"{name}.weight" if name else "weight")


def _sparse(name: str) -> ModelError:
    return ModelError(
        f"parameter {name!r} gets sparse gradients",
        "gradients are exchanged and clipped as dense tensors",
        "make its layer with sparse=False (an exchange such as topk or threshold sends few entries, if that is what it was for)",
    )
