"""Numbers on their way from a device to the host, while the device works on."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


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
