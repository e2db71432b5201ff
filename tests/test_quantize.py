"""The quantizing codecs: bytes, error bounds, bias, what is not finite; the compiled loops against the readable reference."""

from __future__ import annotations

import dataclasses
import math
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.core.errors import Diverged, UsageError
from manyhands.exchange import natural, pack, quantize, sign
from manyhands.exchange.int2 import Int2
from manyhands.exchange.int4 import Int4
from manyhands.exchange.int8 import Int8
from manyhands.exchange.natural import Natural
from manyhands.exchange.sign import Sign
from manyhands.exchange.ternary import Ternary

UNIFORM: list[Any] = [Int8, Int4, Int2, Ternary]
LEVELS = {Int8: 254, Int4: 14, Int2: 3, Ternary: 2}  # intervals between -max and max
BITS = {Int8: 8, Int4: 4, Int2: 2, Ternary: 1.6, Sign: 1, Natural: 8}
CODECS: list[Any] = [
    *(kind(rounding=r) for kind in [*UNIFORM, Natural] for r in ("nearest", "stochastic")),
    Sign(),
]
STOCHASTIC: list[Any] = [kind(rounding="stochastic") for kind in [*UNIFORM, Natural]]
BLOCKS = [0, 1, 3, 8, 40, 256, 1281]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TINY = 2.0**-126


def ids(codec: Any) -> str:
    return f"{type(codec).__name__}-{getattr(codec, 'rounding', '')}"


def again(codec: Any, **changes: Any) -> Any:
    return dataclasses.replace(codec, **changes)


def through(codec: Any, x: torch.Tensor, key: int = 7) -> torch.Tensor:
    decoded: torch.Tensor = codec.decode(codec.encode(x, key), x.numel(), x.dtype)
    return decoded


def maxima(x: torch.Tensor, block: int) -> torch.Tensor:
    """The largest magnitude of each value's block, float64 [n]."""
    rows = quantize.in_blocks(x.reshape(-1).double(), block)
    return quantize.spread(rows.abs().amax(1), x.numel(), block)


