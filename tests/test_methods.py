"""Every strategy over real processes, against plain PyTorch or a hand-unrolled reference in one process."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from test_exactness import SEQ, N, Rows, assert_close, make, plain_run, summed

from manyhands.core import config, registry
from manyhands.core.errors import ModelError, UsageError
from manyhands.core.membership import Seat
from manyhands.data.sample import Order
from manyhands.exchange.half import BF16
from manyhands.strategy import presets
from manyhands.strategy.base import Strategy
from manyhands.strategy.optimizers import SGD, AdamW
from manyhands.train.feed import Feed
from manyhands.train.fragments import split
from manyhands.train.replica import Part, Replica
from manyhands.wire.solo import Solo
from manyhands.wire.world import Member, World

LONE = World(Solo(), (Member(0, "here", "cpu"),), "solo")
GLOBAL = 6
NEUTRAL = {"outer_lr": 1.0, "outer_momentum": 0.0}


def feed_of(world: Any, case: dict[str, Any]) -> Feed:
    rows = case.get("rows", Rows)()
    return Feed(
        rows=rows,
        order=Order(len(rows), case.get("global_batch", GLOBAL), 3, False),
        rank=world.rank,
        weights=case.get("weights", [1.0] * 5)[: world.size],
        micro_batch=1,
        device_batch=64,
        coalesce=True,
        device=torch.device("cpu"),
        seed=3,
    )


def method_run(world: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Some steps of a strategy; the agreed parameters before and after coming to rest."""
    torch.set_num_threads(1)
    model = make()
    replica = Replica(
        model, case["strategy"], world.wire, max_grad_norm=case.get("clip"), targets_per_row=SEQ
    )
    feed = feed_of(world, case)
    results = [replica.step(feed.part(step), summed) for step in range(case["steps"])]
    replica.meet()
    assert replica.at_rest or not replica.method.agrees
    if replica.method.agrees:
        replica.check_agreement()
    with replica.agreed():
        state = {k: v.detach().clone().tolist() for k, v in model.state_dict().items()}
    replica.close()
    return {
        "losses": [r.loss for r in results],
        "agreed": [r.agreed for r in results],
        "state": state,
        "tokens": replica.tokens,
    }


def turned_run(world: Any, strategy: Strategy, turned: bool) -> list[float]:
    """A model with a matrix that is laid out by columns, or with the same one by rows."""
    model = make()
    if turned:
        model.hidden.weight = torch.nn.Parameter(model.hidden.weight.detach().t().contiguous().t())
    replica = Replica(model, strategy, world.wire, targets_per_row=SEQ)
    feed = feed_of(world, {})
    for step in range(4):
        replica.step(feed.part(step), summed)
    replica.meet()
    replica.check_agreement()
    found: list[float] = model.hidden.weight.detach().flatten().tolist()
    replica.close()
    return found


@pytest.mark.parametrize(
    "make_it", [presets.ddp, presets.zero1, presets.eager, partial(presets.diloco, every=2)]
)
def test_a_matrix_is_updated_however_it_lies_in_memory(fleets: Any, make_it: Any) -> None:
    strategy = make_it(lr=0.01, optimizer="adamw")
    for ours in fleets(2, "shared").run(turned_run, strategy, True):
        assert ours == pytest.approx(fleets(2, "shared").run(turned_run, strategy, False)[0], rel=1e-9)


def targets(steps: int, global_batch: int = GLOBAL) -> int:
    rows, order = Rows(), Order(N, global_batch, 3, False)
    return sum(int((rows.take(order.ids(s))["targets"] != -100).sum()) for s in range(steps))


# ------------------------------------------------------------------------------- equal to plain training

PLAIN: dict[str, Callable[..., Strategy]] = {
    "ddp": presets.ddp,
    "accumulate": lambda **k: presets.accumulate(every=1, **k),
    "hierarchical": presets.hierarchical,
    "local-sgd": lambda **k: presets.local_sgd(every=3, **k),
    "post-local-sgd": lambda **k: presets.post_local_sgd(every=2, start=2, **k),
    "slowmo": lambda **k: presets.slowmo(every=2, slow_momentum=0.0, **k),
    "diloco": lambda **k: presets.diloco(every=2, **NEUTRAL, **k),
    "streaming-diloco": lambda **k: presets.streaming_diloco(
        every=2, fragments=2, delay=0, keep_local=0.0, exchange="all-reduce", **NEUTRAL, **k
    ),
    "gossip": lambda **k: presets.gossip(every=2, **NEUTRAL, **k),
    "eager": presets.eager,
    "forecast": lambda **k: presets.forecast(every=3, delay=1, exchange="error-feedback(int4)", **k),
    "forecast, in turn": lambda **k: presets.forecast(every=4, delay=2, fragments=3, **k),
    "hogwild": presets.hogwild,
}


