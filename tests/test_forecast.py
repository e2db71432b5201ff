"""`forecast`: own steps that agreed ones replace, against all-reduce and against a slow reference by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from test_exactness import N, Rows, assert_close, make, summed
from test_methods import GLOBAL, LONE, method_run, targets

from manyhands.core.errors import UsageError
from manyhands.data.partition import divide
from manyhands.data.sample import Order
from manyhands.strategy import presets
from manyhands.strategy.optimizers import SGD, Adagrad, Adam, AdamW, Muon, RMSprop
from manyhands.train.forecast import times
from manyhands.train.fragments import split

RATE, BETAS, EPS = 0.01, (0.9, 0.95), 1e-8


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "optimizer",
    [SGD(0.3, momentum=0.9), AdamW(RATE), Adam(RATE), RMSprop(RATE), Adagrad(RATE), Muon(RATE)],
    ids=lambda o: type(o).__name__,
)
def test_a_round_of_one_step_is_all_reduce(fleets: Any, size: int, optimizer: Any) -> None:
    strategy = presets.forecast(every=1, optimizer=optimizer)
    case = {"strategy": strategy, "steps": 5, "weights": [3.0, 1.0, 1.0]}
    reference = method_run(LONE, {"strategy": presets.ddp(optimizer=optimizer), "steps": 5})
    for answer in fleets(size, "shared").run(method_run, case):
        assert_close(answer, reference)
        assert answer["tokens"] == targets(5)


class ByHand:
    """AdamW of flat float64 vectors, written out."""

    def __init__(self, model: Any) -> None:
        self.named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.value = {n: p.detach().clone() for n, p in self.named.items()}
        self.m: dict[str, Any] = {}
        self.v: dict[str, Any] = {}
        self.t: dict[str, int] = {}

    def become(self, other: ByHand, names: set[str]) -> None:
        for mine, theirs in (
            (self.value, other.value),
            (self.m, other.m),
            (self.v, other.v),
            (self.t, other.t),
        ):
            for name in names:
                mine.pop(name, None)
            mine.update({n: x for n, x in theirs.items() if n in names})

    def step(self, grads: dict[str, Any], counts: dict[str, float] | None = None) -> None:
        b1, b2 = BETAS
        for n, g in grads.items():
            c = 1.0 if counts is None else counts[n]
            x = self.value[n]
            self.m[n] = b1 * self.m.get(n, 0 * x) + (1 - b1) * g
            self.v[n] = b2 * self.v.get(n, 0 * x) + (1 - b2) * c * g * g
            self.t[n] = self.t.get(n, 0) + 1
            decay = 0.1 if x.dim() >= 2 else 0.0
            root = (self.v[n] / (1 - b2 ** self.t[n])).sqrt() + EPS
            self.value[n] = x * (1 - RATE * decay) - RATE * (self.m[n] / (1 - b1 ** self.t[n])) / root


Terms = list[tuple[int, dict[str, Any]]]  # targets and gradient of steps


def replay(worker: ByHand, terms: Terms, steps: int) -> None:
    """`steps` steps with the mean of these gradients, whose squares count as those of one step."""
    total, n = sum(c for c, _ in terms), len(terms)
    mean, counts = {}, {}
    for name in {name for _, g in terms for name in g}:
        zero = torch.zeros_like(worker.value[name])
        mean[name] = sum((c * g.get(name, zero) for c, g in terms), zero) / total
        square = sum(c * float(g[name].square().sum()) for c, g in terms if name in g) / total
        short = float(mean[name].square().sum())
        noise = min(max(0.0, (square - short) / (1 - 1 / n)), square) if n > 1 else 0.0
        count = round(256 * (square - noise + noise * steps / n) / short) / 256 if short else 1.0
        counts[name] = min(max(1.0, count), steps) if steps > 1 else 1.0
    for _ in range(steps):
        worker.step(mean, counts)


def _reference(
    size: int, steps: int, every: int, delay: int, weights: list[float], fragments: int
) -> dict[str, Any]:
    rows, order = Rows(), Order(N, GLOBAL, 3, False)
    models = [make() for _ in range(size)]
    workers, agreed = [ByHand(m) for m in models], ByHand(make())
    parts = [{n for n, _ in part} for part in split(list(agreed.named.items()), fragments)]
    terms: list[list[Terms]] = [[[] for _ in range(size)] for _ in parts]  # of each part and worker
    since, flights = [0] * fragments, [None] * fragments

    def send(f: int) -> Any:
        found = ([term for own in terms[f] for term in own], since[f])
        for own in terms[f]:
            own.clear()
        since[f] = 0
        return found

    def arrive(f: int, flown: Any) -> None:
        told, h = flown
        replay(agreed, told, h)
        for worker, own in zip(workers, terms[f], strict=True):
            worker.become(agreed, parts[f])
            if own:
                replay(worker, own, len(own))

    for step in range(1, steps + 1):
        ids = order.ids(step - 1)
        for w, (worker, model, part) in enumerate(
            zip(workers, models, divide(len(ids), weights), strict=True)
        ):
            with torch.no_grad():
                for name, p in worker.named.items():
                    p.copy_(worker.value[name])
            model.zero_grad()
            if not len(part):
                continue
            loss, count = summed(model, rows.take(ids[part.start : part.stop]))
            if count:
                (loss / count).backward()
                grads = {n: p.grad.clone() for n, p in worker.named.items() if p.grad is not None}
                for f, names in enumerate(parts):
                    terms[f][w].append((count, {n: g for n, g in grads.items() if n in names}))
                worker.step(grads)
        since = [n + 1 for n in since]
        for f in range(fragments):
            if step % every == f * every // fragments:
                flights[f] = send(f)
        for f in range(fragments):
            if flights[f] is not None and since[f] == delay:
                arrive(f, flights[f])
                flights[f] = None
    for f in range(fragments):
        if flights[f] is not None:
            arrive(f, flights[f])
    for f in range(fragments):
        if since[f]:
            arrive(f, send(f))
    model = make()
    model.load_state_dict({**model.state_dict(), **dict(agreed.value.items())})
    return {"losses": [], "state": {k: v.tolist() for k, v in model.state_dict().items()}}


@pytest.mark.parametrize(
    ("size", "transport", "every", "delay", "fragments", "steps"),
    [
        (2, "shared", 3, 0, 1, 7),
        (2, "group", 3, 1, 1, 8),
        (3, "shared", 2, 1, 1, 7),
        (2, "shared", 4, 3, 1, 10),
        (2, "group", 3, 1, 3, 11),
        (3, "shared", 4, 2, 2, 9),
        (2, "shared", 5, 0, 3, 13),
    ],
)
def test_it_is_what_the_module_says(
    fleets: Any, size: int, transport: str, every: int, delay: int, fragments: int, steps: int
) -> None:
    weights = [2.0, 1.0, 1.0][:size]
    strategy = presets.forecast(
        every=every, delay=delay, fragments=fragments, optimizer=AdamW(RATE, betas=BETAS)
    )
    case = {"strategy": strategy, "steps": steps, "weights": weights}
    reference = _reference(size, steps, every, delay, weights, fragments)
    for answer in fleets(size, transport).run(method_run, case):
        assert_close({**answer, "losses": []}, reference)
        assert answer["tokens"] == targets(steps)


def _uneven_run(world: Any, pace: float, fragments: int) -> dict[str, Any]:
    """Worker 1 makes every other step, with gradients of two; a step of the round's middle agrees meanwhile."""
    import test_methods

    from manyhands.train.replica import Replica

    torch.set_num_threads(1)
    model = make()
    strategy = presets.forecast(every=8, delay=3, fragments=fragments, optimizer=AdamW(RATE))
    replica = Replica(model, strategy, world.wire, max_grad_norm=None, targets_per_row=test_methods.SEQ)
    feed = test_methods.feed_of(world, {})
    for step in range(22):
        part = feed.part(step)
        replica.step(dataclasses.replace(part, pace=pace) if world.rank else part, summed)
        method: Any = replica.method
        if method.inner.pending:  # what is added up is where the next gradients will be added
            assert any(p.grad is not None for p in model.parameters())
    replica.meet()
    replica.check_agreement()
    with replica.agreed():
        state = [p.detach().flatten().tolist() for p in model.parameters()]
    tokens = replica.tokens
    replica.close()
    return {"state": state, "tokens": tokens}


