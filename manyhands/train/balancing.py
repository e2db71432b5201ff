"""Measurements of a step -> the next step's division, in the loop of the main job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manyhands.core.events import Emit, Redivided
from manyhands.data.sample import places

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from manyhands.balance.balancer import Balancer, Work
    from manyhands.train.feed import Feed
    from manyhands.train.method import StepResult
    from manyhands.train.plan import Plan
    from manyhands.wire.world import World


def balancer_for(plan: Plan, ids: Sequence[str], global_batch: int) -> Balancer | None:
    """What re-estimates the shares of the workers `ids`; None where the plan says that they stay."""
    from manyhands.balance.balancer import Balancer

    if not plan.balance:
        return None
    n_units = len(places(global_batch, plan.micro_batch))
    return Balancer(ids, n_units=n_units, unit_rows=plan.micro_batch)


def rebalance(balancer: Balancer | None, feed: Feed, result: StepResult, step: int, emit: Emit) -> None:
    """After each step, on every worker alike: `feed` divides the next global batch by what was measured.

    Steps in which the workers did not speak (between agreements) leave the division alone.
    """
    if balancer is None or len(result.work) != len(balancer.weights):
        return
    before = balancer.weights
    feed.weights = balancer.observe(_of_a_step(feed, result.work, step))
    if balancer.weights != before:
        emit(Redivided(step=step, shares=balancer.weights, rows_per_s=balancer.speeds()))


def _of_a_step(feed: Feed, work: Work, step: int) -> Work:
    """(seconds, rows) of each rank in a mean step of those, before `step`, of which it tells.

    Where workers agree every H steps it tells of H at once, and H times what a step costs beside its rows is not what one
    costs. Long rows are counted for more, where the rows are those of these steps' division.
    """
    told = max(1, round(sum(rows for _, rows in work) / feed.order.global_batch))
    if getattr(feed.rows, "lengths", None) is not None:
        amounts = [feed.amounts(each) for each in range(max(0, step - told), step)]
        own = [sum(rows for rows, _ in rank) for rank in zip(*amounts, strict=True)]
        costs = [sum(cost for _, cost in rank) for rank in zip(*amounts, strict=True)]
        pairs = zip(work, own, costs, strict=True)
        work = [(seconds, cost if rows == mine else rows) for (seconds, rows), mine, cost in pairs]
    return [(seconds / told, rows / told) for seconds, rows in work]


def shares_of(balancer: Balancer | None, feed: Feed) -> dict[str, Any]:
    """Who has how much, and what is known of each, as JSON data."""
    return {
        "balancer": balancer.state() if balancer is not None else None,
        "weights": list(feed.weights),
    }


def take_shares(balancer: Balancer | None, feed: Feed, told: Mapping[str, Any]) -> Balancer | None:
    """What `shares_of` said on another worker; the balancer to go on with, which is none where that one has none."""
    feed.weights = tuple(told["weights"])
    if balancer is None or told["balancer"] is None:
        return None
    balancer.load(told["balancer"])
    balancer.weights = tuple(told["weights"])
    return balancer


def regroup(
    balancer: Balancer | None, feed: Feed, world: World, ids: Sequence[str], *, leader: int
) -> Balancer | None:
    """Shares in another set of workers: the leader's; the balancer to go on with. Collective.

    Each would come to the same ones, but for a newcomer, whose job says less of how the others began (shares that were given
    were for those), and for who was interrupted between an agreement and what it tells of the workers' speeds.
    """
    if balancer is not None:
        feed.weights = balancer.reset(ids)
    elif len(feed.weights) != world.size:
        feed.weights = (1,) * world.size
    return take_shares(balancer, feed, world.gather(shares_of(balancer, feed))[leader])
