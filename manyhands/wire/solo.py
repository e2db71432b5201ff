"""A world of one: every request is answered by what was asked with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manyhands.core.request import Gather, Place, Request, Scatter, Where
from manyhands.wire.traffic import Traffic

if TYPE_CHECKING:
    from torch import Tensor


class Ready:
    """A reply that is there already."""

    def __init__(self, reply: Any) -> None:
        self._reply = reply

    def wait(self) -> Any:
        return self._reply


class Solo:
    """The wire of a single worker."""

    rank = 0
    size = 1
    lazy = True  # nothing travels before `wait`, nor then

    def __init__(self, device: str = "cpu") -> None:
        self.traffic = Traffic()
        self._device = device

    def begin(self, request: Request) -> Ready:
        if isinstance(request, Where):
            return Ready(Place(0, 1))
        if isinstance(request, Scatter):
            return Ready(list(request.tensors))
        return Ready([request.tensor] if isinstance(request, Gather) else request.tensor)

    def buffer(self, numel: int, dtype: Any) -> Tensor:
        import torch

        return torch.zeros(numel, dtype=dtype, device=self._device)

    def common(self, numel: int, dtype: Any) -> Tensor:
        """A zeroed flat tensor that all workers share: there is one."""
        return self.buffer(numel, dtype)

    def close(self) -> None:
        pass
