"""Methods of local steps, of steps in flight and of pairs against their papers, unrolled by hand in one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_exactness import Rows, assert_close, make, summed
from test_methods import GLOBAL, method_run

from manyhands.core.request import partner
from manyhands.data.partition import divide
from manyhands.data.sample import Order
from manyhands.strategy import presets
from manyhands.strategy.optimizers import SGD
from manyhands.train.fragments import split


class FullRows(Rows):
    """Every target is valid, so that each step has the same count."""

    def __init__(self) -> None:
        super().__init__(4 * GLOBAL)
        self.targets[self.targets == -100] = 1


class Simulated:
    """N workers in one process, one after the other, in plain PyTorch: models, their optimizers, their shares."""

    def __init__(self, size: int, lr: float, weights: list[float], rows: Rows | None = None) -> None:
        self.models = [make() for _ in range(size)]
        self.optimizers = [
            torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=lr, momentum=0.9)
            for m in self.models
        ]
        self.rows, self.weights = rows or Rows(), weights
        self.order = Order(len(self.rows), GLOBAL, 3, False)
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
    workers = Simulated(size, 0.1, [1.0] * size, FullRows())
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


@pytest.mark.parametrize("correct", [True, False])
def test_eager_forecasts_and_corrects(fleets: Any, correct: bool) -> None:
    strategy = presets.eager(optimizer=SGD(0.3), correct=correct)
    case = {"strategy": strategy, "steps": 4, "rows": FullRows}
    reference = _eager_reference(2, 4, correct)
    for answer in fleets(2, "shared").run(method_run, case):
        assert_close({**answer, "losses": []}, reference)


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
