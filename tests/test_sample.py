"""The order of samples and who takes which: index arithmetic, tested by properties."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.core.errors import DataError, UsageError
from manyhands.data.partition import divide
from manyhands.data.permute import Permutation
from manyhands.data.sample import Order, places

seeds = st.integers(min_value=0, max_value=2**64 - 1)


def whole(n: int, seed: int, epoch: int) -> np.ndarray:
    return Permutation(n, seed, epoch).take(np.arange(n))


@given(n=st.integers(1, 3000), seed=seeds, epoch=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_a_permutation_takes_each_index_once_and_seeking_equals_reading(
    n: int, seed: int, epoch: int
) -> None:
    order = whole(n, seed, epoch)
    assert sorted(order.tolist()) == list(range(n))
    permutation = Permutation(n, seed, epoch)
    for i in {0, n // 2, n - 1}:
        assert permutation[i] == order[i]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17])
def test_small_permutations_are_bijections_and_scalar_equals_vector(n: int) -> None:
    for seed in range(20):
        permutation = Permutation(n, seed)
        assert [permutation[i] for i in range(n)] == whole(n, seed, 0).tolist()
        assert sorted(permutation[i] for i in range(n)) == list(range(n))


@pytest.mark.parametrize("n", [10**9, 2**40, 2**62])
def test_any_sample_of_a_huge_order_is_found_at_once(n: int) -> None:
    positions = np.array([0, 1, n // 3, n // 2, n - 2, n - 1])
    start = time.process_time()
    permutation = Permutation(n, seed=3, epoch=7)
    scalars = [permutation[int(i)] for i in positions]
    assert time.process_time() - start < 0.5  # microseconds in truth; a scan of 10**9 takes much longer
    vector = permutation.take(positions)
    assert vector.dtype == np.int64
    assert vector.tolist() == scalars
    assert len(set(scalars)) == len(scalars)
    assert all(0 <= x < n for x in scalars)


@given(n=st.integers(10**9, 2**62), seed=seeds, first=st.integers(0, 10**8))
@settings(max_examples=30, deadline=None)
def test_a_window_of_a_huge_order_has_no_repeats(n: int, seed: int, first: int) -> None:
    window = Permutation(n, seed).take(np.arange(first, first + 500)).tolist()
    assert len(set(window)) == 500
    assert min(window) >= 0
    assert max(window) < n


@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_order_of_a_few_is_about_as_likely_as_any_other(n: int) -> None:
    """Chi-square over seeds; the bound is far beyond chance (p < 1e-9) and far below a biased cipher's."""
    orders = math.factorial(n)
    trials = 150 * orders
    seen = Counter(tuple(whole(n, seed, 0).tolist()) for seed in range(trials))
    chi2 = sum((seen[p] - 150) ** 2 / 150 for p in itertools.permutations(range(n)))
    assert chi2 < (orders - 1) + 8 * math.sqrt(2 * (orders - 1)) + 20


def test_every_position_is_about_as_likely_for_a_sample() -> None:
    n, trials = 40, 4000
    counts = np.zeros((n, n))
    for seed in range(trials):
        counts[np.arange(n), whole(n, seed, 1)] += 1
    chi2 = ((counts - trials / n) ** 2 / (trials / n)).sum()
    df = (n - 1) ** 2
    assert abs(chi2 - df) < 8 * math.sqrt(2 * df)


def test_epochs_and_seeds_give_unrelated_orders() -> None:
    n = 2000
    base = whole(n, 0, 0)
    for other in (whole(n, 0, 1), whole(n, 1, 0), np.arange(n)):
        # the number of fixed points of a random permutation has mean and variance 1
        assert (base == other).sum() < 12
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.15


def test_positions_outside_are_refused() -> None:
    for i in (-1, 5):
        with pytest.raises(IndexError, match=f"position {i} of 5"):
            Permutation(5, 0)[i]
        with pytest.raises(IndexError, match=f"position {i} of 5"):
            Permutation(5, 0).take(np.array([0, i]))
    assert Permutation(5, 0).take(np.array([], dtype=np.int64)).shape == (0,)
    with pytest.raises(DataError, match="n = 0 samples"):
        Permutation(0, 0)
    with pytest.raises(UsageError, match="at most"):
        Permutation(2**62 + 1, 0)


# ------------------------------------------------------------------------------------------------- batches


@given(
    n=st.integers(1, 400),
    global_batch=st.integers(1, 500),
    workers=st.integers(1, 9),
    micro_batch=st.integers(1, 9),
    seed=seeds,
)
@settings(max_examples=80, deadline=None)
def test_each_sample_once_per_epoch_for_any_batch_and_any_number_of_workers(
    n: int, global_batch: int, workers: int, micro_batch: int, seed: int
) -> None:
    order = Order(n, global_batch, seed)
    for epoch in (0, 1):
        used: list[int] = []
        first = epoch * order.steps_per_epoch
        for step in range(first, first + order.steps_per_epoch):
            ids = order.ids(step)
            cuts = places(len(ids), micro_batch)
            shares = divide(len(cuts), [1.0] * workers)
            together = [
                int(i)
                for share in shares
                for place in share
                for i in ids[cuts[place].start : cuts[place].stop]
            ]
            assert together == ids.tolist()  # the workers' parts, in rank order, are the global batch
            used += together
        assert sorted(used) == list(range(n))


