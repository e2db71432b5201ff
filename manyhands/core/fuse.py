"""A readable expression of single PyTorch operations as one compiled kernel, where a GPU has a compiler for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


@functools.cache
def can_fuse() -> bool:
    """Whether there is a compiler for GPUs, and native code is wanted."""
    import importlib.util

    from manyhands.core.native import kernels_wanted

    return importlib.util.find_spec("triton") is not None and kernels_wanted()


@functools.cache
def fuse(expression: Callable[..., Any], any_shape: bool = True) -> Callable[..., Any]:
    """`expression`, compiled; itself where there is no Triton or where native code is not wanted.

    For any shape at once, or first for the shape that it meets first, which gives faster kernels. If compiling fails
    it warns, and the expression itself computes from then on.
    """
    import warnings

    import torch

    if not can_fuse():
        return expression
    working = [torch.compile(expression, dynamic=True if any_shape else None)]

    def run(*arguments: Any) -> Any:
        if working:
            try:
                return working[0](*arguments)
            except (
                Exception
            ) as error:  # whatever Triton or its own compiler lacks; the expression needs neither
                name = getattr(expression, "__name__", "an expression")
                warnings.warn(f"{name} by PyTorch's single operations, slower: {error}", stacklevel=2)
                working.clear()
        return expression(*arguments)

    return run
