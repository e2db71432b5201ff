"""Numbers on their way from a device to the host, while the device works on."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from manyhands.core.errors import UsageError
from manyhands.core.types import Summed


class Reading:
    """The values of a tensor as they are when the device gets here; asking for them waits for no later work."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: Any = None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._host = tensor

    @staticmethod
    def of(*numbers: Tensor | float) -> Reading:
        """Of scalars, at least one of them a tensor; all become float64."""
        like = next(x for x in numbers if isinstance(x, Tensor))
        if like.device.type != "cuda":
            return Reading(torch.tensor([float(x) for x in numbers], dtype=torch.float64))
        there = [
            x.detach().to(torch.float64)
            if isinstance(x, Tensor)
            else like.new_full((), x, dtype=torch.float64)
            for x in numbers
        ]
        return Reading(torch.stack([x.reshape(()) for x in there]))

    def values(self) -> list[float]:
        """As Python's floats, in order."""
        if self._event is not None:
            self._event.synchronize()
        return [float(x) for x in self._host.reshape(-1).tolist()]


class Stopwatch:
    """Seconds that a device takes for what is given to it between the making of this and `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._begun, self._ended = time.perf_counter(), 0.0
        self._events: list[Any] = []
        if device.type == "cuda":
            self._events = [
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            ]
            self._events[0].record()

    def stop(self) -> None:
        self._ended = time.perf_counter()
        if self._events:
            self._events[1].record()

    @property
    def done(self) -> bool:
        """Whether the device has come to `stop`."""
        return not self._events or bool(self._events[1].query())

    def seconds(self) -> float:
        """Once it is `done`."""
        if self._events:
            return float(self._events[0].elapsed_time(self._events[1])) / 1e3
        return self._ended - self._begun


def summed_of(said: Any) -> Summed:
    """What a loss function returned. Raises `UsageError`: it is no pair of a sum and a count."""
    fine = isinstance(said, (tuple, list)) and len(said) == 2
    if not (fine and isinstance(said[0], torch.Tensor) and said[0].numel() == 1):
        shape = f" of shape {list(said.shape)}" if isinstance(said, torch.Tensor) else ""
        inside = f" of {', '.join(type(x).__name__ for x in said)}" if isinstance(said, (tuple, list)) else ""
        raise UsageError(
            f"loss returned a {type(said).__name__}{shape}{inside}",
            "it returns (the sum of the losses, a tensor of one value; the count of valid targets)",
            "for example (F.cross_entropy(logits, targets, reduction='sum'), targets.numel())",
        )
    return Summed(said[0] if said[0].dim() == 0 else said[0].reshape(()), said[1])
