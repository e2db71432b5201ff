"""Datasets of a user's own loop: Hugging Face's, and those that draw random numbers where they are read."""

from __future__ import annotations

import random
from typing import Any

import datasets
import numpy as np
import pytest
import torch

import manyhands
from manyhands.api import _MapRows
from manyhands.core.errors import UsageError
from manyhands.data.sample import Order
from manyhands.train.feed import Feed
from manyhands.train.job import Job


class Augmented:
    """Each row with noise of all three generators that people use."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, Any]:
        noise = torch.randn(1) + random.random() + float(np.random.rand())
        return {"x": noise + 10 * i, "i": i}


def rows_of(worker: int, weights: list[float], step: int) -> dict[int, float]:
    feed = Feed(
        rows=_MapRows(Augmented()),
        order=Order(12, 6, 3),
        rank=worker,
        weights=weights,
        micro_batch=1,
        device_batch=2 + worker,
        coalesce=True,
        device=torch.device("cpu"),
        seed=3,
    )
    found = {}
    for _, batch in feed.part(step).micro_batches:
        found |= dict(zip(batch["i"].tolist(), batch["x"][:, 0].tolist(), strict=True))
    return found


def test_what_a_dataset_draws_does_not_depend_on_who_reads_it() -> None:
    for step in (0, 1, 2):
        one = rows_of(0, [1.0], step)
        torch.manual_seed(9)
        np.random.seed(9)
        split = [rows_of(worker, [1.0, 2.0, 1.0], step) for worker in (2, 0, 1)]
        assert {i: x for part in split for i, x in part.items()} == one
        assert len(one) == 6
    epochs = rows_of(0, [1.0], 0) | rows_of(0, [1.0], 1), rows_of(0, [1.0], 2) | rows_of(0, [1.0], 3)
    assert epochs[0].keys() == epochs[1].keys()
    assert all(epochs[0][i] != epochs[1][i] for i in epochs[0]), "drawn anew in each epoch"


def test_reading_leaves_the_generators_alone() -> None:
    def drawn() -> list[float]:
        return [float(torch.rand(())), random.random(), float(np.random.rand())]

    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(4)
    expected = drawn()
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(4)
    rows_of(0, [1.0], 0)
    assert drawn() == expected


def test_a_hugging_face_dataset_is_shared() -> None:
    dataset = datasets.Dataset.from_dict({"x": [[float(i)] for i in range(10)]}).with_format("torch")
    hands = manyhands.join(device="cpu")
    seen = [
        x
        for part in hands.share(dataset, global_batch=4)
        for _, b in part.micro_batches
        for x in b["x"].tolist()
    ]
    assert sorted(seen) == [[float(i)] for i in range(10)]
    hands.close()


def test_a_fixed_order_of_additions_wants_one_thread() -> None:
    Job(reproducible=True, threads=1)
    with pytest.raises(UsageError, match="leave out --threads"):
        Job(reproducible=True, threads=2)


def test_a_part_of_a_pass_is_at_least_a_step_as_on_the_command_line() -> None:
    hands = manyhands.join()
    for epochs, steps in ((0, 0), (0.5, 1), (1, 2), (1.2, 3)):
        assert len(list(hands.share(Augmented(), global_batch=6, epochs=epochs))) == steps
    for name in ("micro_batch", "device_batch"):
        with pytest.raises(UsageError, match=f"{name} = 0"):
            next(hands.share(Augmented(), global_batch=6, **{name: 0}))
    with pytest.raises(UsageError, match="micro_batch = 3 with device_batch = 2"):
        next(hands.share(Augmented(), global_batch=6, micro_batch=3, device_batch=2))
    for part in hands.share(Augmented(), global_batch=6, device_batch=2):
        assert all(len(next(iter(batch.values()))) <= 2 for _, batch in part.micro_batches)
