"""Every strategy over real processes, against plain PyTorch or a hand-unrolled reference in one process."""

from __future__ import annotations

import copy
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
from manyhands.core.errors import UsageError
from manyhands.core.membership import Seat
from manyhands.core.request import partner
from manyhands.data.partition import divide
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
    return Feed(
        rows=Rows(),
        order=Order(N, case.get("global_batch", GLOBAL), 3, False),
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


# --------------------------------------------------------------------------- equal to an unrolled reference


class Simulated:
    """N workers in one process, one after the other, in plain PyTorch: models, their optimizers, their shares."""

    def __init__(self, size: int, lr: float, weights: list[float]) -> None:
        self.models = [make() for _ in range(size)]
        self.optimizers = [
            torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=lr, momentum=0.9)
            for m in self.models
        ]
        self.rows, self.order, self.weights = Rows(), Order(N, GLOBAL, 3, False), weights
        self.counts = [0] * size

    def inner(self, step: int) -> None:
        ids = self.order.ids(step)
        for rank, part in enumerate(divide(len(ids), self.weights)):
            if not len(part):
                continue
            loss, count = summed(self.models[rank], self.rows.take(ids[part.start : part.stop]))
            if count:
                self.optimizers[rank].zero_grad()
                (loss / count).backward()
                self.optimizers[rank].step()
                self.counts[rank] += count

    def named(self, rank: int) -> dict[str, torch.Tensor]:
        return {n: p for n, p in self.models[rank].named_parameters() if p.requires_grad}


def _diloco_reference(size: int, steps: int, every: int, weights: list[float]) -> dict[str, Any]:
    workers = Simulated(size, 0.1, weights)
    anchor = copy.deepcopy(workers.models[0])
    held = {n: p for n, p in anchor.named_parameters() if p.requires_grad}
    outer = torch.optim.SGD(list(held.values()), lr=0.7, momentum=0.9, nesterov=True)
    for step in range(steps):
        workers.inner(step)
        if (step + 1) % every == 0 or step == steps - 1:
            total = sum(workers.counts)
            with torch.no_grad():
                for name, a in held.items():
                    ways = [a - workers.named(r)[name] for r in range(size)]
                    a.grad = sum(w * c / total for w, c in zip(ways, workers.counts, strict=True))
            outer.step()
            with torch.no_grad():
                for name, a in held.items():
                    for rank in range(size):
                        workers.named(rank)[name].copy_(a)
            workers.counts = [0] * size
    return {"losses": [], "state": {k: v.tolist() for k, v in anchor.state_dict().items()}}


@pytest.mark.parametrize(("size", "transport"), [(2, "shared"), (3, "group")])
def test_diloco_is_what_the_paper_says(fleets: Any, size: int, transport: str) -> None:
    weights = [2.0, 1.0, 1.0][:size]
    strategy = presets.diloco(every=2, optimizer=SGD(0.1, momentum=0.9))
    case = {"strategy": strategy, "steps": 5, "weights": weights}
    reference = _diloco_reference(size, 5, 2, weights)
    for answer in fleets(size, transport).run(method_run, case):
        assert_close({**answer, "losses": []}, reference)
        assert answer["agreed"] == [False, True, False, True, False]


def _streaming_reference(size: int, steps: int) -> dict[str, Any]:
    """Fragments of every=4, offsets 0 and 2, one step in flight, half of the local parameters kept."""
    weights = [1.0] * size
    workers = Simulated(size, 0.1, weights)
    named = [(n, p) for n, p in workers.models[0].named_parameters() if p.requires_grad]
    fragments = [[n for n, _ in part] for part in split(named, 2)]
    anchor = copy.deepcopy(workers.models[0])
    held = {n: p for n, p in anchor.named_parameters() if p.requires_grad}
    outer = torch.optim.SGD(list(held.values()), lr=0.7, momentum=0.9, nesterov=True)
    since = [[0] * size for _ in fragments]
    flying: dict[int, tuple[int, dict[str, torch.Tensor]]] = {}

    def start(f: int, at: int) -> None:
        total = sum(since[f])
        way = {}
        for name in fragments[f]:
            ways = [held[name].detach() - workers.named(r)[name].detach() for r in range(size)]
            way[name] = sum((w * c / total for w, c in zip(ways, since[f], strict=True)), torch.zeros(()))
        flying[f] = (at, way)
        since[f] = [0] * size

    def finish(f: int, keep: float) -> None:
        _, way = flying.pop(f)
        for name, value in way.items():
            held[name].grad = value
        outer.step()
        with torch.no_grad():
            for name in way:
                held[name].grad = None
                for rank in range(size):
                    p = workers.named(rank)[name]
                    p.copy_(keep * p + (1 - keep) * held[name])

    for step in range(1, steps + 1):
        before = list(workers.counts)
        workers.inner(step - 1)
        for f in range(2):
            since[f] = [s + c - b for s, c, b in zip(since[f], workers.counts, before, strict=True)]
        for f, offset in enumerate((0, 2)):
            if step > offset and (step - offset) % 4 == 0:
                start(f, step)
        for f in [f for f, (at, _) in flying.items() if step == at + 1]:
            finish(f, 0.5)
    for f in list(flying):
        finish(f, 0.5)
    for f in range(2):
        if sum(since[f]):
            start(f, steps)
            finish(f, 0.0)
        else:
            with torch.no_grad():
                for name in fragments[f]:
                    workers.named(0)[name].copy_(held[name])
    return {"losses": [], "state": {k: v.tolist() for k, v in anchor.state_dict().items()}}