@pytest.mark.parametrize("fragments", [1, 2])
def test_parts_that_no_step_has_used_survive_an_agreement(fleets: Any, fragments: int) -> None:
    answers = fleets(2, "shared").run(_uneven_run, 0.5, fragments)
    assert answers[0] == answers[1]
    assert answers[0]["tokens"] == targets(22)


@pytest.mark.parametrize("signal", [0.0, 0.1, 1.0])
def test_squares_count_as_those_of_one_step_would(signal: float) -> None:
    """Over many tensors the counted squares of a round's mean are those of one step's gradient, on average."""
    workers, steps, size = 2, 4, 4096
    torch.manual_seed(1)
    found, wanted = 0.0, 0.0
    for _ in range(20):
        terms = signal + torch.randn(steps, workers, size, dtype=torch.float64)
        mean = terms.mean((0, 1))
        square, length = float(terms.square().sum(-1).mean()), float(mean.square().sum())
        found += times(square, length, workers * steps, steps) * length
        wanted += float(terms.mean(1).square().sum(-1).mean())
    assert math.isclose(found, wanted, rel_tol=0.02)


@pytest.mark.parametrize(
    ("square", "length", "terms", "steps"),
    [(1.0, 0.5, 2, 1), (1.0, 1.0, 1, 4), (0.0, 0.0, 8, 4), (1.0, math.nan, 8, 4), (0.3, 4.0, 8, 4)],
)
def test_squares_count_once_where_nothing_is_known(
    square: float, length: float, terms: float, steps: int
) -> None:
    assert times(square, length, terms, steps) == 1.0


