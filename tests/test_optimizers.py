"""Optimizers and schedules: PyTorch's own numbers, state by name, and curves kept as goldens."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from manyhands.core.config import from_choice, from_text, to_data
from manyhands.core.errors import CheckpointError, UsageError
from manyhands.core.registry import REGISTRY
from manyhands.strategy.delayed_nesterov import DelayedNesterov
from manyhands.strategy.optimizers import SGD, Adafactor, Adagrad, Adam, AdamW, Muon, RMSprop
from manyhands.strategy.schedules import WSD, Constant, Cosine, Linear
from manyhands.strategy.sign import SignSGD

SPECS: dict[str, Any] = {
    "sgd": SGD(0.02),
    "sgd-momentum": SGD(0.005, momentum=0.9, weight_decay=0.01),
    "sgd-nesterov": SGD(0.005, momentum=0.9, nesterov=True),
    "adam": Adam(1e-2, weight_decay=0.01),
    "adamw": AdamW(1e-2),
    "adagrad": Adagrad(0.05, weight_decay=0.01),
    "rmsprop": RMSprop(1e-2, momentum=0.5, centered=True, weight_decay=0.01),
    "rmsprop-plain": RMSprop(1e-2),
    "adafactor": Adafactor(1e-2, weight_decay=0.01),
    "muon": Muon(1e-2),
    "signsgd": SignSGD(0.01, momentum=0.9, weight_decay=0.01),
    "delayed-nesterov": DelayedNesterov(0.005, every=3, activation=0.1, weight_decay=0.01),
}
HIDDEN = {"hidden.weight", "late.weight", "never.weight"}


class Small(nn.Module):
    """An embedding, matrices, biases, a norm, a late starter and one that is never used."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 7)
        self.hidden = nn.Linear(7, 5)
        self.late = nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)
        self.never = nn.Linear(5, 2)
        self.to(dtype)

    def forward(self, ids: torch.Tensor, *, late: bool) -> torch.Tensor:
        x = torch.tanh(self.hidden(self.embed(ids)))
        if late:
            x = x + self.late(x)
        out: torch.Tensor = self.head(self.norm(x))
        return out


def train(model: Small, optimizer: Any, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 11, (6,), generator=generator)
        optimizer.zero_grad()
        model(ids, late=step >= 2).square().sum().backward()
        optimizer.step()


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("name", SPECS)
def test_save_load_continue_is_the_uninterrupted_run_to_the_bit(name: str, tmp_path: Path) -> None:
    """Through a safetensors file, into an optimizer that lists the parameters in another order."""
    spec = SPECS[name]
    whole = Small()
    train(whole, spec.build(named(whole), "cpu"), range(8))
    for cut in (1, 4):  # before and after the late parameters begin
        first = Small()
        optimizer = spec.build(named(first), "cpu")
        train(first, optimizer, range(cut))
        save_file({"#": torch.zeros(1), **optimizer.state_by_name()}, tmp_path / "state.safetensors")
        second = Small()
        second.load_state_dict(first.state_dict())
        resumed = spec.build(named(second)[::-1], "cpu")
        state = load_file(tmp_path / "state.safetensors")
        del state["#"]
        resumed.load_state_by_name(state)
        assert sorted(resumed.state_by_name()) == sorted(state)
        train(second, resumed, range(cut, 8))
        assert equal(whole, second)


@pytest.mark.parametrize("name", SPECS)
def test_loading_copies_and_saving_keeps_names(name: str) -> None:
    model = Small()
    optimizer = SPECS[name].build(named(model), "cpu")
    train(model, optimizer, range(3))
    state = {k: v.clone() for k, v in optimizer.state_by_name().items()}
    assert list(state) == sorted(state)
    names = [n for n, _ in model.named_parameters()]
    assert all(key.rpartition(".")[0] in names for key in state)
    other = SPECS[name].build(named(model), "cpu")
    other.load_state_by_name(state)
    before = {k: v.clone() for k, v in state.items()}
    train(model, other, range(3, 5))
    for key, value in state.items():
        assert torch.equal(value, before[key])


