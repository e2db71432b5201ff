"""Who computes what: places given to a feed, shares from measurements, costs, and the order of samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from manyhands.core.errors import UsageError
from manyhands.data.sample import Order
from manyhands.train.feed import Feed


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
