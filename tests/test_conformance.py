"""Every registered exchange and cadence against every property. A new plugin finds its rows here by its registry line.

Exchanges stand alone and inside every combinator that takes them (the table below is made from the registry). What a
plugin says of itself decides which rows it gets: ``by_place`` (fed with subtrees), ``by_tensor``, ``holds``,
``conserves`` (see `manyhands.exchange.combine`).
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from talks import converse

from manyhands.cadence.every import Every
from manyhands.core import config, registry
from manyhands.core.errors import UsageError
from manyhands.core.request import Gather, Scatter
from manyhands.core.types import Cadence, Exchange
from manyhands.exchange import auto
from manyhands.exchange.allreduce import AllReduce
from manyhands.exchange.bytensor import ByTensor
from manyhands.exchange.codec import Codec
from manyhands.exchange.combine import flush, leaves, trait
from manyhands.exchange.feedback import ErrorFeedback
from manyhands.exchange.int8 import Int8
from manyhands.exchange.ordered import Tree
from manyhands.strategy.base import Strategy
from manyhands.strategy.optimizers import SGD
from manyhands.train import exchange_state

EXCHANGES = sorted(registry.REGISTRY["exchanges"])
LOSSLESS = ["all-reduce", "ordered"]  # all others: what was sent adds up to the mean (below)
WORLDS = [1, 2, 3, 5]
SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (7,), (33, 3), (129,), (4, 0, 2)]
SEVERAL: list[tuple[int, ...]] = [
    (5,),
    (11, 4),
    (),
    (3,),
]  # of one contribution: small and large for by-tensor
AROUND = [
    "error-feedback({})",
    "two-phase({})",
    "error-feedback(two-phase({}))",
]  # tried around each exchange
AROUND_SHORT = [  # tried around each, in one short test
    "momentum({})",
    "ef21({})",
    "warmup(error-feedback({}), rounds=1)",
    "auto(error-feedback({}), every=1)",
    "error-feedback(by-tensor({}, numel=8))",
    "by-tensor({}, numel=8)",
    "ef21(by-tensor({}, numel=8))",
    "momentum(by-tensor({}, numel=8))",
]
AROUND_ONE = [  # and around one codec, which stands for all
    "error-feedback(hierarchical({}))",
    "error-feedback(chain({}, then={}))",
    "error-feedback(by-tensor({}, numel=8))",
    "by-tensor(error-feedback({}), numel=8)",
    "warmup(error-feedback({}), rounds=1)",
    "auto(error-feedback({}), every=1)",
    "ef21({})",
    "ef21(hierarchical({}))",
    "momentum({})",
]
ONE = "bf16"


def _is_combinator(cls: type) -> bool:
    return any(f.metadata.get("choice") == "exchanges" for f in dataclasses.fields(cls))


def _possible(text: str) -> bool:
    """Whether the combination is not refused, at its construction or for these tensors."""
    try:
        _value(text).init([torch.zeros(40)])
    except UsageError:
        return False
    return True


@cache
def _value(text: str) -> Any:
    return config.from_text("exchanges", text)


# those of which replicas do not agree on a sum (gossip) have rows of their own
BY_MODEL = [n for n in EXCHANGES if trait(_value(n), "by_model")]
SINGLE = [n for n in EXCHANGES if not _is_combinator(type(_value(n))) and n not in BY_MODEL]
TRIED = [around.replace("{}", n) for n in SINGLE for around in AROUND]
TRIED += [around.replace("{}", ONE) for around in AROUND_ONE]
TRIED += [f"{around}(ternary(rounding=nearest))" for around in ("error-feedback", "ef21")]
COMBINED = [text for text in TRIED if _possible(text)]
SHORT = [around.replace("{}", n) for n in SINGLE for around in AROUND_SHORT]
SHORT = [text for text in SHORT if _possible(text)]
TABLE = [*[n for n in EXCHANGES if n not in BY_MODEL], *COMBINED]
CODECS = [text for text in TABLE if isinstance(_value(text), Codec)]
HOLDING = [text for text in TABLE if trait(_value(text), "holds") and trait(_value(text), "conserves")]
HOSTS = {1: [0], 2: [0, 1], 3: [0, 0, 0], 5: [0, 0, 0, 0, 0], 4: [0, 0, 1, 1], 6: [0, 1, 1, 0, 0, 1]}


def _values(world: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    return [
        torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + r)).to(dtype)
        for r in range(world)
    ]


def _several(
    world: int, shapes: list[tuple[int, ...]], dtype: torch.dtype, *, seed: int
) -> list[list[torch.Tensor]]:
    """Everybody's contribution of several tensors."""
    of_each = [_values(world, shape, dtype, 10 * seed + i) for i, shape in enumerate(shapes)]
    return [[values[rank] for values in of_each] for rank in range(world)]