def mixed(numel: int, seed: int, decades: float = 6.0) -> torch.Tensor:
    """Values of either sign over many orders of magnitude, some zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator) * 10 ** (
        decades * torch.randn(numel, generator=generator).clamp(-5, 5)
    )
    return torch.where(torch.rand(numel, generator=generator) < 0.05, 0.0, x)


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
tensors = st.one_of(
    st.lists(floats, max_size=40).map(lambda v: torch.tensor(v, dtype=torch.float32)),
    st.builds(
        mixed,
        st.integers(0, 3000),
        st.integers(0, 1000),
        st.sampled_from([0.0, 1.0, 6.0]),
    ),
)
keys = st.integers(0, 2**64 - 1)


# --- bytes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS, ids=ids)
def test_bytes_are_as_many_as_said_and_as_theory_has_it(codec: Any) -> None:
    for numel in [0, 1, 2, 5, 7, 255, 256, 257, 1279, 1280, 1281, 100_003]:
        payload = codec.encode(torch.ones(numel), 1)
        assert (payload.dtype, payload.numel()) == (torch.uint8, codec.size_bytes(numel))
    scales = (1 if isinstance(codec, Natural) else 2) * math.ceil(100_003 / 256)
    theory = BITS[type(codec)] * 100_003 / 8 + scales
    assert codec.size_bytes(100_003) == pytest.approx(theory, rel=1e-3)
    assert again(codec, block=0).size_bytes(100_003) <= BITS[type(codec)] * 100_003 / 8 + 3


@given(st.sampled_from(sorted(pack.BASE)), st.data())
@settings(max_examples=60, deadline=None)
def test_packing_is_undone(per: int, data: Any) -> None:
    codes = data.draw(st.lists(st.integers(0, pack.BASE[per] - 1), max_size=50))
    packed = pack.pack(torch.tensor(codes, dtype=torch.int64), per)
    assert packed.numel() == math.ceil(len(codes) / per)
    assert pack.unpack(packed, len(codes), per).tolist() == codes


@pytest.mark.parametrize("codec", CODECS, ids=ids)
def test_a_payload_of_another_length_is_refused(codec: Any) -> None:
    payload = codec.encode(torch.ones(100), 0)
    for wrong in (payload[:-1], torch.cat([payload, payload]), payload[:0], payload.to(torch.int32)):
        for decode in (codec.decode, codec.reference_decode):
            with pytest.raises(Diverged, match=f"where {payload.numel()} bytes are due"):
                decode(wrong, 100, torch.float32)


@given(
    st.sampled_from(CODECS), st.integers(1, 700), st.sampled_from(BLOCKS), st.randoms(use_true_random=False)
)
@settings(max_examples=150, deadline=None)
def test_any_bytes_of_the_right_length_decode(codec: Any, numel: int, block: int, random: Any) -> None:
    codec = again(codec, block=block)
    garbage = torch.frombuffer(bytearray(random.randbytes(codec.size_bytes(numel))), dtype=torch.uint8)
    assert codec.decode(garbage, numel, torch.float32).shape == (numel,)
    assert codec.decode(garbage, numel, torch.bfloat16).dtype is torch.bfloat16


# --- the compiled loops and the reference ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled() -> None:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    assert quantize.status() == "compiled loops"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    nan = a.isnan() & b.isnan()  # which NaN it is says nothing
    a, b = a.masked_fill(nan, 0), b.masked_fill(nan, 0)
    return a.dtype is b.dtype and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


@pytest.mark.usefixtures("compiled")
@given(st.sampled_from(CODECS), st.sampled_from(BLOCKS), tensors, keys, st.sampled_from(DTYPES))
@settings(max_examples=400, deadline=None)
def test_loops_equal_the_reference_bit_for_bit(
    codec: Any, block: int, x: torch.Tensor, key: int, dtype: torch.dtype
) -> None:
    codec = again(codec, block=block)
    x = x.to(dtype)
    payload = codec.encode(x, key)
    assert torch.equal(payload, codec.reference_encode(x, key))
    assert same_bits(
        codec.decode(payload, x.numel(), dtype), codec.reference_decode(payload, x.numel(), dtype)
    )


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("codec", CODECS, ids=ids)
def test_loops_equal_the_reference_on_a_long_tensor_and_on_bad_values(codec: Any) -> None:
    x = mixed(300_001, 3)
    x[70_000:70_300] = 0
    for place, value in ((5, torch.nan), (1000, torch.inf), (299_999, -torch.inf), (150_000, -torch.nan)):
        x[place] = value
    payload = codec.encode(x, 2**64 - 5)
    assert torch.equal(payload, codec.reference_encode(x, 2**64 - 5))
    assert same_bits(
        codec.decode(payload, x.numel(), x.dtype), codec.reference_decode(payload, x.numel(), x.dtype)
    )


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("codec", CODECS, ids=ids)
def test_payloads_need_no_alignment(codec: Any) -> None:
    x = mixed(1000, 1)
    payload = codec.encode(x, 3)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), payload])[1:]
    for decode in (codec.decode, codec.reference_decode):
        assert same_bits(decode(shifted, 1000, torch.float32), codec.decode(payload, 1000, torch.float32))


def test_without_a_compiler_the_reference_computes() -> None:
    code = """
import torch
from manyhands.exchange import quantize
from manyhands.exchange.int4 import Int4
x, codec = torch.linspace(-1, 1, 1000), Int4(rounding="stochastic")
payload = codec.encode(x, 5)
assert torch.equal(payload, codec.reference_encode(x, 5))
assert (codec.decode(payload, 1000, torch.float32) - x).abs().max() < 0.15
print(quantize.status())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"MANYHANDS_KERNELS": "off"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "PyTorch's operations (MANYHANDS_KERNELS=off: slower)"


EXPRESSIONS = {
    "uniform": (
        quantize.expression_of_encode,
        quantize.expression_of_decode,
        (14, 2, 256),
    ),
    "sign": (sign.expression_of_encode, sign.expression_of_decode, (256,)),
    "natural": (natural.expression_of_encode, natural.expression_of_decode, (256,)),
}


@pytest.mark.parametrize("name", list(EXPRESSIONS))
def test_expressions_trace_once_for_all_sizes_and_keys(name: str) -> None:
    """What torch.compile is given on a GPU: whole graphs, the same bits, not made anew for another size or key."""
    encode, decode, fixed = EXPRESSIONS[name]
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    traced = [torch.compile(f, backend=count, dynamic=True, fullgraph=True) for f in (encode, decode)]
    for numel, key in ((100_003, 1), (300_000, 2**64 - 1)):
        x = mixed(numel, 1)
        random = () if name == "sign" else (quantize.seed(key, x.device),)
        flags = () if name == "sign" else (True,)
        payload = traced[0](x, *random, *fixed, *flags)
        assert torch.equal(payload, encode(x, *random, *fixed, *flags))
        assert same_bits(traced[1](payload, numel, *fixed), decode(payload, numel, *fixed))
    assert len(graphs) == 2
    torch._dynamo.reset()


