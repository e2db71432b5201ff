"""What the quantizing codecs share: blocks, scales, random bits, evenly spaced levels, and the compiled loops.

A payload is ``[one scale a block][codes of all values, packed]``. The values of a block are coded by `top` + 1 evenly
spaced levels around zero (QSGD's scheme with the infinity norm, arXiv:1610.02132 §3.1)::

    step = max|x| / (top/2), as bf16 rounded up        so that no value lies beyond the last level
    code = ⌊x / step + top/2 + u⌋                      u = ½: nearest; u uniform in (0, 1): stochastic
    x̂    = (code − top/2) · step                       never beyond the type's largest value

Nearest: |x̂ − x| ≤ step/2. Stochastic: |x̂ − x| < step, E[x̂] = x to 2⁻¹⁷ step (u has 16 bits). Exact ties go up. The
step is at most 2⁻⁷ larger than the quotient; it is at least 2⁻¹²⁶, or 0 where all values are 0, which come out as 0. A
block with NaN or infinity, or a value beyond float32, is NaN as a whole: everybody sees it.

`u` is a function of (key, index of the value): equal inputs give equal bytes, for any number of threads. Each reference (plain
PyTorch, any device) gives what the loops of ``quantize.cpp`` give, bit for bit; decoding multiplies once, so replicas agree
wherever they decode. Loops need a CPU and, once, a compiler. On a GPU with Triton, kernels (``quantize_gpu.py``) give the same bits
for long tensors in blocks of a power of two. Otherwise the reference computes, on a GPU fused by torch.compile where Triton is
there (which may fuse a product with a sum: then a code can differ by one from the CPU's).
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from manyhands.core import rng
from manyhands.core.errors import Diverged, UsageError
from manyhands.core.fuse import fuse
from manyhands.exchange import pack

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

Rounding = Literal["nearest", "stochastic"]
SOURCE = Path(__file__).with_name("quantize.cpp")
SMALLEST_STEP = 2.0**-126  # the smallest normal float32: its inverse is finite
LARGEST_SCALE = 3.3895313892515355e38  # of bf16
FUSED_FROM = 1 << 16  # values; shorter tensors on a GPU are not worth a compilation of their own


class Grid(NamedTuple):
    """Evenly spaced levels.

    Attributes:
        top: the largest code; level c is (c − top/2) · step.
        per: codes in a byte.
    """

    top: int
    per: int


def validate(block: int) -> None:
    """Raises `UsageError`."""
    if block < 0:
        raise UsageError(
            f"block = {block}", "a block holds at least one value", "give 256, or 0 for one block a tensor"
        )


def width(numel: int, block: int) -> int:
    """Values in a whole block of `numel` values; `block` 0 is one for all. At least 1."""
    return max(1, min(block or numel, numel))


def blocks_of(numel: int, block: int) -> int:
    """How many blocks `numel` values make."""
    return -(-numel // width(numel, block))


def size_bytes(numel: int, per: int, block: int, scale_bytes: int = 2) -> int:
    """Bytes of a payload: a scale a block and the packed codes."""
    return scale_bytes * blocks_of(numel, block) + pack.size_bytes(numel, per)


# --- evenly spaced levels ------------------------------------------------------------------------------------------------


def encode(tensor: Tensor, key: int, *, grid: Grid, block: int, rounding: Rounding) -> Tensor:
    """The payload (uint8 [size_bytes]) of a floating-point tensor of any shape. Deterministic in (tensor, key)."""
    from manyhands.exchange import quantize_gpu

    stochastic = rounding == "stochastic"
    payload = quantize_gpu.uniform_encode(tensor, key, grid=grid, block=block, stochastic=stochastic)
    if payload is not None:
        return payload
    flat = flatten(tensor)
    loops = kernels_for(flat)
    if loops is None:
        expression = fused(expression_of_encode, flat)
        bits = seed(key, flat.device) if stochastic else no_seed(flat.device)
        return expression(flat, bits, grid.top, grid.per, block, stochastic)
    payload = empty_payload(flat, grid.per, block)
    loops.manyhands_uniform_encode(
        *place(flat, block), payload.data_ptr(), grid.per, grid.top, int(stochastic), rng.mix(key)
    )
    return payload


def decode(payload: Tensor, numel: int, dtype: torch.dtype, *, grid: Grid, block: int) -> Tensor:
    """The values [numel] of a payload. Raises `Diverged` where its length is another codec's."""
    import torch

    from manyhands.exchange import quantize_gpu

    payload = checked(payload, size_bytes(numel, grid.per, block))
    made = quantize_gpu.uniform_decode(payload, numel, dtype, grid=grid, block=block)
    if made is not None:
        return made
    loops = kernels_for(payload)
    if loops is None:
        return as_type(fused(expression_of_decode, payload)(payload, numel, grid.top, grid.per, block), dtype)
    values = torch.empty(numel, dtype=torch.float32)
    loops.manyhands_uniform_decode(
        payload.data_ptr(), numel, width(numel, block), values.data_ptr(), grid.per, grid.top
    )
    return as_type(values, dtype)


