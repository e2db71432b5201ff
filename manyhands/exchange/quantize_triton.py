"""The quantizing codecs' kernels for GPUs, in Triton: each reads its input once and writes its output once.

A program handles a tile of ROWS whole blocks, [ROWS, BLOCK]: it keeps the values in registers, reduces each row to its scale and
stores scales and codes, so encoding costs no second pass. The formulas are those of quantize.py, sign.py and natural.py, and the
bits those of the loops of ``quantize.cpp``: launched with ``enable_fp_fusion=False`` nothing is fused, `tl.div_rn` rounds as IEEE
says, magnitudes are compared and scales rounded as integers. ``quantize_gpu.py`` launches them; only it imports this module, since
Triton comes with PyTorch's builds for GPUs only.

Codes move in *words* of BYTES bytes that hold VALUES codes: as a thread loads four neighbouring floats (16 bytes), the word of four
codes is its own, made without talking to others, and a warp's words are contiguous. Where the codes begin at an address that is no
multiple of BYTES, a word moves in parts of UNIT bytes. Blocks after the last whole tile have programs of their own, which go byte
by byte under a mask.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr

INFINITY = constexpr(0x7F800000)  # bits of float32; above it are the NaNs
MAGNITUDE = constexpr(0x7FFFFFFF)  # all bits but the sign
SMALLEST_STEP = constexpr(0x00800000)  # 2⁻¹²⁶
LARGEST_SCALE = constexpr(0x7F7F0000)  # of bf16
NOT_FINITE = constexpr(0x7FC00000)  # NaN
NO_WINDOW = constexpr(255)
GRAIN = constexpr(2.0**-16)  # of the random fractions


# --- parts ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _typed(area, UNIT: constexpr):
    """A pointer to bytes as one to unsigned integers of UNIT bytes; what 4 bytes hold is shifted as int32."""
    if UNIT == 4:
        typed = area.to(tl.pointer_type(tl.int32), bitcast=True)
    elif UNIT == 2:
        typed = area.to(tl.pointer_type(tl.uint16), bitcast=True)
    else:
        typed = area.to(tl.pointer_type(tl.uint8), bitcast=True)
    return typed


@triton.jit
def _put(area, words, left, BYTES: constexpr, UNIT: constexpr, WHOLE: constexpr):
    """Store words [ROWS, WORDS], BYTES each, from `area` on: the first `left` bytes of them."""
    ROWS: constexpr = words.shape[0]
    WORDS: constexpr = words.shape[1]
    word = tl.arange(0, ROWS)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    if WHOLE and UNIT == BYTES:
        tl.store(_typed(area, UNIT) + word, words)
    else:
        PARTS: constexpr = BYTES // UNIT
        part = tl.arange(0, PARTS)[None, None, :]
        place = word[:, :, None] * PARTS + part  # [ROWS, WORDS, PARTS]
        cut = words[:, :, None] >> part * (8 * UNIT)
        tl.store(_typed(area, UNIT) + place, cut, mask=place < left // UNIT)


@triton.jit
def _take(area, left, ROWS: constexpr, WORDS: constexpr, BYTES: constexpr, UNIT: constexpr, WHOLE: constexpr):
    """The words that `_put` stored: int32 [ROWS, WORDS]."""
    word = tl.arange(0, ROWS)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    if WHOLE and UNIT == BYTES:
        words = tl.load(_typed(area, UNIT) + word).to(tl.int32)
    else:
        PARTS: constexpr = BYTES // UNIT
        part = tl.arange(0, PARTS)[None, None, :]
        place = word[:, :, None] * PARTS + part  # [ROWS, WORDS, PARTS]
        parts = tl.load(_typed(area, UNIT) + place, mask=place < left // UNIT, other=0).to(tl.int32)
        words = tl.sum(parts << part * (8 * UNIT), axis=2)
    return words


@triton.jit
def _packed(codes, BITS: constexpr, VALUES: constexpr):
    """Words of VALUES codes, BITS each, the first in the lowest bits: int32 [ROWS, BLOCK // VALUES] of [ROWS, BLOCK]."""
    ROWS: constexpr = codes.shape[0]
    BLOCK: constexpr = codes.shape[1]
    groups = tl.reshape(codes, [ROWS, BLOCK // VALUES, VALUES])
    return tl.sum(groups << (tl.arange(0, VALUES) * BITS)[None, None, :], axis=2)


@triton.jit
def _unpacked(words, BITS: constexpr, VALUES: constexpr):
    """The codes of words: int32 [ROWS, WORDS, VALUES]."""
    return (words[:, :, None] >> (tl.arange(0, VALUES) * BITS)[None, None, :]) & ((1 << BITS) - 1)


@triton.jit
def _values(source, left, ROWS: constexpr, BLOCK: constexpr, WHOLE: constexpr):
    """Float32 [ROWS, BLOCK] from `source` on; of a tile that is not whole the first `left`, then zeros."""
    inside = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(source + inside) if WHOLE else tl.load(source + inside, mask=inside < left, other=0.0)
    if source.dtype.element_ty == tl.bfloat16:  # by shifting: exact for all, NaN's sign too
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _store_values(groups, target, left, BOUND: constexpr, WHOLE: constexpr):
    """Store float32 [ROWS, WORDS, VALUES] from `target` on, in its type; a BOUND above 0 stands for what lies beyond it."""
    ROWS: constexpr = groups.shape[0]
    BLOCK: constexpr = groups.shape[1] * groups.shape[2]
    x = tl.reshape(groups, [ROWS, BLOCK])
    if BOUND > 0.0:
        x = tl.where(x > BOUND, BOUND, x)  # NaN stays
        x = tl.where(x < -BOUND, -BOUND, x)
    x = x.to(target.dtype.element_ty)
    inside = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        tl.store(target + inside, x)
    else:
        tl.store(target + inside, x, mask=inside < left)


@triton.jit
def _put_scales(payload, first, bits):
    """Store the upper halves of the float32 whose bits these are: [ROWS], from block `first` on."""
    ROWS: constexpr = bits.shape[0]
    area = payload.to(tl.pointer_type(tl.uint16), bitcast=True) + first
    tl.store(area + tl.arange(0, ROWS), bits >> 16)


@triton.jit
def _take_scales(payload, first, ROWS: constexpr):
    """The scales that `_put_scales` stored: float32 [ROWS]."""
    area = payload.to(tl.pointer_type(tl.uint16), bitcast=True) + first
    halves = tl.load(area + tl.arange(0, ROWS))
    return (halves.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _random_bits(first, low, high, ROWS: constexpr, BLOCK: constexpr):
    """quantize.random_bits for the values of a tile that begins with block `first`: uint32 [ROWS, BLOCK]."""
    inside = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = ((first * BLOCK).to(tl.uint32) + inside.to(tl.uint32)) ^ low.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ high.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _place(numel, TILE: constexpr):
    """(this program's number, how many whole tiles there are), int64."""
    return tl.program_id(0).to(tl.int64), numel.to(tl.int64) // TILE


# --- evenly spaced levels (quantize.py) ----------------------------------------------------------------------------------


@triton.jit
def _uniform_encode(
    values,
    payload,
    numel,
    low,
    high,
    first,
    TOP: constexpr,
    BITS: constexpr,
    BLOCK: constexpr,
    ROWS: constexpr,
    UNIT: constexpr,
    STOCHASTIC: constexpr,
    WHOLE: constexpr,
):
    blocks = tl.cdiv(numel.to(tl.int64), BLOCK)
    left = tl.minimum(numel - first * BLOCK, ROWS * BLOCK).to(tl.int32)
    x = _values(values + first * BLOCK, left, ROWS, BLOCK, WHOLE)
    largest = tl.max(x.to(tl.int32, bitcast=True) & MAGNITUDE, axis=1)  # [ROWS]; NaN > infinity > all others
    quotient = tl.div_rn(largest.to(tl.float32, bitcast=True), TOP * 0.5)
    step = (quotient.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000  # to the next bf16 number
    step = tl.minimum(tl.maximum(step, SMALLEST_STEP), LARGEST_SCALE)
    inverse = tl.div_rn(1.0, step.to(tl.float32, bitcast=True))
    inverse = tl.where(largest == 0, 0.0, inverse)
    step = tl.where(largest == 0, 0, tl.where(largest < INFINITY, step, NOT_FINITE))
    _put_scales(payload, first, step)
    shift = TOP * 0.5 + 0.5
    if STOCHASTIC:
        random = _random_bits(first, low, high, ROWS, BLOCK)
        shift = (random >> 16).to(tl.int32).to(tl.float32) * GRAIN + (GRAIN * 0.5) + TOP * 0.5
    codes = tl.minimum((x * inverse[:, None] + shift).to(tl.int32), TOP)
    codes = tl.where((largest < INFINITY)[:, None], codes, 0)
    if not WHOLE:  # a last byte is filled up with zeros
        inside = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        codes = tl.where(inside < left, codes, 0)
    PER: constexpr = 8 // BITS
    area = payload + 2 * blocks + first * (BLOCK // PER)
    _put(area, _packed(codes, BITS, 4), tl.cdiv(left, PER), BITS // 2, UNIT, WHOLE)


@triton.jit(do_not_specialize=["numel", "low", "high"])
def uniform_encode(
    values,
    payload,
    numel,
    low,
    high,
    TOP: constexpr,
    BITS: constexpr,
    BLOCK: constexpr,
    ROWS: constexpr,
    UNIT: constexpr,
    STOCHASTIC: constexpr,
):
    """The payload of values [numel]; `low` and `high` are the halves of the mixed key, as int32."""
    tile, tiles = _place(numel, ROWS * BLOCK)
    if tile < tiles:
        _uniform_encode(
            values, payload, numel, low, high, tile * ROWS, TOP, BITS, BLOCK, ROWS, UNIT, STOCHASTIC, True
        )
    else:
        _uniform_encode(
            values,
            payload,
            numel,
            low,
            high,
            tile + tiles * (ROWS - 1),
            TOP,
            BITS,
            BLOCK,
            1,
            1,
            STOCHASTIC,
            False,
        )


@triton.jit
def _uniform_decode(
    payload,
    out,
    numel,
    first,
    TOP: constexpr,
    BITS: constexpr,
    BOUND: constexpr,
    BLOCK: constexpr,
    ROWS: constexpr,
    UNIT: constexpr,
    WHOLE: constexpr,
):
    blocks = tl.cdiv(numel.to(tl.int64), BLOCK)
    left = tl.minimum(numel - first * BLOCK, ROWS * BLOCK).to(tl.int32)
    PER: constexpr = 8 // BITS
    area = payload + 2 * blocks + first * (BLOCK // PER)
    words = _take(area, tl.cdiv(left, PER), ROWS, BLOCK // 4, BITS // 2, UNIT, WHOLE)
    step = _take_scales(payload, first, ROWS)
    levels = _unpacked(words, BITS, 4).to(tl.float32) - TOP * 0.5
    _store_values(levels * step[:, None, None], out + first * BLOCK, left, BOUND, WHOLE)


@triton.jit(do_not_specialize=["numel"])
def uniform_decode(
    payload,
    out,
    numel,
    TOP: constexpr,
    BITS: constexpr,
    BOUND: constexpr,
    BLOCK: constexpr,
    ROWS: constexpr,
    UNIT: constexpr,
):
    """The values [numel] of a payload."""
    tile, tiles = _place(numel, ROWS * BLOCK)
    if tile < tiles:
        _uniform_decode(payload, out, numel, tile * ROWS, TOP, BITS, BOUND, BLOCK, ROWS, UNIT, True)
    else:
        _uniform_decode(payload, out, numel, tile + tiles * (ROWS - 1), TOP, BITS, BOUND, BLOCK, 1, 1, False)


# --- one bit (sign.py) ---------------------------------------------------------------------------------------------------


@triton.jit
def _sign_encode(values, payload, numel, first, BLOCK: constexpr, ROWS: constexpr, WHOLE: constexpr):
    blocks = tl.cdiv(numel.to(tl.int64), BLOCK)
    left = tl.minimum(numel - first * BLOCK, ROWS * BLOCK).to(tl.int32)
    x = _values(values + first * BLOCK, left, ROWS, BLOCK, WHOLE)
    bits = x.to(tl.int32, bitcast=True)
    largest = tl.max(bits & MAGNITUDE, axis=1)  # [ROWS]
    total = tl.sum((bits & MAGNITUDE).to(tl.float32, bitcast=True).to(tl.float64), axis=1)
    mean = total * (1.0 / BLOCK) if WHOLE else total / left  # by a power of two: exact
    scale = mean.to(tl.float32).to(tl.int32, bitcast=True)
    scale = scale + 0x7FFF + ((scale >> 16) & 1)  # bf16 to nearest even, never infinite
    scale = tl.where(largest < INFINITY, tl.minimum(scale, LARGEST_SCALE), NOT_FINITE)
    _put_scales(payload, first, scale)
    area = payload + 2 * blocks + first * (BLOCK // 8)
    _put(area, _packed((bits >> 31) & 1, 1, 8), tl.cdiv(left, 8), 1, 1, WHOLE)


@triton.jit(do_not_specialize=["numel"])
def sign_encode(values, payload, numel, BLOCK: constexpr, ROWS: constexpr):
    """The payload of values [numel]."""
    tile, tiles = _place(numel, ROWS * BLOCK)
    if tile < tiles:
        _sign_encode(values, payload, numel, tile * ROWS, BLOCK, ROWS, True)
    else:
        _sign_encode(values, payload, numel, tile + tiles * (ROWS - 1), BLOCK, 1, False)


@triton.jit
def _sign_decode(
    payload, out, numel, first, BOUND: constexpr, BLOCK: constexpr, ROWS: constexpr, WHOLE: constexpr
):
    blocks = tl.cdiv(numel.to(tl.int64), BLOCK)
    left = tl.minimum(numel - first * BLOCK, ROWS * BLOCK).to(tl.int32)
    area = payload + 2 * blocks + first * (BLOCK // 8)
    words = _take(area, tl.cdiv(left, 8), ROWS, BLOCK // 8, 1, 1, WHOLE)
    scale = _take_scales(payload, first, ROWS).to(tl.int32, bitcast=True)
    x = (scale[:, None, None] ^ (_unpacked(words, 1, 8) << 31)).to(tl.float32, bitcast=True)
    _store_values(x, out + first * BLOCK, left, BOUND, WHOLE)


@triton.jit(do_not_specialize=["numel"])
def sign_decode(payload, out, numel, BOUND: constexpr, BLOCK: constexpr, ROWS: constexpr):
    """The values [numel] of a payload."""
    tile, tiles = _place(numel, ROWS * BLOCK)
    if tile < tiles:
        _sign_decode(payload, out, numel, tile * ROWS, BOUND, BLOCK, ROWS, True)
    else:
        _sign_decode(payload, out, numel, tile + tiles * (ROWS - 1), BOUND, BLOCK, 1, False)


# --- powers of two (natural.py) ------------------------------------------------------------------------------------------


@triton.jit
def _natural_encode(
    values,
    payload,
    numel,
    low,
    high,
    first,
    BLOCK: constexpr,
    ROWS: constexpr,
    UNIT: constexpr,
    STOCHASTIC: constexpr,
    WHOLE: constexpr,
):
    blocks = tl.cdiv(numel.to(tl.int64), BLOCK)
    left = tl.minimum(numel - first * BLOCK, ROWS * BLOCK).to(tl.int32)
    x = _values(values + first * BLOCK, left, ROWS, BLOCK, WHOLE)
    bits = x.to(tl.int32, bitcast=True)
    largest = tl.max(bits & MAGNITUDE, axis=1)  # [ROWS]
    lower = tl.maximum(tl.minimum((largest >> 23) + 1, 254), 127) - 127
    window = tl.where(largest < INFINITY, lower, NO_WINDOW)
    tl.store(payload + first + tl.arange(0, ROWS), window)
    add = 0x400000
    if STOCHASTIC:
        add = (_random_bits(first, low, high, ROWS, BLOCK) >> 9).to(tl.int32)
    exponents = tl.minimum(((bits & MAGNITUDE) + add) >> 23, 254)
    codes = tl.maximum(exponents, lower[:, None]) - lower[:, None]
    codes = codes | ((bits >> 24) & 0x80)
    codes = tl.where((largest < INFINITY)[:, None], codes, 0)
    _put(payload + blocks + first * BLOCK, _packed(codes, 8, 4), left, 4, UNIT, WHOLE)


@triton.jit(do_not_specialize=["numel", "low", "high"])
def natural_encode(
    values,
    payload,
    numel,
    low,
    high,
    BLOCK: constexpr,
    ROWS: constexpr,
    UNIT: constexpr,
    STOCHASTIC: constexpr,
):
    """The payload of values [numel]; `low` and `high` are the halves of the mixed key, as int32."""
    tile, tiles = _place(numel, ROWS * BLOCK)
    if tile < tiles:
        _natural_encode(values, payload, numel, low, high, tile * ROWS, BLOCK, ROWS, UNIT, STOCHASTIC, True)
    else:
        _natural_encode(
            values, payload, numel, low, high, tile + tiles * (ROWS - 1), BLOCK, 1, 1, STOCHASTIC, False
        )


@triton.jit
def _natural_decode(
    payload,
    out,
    numel,
    first,
    BOUND: constexpr,
    BLOCK: constexpr,
    ROWS: constexpr,
    UNIT: constexpr,
    WHOLE: constexpr,
):
    blocks = tl.cdiv(numel.to(tl.int64), BLOCK)
    left = tl.minimum(numel - first * BLOCK, ROWS * BLOCK).to(tl.int32)
    words = _take(payload + blocks + first * BLOCK, left, ROWS, BLOCK // 4, 4, UNIT, WHOLE)
    codes = _unpacked(words, 8, 4)  # [ROWS, BLOCK / 4, 4]
    window = tl.load(payload + first + tl.arange(0, ROWS)).to(tl.int32)[:, None, None]
    level = codes & 127
    bits = tl.where(level == 0, 0, (level + window) << 23) | ((codes >> 7) << 31)
    x = tl.where(window == NO_WINDOW, NOT_FINITE, bits).to(tl.float32, bitcast=True)
    _store_values(x, out + first * BLOCK, left, BOUND, WHOLE)


@triton.jit(do_not_specialize=["numel"])
def natural_decode(payload, out, numel, BOUND: constexpr, BLOCK: constexpr, ROWS: constexpr, UNIT: constexpr):
    """The values [numel] of a payload."""
    tile, tiles = _place(numel, ROWS * BLOCK)
    if tile < tiles:
        _natural_decode(payload, out, numel, tile * ROWS, BOUND, BLOCK, ROWS, UNIT, True)
    else:
        _natural_decode(payload, out, numel, tile + tiles * (ROWS - 1), BOUND, BLOCK, 1, 1, False)
