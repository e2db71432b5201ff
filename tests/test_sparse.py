"""Exchanges that send some entries: top-k, random-k, threshold, sketches. Fast paths against their readable references."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.core import config
from manyhands.core.errors import UsageError
from manyhands.core.request import Gather, Sum
from manyhands.exchange import largest as selection
from manyhands.exchange import sketch as sketching
from manyhands.exchange import sparse
from manyhands.exchange.countsketch import CountSketch
from manyhands.exchange.feedback import ErrorFeedback
from manyhands.exchange.fetchsgd import FetchSGD
from manyhands.exchange.randomk import RandomK
from manyhands.exchange.sketch import Sketch
from manyhands.exchange.threshold import Threshold
from manyhands.exchange.topk import TopK
from manyhands.wire.drive import lockstep

WORLDS = [1, 2, 3, 5]
KINDS = list(sparse.VALUE_BITS)


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _talk(exchange: Any, values: list[torch.Tensor], states: list[Any] | None = None) -> list[Any]:
    states = states or [exchange.init([v]) for v in values]
    return lockstep([exchange.talk([v.clone()], s) for v, s in zip(values, states, strict=True)])


def _bytes(exchange: Any, value: torch.Tensor) -> int:
    """Bytes that one of two workers with the same contribution hands over."""
    talks = [exchange.talk([value.clone()], exchange.init([value])) for _ in range(2)]
    total = 0

    def tapped(talk: Any, count: bool) -> Any:
        nonlocal total
        reply = None
        while True:
            try:
                request = talk.send(reply)
            except StopIteration as end:
                return end.value
            if count and isinstance(request, Sum | Gather):
                total += request.tensor.numel() * request.tensor.element_size()
            reply = yield request

    lockstep([tapped(talk, rank == 0) for rank, talk in enumerate(talks)])
    return total


@pytest.fixture(params=["compiled", "torch"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to select and to sketch, where the compiled one can be had."""
    for module in (selection, sketching):
        if request.param == "torch":
            monkeypatch.setattr(module, "_kernels", lambda: None)
        elif module._kernels() is None:
            pytest.skip("no C++ compiler")
    return str(request.param)


# ------------------------------------------------------------------------------------------------- packing


@given(width=st.integers(0, 40), codes=st.lists(st.integers(0, 2**40 - 1), max_size=40))
@settings(max_examples=60, deadline=None)
def test_bits_come_back_at_the_stated_size(width: int, codes: list[int]) -> None:
    given_codes = torch.tensor([c & ((1 << width) - 1) for c in codes], dtype=torch.int64)
    packed = sparse.pack_bits(given_codes, width)
    assert packed.numel() == sparse.bits_bytes(len(codes), width)
    assert torch.equal(sparse.unpack_bits(packed, len(codes), width), given_codes)