def reference_encode(tensor: Tensor, key: int, *, grid: Grid, block: int, rounding: Rounding) -> Tensor:
    """`encode` in plain PyTorch."""
    flat = flatten(tensor)
    return expression_of_encode(
        flat, seed(key, flat.device), grid.top, grid.per, block, rounding == "stochastic"
    )


def reference_decode(payload: Tensor, numel: int, dtype: torch.dtype, *, grid: Grid, block: int) -> Tensor:
    """`decode` in plain PyTorch."""
    payload = checked(payload, size_bytes(numel, grid.per, block))
    return as_type(expression_of_decode(payload, numel, grid.top, grid.per, block), dtype)


def expression_of_encode(
    flat: Tensor, seed: Tensor, top: int, per: int, block: int, stochastic: bool
) -> Tensor:
    """The payload of a float32 [n]."""
    import torch

    rows = in_blocks(flat, block)  # [blocks, block]
    largest = rows.abs().amax(1, keepdim=True)  # [blocks, 1]; NaN wins
    half = torch.full_like(largest, top / 2)  # by a number, a GPU multiplies by its inverse
    step = _rounded_up(largest / half).clamp(SMALLEST_STEP, LARGEST_SCALE)
    step = torch.where(largest == 0, 0.0, torch.where(largest.isfinite(), step, torch.nan))
    inverse = torch.where(step > 0, 1 / step, 0.0)
    u = dither(rows, seed) if stochastic else 0.5
    codes = (rows * inverse + (top / 2 + u)).to(torch.int32).clamp(max=top)
    codes = torch.where(step.isfinite(), codes, 0).view(-1)[: flat.numel()]
    return torch.cat([to_bytes(step.view(-1)), pack.pack(codes, per)])


def expression_of_decode(payload: Tensor, numel: int, top: int, per: int, block: int) -> Tensor:
    """The float32 [numel] of a payload."""
    import torch

    scales, codes = halves(payload, numel, block)
    levels = pack.unpack(codes, numel, per).to(torch.float32) - top / 2
    bound = torch.finfo(torch.float32).max
    return (levels * spread(scales, numel, block)).clamp(-bound, bound)


# --- parts ---------------------------------------------------------------------------------------------------------------


def flatten(tensor: Tensor) -> Tensor:
    """Float32 [n], contiguous; a value beyond float32 becomes infinity, which all see."""
    import torch

    return tensor.detach().reshape(-1).to(torch.float32).contiguous()


def in_blocks(flat: Tensor, block: int) -> Tensor:
    """[blocks, block], zeros after the last value."""
    import torch

    each = width(flat.numel(), block)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % each)).view(-1, each)


def spread(scales: Tensor, numel: int, block: int) -> Tensor:
    """Each value's scale: [numel] of [blocks]."""
    return scales.repeat_interleave(width(numel, block))[:numel]