# --- error bounds --------------------------------------------------------------------------------------------------------


@given(st.sampled_from(UNIFORM), st.booleans(), st.sampled_from(BLOCKS), tensors, keys)
@settings(max_examples=200, deadline=None)
def test_error_is_within_half_a_step_or_a_step(
    kind: Any, nearest: bool, block: int, x: torch.Tensor, key: int
) -> None:
    codec = kind(block=block, rounding="nearest" if nearest else "stochastic")
    error = (through(codec, x, key).double() - x.double()).abs()
    step = (maxima(x, block) * 2 / LEVELS[kind] * (1 + 2**-7)).clamp(min=TINY)
    assert (error <= step * (0.5 if nearest else 1.0) * (1 + 1e-4)).all()


@given(st.booleans(), st.sampled_from(BLOCKS), tensors, keys)
@settings(max_examples=100, deadline=None)
def test_natural_error_is_relative(nearest: bool, block: int, x: torch.Tensor, key: int) -> None:
    decoded = through(Natural(block=block, rounding="nearest" if nearest else "stochastic"), x, key).double()
    size = x.double().abs()
    floor = torch.maximum(maxima(x, block) * 2.0**-125, torch.tensor(TINY, dtype=torch.float64))
    share = torch.where(size > 2.0**127, 0.5, 1 / 3 if nearest else 1.0)
    assert ((decoded - x.double()).abs() <= torch.maximum(share * size, floor)).all()
    kept = decoded[decoded != 0].abs()
    assert (torch.frexp(kept).mantissa == 0.5).all()  # powers of two
    assert (decoded * x.double() >= 0).all()


@given(st.sampled_from(BLOCKS), tensors)
@settings(max_examples=100, deadline=None)
def test_sign_error_is_that_of_the_best_scale(block: int, x: torch.Tensor) -> None:
    block = min(block, 256)
    decoded = through(Sign(block=block), x).double()
    counts = quantize.in_blocks(torch.ones_like(x), block).double().sum(1)
    rows, out = (quantize.in_blocks(t.double(), block) for t in (x, decoded))
    mean = rows.abs().sum(1) / counts.clamp(min=1)
    slack = counts * (mean * 2.0**-7.999 + 1e-40) ** 2 + (rows**2).sum(1) * 1e-9
    exact = (rows**2).sum(1) - mean**2 * counts
    assert (((out - rows) ** 2).sum(1) <= exact + slack).all()
    assert (torch.signbit(decoded) == torch.signbit(x)).all()


def test_a_scale_makes_no_difference_but_by_scale() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for codec in CODECS:
        for power in (-90, 90):
            assert torch.equal(through(codec, x * 2.0**power), through(codec, x) * 2.0**power), codec