@pytest.mark.parametrize(
    ("make_it", "said"),
    [
        (lambda: presets.forecast(every=3, delay=3), "delay < 3"),
        (lambda: presets.forecast(every=0), "every >= 1"),
        (lambda: presets.forecast(fragments=0), "fragments >= 1"),
        (lambda: presets.forecast(every=2, fragments=3), "fragments <= 2"),
        (lambda: presets.forecast(optimizer=RMSprop(0.01, alpha=0.0)), "above 0"),
        (lambda: presets.forecast(exchange="ordered"), "every-step"),
        (lambda: presets.forecast(exchange="gossip"), "averages models"),
        (lambda: presets.forecast(exchange="all-reduce(bucket_mb=4)"), "bucket_mb would be ignored"),
    ],
)
def test_impossible_pairings_are_refused(make_it: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_it()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("size", [1, 1000, 1024, 5001])
def test_loops_give_the_bits_of_the_reference(steps: int, size: int, monkeypatch: Any) -> None:
    from manyhands.train import replay

    assert replay._loops() is not None, "the set-up has a compiler"
    torch.manual_seed(0)

    def made() -> replay.AdamState:
        return replay.AdamState(torch.randn(size), torch.randn(size), torch.rand(size), torch.tensor(7.0))

    source, mean = made(), torch.randn(size)
    rule = replay.AdamRule((0.9, 0.95), 1e-8, 0.1)
    found = []
    for loops in (replay._loops, lambda: None):
        monkeypatch.setattr(replay, "_loops", loops)
        target = made()
        replay.adamw(source, target, mean, 2.5, [1e-3 * (j + 1) for j in range(steps)], rule, scale=0.7)
        assert replay.square_length(mean) == pytest.approx(float(mean.double().square().sum()), rel=1e-14)
        found.append(target)
    own = dataclasses.replace(source)  # the result where it was read
    replay.adamw(own, own, mean, 2.5, [1e-3 * (j + 1) for j in range(steps)], rule, scale=0.7)
    for name in ("value", "first", "second", "step"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name)), name
        assert torch.equal(getattr(found[0], name), getattr(own, name)), name
    assert float(found[0].step) == 7 + steps


def test_a_replay_is_torchs_own_adamw() -> None:
    from manyhands.train import replay

    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(50, dtype=torch.float64))
    param.grad = torch.randn(50, dtype=torch.float64)
    zero = torch.zeros(50, dtype=torch.float64)
    state = replay.AdamState(param.detach().clone(), zero, zero.clone(), torch.tensor(0.0))
    optimizer = torch.optim.AdamW([param], lr=0.01, betas=BETAS, weight_decay=0.1)
    for _ in range(3):
        optimizer.step()
    replay.adamw(state, state, param.grad, 1.0, [0.01] * 3, replay.AdamRule(BETAS, 1e-8, 0.1))
    assert torch.allclose(state.value, param.detach(), rtol=1e-12, atol=1e-14)
    assert float(state.step) == 3
