"""Shares in training: local steps that follow the speed, and the division of the next batch by what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from facts import facts
from rows import Numbers, Texts, feed_of
from torch import nn

from manyhands import presets
from manyhands.balance.balancer import Balancer
from manyhands.data.sample import Order
from manyhands.train.balancing import rebalance
from manyhands.train.job import Job
from manyhands.train.method import StepResult
from manyhands.train.plan import derive
from manyhands.train.replica import Replica
from manyhands.wire.solo import Solo

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
