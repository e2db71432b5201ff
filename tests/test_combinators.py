"""Combinators of exchanges against their equations, written out by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from fleet import Fleet
from talks import converse

from manyhands.core import config
from manyhands.core.errors import UsageError
from manyhands.core.request import ACROSS, NODE, Gather, Sum
from manyhands.exchange.combine import leaves
from manyhands.exchange.randomk import RandomK
from manyhands.exchange.twophase import lengths
from manyhands.strategy import presets
from manyhands.wire.drive import run

EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def _value(text: str) -> Any:
    return config.from_text("exchanges", text)


def _grads(world: int, shape: Sequence[int] = (60,), seed: int = 0) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator, dtype=torch.float64)] for _ in range(world)]


def _round(exchange: Any, deltas: list[list[torch.Tensor]], states: list[Any], **more: Any) -> list[Any]:
    given = [[t.clone() for t in d] for d in deltas]
    return converse([exchange.talk(d, s) for d, s in zip(given, states, strict=True)], **more)


def _total(deltas: list[list[torch.Tensor]]) -> torch.Tensor:
    return torch.stack([d[0] for d in deltas]).sum(0)


# ---------------------------------------------------------------------------------------------- feedback


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_error_feedback_is_its_equations(decay: float) -> None:
    exchange, codec = _value(f"error-feedback(bf16, decay={decay})"), _value("bf16")
    states = [exchange.init(d) for d in _grads(3)]
    held = [torch.zeros(60, dtype=torch.float64)] * 3
    for turn in range(4):
        deltas = _grads(3, seed=turn)
        agreed = _round(exchange, deltas, states)
        states = [each.state for each in agreed]
        for i, (delta,) in enumerate(deltas):
            p = delta + decay * held[i]
            sent = codec.decode(codec.encode(p, 0), 60, torch.float64)
            held[i] = p - sent
            torch.testing.assert_close(agreed[i].sent[0], sent, **EXACT)
            torch.testing.assert_close(states[i]["residual"][0], held[i], **EXACT)


def test_with_decay_the_residual_is_momentum() -> None:
    """DeMo, algorithm 1: m ← βm + g; q = C(m); m ← m − q. Before anything large is sent, m is plain momentum."""
    beta, exchange = 0.5, _value("error-feedback(threshold(above=1e9, of=absolute), decay=0.5)")
    state, momentum = exchange.init([torch.zeros(60, dtype=torch.float64)]), torch.zeros(60).double()
    for turn in range(5):
        (delta,) = _grads(1, seed=turn)
        (agreed,) = _round(exchange, [delta], [state])
        state, momentum = agreed.state, beta * momentum + delta[0]
        torch.testing.assert_close(state["residual"][0], momentum, **EXACT)
        assert not agreed.mean[0].any()


def test_half_precision_keeps_its_residual_in_float32() -> None:
    exchange = _value("error-feedback(fp16)")
    deltas = [[torch.full((8,), 1 + 2**-7, dtype=torch.bfloat16) * 2.0**-14] for _ in range(2)]
    agreed = _round(exchange, deltas, [exchange.init(d) for d in deltas])
    assert agreed[0].state["residual"][0].dtype is torch.float32
    assert agreed[0].mean[0].dtype is torch.bfloat16


def test_ef21_keeps_the_sum_and_converges_on_a_constant_gradient() -> None:
    exchange = _value("ef21(topk(density=0.1, chunk=0))")
    deltas = _grads(3)
    states = [exchange.init(d) for d in deltas]
    for _ in range(12):
        agreed = _round(exchange, deltas, states)
        states = [each.state for each in agreed]
        own = sum(s["residual"][0] for s in states)
        torch.testing.assert_close(states[0]["agreed"][0], own, **EXACT)  # H = Σ hᵢ
        torch.testing.assert_close(agreed[0].mean[0], states[0]["agreed"][0], **EXACT)
    torch.testing.assert_close(agreed[0].mean[0], _total(deltas), rtol=1e-6, atol=1e-6)


def test_ef21_of_half_precision_keeps_the_sum_of_its_estimates() -> None:
    """What it keeps is in float32: sums that are rounded on their way would add up to a difference, round after round."""
    exchange = _value("ef21(topk(density=0.2, chunk=0))")
    states = [exchange.init([torch.zeros(60, dtype=torch.bfloat16)]) for _ in range(3)]
    for turn in range(100):
        deltas = [[d.bfloat16() for d in delta] for delta in _grads(3, seed=turn)]
        agreed = _round(exchange, deltas, states)
        states = [each.state for each in agreed]
        assert agreed[0].mean[0].dtype is torch.bfloat16
    own = sum(s["residual"][0] for s in states)
    torch.testing.assert_close(states[0]["agreed"][0], own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_momentum_correction_is_its_equations(nesterov: bool, mask: bool) -> None:
    sparsifier = "topk(density=0.1, chunk=0)"
    exchange = _value(f"momentum({sparsifier}, momentum=0.8, mask={mask}, nesterov={nesterov})")
    codec, m = _value(sparsifier), 0.8
    states = [exchange.init(d) for d in _grads(2)]
    u, v = [torch.zeros(60).double()] * 2, [torch.zeros(60).double()] * 2
    for turn in range(6):
        deltas = _grads(2, seed=turn)
        agreed = _round(exchange, deltas, states)
        states = [each.state for each in agreed]
        for i, (g,) in enumerate(deltas):
            u[i] = m * (u[i] + g) if nesterov else m * u[i] + g
            v[i] = v[i] + u[i] + g if nesterov else v[i] + u[i]
            sent = codec.decode(codec.encode(v[i], 0), 60, torch.float64)
            v[i] = v[i] - sent
            if mask:
                u[i] = torch.where(sent != 0, 0.0, u[i])
            held = states[i]["residual"]
            torch.testing.assert_close(held["velocity"][0], u[i], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(held["unsent"][0], v[i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("inner", "whole"),
    [
        ("by-tensor(topk(density=0.1), numel=8)", [0]),
        ("by-tensor(topk(density=0.1), small=bf16, numel=8)", [0]),
        ("warmup(topk(density=0.1), rounds=99)", [0, 1]),
        ("int8", [0, 1]),
        ("topk(density=0.1)", []),
    ],
)
def test_what_is_sent_whole_has_its_full_momentum(inner: str, whole: list[int]) -> None:
    """A steady gradient summing 3 comes to a velocity of 3 / (1 - m); masked, its mean stays 3 in the long run."""
    exchange = _value(f"momentum({inner}, momentum=0.5)")
    deltas = [[torch.full((4,), g), torch.full((40,), g)] for g in (1.0, 2.0)]
    states = [exchange.init(d) for d in deltas]
    agreed = []
    for _ in range(40):
        last = _round(exchange, deltas, states, overwrite=True)
        states = [each.state for each in last]
        agreed.append(last[0].mean)
    for i in range(2):
        late = torch.stack([mean[i] for mean in agreed[20:]]).mean()
        assert (float(late) == pytest.approx(6.0, rel=0.02)) == (i in whole)


# --------------------------------------------------------------------------------------------- two phases


def test_the_owner_answers_for_the_second_rounding() -> None:
    exchange, codec = _value("two-phase(bf16)"), _value("bf16")
    deltas = _grads(2, (10,))
    agreed = _round(exchange, deltas, [exchange.init(d) for d in deltas])

    def coded(tensor: torch.Tensor) -> torch.Tensor:
        return codec.decode(codec.encode(tensor, 0), tensor.numel(), torch.float64)

    a, b = deltas[0][0], deltas[1][0]
    sums = [a[:5] + coded(b[:5]), coded(a[5:]) + b[5:]]  # an owner's own chunk is not rounded
    mean = torch.cat([coded(s) for s in sums])
    torch.testing.assert_close(agreed[0].mean[0], mean, **EXACT)
    torch.testing.assert_close(
        agreed[0].sent[0], torch.cat([a[:5] + mean[:5] - sums[0], coded(a[5:])]), **EXACT
    )
    torch.testing.assert_close(
        agreed[1].sent[0], torch.cat([coded(b[:5]), b[5:] + mean[5:] - sums[1]]), **EXACT
    )


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16])
def test_chunks_cover_everything_once(size: int) -> None:
    for numel in (0, 1, 2, 15, 16, 17, 1000, 999_999):
        cut = lengths(numel, size)
        assert len(cut) == size
        assert sum(cut) == numel
        assert sorted(cut, reverse=True) == cut
        assert max(cut) <= -(-numel // size) * 33 / 32 + 1


# ------------------------------------------------------------------------------------------------ hosts

HOSTS = [0, 0, 0, 1, 1, 1]


def _across_bytes(exchange: Any, deltas: Any, hosts: Sequence[int]) -> int:
    """Most bytes that one worker puts into conversations across hosts."""
    bytes_ = [0] * len(deltas)

    def tap(rank: int, request: Any) -> None:
        if request.axis == ACROSS and isinstance(request, (Sum, Gather)):
            bytes_[rank] += request.tensor.numel() * request.tensor.element_size()
        assert request.axis in (NODE, ACROSS)

    _round(exchange, deltas, [exchange.init(d) for d in deltas], hosts=hosts, tap=tap)
    return max(bytes_)


def test_across_hosts_each_worker_moves_its_slice_only() -> None:
    deltas = _grads(6, (600,))
    assert _across_bytes(_value("hierarchical(all-reduce)"), deltas, HOSTS) == 600 * 8 / 3
    assert _across_bytes(_value("hierarchical(bf16)"), deltas, HOSTS) == 600 * 2 / 3
    assert _across_bytes(_value("hierarchical(bf16)"), deltas[:2], [0, 1]) == 600 * 2


@pytest.mark.parametrize("hosts", [[0], [0, 0, 0], [0, 1, 2], HOSTS, [0, 1, 0, 1]])
@pytest.mark.parametrize("numel", [0, 1, 7, 600])
def test_without_loss_the_hierarchy_is_the_sum(hosts: list[int], numel: int) -> None:
    deltas = _grads(len(hosts), (numel,))
    exchange = _value("hierarchical(topk(density=1.0, values=fp32))")
    for text in ("hierarchical", "hierarchical(all-reduce, within=two-phase(chain(bf16, then=fp16)))"):
        exchange = _value(text)
        agreed = _round(exchange, deltas, [exchange.init(d) for d in deltas], hosts=hosts)
        for each in agreed:
            torch.testing.assert_close(each.mean[0], _total(deltas), rtol=1e-3, atol=1e-3)
            assert torch.equal(each.mean[0], agreed[0].mean[0])


def test_the_speaker_of_a_slice_answers_for_its_loss() -> None:
    exchange = _value("hierarchical(bf16)")
    deltas = _grads(6)
    agreed = _round(exchange, deltas, [exchange.init(d) for d in deltas], hosts=HOSTS)
    for rank, (each, (delta,)) in enumerate(zip(agreed, deltas, strict=True)):
        changed = (each.sent[0] != delta).nonzero().view(-1)
        local = rank % 3
        assert len(changed) > 0
        assert ((changed >= 20 * local) & (changed < 20 * (local + 1))).all()


# --------------------------------------------------------------------------------------- warm-up, chains


def test_a_warm_up_is_lossless_then_comes_down_in_density() -> None:
    exchange = _value("warmup(error-feedback(topk(density=0.01)), rounds=2, ramp=4)")
    states = [exchange.init(d) for d in _grads(2)]
    for turn in range(4):
        deltas = _grads(2, seed=turn)
        agreed = _round(exchange, deltas, states)
        states = [each.state for each in agreed]
        assert torch.equal(agreed[0].mean[0], _total(deltas)) == (turn < 2)
    densities = [exchange.at(2 + t).inner.density for t in range(6)]
    assert densities[0] == 0.25
    assert densities[4:] == [0.01, 0.01]
    assert [a / b for a, b in itertools.pairwise(densities[:5])] == pytest.approx([25**0.25] * 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "text",
    [
        "warmup(ef21(topk(density=0.1)), rounds=3)",
        "warmup(by-tensor(ef21(topk(density=0.1)), small=ef21(bf16), numel=8), rounds=3)",
        "auto(ef21(topk(density=0.1)), every=50)",
    ],
)
def test_ef21_goes_on_from_the_last_lossless_round(text: str, dtype: torch.dtype) -> None:
    exchange = _value(text)
    steady = [[torch.full((4,), g).to(dtype), _grads(2)[i][0].to(dtype)] for i, g in enumerate((1.0, 2.0))]
    states = [exchange.init(d) for d in steady]
    if text.startswith("auto"):  # it has measured, and declined
        states = [{**s, "next": s["next"] + 3, "compress": torch.tensor(False)} for s in states]
    for turn in range(5):
        agreed = _round(exchange, steady, states, overwrite=turn % 2 == 0)
        states = [each.state for each in agreed]
        for i, mean in enumerate(agreed[0].mean):
            torch.testing.assert_close(mean, steady[0][i] + steady[1][i])
        own = [[leaf for path, leaf in leaves(s) if "residual" in path] for s in states]
        everyones = [leaf for path, leaf in leaves(states[0]) if "agreed" in path]
        if turn >= 2:
            for total, a, b in zip(everyones, *own, strict=True):  # H = Σ hᵢ
                torch.testing.assert_close(total, a + b, rtol=1e-6, atol=1e-6)


def test_a_chain_sends_what_was_left() -> None:
    (delta,) = _grads(1, (1000,))
    errors = {}
    for text in ("bf16", "chain(bf16, then=bf16)", "chain(chain(bf16, then=bf16), then=bf16)"):
        codec = _value(text)
        errors[text] = float(
            (codec.decode(codec.encode(delta[0], 1), 1000, torch.float64) - delta[0]).abs().max()
        )
    first, second, third = errors.values()
    assert second < first / 100
    assert third < second / 100
    assert _value("chain(bf16, then=fp16)").size_bytes(7) == 28


# ----------------------------------------------------------------------------------------- real wires

WIRED = [
    "all-reduce(precision=bf16)",
    "error-feedback(two-phase(bf16))",
    "error-feedback(hierarchical(bf16))",
    "hierarchical",
    "warmup(error-feedback(bf16), rounds=1)",
    "error-feedback(by-tensor(bf16, numel=100))",
    "ef21(all-reduce)",
]


@pytest.mark.parametrize("transport", ["shared", "group"])
def test_over_real_wires_as_in_one_process(fleets: Callable[[int, str], Fleet], transport: str) -> None:
    results = fleets(2, transport).run(_wired, WIRED)
    for i, text in enumerate(WIRED):
        exchange = _value(text)
        states = [exchange.init([torch.zeros(130)]) for _ in range(2)]
        for turn in range(3):
            deltas = [[_part(turn, rank)] for rank in range(2)]
            agreed = _round(exchange, deltas, states)
            states = [each.state for each in agreed]
        for rank, each in enumerate(agreed):
            assert results[rank][i]["mean"] == results[0][i]["mean"]
            torch.testing.assert_close(
                torch.tensor(results[rank][i]["mean"]), each.mean[0], rtol=1e-5, atol=1e-5
            )
            held = [leaf for path, leaf in leaves(each.state) if "residual" in path]
            for ours, theirs in zip(results[rank][i]["held"], held, strict=True):
                torch.testing.assert_close(torch.tensor(ours), theirs, rtol=1e-5, atol=1e-5)


def _part(turn: int, rank: int) -> torch.Tensor:
    return torch.randn(130, generator=torch.Generator().manual_seed(10 * turn + rank))


def _wired(world: Any, texts: list[str]) -> list[Any]:
    """From the wire's own buffer, which a sum may be written over."""
    results = []
    buffer = world.wire.buffer(130, torch.float32)
    for text in texts:
        exchange = _value(text)
        state = exchange.init([buffer])
        for turn in range(3):
            buffer.copy_(_part(turn, world.rank))
            agreed = run(exchange.talk([buffer], state), world.wire)
            state = agreed.state
        held = [leaf.tolist() for path, leaf in leaves(state) if "residual" in path]
        results.append({"mean": agreed.mean[0].tolist(), "held": held})
    return results