PLAIN: dict[str, Any] = {
    "sgd": lambda g: torch.optim.SGD(g, lr=0.02),
    "sgd-momentum": lambda g: torch.optim.SGD(g, lr=0.005, momentum=0.9),
    "sgd-nesterov": lambda g: torch.optim.SGD(g, lr=0.005, momentum=0.9, nesterov=True),
    "adam": lambda g: torch.optim.Adam(g, lr=1e-2),
    "adamw": lambda g: torch.optim.AdamW(g, lr=1e-2, betas=(0.9, 0.95)),
    "adagrad": lambda g: torch.optim.Adagrad(g, lr=0.05),
    "rmsprop": lambda g: torch.optim.RMSprop(g, lr=1e-2, momentum=0.5, centered=True),
    "rmsprop-plain": lambda g: torch.optim.RMSprop(g, lr=1e-2),
    "adafactor": lambda g: torch.optim.Adafactor(g, lr=1e-2),
}


TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 0.06}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("name", PLAIN)
def test_the_numbers_are_plain_pytorchs(name: str, dtype: torch.dtype) -> None:
    """Ours (fused where there is a kernel) against PyTorch's single-tensor loop with the same groups."""
    ours, plain = Small(dtype), Small(dtype)
    spec = SPECS[name]
    train(ours, spec.build(named(ours), "cpu"), range(10))
    groups = [
        {"params": [p for p in plain.parameters() if p.dim() >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in plain.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    reference = PLAIN[name](groups)
    for group in reference.param_groups:
        group["fused"], group["foreach"] = False, False
    train(plain, reference, range(10))
    tolerance = TOLERANCE[dtype]
    for (key, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            p, q, rtol=tolerance, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
        )


def orthogonalised(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """Jordan 2024: an odd polynomial of the singular values, here by their decomposition in float64."""
    u, sigma, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    sigma = sigma / sigma.norm()
    for _ in range(steps):
        sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
    return u @ sigma.diag() @ vt


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_muon_orthogonalises_the_momentum(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    param = nn.Parameter(torch.randn(shape))
    optimizer = Muon(0.01, weight_decay=0.1).build([("h.0.weight", param)], "cpu")
    momentum = torch.zeros(shape)
    for _ in range(3):
        before, param.grad = param.detach().clone(), torch.randn(shape)
        momentum = 0.95 * momentum + 0.05 * param.grad
        update = orthogonalised(0.05 * param.grad + 0.95 * momentum, 5)
        optimizer.step()
        scale = 0.01 * 0.2 * math.sqrt(max(shape))
        moved = (before * (1 - 0.01 * 0.1) - param.detach()) / scale
        torch.testing.assert_close(moved.double(), update, rtol=0, atol=0.04)  # the iteration is bfloat16


def test_muon_is_adamw_for_embeddings_heads_norms_and_biases() -> None:
    model, plain = Small(), Small()
    optimizer = Muon(0.01).build(named(model), "cpu")
    adamw = AdamW(0.01).build([(n, p) for n, p in named(plain) if n not in HIDDEN], "cpu")
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            q.grad = p.grad
        adamw.step()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        if name not in HIDDEN:
            assert torch.equal(p, q)
    state = optimizer.state_by_name()
    muons = {k.rpartition(".")[0] for k in state if k.endswith("momentum_buffer")}
    assert muons == HIDDEN - {"never.weight"}


def test_muon_without_torchs_own_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UsageError, match=r"no torch.optim.Muon.*install torch >= 2.9, or use adamw"):
        Muon(0.01).build(named(Small()), "cpu")


@pytest.mark.parametrize(
    ("name", "adamw"),
    [
        ("transformer.wte.weight", True),
        ("transformer.h.0.attn.c_attn.weight", False),
        ("model.embed_tokens.weight", True),
        ("lm_head.weight", True),
        ("model.layers.3.mlp.up_proj.weight", False),
        ("bert.embeddings.word_embeddings.weight", True),
        ("bert.encoder.layer.0.attention.self.query.weight", False),
        ("classifier.weight", True),
        ("score.weight", True),
    ],
)
def test_muon_leaves_embeddings_and_heads_of_known_models_to_adamw(name: str, adamw: bool) -> None:
    assert Muon().is_adamw(name) is adamw


@pytest.mark.parametrize("name", SPECS)
def test_only_matrices_decay_and_unused_parameters_stay(name: str) -> None:
    model = Small()
    optimizer = SPECS[name].build(named(model), "cpu")
    for group in optimizer.param_groups:
        vectors = [p for p in group["params"] if p.dim() < 2]
        assert not vectors or group["weight_decay"] == 0
    before = [p.clone() for p in model.never.parameters()]
    train(model, optimizer, range(4))
    assert all(torch.equal(a, b) for a, b in zip(before, model.never.parameters(), strict=True))
    optimizer.zero_grad()
    held = [p.clone() for p in model.parameters()]
    optimizer.step()  # nobody has a gradient
    assert all(torch.equal(a, b) for a, b in zip(held, model.parameters(), strict=True))


@pytest.mark.parametrize("name", SPECS)
def test_the_rate_is_a_multiple_of_the_given_one(name: str) -> None:
    spec = SPECS[name]
    half, full = Small(), Small()
    optimizer = spec.build(named(half), "cpu")
    optimizer.set_lr(0.1)
    optimizer.set_lr(0.5)
    assert all(g["lr"] == spec.lr * 0.5 for g in optimizer.param_groups)
    train(half, optimizer, range(3))
    train(full, type(spec)(**{**vars(spec), "lr": spec.lr * 0.5}).build(named(full), "cpu"), range(3))
    assert equal(half, full)


@pytest.mark.parametrize("name", ["sgd", "sgd-momentum", "adam", "adamw", "adagrad"])
def test_fused_kernels_are_used_on_the_cpu(name: str) -> None:
    optimizer = SPECS[name].build(named(Small()), "cpu")
    assert all(g["fused"] for g in optimizer.param_groups)


def test_state_of_another_optimizer_model_or_shape_is_refused() -> None:
    model = Small()
    adam = Adam(1e-2).build(named(model), "cpu")
    train(model, adam, range(2))
    state = dict(adam.state_by_name())
    with pytest.raises(CheckpointError, match=r"holds exp_avg, exp_avg_sq, step.*keeps momentum_buffer"):
        SGD(0.1, momentum=0.9).build(named(model), "cpu").load_state_by_name(state)
    with pytest.raises(CheckpointError, match="keeps nothing"):
        SGD(0.1).build(named(model), "cpu").load_state_by_name(state)
    with pytest.raises(CheckpointError, match=r"'hidden.wight'.*did you mean 'hidden.weight'"):
        Adam(1e-2).build(named(model), "cpu").load_state_by_name({"hidden.wight.step": torch.zeros(())})
    missing = {k: v for k, v in state.items() if k != "hidden.bias.exp_avg"}
    with pytest.raises(CheckpointError, match=r"'hidden.bias' holds exp_avg_sq, step"):
        Adam(1e-2).build(named(model), "cpu").load_state_by_name(missing)
    bent = {**state, "hidden.bias.exp_avg": torch.zeros(4)}
    with pytest.raises(CheckpointError, match=r"hidden.bias.exp_avg has shape \[4\].*it is \[5\]"):
        Adam(1e-2).build(named(model), "cpu").load_state_by_name(bent)


# ---------------------------------------------------------------------------------------------- as values


@pytest.mark.parametrize(
    "spec", [*SPECS.values(), AdamW(1e-3, schedule=WSD(warmup=100, unit="tokens"))], ids=repr
)
def test_a_spec_is_its_text_and_its_table(spec: Any) -> None:
    assert from_text("optimizers", repr(spec)) == spec
    table = json.loads(json.dumps(to_data(spec, "optimizers")))
    assert from_choice("optimizers", table, "outer") == spec


def test_each_registered_optimizer_and_schedule_is_tested_here() -> None:
    assert {type(s).__name__.lower() for s in SPECS.values()} == {
        name.replace("-", "") for name in REGISTRY["optimizers"]
    }
    assert set(CURVES) >= {f"{name}" for name in REGISTRY["schedules"]}
    assert AdamW(3e-4) == from_text("optimizers", "adamw(3e-4)") == AdamW()
    assert from_text("optimizers", "sgd(0.1, schedule=none)").schedule == Constant()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamW(0), "lr = 0"),
        (lambda: AdamW(-1), "lr = -1"),
        (lambda: AdamW(float("nan")), "AdamW.lr: nan"),
        (lambda: AdamW(betas=(0.9, 1.0)), "betas"),
        (lambda: Adam(eps=0), "eps = 0"),
        (lambda: SGD(momentum=1.5), "momentum = 1.5"),
        (lambda: SGD(nesterov=True), "nesterov = true with momentum = 0"),
        (lambda: SGD(weight_decay=-1), "weight_decay = -1"),
        (lambda: Adafactor(clip=0.5), "clip = 0.5"),
        (lambda: Muon(ns_steps=0), "ns_steps = 0"),
        (lambda: Cosine(warmup=-1), "warmup = -1"),
        (lambda: Cosine(floor=2), "floor = 2"),
        (lambda: WSD(warmup=0.5, decay=0.6), "together"),
        (lambda: Linear(unit="samples"), "Linear.unit: 'samples'"),  # type: ignore[arg-type]
    ],
)
def test_values_that_cannot_be_meant_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        make()


# ---------------------------------------------------------------------------------------------- schedules

CURVES: dict[str, Any] = {
    "constant": Constant(),
    "constant-warmup-4": Constant(warmup=4),
    "linear": Linear(),
    "linear-warmup-10%": Linear(warmup=0.1, floor=0.2),
    "cosine": Cosine(),
    "cosine-warmup-5-to-0": Cosine(warmup=5, floor=0.0),
    "wsd": WSD(),
    "wsd-counts": WSD(warmup=3, decay=10, floor=0.1),
}


def test_curves_are_the_goldens(request: pytest.FixtureRequest) -> None:
    path = Path(__file__).parent / "goldens" / "schedules.json"
    points: Sequence[int] = range(45)
    curves = {name: [s.factor(float(t), 40.0) for t in points] for name, s in CURVES.items()}
    if request.config.getoption("--rewrite-goldens", default=False):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(curves, indent=1) + "\n")
    golden = json.loads(path.read_text())
    assert set(golden) == set(curves)
    for name, curve in curves.items():
        assert curve == pytest.approx(golden[name], rel=1e-12, abs=1e-12), name


