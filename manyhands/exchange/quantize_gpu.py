"""The quantizing codecs on a GPU, by kernels of our own: which tensors they serve, in what tiles, and how they are launched.

Encoding and decoding are bound by memory: int8 reads 4 bytes a value and writes 1, a copy reads 4 and writes 4. The kernels
(``quantize_triton.py``) move each byte once. They serve long tensors in blocks of a power of two; for all others, for `Ternary`,
and where there is no Triton, each function returns None and the caller's expression computes. So it does, with a warning, if
Triton cannot compile here.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from manyhands.core import rng
from manyhands.exchange import quantize

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from manyhands.exchange.quantize import Grid

BLOCKS = tuple(2**power for power in range(5, 13))  # that the kernels serve


class Tiling(NamedTuple):
    """What a program handles.

    Attributes:
        values: in the whole blocks of a program; a longer block has a program of its own.
        warps: threads, in 32s. One warp reduces a block of 256 without waiting for others.
    """

    values: int
    warps: int


TILINGS = {
    "uniform_encode": Tiling(1024, 1),
    "uniform_decode": Tiling(1024, 1),
    "sign_encode": Tiling(1024, 1),
    "sign_decode": Tiling(1024, 1),
    "natural_encode": Tiling(1024, 1),
    "natural_decode": Tiling(1024, 1),
}


def ready() -> bool:
    """Whether there are kernels, none of which has failed to compile."""
    return bool(_kernels())


def serves(device: torch.device, numel: int, block: int) -> bool:
    """Whether the kernels encode and decode `numel` values there."""
    long = device.type == "cuda" and numel >= quantize.FUSED_FROM
    return long and block in BLOCKS and ready()


def uniform_encode(tensor: Tensor, key: int, *, grid: Grid, block: int, stochastic: bool) -> Tensor | None:
    """The payload of `quantize.encode`, or None."""
    if grid.per not in (1, 2, 4) or not serves(tensor.device, tensor.numel(), block):
        return None
    values, bits = _flat(tensor), 8 // grid.per
    payload = _room(values, grid.per, block, 2)
    unit = _unit(payload, 2 * quantize.blocks_of(values.numel(), block), bits // 2)
    seed = _halves(key) if stochastic else (0, 0)
    constants = {"TOP": grid.top, "BITS": bits, "UNIT": unit, "STOCHASTIC": stochastic}
    return _launched("uniform_encode", block, values.numel(), values, payload, *seed, **constants)


def uniform_decode(
    payload: Tensor, numel: int, dtype: torch.dtype, *, grid: Grid, block: int
) -> Tensor | None:
    """The values of `quantize.decode`, or None."""
    import torch

    if grid.per not in (1, 2, 4) or not serves(payload.device, numel, block):
        return None
    payload, bits = _aligned(payload), 8 // grid.per
    unit = _unit(payload, 2 * quantize.blocks_of(numel, block), bits // 2)
    bound = _bound(dtype) or torch.finfo(torch.float32).max
    constants = {"TOP": grid.top, "BITS": bits, "UNIT": unit, "BOUND": bound}
    return _decoded("uniform_decode", block, payload, numel, dtype, **constants)


def sign_encode(tensor: Tensor, *, block: int) -> Tensor | None:
    """The payload of `Sign.encode`, or None."""
    if not serves(tensor.device, tensor.numel(), block):
        return None
    values = _flat(tensor)
    return _launched("sign_encode", block, values.numel(), values, _room(values, 8, block, 2))


def sign_decode(payload: Tensor, numel: int, dtype: torch.dtype, *, block: int) -> Tensor | None:
    """The values of `Sign.decode`, or None."""
    if not serves(payload.device, numel, block):
        return None
    return _decoded("sign_decode", block, _aligned(payload), numel, dtype, BOUND=_bound(dtype))


def natural_encode(tensor: Tensor, key: int, *, block: int, stochastic: bool) -> Tensor | None:
    """The payload of `Natural.encode`, or None."""
    if not serves(tensor.device, tensor.numel(), block):
        return None
    values = _flat(tensor)
    payload = _room(values, 1, block, 1)
    unit = _unit(payload, quantize.blocks_of(values.numel(), block), 4)
    seed = _halves(key) if stochastic else (0, 0)
    constants = {"UNIT": unit, "STOCHASTIC": stochastic}
    return _launched("natural_encode", block, values.numel(), values, payload, *seed, **constants)


def natural_decode(payload: Tensor, numel: int, dtype: torch.dtype, *, block: int) -> Tensor | None:
    """The values of `Natural.decode`, or None."""
    if not serves(payload.device, numel, block):
        return None
    unit = _unit(payload, quantize.blocks_of(numel, block), 4)
    return _decoded("natural_decode", block, payload, numel, dtype, UNIT=unit, BOUND=_bound(dtype))


# --- parts ---------------------------------------------------------------------------------------------------------------


@functools.cache
def _kernels() -> list[Any]:
    """The module of kernels; empty where there is no Triton or native code is not wanted, and once a launch has failed."""
    from manyhands.core.fuse import can_fuse

    if not can_fuse():
        return []
    try:
        from manyhands.exchange import quantize_triton
    except ImportError:  # a Triton without what they need
        return []
    return [quantize_triton]


def _launched(
    name: str, block: int, numel: int, source: Tensor, target: Tensor, *seed: int, **constants: Any
) -> Tensor | None:
    """`target` after the kernel, or None where it cannot be compiled."""
    import warnings

    import torch

    tiling = TILINGS[name]
    rows = max(1, tiling.values // block)
    warps = tiling.warps * max(1, block // max(tiling.values, 1024))  # up to 32 values a thread
    tiles, rest = divmod(numel, rows * block)
    kernel = getattr(_kernels()[0], name)[(tiles + -(-rest // block),)]
    try:
        with torch.cuda.device(source.get_device()):
            kernel(
                *(source, target, numel, *seed),
                **(constants | {"BLOCK": block, "ROWS": rows}),
                num_warps=warps,
                enable_fp_fusion=False,  # each product and each sum is rounded, as everywhere
            )
    except Exception as error:  # whatever Triton or its own compiler lacks
        warnings.warn(f"{name} not by a kernel of its own, slower: {error}", stacklevel=3)
        _kernels().clear()
        return None
    return target


def _decoded(
    name: str, block: int, payload: Tensor, numel: int, dtype: torch.dtype, **constants: Any
) -> Tensor | None:
    """A new [numel] of `dtype` after the kernel, or None."""
    import torch

    written = torch.float32 if dtype is torch.float64 else dtype
    target = torch.empty(numel, dtype=written, device=payload.device)
    values = _launched(name, block, numel, payload, target, **constants)
    return None if values is None else values.to(dtype)


def _flat(tensor: Tensor) -> Tensor:
    """[n], contiguous; half precision as it is, since the kernels widen it as they read."""
    import torch

    if tensor.dtype in (torch.bfloat16, torch.float16):
        return tensor.detach().reshape(-1).contiguous()
    return quantize.flatten(tensor)


def _room(values: Tensor, per: int, block: int, scale_bytes: int) -> Tensor:
    import torch

    size = quantize.size_bytes(values.numel(), per, block, scale_bytes)
    return torch.empty(size, dtype=torch.uint8, device=values.device)


def _aligned(payload: Tensor) -> Tensor:
    """The payload, at an even address: scales are read as two bytes."""
    return payload.clone() if payload.data_ptr() % 2 else payload


def _unit(payload: Tensor, offset: int, most: int) -> int:
    """Bytes that are read or written at a time, where codes begin `offset` bytes into the payload."""
    address = payload.data_ptr() + offset
    return next(unit for unit in (4, 2, 1) if unit <= most and address % unit == 0)


def _halves(key: int) -> tuple[int, int]:
    """The halves of the mixed key as signed integers, of whatever value: of one type for Triton."""
    mixed = rng.mix(key)
    low, high = mixed & 0xFFFFFFFF, mixed >> 32
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


def _bound(dtype: torch.dtype) -> float:
    """What stands for all beyond it, as in `quantize.as_type`; 0 where nothing is."""
    import torch

    return 0.0 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).max