@pytest.mark.parametrize("name", sorted(PLAIN))
@pytest.mark.parametrize("optimizer", [SGD(0.3, momentum=0.9), AdamW(0.01)], ids=["sgd", "adamw"])
def test_one_worker_is_plain_training(name: str, optimizer: Any) -> None:
    strategy = PLAIN[name](optimizer=optimizer)
    case = {"strategy": strategy, "steps": 5, "clip": 0.5}
    ours = method_run(LONE, case)
    reference = plain_run({**case, "optimizer": optimizer, "global_batch": GLOBAL})
    assert_close({**ours, "losses": []}, {**reference, "losses": []})
    assert ours["tokens"] == targets(5)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("transport", ["shared", "group"])
def test_local_sgd_of_one_step_is_all_reduce(fleets: Any, size: int, transport: str) -> None:
    """SGD without momentum is linear, so the mean of the ways is the way along the mean; weights are uneven."""
    for name in ("local-sgd", "diloco"):
        more: Any = NEUTRAL if name == "diloco" else {}
        strategy = getattr(presets, name.replace("-", "_"))(every=1, optimizer=SGD(0.3), **more)
        case = {"strategy": strategy, "steps": 5, "weights": [3.0, 1.0, 1.0]}
        answers = fleets(size, transport).run(method_run, case)
        reference = plain_run({"steps": 5, "clip": None, "optimizer": SGD(0.3), "global_batch": GLOBAL})
        for answer in answers:
            assert_close(answer, reference)
            assert answer["tokens"] == targets(5)


def test_accumulated_batches_are_one_large_batch(fleets: Any) -> None:
    strategy = presets.accumulate(every=2, optimizer=AdamW(0.01))
    answers = fleets(2, "shared").run(method_run, {"strategy": strategy, "steps": 5, "clip": 0.5})
    model = make()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.9, 0.95),
    )
    rows, order = Rows(), Order(N, GLOBAL, 3, False)
    for group in ([0, 1], [2, 3], [4]):  # the last, incomplete one is applied when the workers come to rest
        sums = [summed(model, rows.take(order.ids(step))) for step in group]
        optimizer.zero_grad()
        (sum(s[0] for s in sums) / sum(s[1] for s in sums)).backward()
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        optimizer.step()
    reference = {"losses": [], "state": {k: v.tolist() for k, v in model.state_dict().items()}}
    for answer in answers:
        assert_close({**answer, "losses": []}, reference)
        assert answer["agreed"] == [False, True, False, True, False]
        assert answer["tokens"] == targets(5)


# ------------------------------------------------------------------------------------------ all of them run


