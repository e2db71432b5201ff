"""Who computes what: places given to a feed, shares from measurements, costs, and the order of samples."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from facts import facts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from manyhands import presets
from manyhands.balance.balancer import Balancer
from manyhands.balance.estimate import REST, Track, fit
from manyhands.balance.shares import Cost, makespan, solve
from manyhands.core.errors import UsageError
from manyhands.data.partition import divide, divide_costs
from manyhands.data.sample import Order
from manyhands.train.balancing import rebalance
from manyhands.train.feed import Feed
from manyhands.train.job import Job
from manyhands.train.method import StepResult
from manyhands.train.plan import derive
from manyhands.train.replica import Replica
from manyhands.wire.solo import Solo


class Numbers:
    """Row i is the number i."""

    bytes_per_target = 1.0

    def __init__(self, n: int = 40) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def take(self, ids: np.ndarray) -> dict[str, torch.Tensor]:
        return {"x": torch.from_numpy(np.asarray(ids))}


def feed_of(**changes: Any) -> Feed:
    case: dict[str, Any] = {
        "rows": Numbers(),
        "order": Order(40, 18, seed=5),
        "rank": 0,
        "weights": [1.0, 2.0],
        "micro_batch": 2,
        "device_batch": 6,
        "coalesce": True,
        "device": torch.device("cpu"),
        "seed": 5,
    }
    return Feed(**{**case, **changes})


def rows_of(feed: Feed, step: int, **how: Any) -> list[list[int]]:
    return [batch["x"].tolist() for _, batch in feed.part(step, **how).micro_batches]


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


class Texts(Numbers):
    """Rows of 1 to 64 tokens, in four classes of unequal size."""

    def __init__(self, n: int = 400) -> None:
        super().__init__(n)
        draw = np.random.default_rng(3)
        self.lengths = draw.integers(1, 65, n)
        self.classes = np.searchsorted([0.6, 0.9, 0.99], draw.random(n)).astype(np.int64)


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


# -- local steps that follow the speed


class Curve(Numbers):
    def take(self, ids: np.ndarray) -> dict[str, torch.Tensor]:
        x = torch.from_numpy(np.asarray(ids)).double()[:, None] / self.n
        return {"x": torch.cat([x, x * x], 1), "y": torch.sin(3 * x)}


def squares(model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
    return ((model(batch["x"]) - batch["y"]) ** 2).sum(), len(batch["y"])


def small() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def local_run(
    weights: Sequence[float], rank: int, *, by_speed: bool, steps: int = 8
) -> tuple[Any, list[int]]:
    """My parameters before an agreement of one, and after which steps they moved."""
    strategy = presets.local_sgd(lr=0.01, every=8, schedule="constant", weight_decay=0.0)
    replica = Replica(small(), strategy, Solo("cpu"), max_grad_norm=0.0)
    feed = feed_of(rows=Curve(48), order=Order(48, 12, seed=2), weights=weights, rank=rank, micro_batch=1)
    feed.by_speed = by_speed
    moved = []
    for step in range(steps):
        before = [p.detach().clone() for p in replica.model.parameters()]
        replica.step(feed.part(step), squares)
        if any((a != b).any() for a, b in zip(before, replica.model.parameters(), strict=True)):
            moved.append(step + 1)
    replica.close()
    return [p.detach().clone() for p in replica.model.parameters()], moved


def test_a_slower_worker_makes_fewer_local_steps_of_the_largest_share() -> None:
    assert local_run([1, 2], 1, by_speed=True)[1] == list(range(1, 9))
    found, moved = local_run([1, 2], 0, by_speed=True)
    assert moved == [2, 4, 6, 8]
    assert local_run([1, 3], 0, by_speed=True)[1] == [3, 6, 8]  # the last one with what is there
    assert local_run([0, 3], 0, by_speed=True)[1] == []
    # by hand: AdamW after each second part, with the mean gradient of both
    model = small()
    feed = feed_of(rows=Curve(48), order=Order(48, 12, seed=2), weights=[1, 2], micro_batch=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for first in range(0, 8, 2):
        sums = [squares(model, b) for step in (first, first + 1) for _, b in feed.part(step).micro_batches]
        (sum(s for s, _ in sums) / sum(n for _, n in sums)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for mine, theirs in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-9, atol=1e-12)


def test_at_equal_shares_local_steps_by_speed_are_the_fixed_ones() -> None:
    fixed, moved = local_run([1, 1], 0, by_speed=False)
    by_speed, moved_too = local_run([1, 1], 0, by_speed=True)
    assert moved == moved_too == list(range(1, 9))
    assert all(torch.equal(a, b) for a, b in zip(fixed, by_speed, strict=True))
    assert local_run([1, 2], 0, by_speed=False)[1] == list(range(1, 9))


def test_a_run_that_ends_within_a_round_uses_all_that_was_computed() -> None:
    strategy = presets.local_sgd(lr=0.01, every=8, schedule="constant")
    replica = Replica(small(), strategy, Solo("cpu"))
    feed = feed_of(rows=Curve(48), order=Order(48, 12, seed=2), weights=[1, 3], micro_batch=1)
    feed.by_speed = True
    before = [p.detach().clone() for p in replica.model.parameters()]
    for step in range(2):
        replica.step(feed.part(step), squares)
    assert all(torch.equal(a, b) for a, b in zip(before, replica.model.parameters(), strict=True))
    replica.meet()
    assert not any(torch.equal(a, b) for a, b in zip(before, replica.model.parameters(), strict=True))
    assert replica.tokens == 6  # 3 rows of each batch of 12 were mine; here nobody has the others
    replica.close()


# -- in the loop


@pytest.mark.parametrize("texts", [False, True])
def test_workers_that_agree_every_so_many_steps_are_divided_as_by_single_steps(texts: bool) -> None:
    """What a step costs beside its rows is paid in each of them: 64 steps at once are not one with 64 times the cost."""
    found = []
    for every in (1, 64):
        feed = feed_of(
            rows=Texts(400) if texts else Numbers(400),
            order=Order(400, 16, seed=1),
            weights=[1.0, 1.0],
            micro_batch=1,
        )
        balancer, told = Balancer(["a", "b"], n_units=16), []
        for step in range(every, 9 * every, every):
            amounts = [feed.amounts(each) for each in range(step - every, step)]
            work = [
                (sum(fixed + each * amount[rank][1] for amount in amounts), sum(a[rank][0] for a in amounts))
                for rank, (fixed, each) in enumerate([(0.05, 0.01), (0.10, 0.02)])
            ]
            result = StepResult(0.0, 16, 16, 0.0, 0.1, False, 0, False, 8, work=tuple(work))
            rebalance(balancer, feed, result, step, told.append)
        found.append(tuple(feed.weights))
    assert found[0] == found[1]
    assert found[1][1] >= 3


@pytest.mark.parametrize("texts", [False, True])
def test_the_next_batch_is_divided_by_what_was_measured(texts: bool) -> None:
    rows = Texts(400) if texts else Numbers(400)
    feed = feed_of(rows=rows, order=Order(400, 40, seed=1), weights=[1.0, 1.0], micro_batch=1)
    balancer, told = Balancer(["a", "b"], n_units=40), []
    for step in range(6):
        amounts = feed.amounts(step)
        seconds = [cost * slowness for (_, cost), slowness in zip(amounts, (1.0, 3.0), strict=True)]
        work = tuple((s, float(n)) for s, (n, _) in zip(seconds, amounts, strict=True))
        result = StepResult(0.0, 40, 40, 0.0, 0.1, False, 0, False, 20, work=work)
        rebalance(balancer, feed, result, step + 1, told.append)
    assert list(feed.weights) == [30, 10]
    (event,) = told
    assert (event.step, tuple(event.shares)) == (3, (30, 10))
    assert event.rows_per_s == pytest.approx([1.0, 1 / 3])
    rebalance(None, feed, result, 7, told.append)  # nobody asked for it
    rebalance(balancer, feed, StepResult(0.0, 40, 40, 0.0, 0.1, False, 0, False, 20), 8, told.append)
    assert list(feed.weights) == [30, 10]
    assert len(told) == 1


def test_one_worker_that_others_may_join_is_measured_from_the_start() -> None:
    """Who comes takes over how the job began; alone for good there is nothing to divide."""
    assert not derive(Job(), facts()).balance
    assert derive(Job(), facts(elastic=True)).balance
    assert not derive(Job(balance="off"), facts(elastic=True)).balance
    alone = Balancer(["w0"], n_units=12)
    assert [alone.observe([(1.0, 12.0)]) for _ in range(5)] == [(12,)] * 5
    assert alone.reset(["w0", "w1"]) == (6, 6)