@given(numel=st.integers(1, 5000), share=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_positions_come_back_at_the_stated_size(numel: int, share: float, seed: int) -> None:
    count = round(share * numel)
    order = torch.randperm(numel, generator=torch.Generator().manual_seed(seed))
    where = order[:count].sort().values
    packed = sparse.pack_where(where, numel)
    assert packed.numel() == sparse.where_bytes(numel, count)
    assert torch.equal(sparse.unpack_where(packed, numel, count), where)


def test_positions_take_at_most_two_bits_more_than_the_logarithm() -> None:
    for numel, count in ((4096 * 1000, 64 * 1000), (31_400_000, 314_000), (10**9, 10**4)):
        entropy = (
            math.lgamma(numel + 1) - math.lgamma(count + 1) - math.lgamma(numel - count + 1)
        ) / math.log(2)
        bits = 8 * sparse.where_bytes(numel, count)
        assert entropy <= bits <= (2 + math.log2(numel / count)) * count + 64
        assert bits <= 1.1 * entropy
    assert 8 * sparse.where_bytes(4096 * 1000, 64 * 1000) / 64_000 < 8.01  # DeMo and SparseLoCo count 12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 7, 128, 129, 1000])
def test_values_come_back_within_their_bound(kind: str, count: int) -> None:
    values = _normal(count) * _normal(count, seed=1).exp()
    packed = sparse.pack_values(values, kind)  # type: ignore[arg-type]
    assert packed.numel() == sparse.values_bytes(count, kind)  # type: ignore[arg-type]
    decoded = sparse.unpack_values(packed, count, kind, torch.float32)  # type: ignore[arg-type]
    if kind in ("fp32", "bf16"):
        assert ((decoded - values).abs() <= values.abs() * {"fp32": 0, "bf16": 2**-8}[kind]).all()
        return
    for begin in range(0, count, sparse.GROUP):
        group, result = values[begin : begin + sparse.GROUP], decoded[begin : begin + sparse.GROUP]
        spread = group.abs().amax() - group.abs().amin()
        levels = {"int8": 127, "int4": 7, "int2": 0.5}[kind]  # of 2 bits: no more than the spread
        bound = spread / (2 * levels) + group.abs().amax() * 2**-8
        assert ((result - group).abs() <= bound).all()
        assert (result * group >= 0).all()


@pytest.mark.parametrize("kind", ["int8", "int4", "int2"])
def test_the_smallest_numbers_do_not_come_back_larger(kind: str) -> None:
    values = _normal(300).double().mul(1e-39).float()
    packed = sparse.pack_values(values, kind)  # type: ignore[arg-type]
    left = values.double() - sparse.unpack_values(packed, 300, kind, torch.float64)  # type: ignore[arg-type]
    assert left.norm() < values.double().norm()


def test_two_bits_are_the_means_of_the_smaller_and_the_larger() -> None:
    values = torch.tensor([1.0, -1.0, 3.0, -3.0] * 32)
    packed = sparse.pack_values(values, "int2")
    assert torch.equal(sparse.unpack_values(packed, 128, "int2", torch.float32), values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_stay_so(kind: str, poison: float) -> None:
    values = _normal(300)
    values[200] = poison
    packed = sparse.pack_values(values, kind)  # type: ignore[arg-type]
    assert not sparse.unpack_values(packed, 300, kind, torch.float32)[200].isfinite()  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------- selection


def _difficult(seed: int, numel: int) -> torch.Tensor:
    """Heavy tails, ties, zeros, NaN, infinity, half precision, by turns."""
    x = _normal(numel, seed=seed) * torch.rand(numel, generator=torch.Generator().manual_seed(seed)) ** (
        seed % 5 * 3
    )
    if seed % 3 == 0:
        x = x.round()
    if seed % 4 == 0:
        x[:: 1 + seed % 50] = math.nan
    if seed % 7 == 0:
        x[1 :: 3 + seed % 50] = -math.inf
    return x.to([torch.float32, torch.bfloat16, torch.float64, torch.float16][seed % 4])


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 7, 9, 14, 20, 23])
def test_selection_equals_its_reference(seed: int, loops: str) -> None:
    numel = [1, 17, 4097, 33_000, 50_001][seed % 5]
    x = _difficult(seed, numel)
    for k in {0, 1, numel // 100, numel // 3, numel}:
        assert torch.equal(selection.largest(x, k), selection.largest_reference(x, k))
    for chunk, k in ((64, 1), (100, 33), (4096, 41), (5000, 5000)):
        found = selection.largest_of_chunks(x, chunk, k)
        assert found.numel() == selection.kept(numel, chunk, k)
        assert (found.diff() > 0).all()
        for begin in range(0, numel, chunk):
            part = x[begin : begin + chunk]
            mine = found[(found >= begin) & (found < begin + chunk)] - begin
            best = selection.largest_reference(part, selection.kept(len(part), chunk, k))
            sizes = [selection._magnitude(part)[i].sort().values for i in (mine, best)]
            assert torch.equal(*sizes)
    for threshold in (0.5, 2.0, math.inf):
        expected = (~(x.to(torch.promote_types(x.dtype, torch.float32)).abs() < threshold)).nonzero().view(-1)
        assert torch.equal(selection.at_least(x, threshold), expected)


def test_a_strided_vector_is_selected_from_as_a_copy_is(loops: str) -> None:
    x = _normal(100_000)[::2]
    assert torch.equal(selection.largest(x, 100), selection.largest(x.clone(), 100))
    assert torch.equal(selection.largest_of_chunks(x, 512, 5), selection.largest_of_chunks(x.clone(), 512, 5))
    assert torch.equal(selection.at_least(x, 1.0), selection.at_least(x.clone(), 1.0))


# --------------------------------------------------------------------------------------------------- top-k


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("values", KINDS)
@pytest.mark.parametrize("chunk", [0, 64])
def test_topk_adds_everybodys_largest(world: int, values: str, chunk: int) -> None:
    codec = TopK(density=0.1, chunk=chunk, values=values)  # type: ignore[arg-type]
    given_values = [_normal(21, 13, seed=r) for r in range(world)]
    agreed = _talk(codec, given_values)
    expected = torch.zeros(21, 13)
    for value, mine in zip(given_values, agreed, strict=True):
        decoded = codec.decode(codec.encode(value.view(-1), 0), 273, torch.float32).view(21, 13)
        assert torch.equal(mine.sent[0], decoded)
        expected += decoded
        assert torch.equal(mine.mean[0], agreed[0].mean[0])
        if values == "fp32":
            kept_ones = decoded != 0
            assert torch.equal(decoded[kept_ones], value[kept_ones])
            for begin in range(0, 273, chunk or 273):
                part, flags = (t.view(-1)[begin : begin + (chunk or 273)] for t in (value, kept_ones))
                assert part[flags].abs().amin() >= part[~flags].abs().amax()
    torch.testing.assert_close(agreed[0].mean[0], expected, rtol=1e-6, atol=1e-6)


def test_everything_may_be_sent() -> None:
    for codec in (TopK(density=1.0), TopK(k=64, chunk=64), TopK(density=1.0, chunk=0)):
        value = _normal(1000)
        assert codec.size_bytes(1000) == 4000
        assert torch.equal(codec.decode(codec.encode(value, 0), 1000, torch.float32), value)


def test_the_mean_of_the_senders_alone() -> None:
    a = torch.tensor([8.0, 0.1, 0.0, 0.0]) / 2  # weights 1/2: contributions add up to the mean
    b = torch.tensor([4.0, 0.0, 6.0, 0.0]) / 2
    codec = TopK(k=2, chunk=4, average="senders")
    agreed = _talk(codec, [a, b])
    torch.testing.assert_close(agreed[0].mean[0], torch.tensor([6.0, 0.1, 6.0, 0.0]))
    torch.testing.assert_close(agreed[1].sent[0], b)
    assert not codec.conserves
    assert TopK().conserves
    everyone = _talk(TopK(k=2, chunk=4), [a, b])
    torch.testing.assert_close(everyone[0].mean[0], torch.tensor([6.0, 0.05, 3.0, 0.0]))


def test_sparseloco_takes_ten_bits_an_entry() -> None:
    codec = TopK(chunk=4096, k=64, values="int2", average="senders")
    numel = 4096 * 8
    assert 8 * codec.size_bytes(numel) / (64 * 8) <= 10.26  # 8 of position, 2 of value, 1/4 of ranges
    value = _normal(numel)
    assert codec.encode(value, 0).numel() == codec.size_bytes(numel)
    feedback = ErrorFeedback(codec, decay=0.95)
    states = [feedback.init([value]) for _ in range(2)]
    for _ in range(3):
        agreed = _talk(feedback, [value, value], states)
        states = [each.state for each in agreed]
    assert torch.equal(states[0]["residual"][0], states[1]["residual"][0])


@pytest.mark.parametrize(
    "exchange", [TopK(density=0.03), Threshold(), CountSketch(density=0.03)], ids=lambda e: type(e).__name__
)
def test_the_largest_never_wait_for_long_under_feedback(exchange: Any) -> None:
    """A constant contribution is delivered: after t rounds Σ agreed is near t g, though a small share travels at a time."""
    feedback, value = ErrorFeedback(exchange), _normal(2000)
    states = [feedback.init([value / 2]) for _ in range(2)]
    total = torch.zeros(2000)
    for _ in range(120):
        agreed = _talk(feedback, [value / 2, value / 2], states)
        states = [each.state for each in agreed]
        total += agreed[0].mean[0]
    held = sum(s["residual"][0] for s in states)
    torch.testing.assert_close(total + held, 120 * value, rtol=1e-3, atol=1e-2)
    assert float((total / 120 - value).norm() / value.norm()) < 0.35


# ----------------------------------------------------------------------------------------------- threshold


@pytest.mark.parametrize(
    ("of", "scale"),
    [
        ("absolute", lambda x: 1.0),
        ("rms", lambda x: float(x.double().square().mean().sqrt())),
        ("norm", lambda x: float(x.double().norm())),
        ("max", lambda x: float(x.abs().amax())),
    ],
)
def test_a_threshold_sends_what_reaches_it(of: Any, scale: Callable[[torch.Tensor], float]) -> None:
    x = _normal(500)
    above = 0.1 if of in ("norm", "max") else 1.5
    codec = Threshold(above=above, of=of)
    (agreed,) = _talk(codec, [x])
    expected = torch.where(x.abs() >= above * scale(x), x, 0)
    assert torch.equal(agreed.sent[0], expected)
    count = int(expected.count_nonzero())
    assert 0 < count < 500
    assert codec.encode(x, 0).numel() == codec.payload_bytes(500, count)
    assert _bytes(codec, x) == codec.payload_bytes(500, count)


@pytest.mark.parametrize("of", ["rms", "norm", "max", "absolute"])
def test_a_threshold_of_zeros_of_huge_and_of_unequal_contributions(of: Any) -> None:
    codec = Threshold(above=0.5, of=of)
    agreed = _talk(codec, [torch.zeros(50), torch.full((50,), 1e38), _normal(50)])
    assert not agreed[0].sent[0].any()
    sent = agreed[1].sent[0]
    assert torch.equal(sent, torch.full((50,), 1e38)) or of == "norm"  # each is 1/√50 of the norm
    assert torch.equal(agreed[0].mean[0], agreed[2].mean[0])


# ------------------------------------------------------------------------------------------------ random-k


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("block", [1, 16])
def test_random_entries_are_the_same_on_all_and_others_each_round(world: int, block: int) -> None:
    exchange = RandomK(density=0.1, block=block)
    values = [_normal(1003, seed=r) for r in range(world)]
    states, seen = None, []
    for _ in range(2):
        agreed = _talk(exchange, values, states)
        states = [each.state for each in agreed]
        kept_ones = agreed[0].sent[0] != 0
        for value, mine in zip(values, agreed, strict=True):
            assert torch.equal(mine.sent[0], torch.where(kept_ones, value, 0))
        torch.testing.assert_close(agreed[0].mean[0], torch.where(kept_ones, sum(values), 0))
        seen.append(kept_ones)
    assert not torch.equal(*seen)
    assert _bytes(exchange, values[0]) == exchange.size_bytes(1003)
    assert 4 * int(seen[0].sum()) == exchange.size_bytes(1003) - 4  # and whether all is finite


def test_random_entries_scaled_are_unbiased() -> None:
    exchange, value = RandomK(density=0.2, unbiased=True), _normal(53, dtype=torch.float64)
    state, total, squares = exchange.init([value]), torch.zeros_like(value), torch.zeros_like(value)
    rounds = 1500
    for _ in range(rounds):
        ((mean,), _, state) = _talk(exchange, [value], [state])[0]
        total += mean
        squares += mean**2
    error = (squares / rounds - (total / rounds) ** 2).div(rounds).sqrt()
    assert ((total / rounds - value).abs() <= 5 * error + 1e-12).all()
    assert float(squares.sum() / rounds) <= 1.1 * 53 / 10 * float(value.square().sum()) + 1e-9


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_sent_is_seen_if_it_is_not_finite(poison: float) -> None:
    for exchange in (RandomK(density=0.001), RandomK(density=0.001, block=8), CountSketch(density=0.001)):
        values = [_normal(5000, seed=r) for r in range(3)]
        values[1][1234] = poison
        agreed = _talk(exchange, values)
        assert all(not each.mean[0].isfinite().all() for each in agreed)
        assert agreed[0].sent[0].isfinite().all()  # who did not cause it keeps a sound residual
        assert not agreed[1].sent[0].isfinite().all()
    huge = [torch.full((5000,), 3e38) for _ in range(1)]  # the sum overflows, no entry does
    assert _talk(RandomK(), huge)[0].mean[0].isfinite().all()


# ------------------------------------------------------------------------------------------------ sketches


@pytest.mark.parametrize("rows", [1, 3, 5, 7])
@pytest.mark.parametrize(("numel", "columns"), [(1, 1), (64, 64), (1000, 77), (60_000, 17_000)])
def test_a_sketch_equals_its_definition(rows: int, numel: int, columns: int, loops: str) -> None:
    sketch = Sketch(numel, rows, columns, key=7)
    x = _normal(numel, dtype=torch.float64)
    shifts, signs = (torch.tensor(t) for t in sketch._turns())
    where = torch.arange(numel)
    expected = torch.zeros(rows, columns, dtype=torch.float64)
    for row in range(rows):
        place = (where % columns + shifts[row, where // columns]) % columns
        expected[row].index_add_(0, place, x * signs[row, where // columns])
        assert torch.equal(sketch.buckets(where)[row], place)
    torch.testing.assert_close(sketch.of(x), expected)
    torch.testing.assert_close(sketch.estimate(expected), sketch.estimate_reference(expected))
    single = sketch.of(x.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(sketch.estimate(single), sketch.estimate_reference(single))


def test_a_sketch_is_linear_and_its_estimates_unbiased() -> None:
    x, y = _normal(500, dtype=torch.float64), _normal(500, seed=1, dtype=torch.float64)
    sketch = Sketch(500, 1, 40, key=3)
    torch.testing.assert_close(sketch.of(x) + 2 * sketch.of(y), sketch.of(x + 2 * y))
    estimates = []
    for key in range(600):
        sketch = Sketch(500, 1, 40, 2 * key)  # the lowest bit is not used
        estimates.append(sketch.estimate(sketch.of(x)))
    drawn = torch.stack(estimates)
    error = drawn.var(0).div(600).sqrt()
    assert ((drawn.mean(0) - x).abs() <= 5 * error).all()
    assert float(drawn.var(0).mean()) <= 1.2 * float(x.square().sum()) / 40  # the paper's bound


@pytest.mark.parametrize("world", WORLDS)
def test_heavy_hitters_of_the_sum_are_found(world: int) -> None:
    """Entries that are large only in the sum, and no worker's own largest."""
    numel, heavy = 100_000, torch.tensor([5, 999, 50_000, 99_999])
    values = [0.02 * _normal(numel, seed=r) for r in range(world)]
    for r, value in enumerate(values):
        value[heavy] += 10.0 / world
        value[1000 * (r + 1)] += 9.0  # my own largest, one of many if I am not alone
        values[(r + 1) % world][1000 * (r + 1)] -= 9.0
    exchange = CountSketch(rows=5, density=4 / numel, compression=20)
    agreed = _talk(exchange, values)
    total = torch.stack(values).sum(0)
    assert torch.equal(agreed[0].mean[0].nonzero().view(-1), heavy)
    torch.testing.assert_close(agreed[0].mean[0][heavy], total[heavy])
    assert all(torch.equal(mine.sent[0][heavy], v[heavy]) for mine, v in zip(agreed, values, strict=True))
    assert _bytes(exchange, values[0]) == exchange.size_bytes(numel)
    assert exchange.size_bytes(numel) <= 4 * numel / 20 * 1.02 + 16


def test_fetchsgd_equals_algorithm_1_where_the_sketch_is_the_vector() -> None:
    exchange = FetchSGD(density=0.1, momentum=0.8)  # so short that nothing would be saved
    states = None
    momentum, error = torch.zeros(100), torch.zeros(100)
    for turn in range(6):
        values = [_normal(100, seed=10 * turn + r) for r in range(3)]
        agreed = _talk(exchange, values, states)
        states = [each.state for each in agreed]
        momentum = 0.8 * momentum + sum(values)
        error = error + momentum
        where = selection.largest_reference(error, 10)
        update = torch.zeros(100)
        update[where] = error[where]
        momentum[where], error[where] = 0.0, 0.0
        torch.testing.assert_close(agreed[0].mean[0], update)


def test_fetchsgd_converges_where_what_it_holds_is_a_sketch() -> None:
    """A quadratic with a sparse gradient is solved through sketches 4 times smaller, with no state on any worker."""
    numel = 10_000
    target = torch.zeros(numel)
    target[torch.randperm(numel, generator=torch.Generator().manual_seed(1))[:50]] = 1.0
    exchange = FetchSGD(rows=5, compression=4, density=0.01, momentum=0.5)
    x = torch.zeros(numel)
    states = [exchange.init([x]) for _ in range(2)]
    for _ in range(70):
        agreed = _talk(exchange, [(x - target) / 2, (x - target) / 2], states)
        states = [each.state for each in agreed]
        x = x - 0.1 * agreed[0].mean[0]
    assert float((x - target).norm() / target.norm()) < 0.08
    assert all(
        torch.equal(a, b) for key in states[0] for a, b in zip(states[0][key], states[1][key], strict=True)
    )


def test_a_round_that_is_not_finite_leaves_fetchsgds_state() -> None:
    exchange = FetchSGD()
    values = [_normal(5000, seed=r) for r in range(2)]
    states = [each.state for each in _talk(exchange, values)]
    bad = [values[0], values[1].clone()]
    bad[1][3] = math.nan
    agreed = _talk(exchange, bad, states)
    assert all(not each.mean[0].isfinite().all() for each in agreed)
    for each, before in zip(agreed, states, strict=True):
        assert all(torch.equal(each.state[k][0], before[k][0]) for k in before)


# --------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "text",
    [
        "topk(density=0)",
        "topk(density=1.5)",
        "topk(chunk=-1)",
        "topk(k=65, chunk=64)",
        "topk(k=0)",
        "threshold(above=0)",
        "threshold(above=2, of=norm)",
        "threshold(above=nan)",
        "randomk(density=2)",
        "randomk(block=0)",
        "countsketch(rows=2)",
        "countsketch(compression=1)",
        "countsketch(density=0)",
        "fetchsgd(momentum=1)",
        "fetchsgd(rows=4)",
        "error-feedback(fetchsgd)",
        "two-phase(topk(average=senders))",
    ],
)
def test_what_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        config.from_text("exchanges", text)


def test_a_short_vector_is_its_own_sketch() -> None:
    assert sketching.shape(100, 3, 20) == (1, 100)
    assert sketching.shape(0, 3, 20) == (1, 1)
    assert sketching.shape(30_000, 3, 20) == (3, 500)
    value = _normal(100)
    assert torch.equal(_talk(CountSketch(), [value])[0].mean[0], value)
    assert _bytes(CountSketch(), value) == CountSketch().size_bytes(100) == 400