def learning_run(world: Any, text: str, steps: int) -> dict[str, Any]:
    """Whether a strategy learns, and ends with equal replicas; its losses on all rows before and after."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    strategy = config.from_text("strategies", text)
    model = make().float()
    replica = Replica(model, strategy, world.wire, max_grad_norm=1.0, targets_per_row=SEQ)
    feed = feed_of(world, {"global_batch": 12})

    def score() -> float:
        with replica.agreed(), torch.no_grad():
            loss, count = summed(model, {"input_ids": Rows().ids, "targets": Rows().targets})
            return float(loss) / count

    first = score()
    for step in range(steps):
        replica.step(feed.part(step), summed)
    replica.meet()
    word = replica.check_agreement()
    last = score()
    replica.close()
    return {"first": first, "last": last, "word": word}


LEARNING = {
    "local-sgd": "every=4",
    "post-local-sgd": "every=4, start=8",
    "slowmo": "every=4",
    "diloco": "every=4",
    "streaming-diloco": "every=8, fragments=2, delay=2",
    "muloco": "every=4",
    "sparseloco": "every=4",
    "gossip": "every=4",
    "hogwild": "every=4",
    "accumulate": "every=2",
}
OURS = sorted(
    name
    for name, entry in registry.REGISTRY["strategies"].items()
    if not name.startswith(("zero", "parameter-server"))  # tests of their own: they need other processes
)


@pytest.mark.parametrize("name", OURS)
def test_every_strategy_learns_with_two_workers(fleets: Any, name: str) -> None:
    options = [o for o in ("lr=0.02", LEARNING.get(name)) if o]
    answers = fleets(2, "shared").run(learning_run, f"{name}({', '.join(options)})", 24)
    assert len({a["word"] for a in answers}) == 1, "replicas are equal at rest"
    for answer in answers:
        assert answer["last"] < 0.97 * answer["first"], answer


# --------------------------------------------------------------------------------------------- bad pairings


@pytest.mark.parametrize(
    ("make_it", "words"),
    [
        (lambda: Strategy(cadence=config.from_text("cadences", "staggered")), "inner = 'adamw'"),
        (lambda: Strategy(keep_local=0.5), "leave out keep_local"),
        (lambda: Strategy(keep_local=1.0), "keep_local < 1"),
        (lambda: presets.local_sgd(exchange="ordered"), "all-reduce"),
        (lambda: presets.ddp(exchange="gossip"), "averages models"),
        (lambda: presets.eager(exchange="ordered"), "every-step"),
        (lambda: presets.ddp(exchange="none"), "all-reduce"),
        (lambda: dataclasses.replace(presets.hogwild(), exchange=BF16()), "would be ignored"),
        (lambda: presets.ddp(bucket_mb=3, exchange="int8"), "leave them out"),
        (lambda: presets.streaming_diloco(every=4, fragments=8), "fragments <= 4"),
        (lambda: presets.streaming_diloco(every=8, delay=8), "delay < 8"),
        (lambda: presets.local_sgd(every=0), "every >= 1"),
        (lambda: config.from_text("strategies", "diloco(everry=3)"), "did you mean 'every'"),
        (lambda: config.from_text("strategies", "dilco"), "did you mean 'diloco'"),
    ],
)
def test_impossible_pairings_are_refused_with_the_nearest_choice(make_it: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_it()
    assert words in str(caught.value)


def test_more_fragments_than_tensors_are_refused() -> None:
    strategy = presets.streaming_diloco(every=64, fragments=50)
    with pytest.raises(UsageError, match="fragments <= "):
        Replica(make(), strategy, Solo(), targets_per_row=SEQ)


class LookUp(torch.nn.Module):
    """A table whose gradient is sparse, and whose layer does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.ones(5, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(x, self.table, sparse=True)


def test_sparse_gradients_are_refused_before_an_update() -> None:
    says = torch.nn.Sequential(torch.nn.Embedding(5, 2, sparse=True), torch.nn.Linear(2, 1))
    for name in registry.entries("strategies"):
        with pytest.raises(ModelError, match=r"parameter '0.weight' gets sparse gradients.*sparse=False"):
            Replica(says, config.from_text("strategies", name), Solo())
    says[0].requires_grad_(False)  # frozen it has none
    Replica(says, presets.ddp(), Solo()).close()
    part = Part(0, [(0, {"x": torch.tensor([1, 2])})], 1, 2, 0)
    for strategy in (presets.ddp(), presets.diloco(every=1), presets.zero1()):
        model = LookUp()
        with pytest.raises(ModelError, match=r"parameter 'table' gets sparse gradients"):
            Replica(model, strategy, Solo()).step(part, lambda m, b: (m(b["x"]).sum(), 2))
        assert bool((model.table == 1).all())


def test_hogwild_over_sockets_is_refused(fleets: Any) -> None:
    answers = fleets(2, "group").run(_refused, presets.hogwild())
    assert all("one machine" in answer for answer in answers)


def _refused(world: Any, strategy: Any) -> str:
    try:
        Replica(make(), strategy, world.wire, targets_per_row=SEQ)
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("fragments", [1, 2, 3, 5])
def test_fragments_are_all_parameters_once(fragments: int) -> None:
    named = [(n, p) for n, p in make().named_parameters() if p.requires_grad]
    parts = split(named, fragments)
    assert len(parts) == fragments
    assert sorted(n for part in parts for n, _ in part) == sorted(n for n, _ in named)
    assert all(parts)


@pytest.mark.parametrize("fragments", [2, 3, 4])
def test_an_embedding_is_no_burden_on_a_fragment_of_layers(fragments: int) -> None:
    layers = {f"h.{i}.weight": 4 for i in range(8)}
    sizes = {"last.weight": 1, "embed.weight": 10, **layers}
    named = [(n, torch.nn.Parameter(torch.zeros(size))) for n, size in sizes.items()]
    parts = [[n for n, _ in part] for part in split(named, fragments)]
    of = [sum(sizes[n] for n in part) for part in parts]
    assert parts[0][0] == "embed.weight"
    assert max(of) - min(of) <= 6, "less than the embedding"


@pytest.mark.parametrize("name", OURS)
def test_every_strategy_reads_back_from_all_its_spellings(name: str) -> None:
    strategy = config.from_text("strategies", name)
    assert config.from_text("strategies", repr(strategy)) == strategy
    assert config.from_choice("strategies", config.to_data(strategy, "strategies"), "strategy") == strategy


SEATS = [Seat(id=f"w{rank}", host=f"host{rank}") for rank in range(2)]


def nan_run(world: Any, text: str) -> list[Any]:
    """One worker's data is poisoned in one round; nobody's parameters may become NaN, and training goes on."""
    torch.set_num_threads(1)
    model = make().float()
    replica = Replica(model, config.from_text("strategies", text), world.wire, targets_per_row=SEQ)
    feed = feed_of(world, {"global_batch": 12})

    def poisoned(m: Any, batch: Any) -> Any:
        loss, count = summed(m, batch)
        return loss * (math.nan if world.rank == 1 and replica.steps == 2 else 1.0), count

    for step in range(6):
        replica.step(feed.part(step), poisoned)
    replica.meet()
    word = replica.check_agreement()
    finite = all(bool(torch.isfinite(t).all()) for t in model.state_dict().values())
    held = torch.utils._pytree.tree_leaves(replica.states)
    kept = all(bool(torch.isfinite(t.double()).all()) for t in held)
    return [word, finite, replica.skipped, kept, replica.take_notes()]


@pytest.mark.parametrize(
    "text",
    [
        "ddp(lr=0.01, exchange=error-feedback(topk(density=0.1)))",
        "eager(lr=0.01)",
        "zero1(lr=0.01)",
        "hogwild(lr=0.01)",
        "forecast(lr=0.01, every=2, delay=1, exchange=error-feedback(int8))",
        "diloco(lr=0.01, every=2, exchange=error-feedback(int8))",
        "powersgd(lr=0.01)",
    ],
)
def test_a_nan_of_one_worker_is_left_out_by_all(fleets: Any, text: str) -> None:
    answers = fleets(2, "shared").run(nan_run, text)
    assert answers[0][0] == answers[1][0]
    for _, finite, _, held_finite, notes in answers:
        assert finite
        assert held_finite
        assert any("w1 (rank 1, host1)" in note.words(SEATS) for note in notes)
        assert not any("w0" in note.words(SEATS) for note in notes)
    assert any(skipped for _, _, skipped, _, _ in answers)


def one_nan_run(world: Any) -> tuple[list[float], int]:
    """What the workers tell each other of rounds in whose first one step of one worker came to nothing."""
    replica = Replica(make(), presets.hogwild(lr=0.01, every=2), world.wire, targets_per_row=SEQ)
    feed, told = feed_of(world, {}), []

    def poisoned(m: Any, batch: Any) -> Any:
        loss, count = summed(m, batch)
        return loss * (math.nan if world.rank == 1 and replica.steps == 0 else 1.0), count

    for step in range(4):
        result = replica.step(feed.part(step), poisoned)
        told += [result.loss] if result.agreed else []
    return told, replica.tokens


def test_a_step_of_hogwild_that_was_left_out_is_in_no_mean(fleets: Any) -> None:
    answers = fleets(2, "shared").run(one_nan_run)
    assert answers[0] == answers[1]
    told, tokens = answers[0]
    assert all(math.isfinite(loss) for loss in told)
    assert tokens < targets(4)


def gaps_run(world: Any) -> list[tuple[float, float]]:
    """(norm that was told, how far parameters went) of each agreed step at rate 1."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Linear(1, 3)).double()
    replica = Replica(model, config.from_text("strategies", SIGNS), world.wire)
    found = []
    for step in range(3):
        before = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(2 * step + world.rank)).double()
        part = Part(step, [(world.rank, {"x": x})], world.size, 4 * world.size, 0)
        result = replica.step(part, lambda m, b: (m(b["x"]).square().sum(), len(b["x"])))
        after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        found += [(result.grad_norm, float((before - after).norm()))] if result.agreed else []
    replica.meet()
    replica.close()
    return found


SIGNS = "eager(correct=false, optimizer=sgd, lr=1.0, exchange=error-feedback(sign(block=0)))"


def test_what_a_codec_makes_of_the_room_between_parameters_is_in_no_norm(fleets: Any) -> None:
    for found in fleets(2, "shared").run(gaps_run):
        assert len(found) == 2
        for told, gone in found:
            assert told == pytest.approx(gone, rel=1e-12)


def test_counts_are_exact_between_uneven_shares(fleets: Any) -> None:
    strategy = presets.diloco(every=3, lr=0.01)
    case = {"strategy": strategy, "steps": 7, "weights": [5.0, 0.0]}
    answers = fleets(2, "shared").run(method_run, case)
    assert [a["tokens"] for a in answers] == [targets(7)] * 2
    assert np.isfinite(np.array(list(answers[0]["losses"]))[2::3]).all()