@pytest.mark.parametrize("codec", CODECS, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers_stay_finite(codec: Any, dtype: torch.dtype) -> None:
    most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    x = torch.tensor([most, -most, most / 3, 0.0, 1.0], dtype=dtype)
    decoded = through(codec, x)
    assert decoded.isfinite().all()
    assert decoded.dtype is dtype
    if getattr(codec, "rounding", "") == "nearest" and not isinstance(codec, Natural):
        assert decoded[0] >= 0.99 * most


@pytest.mark.parametrize("codec", CODECS, ids=ids)
def test_zeros_stay_zeros(codec: Any) -> None:
    x = torch.zeros(700)
    x[300] = 5  # in the second block
    decoded = through(codec, x)
    assert decoded[256:512].any()
    decoded[256:512] = 0
    assert not decoded.any()


# --- shapes, types, what is not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_and_types(codec: Any, dtype: torch.dtype) -> None:
    base = torch.randn(60, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    for x in (base, base.t(), base[::3, 1::2], base[0, 0], base[:0], base.clone().requires_grad_()):
        payload = codec.encode(x, 1)
        flat = x.detach().reshape(-1).contiguous()
        assert torch.equal(payload, codec.encode(flat, 1))
        decoded = codec.decode(payload, x.numel(), dtype)
        assert (decoded.dtype, decoded.shape, decoded.requires_grad) == (dtype, flat.shape, False)
        assert torch.equal(x.detach().reshape(-1), flat)  # untouched


@pytest.mark.parametrize("codec", CODECS, ids=ids)
@pytest.mark.parametrize("poison", [torch.nan, -torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_is_seen_in_its_block_alone(codec: Any, poison: float, dtype: torch.dtype) -> None:
    x = torch.ones(1000, dtype=dtype)
    x[300] = poison
    decoded = through(codec, x)
    assert decoded[256:512].isnan().all()
    assert torch.cat([decoded[:256], decoded[512:]]).isfinite().all()
    assert through(again(codec, block=0), x).isnan().all()


def test_beyond_float32_is_seen() -> None:
    for codec in CODECS:
        assert through(codec, torch.tensor([1e300, 1.0], dtype=torch.float64)).isnan().all(), codec


# --- randomness ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", STOCHASTIC, ids=ids)
def test_stochastic_rounding_has_no_bias(codec: Any) -> None:
    """The mean over many keys lies as near to the tensor as its standard error says, in every place and on average."""
    n, draws = 512, 4000
    x = mixed(n, 5, decades=0.0)
    outcomes = torch.stack([through(codec, x, key).double() for key in range(draws)])
    gap = x.abs() if isinstance(codec, Natural) else maxima(x, codec.block) * 2 / LEVELS[type(codec)]
    rare = gap * 20**0.5 / draws  # the standard error of what happens 20 times
    off = (outcomes.mean(0) - x.double()) / torch.maximum(outcomes.std(0) / draws**0.5, rare).clamp(min=1e-30)
    assert off.abs().max() < 4.5  # 512 values: P < 0.004 for fair ones; the keys are fixed
    assert abs(float(off.mean())) * n**0.5 < 3.5
    assert 0.7 < float(off.std()) < 1.15


def test_natural_variance_is_at_most_an_eighth() -> None:
    x = torch.linspace(1, 2, 257)
    outcomes = torch.stack([through(Natural(), x, key).double() for key in range(2000)])
    variance = ((outcomes - x.double()) ** 2).mean(0)
    assert (variance <= x.double() ** 2 / 8 * 1.15).all()


@pytest.mark.parametrize("codec", STOCHASTIC, ids=ids)
def test_chance_is_a_function_of_tensor_and_key(codec: Any) -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(1)
    first = codec.encode(x, 11)
    torch.manual_seed(2)
    assert torch.equal(first, codec.encode(x.clone(), 11))
    for other in (12, 11 + (1 << 32), 11 + (1 << 63)):
        assert not torch.equal(first, codec.encode(x, other))
    nearest = again(codec, rounding="nearest")
    assert torch.equal(nearest.encode(x, 11), nearest.encode(x, 12))


def test_random_bits_look_random() -> None:
    n = 1 << 16
    like = torch.empty(n)
    keys = (0, 1, 1 << 32, 0xDEADBEEF12345678)
    streams = [quantize.random_bits(like, quantize.seed(key, like.device)) for key in keys]
    for bits in streams:
        ones = torch.stack([(bits >> k & 1).double().mean() for k in range(32)])
        assert ((ones - 0.5).abs() < 5 * 0.5 / n**0.5).all()
        cells = torch.bincount(bits >> 24, minlength=256).double()
        chi2 = float(((cells - n / 256) ** 2 / (n / 256)).sum())
        assert 255 - 5 * 22.6 < chi2 < 255 + 5 * 22.6
        centred = (bits >> 8).double() / 2**24 - 0.5
        assert abs(float((centred[1:] * centred[:-1]).mean())) * 12 < 5 / n**0.5
    u = quantize.dither(like, quantize.seed(0, like.device))
    assert ((u > 0) & (u < 1)).all()
    for i, a in enumerate(streams):  # unrelated streams of unequal keys, also after sorting
        for b in streams[:i]:
            same = ((a >> 24) == (b >> 24)).double().mean()
            assert abs(float(same) - 1 / 256) < 5 * (1 / 256 / n) ** 0.5
            assert not torch.equal(a.sort().values, b.sort().values)


# --- usage ---------------------------------------------------------------------------------------------------------------


def test_impossible_parameters_are_refused() -> None:
    for kind in [*UNIFORM, Natural]:
        with pytest.raises(UsageError, match=r"rounding: 'up'.*it is one of 'nearest', 'stochastic'"):
            kind(rounding="up")
    for kind in [*UNIFORM, Natural, Sign]:
        with pytest.raises(UsageError, match=r"block = -1.*at least one value"):
            kind(block=-1)