def as_type(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Finite float32 values (or NaN) as `dtype`. A narrower type's largest value stands for what lies beyond it."""
    import torch

    if dtype not in (torch.float32, torch.float64):
        bound = torch.finfo(dtype).max
        values = values.clamp_(-bound, bound)
    return values.to(dtype)


def to_bytes(scales: Tensor) -> Tensor:
    """Float32 scales that are bf16 numbers, as two bytes each: uint8 [2 · blocks].

    By shifting: what bits torch's conversion to bf16 gives to NaN depends on where in a tensor it stands.
    """
    import torch

    return (scales.view(torch.int32) >> 16).to(torch.int16).view(torch.uint8)


def halves(payload: Tensor, numel: int, block: int) -> tuple[Tensor, Tensor]:
    """(bf16 scales as float32 [blocks], packed codes) of a payload."""
    import torch

    split = 2 * blocks_of(numel, block)
    return payload[:split].clone().view(torch.bfloat16).to(torch.float32), payload[split:]


def _rounded_up(x: Tensor) -> Tensor:
    """Non-negative float32 to the next bf16 number, as float32."""
    import torch

    return ((x.view(torch.int32).to(torch.int64) + 0xFFFF) & ~0xFFFF).to(torch.int32).view(torch.float32)


def seed(key: int, device: torch.device) -> Tensor:
    """The halves of the mixed key, int64 [2]: a tensor, so that nothing is compiled anew for another key."""
    import torch

    mixed = rng.mix(key)
    halves = torch.tensor([mixed & 0xFFFFFFFF, mixed >> 32])
    if device.type != "cuda":
        return halves.to(device)
    return halves.pin_memory().to(device, non_blocking=True)  # nobody waits for the device


@functools.cache
def no_seed(device: torch.device) -> Tensor:
    """In place of `seed` where nothing is random."""
    import torch

    return torch.zeros(2, dtype=torch.int64, device=device)


def random_bits(like: Tensor, seed: Tensor) -> Tensor:
    """32 random bits for each element, as int64 of `like`'s shape: a hash of (key, index).

    Wellons' *lowbias32* (two multiplications), with half of the mixed key put in before each of them.
    """
    import torch

    x = (torch.arange(like.numel(), device=like.device) & 0xFFFFFFFF) ^ seed[0]
    x = ((x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF) ^ seed[1]
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return (x ^ (x >> 16)).view(like.shape)


def dither(like: Tensor, seed: Tensor) -> Tensor:
    """A float32 in (0, 1) for each element: the odd multiples of 2⁻¹⁷, with equal probability."""
    import torch

    return (random_bits(like, seed) >> 16).to(torch.float32) * 2.0**-16 + 2.0**-17


def checked(payload: Tensor, expected: int) -> Tensor:
    """The payload, contiguous. Raises `Diverged` where it cannot be what `encode` made."""
    import torch

    if payload.dtype is not torch.uint8 or payload.numel() != expected:
        raise Diverged(
            f"a payload of {payload.numel()} × {payload.dtype} where {expected} bytes are due",
            "all workers encode the same tensors with the same codec",
            "start every worker with the same model and strategy",
        )
    return payload.reshape(-1).contiguous()


# --- compiled loops ------------------------------------------------------------------------------------------------------


@functools.cache
def _loops() -> tuple[ctypes.CDLL | None, str]:
    from manyhands.core.native import kernels

    try:
        library = kernels(SOURCE)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return None, f"PyTorch's operations ({error}: slower)"
    p, n, i, key = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_uint64
    signatures: dict[str, list[Any]] = {
        "uniform_encode": [p, n, n, p, i, i, i, key],
        "uniform_decode": [p, n, n, p, i, i],
        "sign_encode": [p, n, n, p],
        "sign_decode": [p, n, n, p],
        "natural_encode": [p, n, n, p, i, key],
        "natural_decode": [p, n, n, p],
    }
    for name, types in signatures.items():
        function = getattr(library, f"manyhands_{name}")
        function.argtypes, function.restype = types, None
    return library, "compiled loops"


def kernels_for(tensor: Tensor) -> ctypes.CDLL | None:
    """The compiled loops, where `tensor` is one for them."""
    return _loops()[0] if tensor.device.type == "cpu" and tensor.numel() else None


def fused(expression: Callable[..., Tensor], like: Tensor) -> Callable[..., Tensor]:
    """The expression, compiled for a long tensor on a GPU; itself for all others."""
    long = like.device.type == "cuda" and like.numel() >= FUSED_FROM
    return fuse(expression) if long else expression


def status() -> str:
    """How tensors on the CPU are quantized in this process, and why not faster where they are not."""
    return _loops()[1]


def empty_payload(flat: Tensor, per: int, block: int, scale_bytes: int = 2) -> Tensor:
    """Room for the payload of `flat`."""
    import torch

    return torch.empty(size_bytes(flat.numel(), per, block, scale_bytes), dtype=torch.uint8)


def place(flat: Tensor, block: int) -> tuple[int, int, int]:
    """(address, values, values in a block): how the loops are told of a tensor."""
    return flat.data_ptr(), flat.numel(), width(flat.numel(), block)
