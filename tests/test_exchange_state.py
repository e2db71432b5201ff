"""Residuals through checkpoints: everybody's are saved, any number of workers continues, no sum changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fleet import Fleet

import manyhands
from manyhands.core import config
from manyhands.core.errors import CheckpointError
from manyhands.core.types import Summed
from manyhands.exchange.combine import leaves
from manyhands.strategy import optimizers
from manyhands.train import carried, exchange_state, session, tensors
from manyhands.train.replica import Part, Replica
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


def _without_a_third(world: Any) -> dict[str, list[float]]:
    """EF21 when a third worker was lost: what it had agreed with these two is still in the sum."""
    exchange = config.from_text("exchanges", "by-tensor(ef21(topk(density=0.2, chunk=0)), numel=1)")
    delta = [torch.randn(40, generator=torch.Generator().manual_seed(world.rank), dtype=torch.float64)]
    state = exchange.init(delta)
    for turn in range(30):
        if turn == 4:
            inner = next(s for s in state.values() if isinstance(s, dict) and "agreed" in s)
            inner["agreed"][0].add_(7.0)
            exchange_state.resum([state], world.wire)
        agreed = run(exchange.talk(delta, state), world.wire)
        state = agreed.state
    return {"delta": delta[0].tolist(), "mean": agreed.mean[0].tolist()}


def test_the_sum_that_ef21_keeps_is_of_those_who_are_there(fleets: Callable[[int, str], Fleet]) -> None:
    a, b = fleets(2, "shared").run(_without_a_third)
    assert a["mean"] == b["mean"]
    both = torch.tensor(a["delta"]) + torch.tensor(b["delta"])
    torch.testing.assert_close(torch.tensor(a["mean"]), both, rtol=1e-6, atol=1e-6)


def _pieces(world: Any) -> list[list[float]]:
    """A leaf that travels in several pieces."""
    exchange_state.PIECE_BYTES = 64
    state = {"residual": [torch.arange(21.0).reshape(3, 7) + 100 * world.rank]}
    named = exchange_state.collect([state], world.wire)
    exchange_state.PIECE_BYTES = 1 << 26
    return [named[name].reshape(-1).tolist() for name in sorted(named)]


def test_who_was_behind_keeps_its_estimates_and_nothing_of_what_it_held_back() -> None:
    """Σ hᵢ = H goes on, as everybody had summed it up when the set of workers met; of a residual nobody knows what was sent."""
    theirs, mine, held = torch.tensor([1.0, 2.0]), torch.tensor([10.0, -4.0]), torch.tensor([0.5, 0.25])

    def states(own: torch.Tensor, left: torch.Tensor, everyones: torch.Tensor) -> list[Any]:
        estimates = {"residual": [own.clone()], "agreed": [everyones.clone()], "inner": ()}
        return [{"0": estimates, "1": {"residual": [left.clone()], "inner": ()}}]

    model = torch.nn.Linear(1, 1)
    method = SimpleNamespace(load_local_state=lambda state: None, restart=lambda: None)
    replica: Any = SimpleNamespace(
        states=states(mine, held, theirs + mine), load_optimizer_state=dict, model=model, method=method
    )
    given = exchange_state.alone(states(theirs, 2 * held, theirs + mine), 0)
    given_tensors = {f"exchange/{name}": tensor for name, tensor in given.items()}
    given_tensors |= {f"model/{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    carried.load(replica, given_tensors, {"steps": 7, "tokens": 70, "skipped": 0}, 0)
    (state,) = replica.states
    assert torch.equal(state["0"]["residual"][0], mine)
    assert torch.equal(state["0"]["agreed"][0], theirs + mine)
    assert not state["1"]["residual"][0].any()


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


def test_an_inner_optimizer_s_moments_are_each_worker_s(fleets: Callable[[int, str], Fleet]) -> None:
    first, *others = fleets(3, "shared").run(_local)
    assert others == [[], []]
    assert first == ["local.w.m@0", "local.w.m@1"]  # worker 2 had nothing to do yet
    named = {f"local.w.m@{rank}": torch.tensor([float(rank)]) for rank in range(2)} | {
        "0.round": torch.tensor(1)
    }
    for rank, holder in enumerate([0, 1, 0, 1]):
        assert exchange_state.local(named, rank=rank) == {"w.m": torch.tensor([float(holder)])}
    assert exchange_state.local({"0.round": torch.tensor(1)}, rank=0) == {}
    (state,) = exchange_state.restore([{"round": torch.tensor(0)}], named, rank=3, size=4, path="c")
    assert int(state["round"]) == 1


def _local(world: Any) -> list[str]:
    local = {"w.m": torch.ones(3)} if world.rank < 2 else {}
    return sorted(exchange_state.collect([], world.wire, local))


# ------------------------------------------------------------------------------------------ whole replicas


def _strategy(kind: str) -> Any:
    exchange = config.from_text("exchanges", "error-feedback(chain(sign, then=sign))")
    if kind == "diloco":
        inner, outer = optimizers.AdamW(0.02), optimizers.SGD(0.7, momentum=0.9, nesterov=True)
        cadence = config.from_text("cadences", "every(3)")
        return manyhands.Strategy(cadence=cadence, exchange=exchange, inner=inner, outer=outer)
    return manyhands.Strategy(exchange=exchange, outer=optimizers.AdamW(0.02))


def _train(world: Any, kind: str, output: str, start: int | None, stop: int, save: bool) -> dict[str, Any]:
    """Steps up to `stop`, from checkpoint `start` (None: from scratch); what the replica is afterwards."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
    replica = Replica(model, _strategy(kind), world.wire)
    if start is not None:
        session.restore_replica(replica, Path(output, f"checkpoint-{start}"))
    first = float(sum((t.sum() for p, t in leaves(replica.states) if "residual" in p), torch.tensor(0.0)))
    while replica.steps < stop:
        batches = []
        for place in range(world.rank, 6, world.size):
            generator = torch.Generator().manual_seed(1000 * replica.steps + place)
            x = torch.randn(4, 6, generator=generator, dtype=torch.float64)
            batches.append((place, {"x": x, "y": x.sum(1, keepdim=True).sin()}))
        part = Part(replica.steps, batches, 6, 24, 0)
        replica.step(part, lambda m, b: Summed((m(b["x"]) - b["y"]).square().sum(), len(b["x"])))
    if save:
        session.save_replica(world, replica, Path(output))
    held = float(sum((t.sum() for p, t in leaves(replica.states) if "residual" in p), torch.tensor(0.0)))
    weights = [t.tolist() for t in model.state_dict().values()]
    replica.close()
    return {"weights": weights, "first": first, "held": held}


@pytest.mark.parametrize("kind", ["ddp", "diloco"])
def test_a_resumed_job_goes_on_as_if_nothing_had_been_and_resized_loses_nothing(
    fleets: Callable[[int, str], Fleet], tmp_path: Path, kind: str
) -> None:
    whole = fleets(3, "shared").run(_train, kind, str(tmp_path / "a"), None, 12, False)
    halves = fleets(3, "shared").run(_train, kind, str(tmp_path / "b"), None, 6, True)
    resumed = fleets(3, "shared").run(_train, kind, str(tmp_path / "b"), 6, 12, False)
    assert [r["weights"] for r in resumed] == [r["weights"] for r in whole]
    assert [r["held"] for r in resumed] == [r["held"] for r in whole]
    assert all(r["first"] == h["held"] != 0 for r, h in zip(resumed, halves, strict=True))
    fewer = fleets(2, "shared").run(_train, kind, str(tmp_path / "b"), 6, 6, False)
    assert sum(r["first"] for r in fewer) == pytest.approx(sum(h["held"] for h in halves), rel=1e-12)