# -------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("error-feedback(error-feedback(bf16))", "keeps what it did not send"),
        ("error-feedback(ef21)", "keeps what it did not send"),
        ("error-feedback(warmup(error-feedback(bf16)))", "keeps what it did not send"),
        ("error-feedback(ordered)", "fixed order"),
        ("error-feedback(none)", "inner is an exchange"),
        ("error-feedback(bf16, decay=0)", "decay = 0.0"),
        ("ef21(topk(average=senders))", "give it average='all'"),
        ("ef21(hierarchical(topk(average=senders)))", "does not add up"),
        ("error-feedback(ternary)", "grows without end"),
        ("error-feedback(two-phase(ternary))", "rounding='nearest'"),
        ("error-feedback(chain(topk, then=ternary))", "rounding='nearest'"),
        ("error-feedback(randomk(unbiased=true))", r"RandomK\(unbiased=False\)"),
        ("ef21(randomk(unbiased=true))", "grows without end"),
        ("error-feedback(all-reduce(precision=bf16))", "use the codec bf16"),
        ("error-feedback(hierarchical(all-reduce(precision=fp16)))", "rounds the sum"),
        ("ef21(by-tensor(topk, small=all-reduce(precision=bf16)))", "rounds the sum"),
        ("momentum(by-tensor(topk, small=all-reduce(precision=bf16)))", "rounds the sum"),
        ("momentum(all-reduce)", "sgd"),
        ("momentum(ternary)", "grows without end"),
        ("momentum(randomk(unbiased=true))", r"RandomK\(unbiased=False\)"),
        ("momentum(by-tensor(topk, small=ternary))", "rounding='nearest'"),
        ("momentum(bf16, momentum=1)", "less than 1"),
        ("two-phase(all-reduce)", "needs a codec"),
        ("two-phase(topk(average=senders))", "give it average='all'"),
        ("two-phase(by-tensor)", "flat pieces"),
        ("hierarchical(hierarchical)", "two levels"),
        ("hierarchical(error-feedback(bf16))", r"put it around: ErrorFeedback\(Hierarchical\(across=BF16"),
        ("hierarchical(by-tensor)", "flat pieces"),
        ("hierarchical(by-tensor(error-feedback(int8)))", r"error-feedback\(hierarchical\(across=int8\)\)"),
        ("hierarchical(auto(int8))", "of a slice"),
        ("warmup(momentum(topk))", "rounds=0"),
        ("warmup(fetchsgd)", "a velocity"),
        ("auto(momentum(topk))", "a velocity"),
        ("auto(by-tensor(momentum(topk)))", "a velocity"),
        ("chain(all-reduce)", "both are codecs"),
        ("warmup(bf16, ramp=3)", "nothing inside has one"),
        ("warmup(bf16, rounds=-1)", "rounds = -1"),
        ("by-tensor(bf16, numel=-1)", "not negative"),
        ("auto(all-reduce)", "chooses between"),
        ("auto(error-feedback(bf16), every=0)", "every = 0"),
        ("eror-feedback(bf16)", "did you mean 'error-feedback'"),
    ],
)
def test_impossible_combinations_are_refused_with_the_rule(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _value(text)


def test_scaled_random_entries_held_back_would_grow() -> None:
    """Why they are refused: the residual of the same contribution, round after round."""
    exchange = RandomK(density=0.1, unbiased=True)
    residual, value = torch.zeros(200), torch.randn(200, generator=torch.Generator().manual_seed(3))
    states = [exchange.init([value])]
    norms = []
    for _ in range(60):
        (agreed,) = converse([exchange.talk([value + residual], states[0])])
        residual, states = value + residual - agreed.sent[0], [agreed.state]
        norms.append(float(residual.norm()))
    assert norms[-1] > 1e3 * norms[0]


def test_what_passes_through() -> None:
    inner = "all-reduce(bucket_mb=3)"
    assert _value(f"error-feedback({inner})").bucket_mb == 3
    assert _value(f"warmup(error-feedback({inner}))").bucket_mb == 3
    assert _value("error-feedback(by-tensor(bf16))").by_tensor
    assert not _value("error-feedback(bf16)").by_tensor


def test_a_rounded_sum_across_hosts_goes_without_feedback() -> None:
    for across, whole in (
        ("all-reduce(precision=bf16)", "hierarchical(all-reduce(precision=bf16))"),
        ("all-reduce", "hierarchical"),
        ("int8", "error-feedback(hierarchical(int8))"),
    ):
        assert presets.hierarchical(across=across).exchange == _value(whole)
    with pytest.raises(UsageError, match="without feedback"):
        presets.hierarchical(across="all-reduce(precision=bf16)", feedback=True)


@pytest.mark.parametrize(
    "text",
    [
        "ddp(exchange=momentum(topk))",
        "ddp(optimizer=sgd(momentum=0.9), exchange=by-tensor(momentum(topk)))",
        "ddp(optimizer=muon, exchange=fetchsgd)",
        "zero1(exchange=momentum(topk))",
        "diloco(exchange=momentum(topk))",
        "forecast(exchange=warmup(fetchsgd, rounds=0))",
    ],
)
def test_a_velocity_is_refused_under_an_optimizer_with_momentum(text: str) -> None:
    with pytest.raises(UsageError, match=r"a velocity; .* consume it with sgd"):
        config.from_text("strategies", text)


@pytest.mark.parametrize(
    "optimizer", ["sgd", "adagrad", "rmsprop", "adafactor", "signsgd", "adam(betas=(0,0.9))"]
)
def test_a_velocity_goes_with_an_optimizer_without(optimizer: str) -> None:
    for exchange in ("momentum(topk)", "fetchsgd"):
        config.from_text("strategies", f"ddp(optimizer='{optimizer}', exchange='{exchange}')")
    config.from_text("strategies", f"diloco(outer_momentum=0, exchange={exchange})")
