"""Residuals through checkpoints: everybody's are saved, any number of workers continues, no sum changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fleet import Fleet

from manyhands.core import config
from manyhands.core.errors import CheckpointError
from manyhands.exchange.combine import leaves
from manyhands.train import exchange_state, tensors
from manyhands.wire.drive import run
from manyhands.wire.solo import Solo

EXCHANGE = "error-feedback(bf16)"
SHAPES = [(40,), (7, 3), (0,)]  # of three buckets
VALUES = 61


def _like() -> list[list[torch.Tensor]]:
    return [[torch.zeros(shape, dtype=torch.float64)] for shape in SHAPES]


def _fresh(text: str = EXCHANGE) -> list[Any]:
    return [config.from_text("exchanges", text).init(like) for like in _like()]


def _work(world: Any, directory: str, continued: bool, seed: int) -> dict[str, Any]:
    """Continue where `directory` is, three rounds, save. What came in, what went out, what this worker holds."""
    exchange = config.from_text("exchanges", EXCHANGE)
    path = Path(directory, "exchange.safetensors")
    states = _fresh()
    if continued:
        states = exchange_state.restore(
            states, exchange_state.Stored(path), rank=world.rank, size=world.size, path=path
        )
    world.gather("")  # all have read
    first = [leaf.tolist() for _, leaf in leaves(states)]
    came, went = torch.zeros(VALUES, dtype=torch.float64), torch.zeros(VALUES, dtype=torch.float64)
    for turn in range(3):
        generator = torch.Generator().manual_seed(1000 * seed + 10 * turn + world.rank)
        weight = (world.rank + turn + 1) / 10
        deltas = [[torch.randn(shape, generator=generator, dtype=torch.float64) * weight] for shape in SHAPES]
        came += torch.cat([d[0].reshape(-1) for d in deltas])
        agreed = [run(exchange.talk(d, s), world.wire) for d, s in zip(deltas, states, strict=True)]
        states = [each.state for each in agreed]
        went += torch.cat([each.mean[0].reshape(-1) for each in agreed])
    named = exchange_state.collect(states, world.wire)
    assert bool(named) == (world.rank == 0)
    if world.rank == 0:
        tensors.write(path, named)
        Path(directory, "state.json").write_text(json.dumps(exchange_state.record(named, world.size)))
    world.gather("")  # all may read
    held = torch.cat([t.reshape(-1) for p, t in leaves(states) if "residual" in p])
    last = [leaf.tolist() for _, leaf in leaves(states)]
    return {"came": came, "went": went, "held": held, "first": first, "last": last}


@pytest.mark.parametrize("transport", ["shared", "group"])
def test_resizing_real_workers_loses_nothing(
    fleets: Callable[[int, str], Fleet], tmp_path: Path, transport: str
) -> None:
    came, went = torch.zeros(VALUES, dtype=torch.float64), torch.zeros(VALUES, dtype=torch.float64)
    before: list[Any] = []
    for turn, size in enumerate([3, 3, 2, 5] if transport == "shared" else [2, 2]):
        results = fleets(size, transport).run(_work, str(tmp_path), turn > 0, turn)
        came += sum(r["came"] for r in results)
        went += results[0]["went"]
        held = sum(r["held"] for r in results)
        assert float(held.abs().max()) > 1e-4  # there is something to lose
        torch.testing.assert_close(went + held, came, rtol=1e-12, atol=1e-12)
        if len(before) == size:  # as many workers: each goes on with its own, bit by bit
            assert [r["first"] for r in results] == before
        before = [r["last"] for r in results]
        facts = json.loads((tmp_path / "state.json").read_text())
        assert facts == {"workers": size, "residuals_of": list(range(size))}
        assert exchange_state.missing({"exchange": facts}) is None


def _pieces(world: Any) -> list[list[float]]:
    """A leaf that travels in several pieces."""
    exchange_state.PIECE_BYTES = 64
    state = {"residual": [torch.arange(21.0).reshape(3, 7) + 100 * world.rank]}
    named = exchange_state.collect([state], world.wire)
    exchange_state.PIECE_BYTES = 1 << 26
    return [named[name].reshape(-1).tolist() for name in sorted(named)]


def test_large_leaves_travel_in_pieces(fleets: Callable[[int, str], Fleet]) -> None:
    first, *others = fleets(3, "shared").run(_pieces)
    assert first == [[i + 100.0 * rank for i in range(21)] for rank in range(3)]
    assert others == [[], []]


def test_worker_j_takes_the_residuals_of_ranks_i_with_i_mod_m_equal_j() -> None:
    states = [{"residual": [torch.tensor([10.0**rank])], "round": torch.tensor(4)} for rank in range(5)]
    named: dict[str, torch.Tensor] = {}
    for rank, state in enumerate(states):
        named |= exchange_state.alone([state], rank)
    assert sorted(named) == [*(f"0.residual.0@{rank}" for rank in range(5)), "0.round"]
    fresh = [{"residual": [torch.zeros(1)], "round": torch.tensor(0)}]
    for size, expected in ((2, [10101.0, 1010.0]), (5, [1.0, 10.0, 100.0, 1e3, 1e4]), (7, [1.0] + [0.0] * 2)):
        for rank, value in enumerate(expected):
            rank = rank if size < 7 or rank == 0 else rank + 4
            (state,) = exchange_state.restore(fresh, named, rank=rank, size=size, path="c")
            assert (state["residual"][0].item(), int(state["round"])) == (value, 4)


def test_an_interrupted_save_has_the_first_worker_s_residuals_and_says_so() -> None:
    states = _fresh()
    states[0]["residual"][0] += 1.5
    named = exchange_state.alone(states, 0)
    facts = exchange_state.record(named, 3)
    assert facts == {"workers": 3, "residuals_of": [0]}
    said = exchange_state.missing({"exchange": facts})
    assert said is not None
    assert "workers 1, 2 of 3" in said
    back = [exchange_state.restore(_fresh(), named, rank=r, size=3, path="c") for r in range(3)]
    assert [float(s[0]["residual"][0].sum()) for s in back] == [60.0, 0.0, 0.0]
    assert exchange_state.missing({}) is None  # a checkpoint without exchange state
    stateless = exchange_state.alone([()], 0)
    assert exchange_state.missing({"exchange": exchange_state.record(stateless, 3)}) is None


def test_other_buckets_and_other_exchanges_are_refused() -> None:
    named = exchange_state.alone(_fresh(), 0)
    exchange = config.from_text("exchanges", EXCHANGE)
    recut = [exchange.init([torch.zeros(VALUES, dtype=torch.float64)])]
    with pytest.raises(CheckpointError, match=r"of 3 buckets, this run has 1 .*same bucket_mb"):
        exchange_state.restore(recut, named, rank=0, size=1, path="checkpoint-5")
    moved = [exchange.init([torch.zeros(shape, dtype=torch.float64)]) for shape in [(41,), (7, 3), (0,)]]
    with pytest.raises(CheckpointError, match=r"0.residual.0 is \[40\] there, \[41\] here"):
        exchange_state.restore(moved, named, rank=0, size=1, path="checkpoint-5")
    with pytest.raises(CheckpointError, match=r"checkpoint-5: .*0.agreed.0.*is missing"):
        exchange_state.restore(_fresh("ef21(bf16)"), named, rank=0, size=1, path="checkpoint-5")
    with pytest.raises(CheckpointError, match=r"0.inner.round.*is unknown.*same --strategy"):
        exchange_state.restore([()] * 3, named, rank=0, size=1, path="checkpoint-5")


def test_a_file_is_read_by_name_and_an_absent_or_broken_one_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "exchange.safetensors"
    assert dict(exchange_state.Stored(path)) == {}
    named = exchange_state.collect(_fresh(), Solo())
    tensors.write(path, named)
    stored = exchange_state.Stored(path)
    assert set(stored) == set(named)
    assert stored.shape("1.residual.0@0") == (7, 3)
    exchange_state.restore(_fresh(), stored, rank=0, size=1, path=path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="holds the exchange's state"):
        exchange_state.Stored(path)
