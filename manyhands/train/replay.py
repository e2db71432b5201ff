"""Several steps of AdamW with one gradient, in one pass over memory (see `manyhands.train.forecast`).

    m ← m + (1 − β₁)(ḡ − m)        v ← β₂ v + (1 − β₂) c ḡ²
    θ ← θ (1 − ηλ) − η/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)

which are the steps of `torch.optim.AdamW` (arXiv:1711.05101, algorithm 2) with the square counted c times, to rounding. From one
place to another: the result may be what was read. The plain PyTorch of `reference` gives the bits of the loops of
``replay.cpp``, so that replicas agree where one host has a compiler and another has none.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from manyhands.exchange.codec import wide

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Path(__file__).with_name("replay.cpp")


@dataclass(frozen=True)
class AdamState:
    """A parameter with AdamW's state of it: values, first and second moments [any shape], steps made."""

    value: Tensor
    first: Tensor
    second: Tensor
    step: Tensor


@dataclass(frozen=True)
class AdamRule:
    """What all steps share."""

    betas: tuple[float, float]
    eps: float
    decay: float


def adamw(
    source: AdamState,
    target: AdamState,
    mean: Tensor,
    count: float,
    rates: Sequence[float],
    rule: AdamRule,
    *,
    scale: float = 1.0,
) -> None:
    """`target` ← `source` after a step of each of `rates` with the gradient `scale` · `mean`, whose square counts `count` times."""
    done = int(source.step)
    with torch.no_grad():
        numbers = _numbers(done, rates, rule)
        loops = _loops() if rates and _plain(source, target, mean) else None
        if loops is None:
            reference(source, target, mean if scale == 1.0 else mean * scale, count, numbers, rule)
        else:
            flat = (ctypes.c_float * (3 * len(rates)))(*(x for row in numbers for x in row))
            own = (source.value, source.first, source.second, target.value, target.first, target.second, mean)
            loops.replay_adamw(
                ctypes.c_int64(mean.numel()),
                *(ctypes.c_void_p(t.data_ptr()) for t in own),
                *(ctypes.c_int64(len(rates)), flat),
                *(ctypes.c_float(x) for x in (*_shares(count, rule), scale)),
            )
        target.step.fill_(done + len(rates))


def square_length(mean: Tensor) -> float:
    """|ḡ|², added up in float64."""
    flat = mean.detach().reshape(-1)
    own = flat.device.type == "cpu" and flat.dtype is torch.float32
    loops = _loops() if own else None
    if loops is None:
        return sum(float(part.double().square().sum()) for part in torch.split(flat, 1 << 16))
    flat = flat.contiguous()
    return float(loops.square_length(ctypes.c_int64(flat.numel()), ctypes.c_void_p(flat.data_ptr())))


def reference(
    source: AdamState,
    target: AdamState,
    mean: Tensor,
    count: float,
    numbers: Sequence[tuple[float, float, float]],
    rule: AdamRule,
) -> None:
    """The same in plain PyTorch, on any device and in any type."""
    share1, keep2, share2, eps = _shares(count, rule)
    exact = wide(mean.dtype)  # of half precision only the result is rounded
    value, first, second = (t.to(exact) for t in (source.value, source.first, source.second))
    mean = mean.to(exact)
    square = (mean * share2) * mean
    for shrink, rate, root in numbers:
        first = first + (mean - first) * share1
        second = second * keep2 + square
        deviation = (
            second.double().sqrt().to(second.dtype)
        )  # correctly rounded, which MKL's of float32 is not always
        value = value * shrink - (first * rate) / (deviation / root + eps)
    target.value.copy_(value)
    target.first.copy_(first)
    target.second.copy_(second)


def _shares(count: float, rule: AdamRule) -> tuple[float, float, float, float]:
    beta1, beta2 = rule.betas
    return 1.0 - beta1, beta2, (1.0 - beta2) * count, rule.eps


def _numbers(done: int, rates: Sequence[float], rule: AdamRule) -> list[tuple[float, float, float]]:
    beta1, beta2 = rule.betas
    return [
        (1.0 - rate * rule.decay, rate / (1.0 - beta1**t), (1.0 - beta2**t) ** 0.5)
        for t, rate in enumerate(rates, done + 1)
    ]


def _plain(source: AdamState, target: AdamState, mean: Tensor) -> bool:
    every = (source.value, source.first, source.second, target.value, target.first, target.second, mean)
    return all(t.device.type == "cpu" and t.dtype is torch.float32 and t.is_contiguous() for t in every)


@functools.cache
def _loops() -> Any:
    """None where they cannot be had: then the reference computes the same, more slowly."""
    from manyhands.core import native

    try:
        loops = native.kernels(SOURCE, "-mprefer-vector-width=512")
    except (RuntimeError, OSError, subprocess.SubprocessError):
        return None
    loops.square_length.restype = ctypes.c_double
    return loops