def _deltas(exchange: Any, values: list[torch.Tensor]) -> tuple[list[Any], torch.Tensor]:
    """Everybody's contribution as this exchange takes it, and the exact sum."""
    total = torch.stack([v.double() for v in values]).sum(0)
    if not trait(exchange, "by_place"):
        return [[v] for v in values], total
    deltas = []
    for rank, value in enumerate(values):
        tree = Tree(len(values))
        tree.add((0, rank), value.reshape(-1).clone())
        keys = torch.tensor([[lv, ix, len(values)] for lv, ix in tree.nodes], dtype=torch.int64)
        deltas.append([keys, torch.stack(list(tree.nodes.values()))])
    return deltas, total.reshape(-1)


def _like(sent: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return sent if sent.shape == total.shape else sent.sum(0)  # of an exchange by place: my subtrees


def _talk(exchange: Any, deltas: list[Any], states: list[Any], **more: Any) -> list[Any]:
    copies = [[t.clone() for t in delta] for delta in deltas]
    hosts = HOSTS[len(deltas)] if not trait(exchange, "by_place") else None
    return converse([exchange.talk(c, s) for c, s in zip(copies, states, strict=True)], hosts, **more)


def _adds_up(exchange: Any) -> bool:
    """Whether Σ of `sent` over workers is `mean`: all but what averages over the senders of an entry alone."""
    inside = [
        getattr(exchange, f.name)
        for f in dataclasses.fields(exchange)
        if f.metadata.get("choice") == "exchanges"
    ]
    return getattr(exchange, "average", "all") == "all" and all(map(_adds_up, inside))


def _equal(a: Any, b: Any) -> bool:
    """Bitwise, NaN included."""
    ours, theirs = list(leaves(a)), list(leaves(b))
    return len(ours) == len(theirs) and all(
        p == q and torch.allclose(x.double(), y.double(), rtol=0, atol=0, equal_nan=True)
        for (p, x), (q, y) in zip(ours, theirs, strict=True)
    )


@pytest.fixture(autouse=True)
def _steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured times are counted questions: the same in every run."""
    monkeypatch.setattr(auto, "now", itertools.count().__next__)


def test_the_table_has_what_is_possible() -> None:
    assert "error-feedback(two-phase(bf16))" in TABLE
    alone = [n for n in SINGLE if f"error-feedback({n})" not in TABLE]
    refused = {n for n in alone if not trait(_value(n), "contracts")}
    assert refused == {"ternary"}
    assert all(trait(_value(n), "by_place") or trait(_value(n), "holds") for n in set(alone) - refused)
    assert {"error-feedback", "two-phase", "auto"} <= set(EXCHANGES) - set(SINGLE)


@pytest.mark.parametrize("world", [*WORLDS, 6])
@pytest.mark.parametrize("text", TABLE)
def test_replicas_agree_bitwise_and_on_the_sum_of_what_was_sent(text: str, world: int) -> None:
    """Empty, scalar, odd and non-contiguous tensors in three types; two rounds each."""
    exchange = _value(text)
    assert isinstance(exchange, Exchange)
    for shape in SHAPES if text in EXCHANGES else [(0,), (33, 3)]:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
            values = _values(world, shape, dtype)
            deltas, total = _deltas(exchange, values)
            states = [exchange.init(d) for d in deltas]
            for _ in range(2):
                agreed = _talk(exchange, deltas, states)
                states = [each.state for each in agreed]
                for each in agreed:
                    assert torch.equal(each.mean[0], agreed[0].mean[0])
                    assert each.mean[0].dtype is dtype
                    assert each.mean[0].shape == total.shape
                if text in LOSSLESS:
                    torch.testing.assert_close(
                        agreed[0].mean[0].double(), total, rtol=tolerance, atol=tolerance
                    )
                if _adds_up(exchange):
                    sent = sum(_like(each.sent[0].double(), total) for each in agreed)
                    mean = agreed[0].mean[0].double()
                    torch.testing.assert_close(mean, sent, rtol=tolerance, atol=tolerance * world)


@pytest.mark.parametrize("text", [t for t in TABLE if not trait(_value(t), "by_place")])
def test_strides_and_a_wire_that_overwrites_change_nothing(text: str) -> None:
    exchange = _value(text)
    plain = _several(4, [*SEVERAL, (24, 9)], torch.float32, seed=0)
    strided = [[v.t().contiguous().t() if v.dim() == 2 else v for v in delta] for delta in plain]
    assert not strided[0][-1].is_contiguous()
    first = [exchange.init(d) for d in plain]
    results = []
    for deltas, overwrite in ((plain, False), (strided, False), (plain, True)):
        # clone(): keeps strides
        states, means = first, []
        for _ in range(3):
            agreed = _talk(exchange, deltas, states, overwrite=overwrite)
            states = [each.state for each in agreed]
            means += [mean.clone() for mean in agreed[0].mean]
        results.append((means, states))
    for means, states in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(means, results[0][0], strict=True))
        assert _equal(_timeless(states), _timeless(results[0][1]))


def _timeless(states: Any) -> list[torch.Tensor]:
    """All leaves but measured times."""
    return [leaf for path, leaf in leaves(states) if "seconds" not in path]


@pytest.mark.parametrize("text", TABLE)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_infinity_are_seen_by_all_and_the_state_of_before_goes_on(text: str, poison: float) -> None:
    exchange = _value(text)
    deltas, _ = _deltas(exchange, _values(3, (16,), torch.float32))
    states = [each.state for each in _talk(exchange, deltas, [exchange.init(d) for d in deltas])]
    before = [leaf.clone() for _, leaf in leaves(states)]
    bad = [[t.clone() for t in delta] for delta in deltas]
    bad[1][-1].view(-1)[3] = poison
    assert all(not torch.isfinite(each.mean[0]).all() for each in _talk(exchange, bad, states))
    assert all(
        torch.equal(a, b) for a, (_, b) in zip(before, leaves(states), strict=True)
    )  # a retry may use it
    assert all(torch.isfinite(each.mean[0]).all() for each in _talk(exchange, deltas, states))


@pytest.mark.parametrize("text", TABLE)
def test_state_is_a_pytree_of_tensors_and_goes_on_after_save_and_load(text: str) -> None:
    exchange = _value(text)
    deltas, _ = _deltas(exchange, _values(3, (40,), torch.float64))
    fresh = [exchange.init(d) for d in deltas]
    states = [each.state for each in _talk(exchange, deltas, fresh)]
    assert all(isinstance(leaf, torch.Tensor) for _, leaf in leaves(states))
    for path, leaf in leaves(states[0]):  # all but residuals is equal everywhere
        if "residual" not in path:
            assert all(torch.equal(leaf, dict(leaves(s))[path]) for s in states)
    copied = _moved(states, fresh)
    again, copy = _talk(exchange, deltas, states), _talk(exchange, deltas, copied)
    assert torch.equal(again[0].mean[0], copy[0].mean[0])
    assert _equal(_timeless([a.state for a in again]), _timeless([a.state for a in copy]))


def _moved(states: list[Any], fresh: list[Any]) -> list[Any]:
    """What `len(fresh)` workers continue with, of a checkpoint of the workers of `states`."""
    named: dict[str, torch.Tensor] = {}
    for rank, state in enumerate(states):
        named |= {k: v.clone() for k, v in exchange_state.alone([state], rank).items()}
    size = len(fresh)
    return [
        exchange_state.restore([state], named, rank=rank, size=size, path="checkpoint-1")[0]
        for rank, state in enumerate(fresh)
    ]


@pytest.mark.parametrize("text", HOLDING)
def test_nothing_is_lost(text: str) -> None:
    """Promise 4: Σₜ agreed + Σᵢ held = Σₜ Σᵢ wᵢ gᵢ, through changes of weights, save, load and resize."""
    exchange = _value(text)
    like = [torch.zeros(shape, dtype=torch.float64) for shape in SEVERAL]
    came, went, held = ([torch.zeros_like(t) for t in like] for _ in range(3))
    states: list[Any] = [exchange.init(like) for _ in range(3)]
    turn = 0
    for world in (3, 3, 2, 5, 4):
        states = _moved(states, [exchange.init(like) for _ in range(world)])
        for _ in range(2):
            turn += 1
            weights = torch.rand(world, generator=torch.Generator().manual_seed(turn)).tolist()
            values = _several(world, SEVERAL, torch.float64, seed=turn)
            deltas = [[v * w for v in delta] for delta, w in zip(values, weights, strict=True)]
            agreed = _talk(exchange, deltas, states, overwrite=True)
            states = [each.state for each in agreed]
            for i in range(len(like)):
                came[i] += sum(d[i] for d in deltas)
                went[i] += agreed[0].mean[i]
    flushed = [flush(exchange, state, like) for state in states]
    for owed, after in flushed:
        for kept, tensor in zip(held, owed, strict=True):
            kept += 0.0 if tensor is None else tensor
        assert all(t is None or not t.any() for t in flush(exchange, after, like)[0])  # owed no more
    for kept, out, into in zip(held, went, came, strict=True):
        torch.testing.assert_close(out + kept, into, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("text", SHORT)
def test_around_every_codec_replicas_agree_and_what_is_held_stays_small(text: str) -> None:
    """20 rounds, each second over a wire that overwrites, of contributions of length about 6."""
    exchange = _value(text)
    shapes: list[tuple[int, ...]] = [(3,), (36,)]
    states = [exchange.init(delta) for delta in _several(2, shapes, torch.float32, seed=0)]
    for turn in range(20):
        deltas, overwrite = _several(2, shapes, torch.float32, seed=turn), turn % 2 == 1
        agreed = _talk(exchange, deltas, states, overwrite=overwrite)
        states = [each.state for each in agreed]
        for i, mean in enumerate(agreed[0].mean):
            assert torch.equal(mean, agreed[1].mean[i])
            if _adds_up(exchange) and not overwrite:  # what a lossless one sent is overwritten, too
                both = agreed[0].sent[i] + agreed[1].sent[i]
                torch.testing.assert_close(mean, both, rtol=1e-4, atol=1e-3)
    held = [leaf for path, leaf in leaves(states) if "residual" in path]
    assert all(float(leaf.norm()) < 1e3 for leaf in held)


@pytest.mark.parametrize("text", CODECS)
def test_bytes_are_what_the_formula_says(text: str) -> None:
    codec = _value(text)
    for numel in (0, 1, 2, 7, 64, 129, 1000, 5000):
        (value,) = _values(1, (numel,), torch.float32)
        payload = codec.encode(value, 5)
        assert payload.dtype is torch.uint8
        assert payload.shape == (codec.size_bytes(numel),)
        assert torch.equal(payload, codec.encode(value.clone(), 5))  # a function of tensor and key
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            decoded = codec.decode(payload, numel, dtype)
            assert decoded.shape == (numel,)
            assert decoded.dtype is dtype
        behind = torch.cat([payload.new_zeros(1), payload])[1:]  # a part of a longer message, at an odd place
        decoded = codec.decode(behind, numel, torch.float32)
        assert torch.equal(decoded, codec.decode(payload, numel, torch.float32))
        requested = _bytes_of(codec, numel, world=3)
        assert set(requested) <= {codec.size_bytes(numel)}


def _bytes_of(exchange: Any, numel: int, world: int) -> list[int]:
    """Bytes of payload that each worker hands over in one round."""
    bytes_ = [0] * world

    def tap(rank: int, request: Any) -> None:
        if isinstance(request, Gather):
            bytes_[rank] += request.tensor.numel() * request.tensor.element_size()
        elif isinstance(request, Scatter):
            others = [t for r, t in enumerate(request.tensors) if r != rank]
            bytes_[rank] += sum(t.numel() * t.element_size() for t in others)

    deltas = [[v] for v in _values(world, (numel,), torch.float32)]
    _talk(exchange, deltas, [exchange.init(d) for d in deltas], tap=tap)
    return bytes_


@pytest.mark.parametrize("text", [t for t in CODECS if f"two-phase({t})" in TABLE])
def test_two_phases_send_as_much_whatever_the_number_of_workers(text: str) -> None:
    """At most size_bytes(n) scattered, and one chunk given to each other worker: 2 (N-1)/N size_bytes(n) in all."""
    codec, exchange = _value(text), _value(f"two-phase({text})")
    numel = 60_000
    for world in (2, 5):
        scattered_and_own = max(_bytes_of(exchange, numel, world))
        chunk = scattered_and_own / world  # N-1 chunks scattered, 1 gathered by each of the others
        assert chunk * world * 2 * (world - 1) / world <= 1.08 * 2 * codec.size_bytes(numel)


@pytest.mark.parametrize("name", BY_MODEL)
@pytest.mark.parametrize("world", WORLDS)
def test_pairs_move_no_average_of_all(name: str, world: int) -> None:
    """Contributions [*pseudo-gradients, *anchors]: what the workers take adds up to Σ of the pseudo-gradients."""
    exchange = _value(name)
    deltas = [[v, a] for v, a in zip(*(_values(world, (20,), torch.float64, s) for s in (1, 2)), strict=True)]
    states = [exchange.init(d) for d in deltas]
    for _ in range(3):
        agreed = _talk(exchange, deltas, states)
        states = [each.state for each in agreed]
        total = sum(each.mean[0] for each in agreed)
        torch.testing.assert_close(total, sum(d[0] for d in deltas), rtol=1e-12, atol=1e-12)


def test_of_a_pair_who_has_seen_nothing_leaves_the_other_its_way() -> None:
    exchange = _value("gossip(pull=0)")
    deltas = [
        [v, v, torch.tensor(seen, dtype=torch.float64)]
        for v, seen in zip(_values(2, (20,), torch.float64), (5.0, 0.0), strict=True)
    ]
    agreed = _talk(exchange, deltas, [exchange.init(d) for d in deltas])
    for each in agreed:
        torch.testing.assert_close(each.mean[0], deltas[0][0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["exchanges", "cadences", "optimizers", "schedules", "tasks"])
def test_every_value_has_a_repr_and_data_that_read_back(kind: str) -> None:
    for text in [*registry.REGISTRY[kind], *(COMBINED if kind == "exchanges" else [])]:
        value = config.from_text(kind, text)
        assert config.from_text(kind, repr(value)) == value
        assert config.from_choice(kind, config.to_data(value, kind), kind) == value


@pytest.mark.parametrize("name", sorted(registry.REGISTRY["cadences"]))
def test_a_cadence_is_a_pure_function_of_the_step(name: str) -> None:
    cadence = registry.resolve("cadences", name)()
    assert isinstance(cadence, Cadence)
    first = [cadence.due(step) for step in range(1, 200)]
    assert first == [cadence.due(step) for step in range(1, 200)]
    assert any(first)


# ------------------------------------------------------------------------------------------- given from Python


def _forbidden(hint: Any) -> Iterator[Any]:
    """Values that a field of this type cannot hold."""
    members = {hint, *typing.get_args(hint)}
    if any(typing.get_origin(member) is typing.Literal for member in members):
        yield "bf61"
    if members & {int, float, bool}:
        yield from ("many", object())
    if float in members:
        yield float("nan")
    elif int in members:
        yield 2.5


@pytest.mark.parametrize(
    "kind", ["exchanges", "cadences", "placements", "optimizers", "schedules", "strategies"]
)
def test_what_a_type_forbids_is_refused_at_construction(kind: str) -> None:
    for name in registry.REGISTRY[kind]:
        maker = registry.resolve(kind, name)
        choices = (
            [f.name for f in dataclasses.fields(maker) if "choice" in f.metadata]
            if kind != "strategies"
            else []
        )
        tries = [
            (field, value)
            for field in inspect.signature(maker).parameters
            for value in (
                *_forbidden(config.hints_of(maker).get(field)),
                *((3, "no-such") if field in choices else ()),
            )
        ]
        for field, value in [*tries, *([("no_such_parameter", 1)] if kind == "strategies" else [])]:
            with pytest.raises(UsageError) as refusal:
                maker(**{field: value})
            assert field in str(refusal.value), (name, field, value)
            assert repr(value) in str(refusal.value) or field == "no_such_parameter", (name, field, value)


def test_what_is_given_from_python_is_taken_as_from_the_command_line() -> None:
    assert ErrorFeedback("int8", decay=1) == ErrorFeedback(Int8(), decay=1.0)  # type: ignore[arg-type]
    assert ByTensor(apart="wte").apart == ("wte",)  # type: ignore[arg-type]  # not the letters w, t and e
    assert Every(np.int64(4)) == Every(4)  # type: ignore[arg-type]
    assert SGD(0.1, nesterov=np.False_) == SGD(torch.tensor(0.1, dtype=torch.float64))  # type: ignore[arg-type]
    with pytest.raises(
        UsageError, match=r"AllReduce.precision: 'bf-16'.*one of 'as-is'.*did you mean 'bf16'"
    ):
        AllReduce(precision="bf-16")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="exchange = none"):
        Strategy(exchange=None)  # type: ignore[arg-type]


def test_a_subclass_may_have_fields_of_its_own() -> None:
    @dataclasses.dataclass(frozen=True)
    class Patient(Every):
        patience: object = 3

    assert Patient(4, patience="much").patience == "much"
    with pytest.raises(UsageError, match=r"Every\.every"):
        Patient("many")  # type: ignore[arg-type]
