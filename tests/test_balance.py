"""Who computes what: places given to a feed, shares from measurements, costs, and the order of samples."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import Texts, feed_of, rows_of

from manyhands.balance.balancer import Balancer
from manyhands.balance.estimate import REST, Track, fit
from manyhands.balance.shares import Cost, makespan, solve
from manyhands.core.errors import UsageError
from manyhands.data.partition import divide, divide_costs
from manyhands.data.sample import Order

# -- the feed


@pytest.mark.parametrize("step", [0, 1, 2])
def test_weights_and_rank_of_a_feed_may_change_between_steps(step: int) -> None:
    feed = feed_of()
    whole = feed.order.ids(step).tolist()
    for weights in ([1.0, 2.0], [5, 1, 1], [0, 3, 1, 0]):
        feed.weights = weights
        found = []
        for feed.rank in range(len(weights)):
            part = feed.part(step)
            assert (part.rows, part.n_places) == (len(whole), -(-len(whole) // 2))
            mine = [first for first, _ in part.micro_batches]
            assert set(mine) <= set(feed.division(step)[feed.rank])
            found += rows_of(feed, step)
        assert [row for rows in found for row in rows] == whole


def test_a_part_may_be_given_by_places() -> None:
    feed = feed_of()
    ids = feed.order.ids(0).tolist()
    part = feed.part(0, places=[7, 0, 1, 2, 3, 6])
    assert [first for first, _ in part.micro_batches] == [
        0,
        3,
        6,
    ]  # at most 6 rows a pass; 3 and 6 do not touch
    assert rows_of(feed, 0, places=[7, 0, 1, 2, 3, 6]) == [ids[0:6], ids[6:8], ids[12:16]]
    assert (part.rows, part.n_places, part.step, part.seed) == (18, 9, 0, 5)
    assert feed.part(0, places=[]).micro_batches == []
    alone = feed_of(coalesce=False)
    assert rows_of(alone, 0, places=[8, 1]) == [ids[2:4], ids[16:18]]


@pytest.mark.parametrize("places", [[9], [-1], [1, 1]])
def test_places_that_cannot_be_are_refused(places: list[int]) -> None:
    with pytest.raises(UsageError, match="places"):
        feed_of().part(0, places=places)


# -- measurements -> shares

COSTS = st.builds(
    Cost, st.sampled_from([0.0, 0.1, 0.7, 3.0]), st.sampled_from([0.1, 0.25, 0.5, 1.0, 2.0, 7.3])
)


@settings(max_examples=150, deadline=None)
@given(st.lists(COSTS, min_size=1, max_size=4), st.integers(0, 9), st.data())
def test_shares_have_the_least_makespan_of_all(costs: list[Cost], n: int, data: st.DataObject) -> None:
    caps = data.draw(
        st.one_of(
            st.none(),
            st.lists(st.one_of(st.none(), st.integers(0, 9)), min_size=len(costs), max_size=len(costs)),
        )
    )
    limits = [n if cap is None else min(cap, n) for cap in caps or [None] * len(costs)]
    if sum(limits) < n:
        with pytest.raises(UsageError, match="rows"):
            solve(costs, n, caps)
        return
    found = solve(costs, n, caps)
    assert sum(found) == n
    assert all(0 <= share <= limit for share, limit in zip(found, limits, strict=True))
    every = itertools.product(*(range(limit + 1) for limit in limits))
    best = min(makespan(costs, shares) for shares in every if sum(shares) == n)
    assert makespan(costs, found) == best


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 5), st.floats(1e-4, 9)), min_size=1, max_size=8), st.integers(0, 3000))
def test_shares_of_many_rows_are_those_of_the_plain_rule(numbers: list[tuple[float, float]], n: int) -> None:
    costs = [Cost(*each) for each in numbers]
    plain = [0] * len(costs)
    for _ in range(n):  # row after row to whoever is done with it first
        rank = min(range(len(costs)), key=lambda i: (costs[i].seconds(plain[i] + 1), i))
        plain[rank] += 1
    assert solve(costs, n) == plain


def test_without_rounding_all_are_done_at_the_time_of_the_derivation() -> None:
    costs = [Cost(0.5, 0.004), Cost(0.1, 0.002), Cost(0.0, 0.001)]
    n = 100_000
    time_s = (n + sum(c.fixed / c.per_row for c in costs)) / sum(1 / c.per_row for c in costs)
    for cost, share in zip(costs, solve(costs, n), strict=True):
        assert share == pytest.approx((time_s - cost.fixed) / cost.per_row, abs=1)


@pytest.mark.parametrize("numbers", [(-1.0, 1.0), (0.0, 0.0), (math.nan, 1.0), (0.0, math.inf)])
def test_costs_that_cannot_be_are_refused(numbers: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="cost"):
        Cost(*numbers)


# -- seconds -> costs


def test_a_line_is_found_and_one_odd_step_in_five_changes_nothing() -> None:
    truth = Cost(2.0, 0.5)
    steps = [(rows, truth.seconds(rows)) for rows in (4, 6, 8, 10, 12, 14, 16, 20)]
    found = fit([*steps, (8, 60.0), (12, 90.0)])
    assert found.seconds(12) == pytest.approx(truth.seconds(12), rel=0.03)
    assert found.fixed == pytest.approx(truth.fixed, rel=0.15)  # shrunk a little


def test_nothing_is_fixed_as_long_as_rows_never_varied() -> None:
    assert fit([(8, 4.1), (8, 4.0), (8, 3.9)]) == Cost(0.0, 0.5)
    close = fit([(8.0, 4.0), (8.1, 4.2), (8.0, 3.9), (8.1, 3.9)])  # varied less than measurements differ
    assert close.fixed < 0.2


def test_a_change_of_speed_is_known_after_two_steps_and_keeps_the_form_of_the_line() -> None:
    track, truth = Track(warm=True), Cost(2.0, 0.5)
    for rows in (8, 12, 16, 8, 12, 16):
        assert not track.observe(rows, truth.seconds(rows))
    slow = [track.observe(rows, 3 * truth.seconds(rows)) for rows in (12, 12)]
    assert slow == [False, True]
    known = track.cost()
    assert known is not None
    assert known.seconds(12) == pytest.approx(3 * truth.seconds(12), rel=0.02)
    assert known.seconds(4) == pytest.approx(3 * truth.seconds(4), rel=0.1)


def test_a_single_odd_step_is_forgotten() -> None:
    track = Track(warm=True)
    for _ in range(6):
        track.observe(8, 4.0)
    before = track.cost()
    assert not track.observe(8, 13.0)
    assert not track.observe(8, 4.0)
    assert track.cost() == before


# -- a job


def play(
    truth: Callable[[int], Sequence[Cost]], n_units: int, steps: int, *, noise: float, seed: int
) -> list[tuple[int, ...]]:
    """The shares of each step of a job whose workers cost `truth(step)`, times noise."""
    draw, balancer = random.Random(seed), Balancer([f"w{i}" for i in range(len(truth(0)))], n_units=n_units)
    shares = []
    for step in range(steps):
        shares.append(balancer.weights)
        assert sum(balancer.weights) == n_units
        costs = zip(truth(step), balancer.weights, strict=True)
        balancer.observe([(c.seconds(b) * math.exp(draw.gauss(0, noise)), float(b)) for c, b in costs])
    return shares


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05])
def test_equal_workers_stay_at_equal_shares(n: int, noise: float) -> None:
    assert set(play(lambda _: [Cost(0.3, 1.0)] * n, 16 * n, 300, noise=noise, seed=n)) == {(16,) * n}


@pytest.mark.parametrize("fixed", [0.0, 0.5, 3.0])
def test_speeds_of_one_two_four_are_balanced_within_five_steps(fixed: float) -> None:
    costs = [Cost(fixed, 4.0), Cost(fixed, 2.0), Cost(fixed, 1.0)]
    shares = play(lambda _: costs, 56, 60, noise=0.01, seed=1)
    best = makespan(costs, solve(costs, 56))
    assert shares[0] == (19, 19, 18)
    assert all(makespan(costs, each) < 1.06 * best for each in shares[5:])  # a row of 56 is that much
    assert makespan(costs, shares[-1]) < 1.02 * best
    assert len(set(shares)) <= 4


def test_a_change_in_mid_run_is_answered_within_three_steps_and_taken_back() -> None:
    def truth(step: int) -> list[Cost]:
        return [Cost(0.3, 1.0), Cost(1.2, 4.0) if 50 <= step < 100 else Cost(0.3, 1.0), Cost(0.3, 1.0)]

    shares = play(truth, 48, 150, noise=0.02, seed=2)
    assert set(shares[:52]) == {(16, 16, 16)}
    assert all(makespan(truth(60), each) < 1.05 * makespan(truth(60), (21, 5, 22)) for each in shares[53:100])
    assert all(makespan(truth(0), each) < 1.1 * makespan(truth(0), (16, 16, 16)) for each in shares[103:])


def test_one_too_slow_to_start_gets_nothing_and_comes_back_when_it_has_recovered() -> None:
    def truth(step: int) -> list[Cost]:
        return [Cost(0.3, 1.0), Cost(50.0, 100.0) if 10 <= step < 300 else Cost(0.3, 1.0), Cost(0.3, 1.0)]

    shares = play(truth, 48, 1000, noise=0.01, seed=3)
    idle = shares[20:300]
    assert sum(each[1] == 0 for each in idle) >= len(idle) - 5  # tried now and then, with one row
    assert max(each[1] for each in idle) == 1
    assert makespan(truth(999), shares[999]) < 1.05 * makespan(truth(999), (16, 16, 16))


def test_whom_a_smaller_batch_leaves_without_rows_does_not_rest() -> None:
    """The last batch of each pass over the data: else whoever rests one day is tried again a thousand steps later."""
    balancer = Balancer([f"w{rank}" for rank in range(4)], n_units=8)
    for _ in range(12):
        for rows in ((2, 2, 2, 2), (2, 2, 2, 2), (1, 1, 1, 0)):
            balancer.observe([(0.1 * n, float(n)) for n in rows])
    assert balancer.weights == (2, 2, 2, 2)
    assert {track["rest"] for track in balancer.state()["tracks"].values()} == {REST}


def test_a_newcomer_that_loads_the_state_comes_to_the_same_shares() -> None:
    old, costs = Balancer(["a", "b"], n_units=30, unit_rows=2), [Cost(0.1, 1.0), Cost(0.1, 2.0)]
    for _ in range(6):
        old.observe([(c.seconds(2 * b), 2.0 * b) for c, b in zip(costs, old.weights, strict=True)])
    assert old.weights == (20, 10)
    new = Balancer(["a", "b"], n_units=30, unit_rows=2)
    new.load(json.loads(json.dumps(old.state())))
    ids, costs = ["a", "b", "c"], [*costs, Cost(0.1, 1.0)]
    assert old.reset(ids) == new.reset(ids)
    assert old.weights[0] == pytest.approx(2 * old.weights[1], abs=1)  # what was known of both is kept
    for _ in range(8):
        work = [(c.seconds(2 * b), 2.0 * b) for c, b in zip(costs, old.weights, strict=True)]
        assert old.observe(work) == new.observe(work)
    assert old.weights == (12, 6, 12)
    assert old.speeds() == new.speeds()
    assert old.reset(["b", "c"]) == (10, 20)


def test_a_worker_that_can_take_nothing_gets_nothing() -> None:
    balancer = Balancer(["a", "b", "c"], n_units=8, caps=[None, 0, 2])
    assert balancer.weights == (6, 0, 2)
    for _ in range(100):
        balancer.observe([(1.0, 6.0), (0.0, 0.0), (0.1, 2.0)])
        assert balancer.weights == (6, 0, 2)

    # nor where it once had something, however long ago
    track = Track()
    for _ in range(3):
        track.observe(2, 1.0)
    track.idle = 10**9
    cost = track.cost()
    assert cost is not None
    assert 0 < cost.per_row < 1e-9


# -- tokens, where lengths differ


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 1, 2, 3, 7, 20]), max_size=8),
    st.lists(st.sampled_from([0, 0.5, 1, 2]), min_size=1, max_size=4).filter(any),
)
def test_costs_are_divided_with_the_least_maximum(costs: list[int], weights: list[float]) -> None:
    found = divide_costs(np.array(costs, dtype=np.int64), weights)
    assert [place for part in found for place in part] == list(range(len(costs)))
    assert all(not part for part, weight in zip(found, weights, strict=True) if not weight)
    if len(set(costs)) < 2:
        assert found == divide(len(costs), weights)
        return

    def worst(parts: Sequence[range]) -> float:
        sums = [sum(costs[part.start : part.stop]) for part in parts]
        each = zip(sums, weights, strict=True)
        return max((cost / weight if weight else math.inf) if cost else 0.0 for cost, weight in each)

    cuts = itertools.combinations_with_replacement(range(len(costs) + 1), len(weights) - 1)
    best = min(worst([range(*ends) for ends in itertools.pairwise((0, *cut, len(costs)))]) for cut in cuts)
    assert worst(found) <= best * (1 + 1e-8)


def test_a_feed_divides_tokens_where_lengths_differ() -> None:
    rows = Texts()
    feed = feed_of(rows=rows, order=Order(400, 40, seed=1), weights=[1, 2, 1], micro_batch=1)
    for step in range(10):
        ids = feed.order.ids(step)
        tokens = [int(rows.lengths[ids[part.start : part.stop]].sum()) for part in feed.division(step)]
        quota = rows.lengths[ids].sum() / 4
        assert max(tokens[0], tokens[1] / 2, tokens[2]) <= quota + 64
        counted = feed.amounts(step)
        assert sum(n for n, _ in counted) == 40
        assert [cost for _, cost in counted] == pytest.approx([t / rows.lengths.mean() for t in tokens])


# -- orders of labelled rows


@pytest.mark.parametrize("n", [1, 7, 400])
@pytest.mark.parametrize("drop_last", [False, True])
def test_each_sample_comes_once_an_epoch_in_every_order(n: int, drop_last: bool) -> None:
    rows = Texts(n)
    batch = min(n, 32)
    for kinds in (
        {"classes": rows.classes},
        {"lengths": rows.lengths},
        {"classes": rows.classes, "lengths": rows.lengths},
    ):
        order = Order(n, batch, seed=9, drop_last=drop_last, **kinds)
        for epoch in range(3):
            steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
            taken = np.concatenate([order.ids(step) for step in steps])
            assert len(set(taken.tolist())) == len(taken) == (n // batch * batch if drop_last else n)
            assert [len(order.ids(step)) for step in steps] == [order.rows(step) for step in steps]


def test_stratified_batches_have_every_class_in_proportion() -> None:
    rows = Texts()
    order = Order(400, 40, seed=4, classes=rows.classes)
    share = np.bincount(rows.classes, minlength=4) / 400 * 40
    epochs = []
    for step in range(20):
        counts = np.bincount(rows.classes[order.ids(step)], minlength=4)
        assert np.abs(counts - share).max() < 2
    for epoch in range(2):
        epochs.append(np.concatenate([order.ids(epoch * 10 + step) for step in range(10)]))
    assert (epochs[0] != epochs[1]).mean() > 0.9  # shuffled anew
    assert (Order(400, 40, seed=4, classes=rows.classes).ids(13) == order.ids(13)).all()  # a pure function
    assert (Order(400, 40, seed=5, classes=rows.classes).ids(13) != order.ids(13)).any()


def test_sorting_by_length_moves_no_sample_to_another_batch() -> None:
    rows = Texts()
    plain, sorted_ = Order(400, 40, seed=4), Order(400, 40, seed=4, lengths=rows.lengths)
    for step in (0, 3, 11):
        ids = sorted_.ids(step)
        assert sorted(ids.tolist()) == sorted(plain.ids(step).tolist())
        assert (np.diff(rows.lengths[ids]) >= 0).all()
