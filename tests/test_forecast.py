"""`forecast`: own steps that agreed ones replace, against all-reduce and against a slow reference by hand."""

from __future__ import annotations

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

    def become(self, other: ByHand) -> None:
        self.value, self.m, self.v, self.t = dict(other.value), dict(other.m), dict(other.v), dict(other.t)

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
        count = round(256 * (square - noise + noise * steps / n) / short) / 256
        counts[name] = min(max(1.0, count), steps) if steps > 1 else 1.0
    for _ in range(steps):
        worker.step(mean, counts)


def _reference(size: int, steps: int, every: int, delay: int, weights: list[float]) -> dict[str, Any]:
    rows, order = Rows(), Order(N, GLOBAL, 3, False)
    models = [make() for _ in range(size)]
    workers, agreed = [ByHand(m) for m in models], ByHand(make())
    terms: list[Terms] = [[] for _ in range(size)]
    length = 0
    flight: Any = None

    def send() -> Any:
        found = ([term for own in terms for term in own], length)
        for own in terms:
            own.clear()
        return found

    def arrive(flown: Any) -> None:
        told, h = flown
        replay(agreed, told, h)
        for worker, own in zip(workers, terms, strict=True):
            worker.become(agreed)
            if own:
                replay(worker, own, len(own))

    since = 0
    for step in range(1, steps + 1):
        ids = order.ids(step - 1)
        for w, own, model, part in zip(workers, terms, models, divide(len(ids), weights), strict=True):
            with torch.no_grad():
                for name, p in w.named.items():
                    p.copy_(w.value[name])
            model.zero_grad()
            if not len(part):
                continue
            loss, count = summed(model, rows.take(ids[part.start : part.stop]))
            if count:
                (loss / count).backward()
                grads = {n: p.grad.clone() for n, p in w.named.items() if p.grad is not None}
                own.append((count, grads))
                w.step(grads)
        since += 1
        if step % every == 0:
            length, since = since, 0
            flight = send()
        if flight is not None and since == delay:
            arrive(flight)
            flight = None
    if flight is not None:
        arrive(flight)
    if since:
        length = since
        arrive(send())
    with torch.no_grad():
        for name, p in agreed.named.items():
            p.copy_(agreed.value[name])
    model = make()
    model.load_state_dict({**model.state_dict(), **dict(agreed.value.items())})
    return {"losses": [], "state": {k: v.tolist() for k, v in model.state_dict().items()}}


@pytest.mark.parametrize(
    ("size", "transport", "every", "delay", "steps"),
    [(2, "shared", 3, 0, 7), (2, "group", 3, 1, 8), (3, "shared", 2, 1, 7), (2, "shared", 4, 3, 10)],
)
def test_it_is_what_the_module_says(
    fleets: Any, size: int, transport: str, every: int, delay: int, steps: int
) -> None:
    weights = [2.0, 1.0, 1.0][:size]
    strategy = presets.forecast(every=every, delay=delay, optimizer=AdamW(RATE, betas=BETAS))
    case = {"strategy": strategy, "steps": steps, "weights": weights}
    reference = _reference(size, steps, every, delay, weights)
    for answer in fleets(size, transport).run(method_run, case):
        assert_close({**answer, "losses": []}, reference)
        assert answer["tokens"] == targets(steps)


def _uneven_run(world: Any, pace: float) -> dict[str, Any]:
    """Worker 1 makes every other step, with gradients of two; a step of the round's middle agrees meanwhile."""
    import dataclasses

    import test_methods

    from manyhands.train.replica import Replica

    torch.set_num_threads(1)
    model = make()
    strategy = presets.forecast(every=8, delay=3, optimizer=AdamW(RATE))
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


def test_parts_that_no_step_has_used_survive_an_agreement(fleets: Any) -> None:
    answers = fleets(2, "shared").run(_uneven_run, 0.5)
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
        (lambda: presets.forecast(optimizer=RMSprop(0.01, alpha=0.0)), "above 0"),
        (lambda: presets.forecast(exchange="ordered"), "every-step"),
        (lambda: presets.forecast(exchange="gossip"), "averages models"),
        (lambda: presets.forecast(exchange="all-reduce(bucket_mb=4)"), "bucket_mb would be ignored"),
    ],
)
def test_impossible_pairings_are_refused(make_it: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_it()


@pytest.mark.parametrize("steps", [1, 3])
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
        replay.adamw(source, target, mean, 2.5, [1e-3 * (j + 1) for j in range(steps)], rule)
        found.append(target)
    for name in ("value", "first", "second", "step"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name)), name
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
