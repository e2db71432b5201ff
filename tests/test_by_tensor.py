"""An exchange for large tensors and another for small ones: by size, by dimensions, by the names of parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_combinators import _round, _value
from test_methods import NEUTRAL, make, method_run

from manyhands.core.errors import UsageError
from manyhands.core.request import Gather, Sum
from manyhands.exchange.bytensor import ByTensor
from manyhands.exchange.combine import named
from manyhands.strategy import presets
from manyhands.strategy.optimizers import SGD, Muon
from manyhands.train.replica import Replica
from manyhands.wire.solo import Solo


def test_tensors_go_by_size_and_dimension_and_small_ones_together() -> None:
    shapes = [(40, 30), (5,), (2000,), (3, 3), ()]
    deltas = [[torch.randn(s, generator=torch.Generator().manual_seed(r)) for s in shapes] for r in range(2)]
    deltas = [[*d[:4], d[4].double()] for d in deltas]
    for text, small in (
        ("by-tensor(bf16, numel=1000)", [1, 3, 4]),
        ("by-tensor(bf16, dims=2, numel=0)", [1, 2, 4]),
    ):
        exchange, asked = _value(text), []
        assert exchange.by_tensor
        states = [exchange.init(d) for d in deltas]
        agreed = _round(exchange, deltas, states, tap=lambda r, q, to=asked: to.append(q) if r == 0 else None)
        sums = [q for q in asked if isinstance(q, Sum)]
        assert len(sums) == 2  # one a type
        for i, mean in enumerate(agreed[0].mean):
            exact = deltas[0][i] + deltas[1][i]
            assert mean.shape == exact.shape
            assert torch.equal(mean, exact) == (i in small)
            torch.testing.assert_close(mean, exact, rtol=0.05, atol=0.05)


def test_blocks_that_end_with_tensors_leave_zeros_alone() -> None:
    exchange, asked = presets.muloco().exchange, []
    deltas = [[torch.zeros(7), torch.ones(30), torch.zeros(3, 4)] for _ in range(2)]
    states = [exchange.init(d) for d in deltas]
    agreed = _round(exchange, deltas, states, tap=lambda r, q: asked.append(q) if r == 0 else None)
    assert [bool(mean.any()) for mean in agreed[0].mean] == [False, True, False]
    assert [q.tensor.numel() for q in asked if isinstance(q, Gather)] == [3 * 2 + 2 + 8 + 3]  # one message


def test_names_set_tensors_apart_however_large_and_however_deep_inside() -> None:
    names = ["transformer.wte.weight", "transformer.h.0.ln_1.weight", "transformer.h.0.mlp.c_fc.weight"]
    deltas = [[torch.randn(50, 30), torch.randn(30), torch.randn(30, 60)] for _ in range(2)]
    exact = [a + b for a, b in zip(*deltas, strict=True)]
    for text in (
        "by-tensor(bf16, numel=0, apart=['wte', 'ln_*'])",
        "warmup(error-feedback(by-tensor(bf16, numel=0, apart=['wte', 'ln_*'])), rounds=0)",
        "warmup(by-tensor(topk(density=0.01), numel=0, apart=['wte', 'ln_*']), rounds=0, ramp=4)",
        "by-tensor(by-tensor(bf16, numel=0, apart=[wte]), numel=0, apart=['ln_*'])",
    ):
        exchange = named(_value(text), names)
        assert exchange == _value(text)  # what it is called is no part of the value
        agreed = _round(exchange, deltas, [exchange.init(d) for d in deltas])
        equal = [torch.equal(mean, whole) for mean, whole in zip(agreed[0].mean, exact, strict=True)]
        assert equal == [True, True, False], text


def test_who_chooses_by_name_says_so_where_nobody_tells_it_names() -> None:
    exchange = _value("by-tensor(bf16, apart=[wte])")
    with pytest.raises(UsageError, match="names of the parameters"):
        exchange.init([torch.zeros(5000)])
    codec = _value("error-feedback(bf16)")
    assert named(codec, ["wte"]) is codec


def test_patterns_that_choose_nothing_are_refused() -> None:
    for pattern, remedy in (("transformer.wte", "give 'wte'"), ("", "for example"), (".", "for example")):
        with pytest.raises(UsageError, match=rf"apart.*one part of a parameter's name.*{remedy}"):
            ByTensor(apart=(pattern,))
    with pytest.raises(UsageError, match=r"adamw.*give 'head'"):
        Muon(adamw=("lm.head",))
    ddp = presets.ddp(exchange="warmup(error-feedback(by-tensor(int8, apart=['embedd', 'wte'])), rounds=1)")
    with pytest.raises(
        UsageError, match=r"\['embedd', 'wte'\] match no parameter.*the parts embed, weight, hidden"
    ):
        Replica(make(), ddp, Solo())
    Replica(make(), presets.ddp(exchange="by-tensor(int8, apart=['embed', 'wte'])"), Solo()).close()


FAMILIES: dict[str, Any] = {
    "ddp": presets.ddp,
    "zero1": presets.zero1,
    "eager": presets.eager,
    "local-sgd": lambda **k: presets.local_sgd(every=4, **k),
    "streaming-diloco": lambda **k: presets.streaming_diloco(every=4, fragments=2, delay=1, **NEUTRAL, **k),
    "forecast": lambda **k: presets.forecast(every=4, delay=1, fragments=2, **k),
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_strategy_sends_the_named_parameters_whole(fleets: Any, family: str) -> None:
    """After one step agreed upon, the tied embedding is as without a codec, and the layers are not."""
    transport = "group" if family == "zero1" else "shared"
    states = []
    for exchange in ("all-reduce", "by-tensor(sign, numel=0, apart=['embed'])"):
        strategy = FAMILIES[family](optimizer=SGD(0.3), exchange=exchange)
        case = {"strategy": strategy, "steps": 1}
        states.append([a["state"] for a in fleets(2, transport).run(method_run, case)])
    exact, chosen = states
    assert chosen[0] == chosen[1]
    for name, _ in make().named_parameters():
        same = torch.allclose(
            torch.tensor(chosen[0][name]), torch.tensor(exact[0][name]), rtol=1e-9, atol=1e-12
        )
        assert same == (name not in ("hidden.weight", "hidden.bias")), name
