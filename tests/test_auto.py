"""Auto: the way that is faster is taken, all decide the same, nothing is lost on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fleet import Fleet
from talks import converse

from manyhands.core import config
from manyhands.core.request import Gather, Scatter, Sum, Where
from manyhands.exchange import auto
from manyhands.exchange.combine import leaves
from manyhands.wire.drive import Interleave


def _value(text: str) -> Any:
    return config.from_text("exchanges", text)


def _grads(world: int, seed: int = 0) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(60, generator=generator, dtype=torch.float64)] for _ in range(world)]


def _round(exchange: Any, deltas: list[list[torch.Tensor]], states: list[Any], **more: Any) -> list[Any]:
    given = [[t.clone() for t in d] for d in deltas]
    return converse([exchange.talk(d, s) for d, s in zip(given, states, strict=True)], **more)


def _total(deltas: list[list[torch.Tensor]]) -> torch.Tensor:
    return torch.stack([d[0] for d in deltas]).sum(0)


class Link:
    """A simulated link and its clock: requests take their bytes' time, encoding a constant."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s, self.s = bytes_per_s, 0.0

    def tap(self, rank: int, request: Any) -> None:
        if isinstance(request, (Sum, Gather)):
            self.s += request.tensor.numel() * request.tensor.element_size() / self.bytes_per_s
        elif isinstance(request, Scatter):
            self.s += sum(t.numel() for t in request.tensors) / self.bytes_per_s
        elif isinstance(request, Where):  # a codec begins
            self.s += 1e-3


@pytest.mark.parametrize(("mbit", "compresses"), [(10_000.0, False), (1.0, True)])
def test_auto_declines_on_a_fast_link(monkeypatch: pytest.MonkeyPatch, mbit: float, compresses: bool) -> None:
    link = Link(mbit * 1e6 / 8)
    monkeypatch.setattr(auto, "now", lambda: link.s)
    exchange = _value("auto(error-feedback(bf16), every=10)")
    states = [exchange.init(d) for d in _grads(3)]
    came, went, exact = torch.zeros(60).double(), torch.zeros(60).double(), []
    for turn in range(40):
        deltas = _grads(3, seed=turn)
        agreed = _round(exchange, deltas, states, tap=link.tap)
        states = [each.state for each in agreed]
        came, went = came + _total(deltas), went + agreed[0].mean[0]
        exact.append(torch.equal(agreed[0].mean[0], _total(deltas)))
    assert [bool(s["compress"]) for s in states] == [compresses] * 3
    held = sum(s["inner"]["residual"][0] for s in states)
    torch.testing.assert_close(went + held, came, rtol=1e-12, atol=1e-12)
    assert exact[-8:] == [not compresses] * 8
    assert bool(held.any()) == compresses  # on declining, what was owed has been sent


def test_auto_follows_a_link_that_changes_and_measures_no_more_than_it_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    link = Link(1e12)
    monkeypatch.setattr(auto, "now", lambda: link.s)
    exchange = _value("auto(error-feedback(bf16), every=5)")
    states = [exchange.init(d) for d in _grads(2)]
    ways = []
    for turn in range(1200):
        if turn == 400:
            link.bytes_per_s = 1e4
        asked: list[Any] = []

        def tap(rank: int, request: Any, asked: list[Any] = asked) -> None:
            link.tap(rank, request)
            asked.append(request)

        agreed = _round(exchange, _grads(2, seed=turn), states, tap=tap)
        states = [each.state for each in agreed]
        ways.append(any(isinstance(q, Where) for q in asked))  # a codec ran
    assert sum(ways[:400]) < 40  # declined, measured now and then
    assert sum(ways[-300:]) > 280  # taken up, all-reduce measured now and then


def test_auto_s_workers_decide_the_same_by_real_clocks(fleets: Callable[[int, str], Fleet]) -> None:
    results = fleets(2, "group").run(_real_auto)
    assert results[0] == results[1]


def _real_auto(world: Any) -> list[Any]:
    exchange = _value("auto(error-feedback(bf16), every=2)")
    states = [exchange.init([torch.zeros(500)]) for _ in range(2)]
    seen: list[Any] = []
    for turn in range(20):
        talks = Interleave(world.wire)
        for bucket, state in enumerate(states):
            generator = torch.Generator().manual_seed(100 * turn + 10 * bucket + world.rank)
            talks.start(exchange.talk([torch.randn(500, generator=generator)], state))
        agreed = talks.finish()
        states = [each.state for each in agreed]
        seen.append([each.mean[0].tolist() for each in agreed])
        seen.append([leaf.tolist() for path, leaf in leaves(states) if "residual" not in path])
    return seen


@pytest.mark.parametrize(
    "text",
    ["auto(error-feedback(powersgd), every=1)", "auto(by-tensor(error-feedback(bf16), numel=8), every=1)"],
)
def test_many_tensors_are_one_all_reduce_of_each_type(text: str) -> None:
    shapes = [(6, 5), (3,), (), (2, 2)]
    kinds = [torch.float64, torch.float32, torch.float64, torch.float64]
    exchange, sums = _value(text), []
    generator = torch.Generator().manual_seed(0)
    deltas = [
        [torch.randn(s, generator=generator, dtype=k) for s, k in zip(shapes, kinds, strict=True)]
        for _ in range(2)
    ]
    states = [{**exchange.init(d), "compress": torch.tensor(False)} for d in deltas]
    for state in states:
        state["next"] += 1  # nothing is measured yet
    agreed = _round(exchange, deltas, states, tap=lambda rank, request: sums.append(request))
    assert sorted(q.tensor.numel() for q in sums if isinstance(q, Sum)) == [3, 3, 35, 35]
    for i, (mean, shape) in enumerate(zip(agreed[0].mean, shapes, strict=True)):
        assert mean.shape == shape
        torch.testing.assert_close(mean, deltas[0][i] + deltas[1][i])


@pytest.mark.parametrize("inner", ["topk(density=0.05)", "by-tensor(topk(density=0.05), numel=8)"])
def test_what_is_owed_to_half_precision_is_sent_unrounded(inner: str) -> None:
    """In the round after a compressed one the mean is rounded once, at its end."""
    exchange = _value(f"auto(error-feedback({inner}), every=1)")
    generator = torch.Generator().manual_seed(0)
    states: list[Any] = []
    for turn in range(8):
        deltas = [[torch.randn(n, generator=generator).bfloat16() for n in (5, 400)] for _ in range(3)]
        states = states or [exchange.init(d) for d in deltas]
        held = [leaf for state in states for path, leaf in leaves(state) if "residual" in path]
        if turn % 2:
            states = [{**s, "next": s["round"] + 1, "compress": torch.tensor(False)} for s in states]
        else:
            states = [{**s, "next": s["round"] + 1, "compress": torch.tensor(True)} for s in states]
        agreed = _round(exchange, deltas, states, overwrite=True)
        states = [each.state for each in agreed]
        if turn % 2:
            for i, mean in enumerate(agreed[0].mean):
                exact = sum(d[i].double() for d in deltas) + sum(h.double() for h in held[i::2])
                assert (mean.double() - exact).abs().max() <= exact.abs().max() * 2.0**-8
                assert torch.equal(mean, exact.bfloat16()) or (mean != exact.bfloat16()).sum() <= 1
            assert not any(
                leaf.any() for state in states for path, leaf in leaves(state) if "residual" in path
            )
