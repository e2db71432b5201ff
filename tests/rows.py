"""Small rows of numbers and texts, and a feed of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

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


class Texts(Numbers):
    """Rows of 1 to 64 tokens, in four classes of unequal size."""

    def __init__(self, n: int = 400) -> None:
        super().__init__(n)
        draw = np.random.default_rng(3)
        self.lengths = draw.integers(1, 65, n)
        self.classes = np.searchsorted([0.6, 0.9, 0.99], draw.random(n)).astype(np.int64)
