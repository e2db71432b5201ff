"""Every registered exchange and cadence against every property. A new plugin finds its row here by its registry line."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from manyhands.core import config, registry
from manyhands.core.types import Cadence, Exchange
from manyhands.exchange.ordered import Tree
from manyhands.wire.drive import lockstep

EXCHANGES = sorted(registry.REGISTRY["exchanges"])
LOSSLESS = ["all-reduce", "ordered"]  # all others: what was sent adds up to the mean (below)
WORLDS = [1, 2, 3, 5]
SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (7,), (33, 3), (129,), (4, 0, 2)]


def _deltas(
    exchange: Any, world: int, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[list[Any], torch.Tensor]:
    """Everybody's contribution as this exchange takes it, and the exact sum."""
    values = [torch.randn(shape, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(world)]
    total = torch.stack([v.double() for v in values]).sum(0)
    if not getattr(exchange, "by_place", False):
        return [[v] for v in values], total
    deltas = []
    for rank, value in enumerate(values):
        tree = Tree(world)
        tree.add((0, rank), value.reshape(-1).clone())
        keys = torch.tensor([[lv, ix, world] for lv, ix in tree.nodes], dtype=torch.int64)
        deltas.append([keys, torch.stack(list(tree.nodes.values()))])
    return deltas, total.reshape(-1)


def _talk(exchange: Any, deltas: list[Any], states: list[Any]) -> list[Any]:
    copies = [[t.clone() for t in delta] for delta in deltas]
    return lockstep([exchange.talk(c, s) for c, s in zip(copies, states, strict=True)])


@pytest.mark.parametrize("name", EXCHANGES)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_replicas_agree_bitwise_and_on_the_sum(
    name: str, world: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    exchange = registry.resolve("exchanges", name)()
    assert isinstance(exchange, Exchange)
    deltas, total = _deltas(exchange, world, shape, dtype)
    agreed = _talk(exchange, deltas, [exchange.init(d) for d in deltas])
    for each in agreed:
        assert torch.equal(each.mean[0], agreed[0].mean[0])
        assert each.mean[0].dtype is dtype
        tolerance = 0.05 if dtype is torch.bfloat16 else 1e-5
        if name in LOSSLESS:
            torch.testing.assert_close(each.mean[0].double(), total, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", EXCHANGES)
def test_the_sum_of_what_was_sent_is_the_mean(name: str) -> None:
    exchange = registry.resolve("exchanges", name)()
    deltas, _ = _deltas(exchange, 3, (64,), torch.float64)
    agreed = _talk(exchange, deltas, [exchange.init(d) for d in deltas])
    sent = sum(each.sent[0].double().reshape(-1, 64).sum(0) for each in agreed)
    torch.testing.assert_close(agreed[0].mean[0], sent, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", EXCHANGES)
def test_nan_and_infinity_are_seen_by_all(name: str) -> None:
    exchange = registry.resolve("exchanges", name)()
    for poison in (float("nan"), float("inf")):
        deltas, _ = _deltas(exchange, 3, (16,), torch.float32)
        deltas[1][-1].view(-1)[3] = poison
        agreed = _talk(exchange, deltas, [exchange.init(d) for d in deltas])
        assert all(not torch.isfinite(each.mean[0]).all() for each in agreed)


@pytest.mark.parametrize("name", EXCHANGES)
def test_state_is_a_pytree_of_tensors_and_goes_on_after_a_copy(name: str) -> None:
    exchange = registry.resolve("exchanges", name)()
    deltas, _ = _deltas(exchange, 2, (40,), torch.float64)
    states = [each.state for each in _talk(exchange, deltas, [exchange.init(d) for d in deltas])]
    leaves, spec = torch.utils._pytree.tree_flatten(states)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    copied = torch.utils._pytree.tree_unflatten([leaf.clone() for leaf in leaves], spec)
    again, copy = _talk(exchange, deltas, states), _talk(exchange, deltas, copied)
    assert torch.equal(again[0].mean[0], copy[0].mean[0])


@pytest.mark.parametrize("kind", ["exchanges", "cadences", "optimizers", "schedules", "tasks"])
def test_every_value_has_a_repr_and_data_that_read_back(kind: str) -> None:
    for name in registry.REGISTRY[kind]:
        value = config.from_text(kind, name)
        assert config.from_text(kind, repr(value)) == value
        assert config.from_choice(kind, config.to_data(value, kind), kind) == value


@pytest.mark.parametrize("name", sorted(registry.REGISTRY["cadences"]))
def test_a_cadence_is_a_pure_function_of_the_step(name: str) -> None:
    cadence = registry.resolve("cadences", name)()
    assert isinstance(cadence, Cadence)
    first = [cadence.due(step) for step in range(1, 200)]
    assert first == [cadence.due(step) for step in range(1, 200)]
    assert any(first)