def test_streaming_diloco_overlaps_fragments(fleets: Any) -> None:
    strategy = presets.streaming_diloco(
        every=4, fragments=2, delay=1, optimizer=SGD(0.1, momentum=0.9), exchange="all-reduce"
    )
    reference = _streaming_reference(2, 11)
    for transport in ("shared", "group"):
        for answer in fleets(2, transport).run(method_run, {"strategy": strategy, "steps": 11}):
            assert_close({**answer, "losses": []}, reference)


def _eager_reference(size: int, steps: int, correct: bool) -> dict[str, Any]:
    workers = Simulated(size, 0.1, [1.0] * size)
    agreed = make()
    held = {n: p for n, p in agreed.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(list(held.values()), lr=0.3)
    last: list[dict[str, torch.Tensor]] | None = None
    mean: dict[str, torch.Tensor] = {}
    for step in range(steps):
        ids = workers.order.ids(step)
        shares = divide(len(ids), workers.weights)
        sums: list[dict[str, torch.Tensor]] = []
        counts = []
        for rank, part in enumerate(shares):
            model = workers.models[rank]
            model.zero_grad()
            loss, count = summed(model, workers.rows.take(ids[part.start : part.stop]))
            loss.backward()
            sums.append(
                {
                    n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                    for n, p in workers.named(rank).items()
                }
            )
            counts.append(count)
        previous = mean
        if last is not None:  # what the last step said arrives now
            for name, p in held.items():
                p.grad = previous[name]
            optimizer.step()
        total = sum(counts)
        mean = {n: sum((s[n] for s in sums), torch.zeros(())) / total for n in held}
        for rank in range(size):
            own = {n: g / total for n, g in sums[rank].items()}  # full batches: nominal counts are equal
            for name, p in workers.named(rank).items():
                if not correct:
                    guess = torch.zeros(())
                elif last is None:
                    guess = sums[rank][name] / counts[rank]
                else:
                    guess = previous[name] + own[name] - last[rank][name]
                with torch.no_grad():
                    p.copy_(held[name] - 0.3 * guess)
        last = [{n: g / total for n, g in s.items()} for s in sums]
    for name, p in held.items():
        p.grad = mean[name]
    optimizer.step()
    return {"losses": [], "state": {k: v.tolist() for k, v in agreed.state_dict().items()}}


class FullRows(Rows):
    """Every target is valid, so that each step has the same count."""

    def __init__(self) -> None:
        super().__init__(4 * GLOBAL)
        self.targets[self.targets == -100] = 1


@pytest.mark.parametrize("correct", [True, False])
def test_eager_forecasts_and_corrects(fleets: Any, monkeypatch: Any, correct: bool) -> None:
    strategy = presets.eager(optimizer=SGD(0.3), correct=correct)
    monkeypatch.setattr("test_methods.Rows", FullRows)
    monkeypatch.setattr("test_methods.N", 4 * GLOBAL)
    reference = _eager_reference(2, 4, correct)
    for answer in fleets(2, "shared").run(full_rows_run, {"strategy": strategy, "steps": 4}):
        assert_close({**answer, "losses": []}, reference)


def full_rows_run(world: Any, case: dict[str, Any]) -> dict[str, Any]:
    import test_methods

    before = test_methods.Rows, test_methods.N
    test_methods.Rows, test_methods.N = FullRows, 4 * GLOBAL  # type: ignore[misc]
    try:
        return test_methods.method_run(world, case)
    finally:
        test_methods.Rows, test_methods.N = before  # type: ignore[misc]


def _gossip_reference(steps: int, every: int, shares: list[float]) -> dict[str, Any]:
    size = len(shares)
    workers = Simulated(size, 0.1, shares)
    anchors = [copy.deepcopy(m) for m in workers.models]
    held = [{n: p for n, p in a.named_parameters() if p.requires_grad} for a in anchors]
    outers = [torch.optim.SGD(list(h.values()), lr=0.7, momentum=0.5) for h in held]
    rounds = 0
    for step in range(1, steps + 1):
        workers.inner(step - 1)
        if step % every == 0 or step == steps:
            new = []
            for rank in range(size):
                other = partner(rank, size, rounds)
                grads = {}
                mine, theirs = workers.counts[rank], workers.counts[other]
                for name in held[rank]:
                    a, b = held[rank][name].detach(), held[other][name].detach()
                    da, db = a - workers.named(rank)[name].detach(), b - workers.named(other)[name].detach()
                    grads[name] = (mine * da + theirs * db) / (mine + theirs or 1) + (a - (a + b) / 2)
                new.append(grads)
            for rank in range(size):
                for name, p in held[rank].items():
                    p.grad = new[rank][name]
                outers[rank].step()
                with torch.no_grad():
                    for name, p in held[rank].items():
                        workers.named(rank)[name].copy_(p)
            rounds += 1
            workers.counts = [0] * size
    state = {k: v.clone() for k, v in anchors[0].state_dict().items()}
    for name in held[0]:
        state[name] = sum((h[name].detach() for h in held), torch.zeros(())) / size
    state["head.weight"] = state["embed.weight"]
    return {"losses": [], "state": {k: v.tolist() for k, v in state.items()}}


@pytest.mark.parametrize(("shares", "transport"), [([1.0, 1.0], "group"), ([3.0, 2.0, 1.0], "shared")])
def test_gossip_is_what_the_paper_says(fleets: Any, shares: list[float], transport: str) -> None:
    """With the targets that each of a pair has seen as weights."""
    strategy = presets.gossip(every=2, optimizer=SGD(0.1, momentum=0.9))
    reference = _gossip_reference(6, 2, shares)
    case = {"strategy": strategy, "steps": 6, "weights": shares}
    for answer in fleets(len(shares), transport).run(method_run, case):
        assert_close({**answer, "losses": []}, reference)


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