total_and_done = st.tuples(st.floats(1, 1e12), st.floats(0, 1.5)).map(lambda x: (x[0], x[0] * x[1]))


@given(point=total_and_done, name=st.sampled_from(sorted(CURVES)))
def test_factors_lie_between_zero_and_one(point: tuple[float, float], name: str) -> None:
    total, done = point
    assert 0 <= CURVES[name].factor(done, total) <= 1


def test_the_shapes_are_what_they_say() -> None:
    cosine = Cosine(warmup=9, floor=0.1)
    assert cosine.factor(0, 109) == pytest.approx(0.1)  # (0 + 1) / (9 + 1)
    assert cosine.factor(9, 109) == 1
    assert cosine.factor(59, 109) == pytest.approx(0.55)
    assert cosine.factor(109, 109) == cosine.factor(500, 109) == pytest.approx(0.1)
    assert Linear(warmup=0, floor=0.5).factor(50, 100) == pytest.approx(0.75)
    wsd = WSD(warmup=0, decay=0.2)
    assert [wsd.factor(t, 100) for t in (0, 80, 90, 100)] == pytest.approx([1, 1, 0.5, 0])
    # in tokens: the same curve, whatever a step holds
    assert Cosine(warmup=0.1, unit="tokens").factor(5e8, 1e9) == pytest.approx(
        Cosine(warmup=0.1).factor(500, 1000)
    )


@pytest.mark.parametrize("name", CURVES)
def test_of_an_unknown_length_only_a_counted_warmup_is_known(name: str) -> None:
    schedule = CURVES[name]
    assert schedule.factor(1e6, math.inf) == 1
    first = schedule.factor(0.0, math.inf)
    assert first == (1 / (schedule.warmup + 1) if schedule.warmup >= 1 else 1)


def test_a_warmup_longer_than_the_run_and_no_decay() -> None:
    assert Cosine(warmup=100).factor(9, 10) == pytest.approx(10 / 101)
    assert WSD(warmup=0, decay=0).factor(99, 100) == 1