def test_18_rows_on_7_workers() -> None:
    order = Order(n=90, global_batch=18, seed=1)
    cuts = places(18, 1)
    shares = divide(len(cuts), [1] * 7)
    assert [len(s) for s in shares] == [3, 3, 3, 3, 2, 2, 2]
    used = [
        int(i)
        for step in range(order.steps_per_epoch)
        for s in shares
        for i in order.ids(step)[s.start : s.stop]
    ]
    assert sorted(used) == list(range(90))


@given(n=st.integers(1, 300), global_batch=st.integers(1, 80), seed=seeds, drop_last=st.booleans())
@settings(max_examples=60, deadline=None)
def test_seeking_equals_walking(n: int, global_batch: int, seed: int, drop_last: bool) -> None:
    if drop_last and n < global_batch:
        n = global_batch
    order = Order(n, global_batch, seed, drop_last)
    seen = 0
    for step in range(2 * order.steps_per_epoch + 2):
        epoch, within = divmod(step, order.steps_per_epoch)
        walked = whole(n, seed, epoch)[within * global_batch : (within + 1) * global_batch]
        assert order.ids(step).tolist() == walked.tolist()
        assert order.rows(step) == len(walked)
        assert order.seen(step) == seen
        assert int(order.epoch(step)) == epoch
        seen += len(walked)
        if drop_last:
            assert len(walked) == global_batch
    assert order.epoch(3 * order.steps_per_epoch) == 3.0


def test_a_late_step_of_a_huge_order_is_found_at_once() -> None:
    order = Order(n=10**9, global_batch=512, seed=0)
    start = time.process_time()
    ids = order.ids(5_000_000_000)
    assert time.process_time() - start < 0.5
    assert ids.shape == (512,)
    assert ids.dtype == np.int64
    assert len(set(ids.tolist())) == 512


def test_the_last_partial_batch_is_kept_unless_it_is_not_wanted() -> None:
    assert [len(Order(10, 4, 0).ids(s)) for s in range(4)] == [4, 4, 2, 4]
    assert [len(Order(10, 4, 0, drop_last=True).ids(s)) for s in range(4)] == [4, 4, 4, 4]
    assert Order(10, 4, 0, drop_last=True).steps_per_epoch == 2
    assert Order(3, 8, 0).ids(0).shape == (3,)


def test_impossible_orders_are_refused_by_value_and_remedy() -> None:
    with pytest.raises(DataError, match=r"n = 0 samples.*not empty"):
        Order(0, 4, 0)
    with pytest.raises(UsageError, match=r"global_batch = 0.*--global-batch >= 1"):
        Order(4, 0, 0)
    with pytest.raises(DataError, match="keep the last batch"):
        Order(3, 4, 0, drop_last=True)
    with pytest.raises(UsageError, match="step = -1"):
        Order(4, 4, 0).ids(-1)


# -------------------------------------------------------------------------------------------------- shares


@given(
    n=st.integers(0, 5000),
    weights=st.lists(st.floats(0, 1e6, allow_nan=False) | st.just(0.0), min_size=1, max_size=12).filter(any),
)
@settings(max_examples=150, deadline=None)
def test_shares_are_exact_contiguous_and_within_one_unit_of_the_quota(n: int, weights: list[float]) -> None:
    ranges = divide(n, weights)
    assert [i for r in ranges for i in r] == list(range(n))
    assert len(ranges) == len(weights)
    total = sum(Fraction(w) for w in weights)
    for r, w in zip(ranges, weights, strict=True):
        assert abs(len(r) - n * Fraction(w) / total) < 1
        if w == 0:
            assert len(r) == 0
    assert divide(n, weights) == ranges


@given(n=st.integers(0, 200), workers=st.integers(1, 20))
def test_equal_workers_differ_by_at_most_one_and_the_first_have_more(n: int, workers: int) -> None:
    lengths = [len(r) for r in divide(n, [1] * workers)]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [1, math.inf], [math.nan]])
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(UsageError, match="relative share"):
        divide(3, weights)


def test_places_cut_a_batch_completely() -> None:
    assert places(0, 4) == []
    assert places(5, 2) == [range(2), range(2, 4), range(4, 5)]
    with pytest.raises(UsageError, match="micro_batch = 0"):
        places(5, 0)
    with pytest.raises(UsageError, match="n_rows = -1"):
        places(-1, 2)
    with pytest.raises(UsageError, match="n_units = -1"):
        divide(-1, [1])
