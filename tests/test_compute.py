"""The CPU's own kernels beside PyTorch's in float64. Attention's backward is tested in a process of its own: it stays enabled."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from facts import facts

from manyhands.core import compute, hardware
from manyhands.core.errors import UsageError
from manyhands.models.build import build
from manyhands.tasks.loss import cross_entropy_sum
from manyhands.train.forward import narrow_residual, quicken
from manyhands.train.job import Job
from manyhands.train.plan import derive

needs_kernels = pytest.mark.skipif(compute.library() is None, reason="no C++ compiler here")

ATTENTION = """
import torch, torch.nn.functional as F
from manyhands.core import compute

def gradients(dtype, given, grad, causal, scale):
    q, k, v = (t.to(dtype).requires_grad_() for t in given)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    return torch.autograd.grad(out, (q, k, v), grad.to(dtype))

def error(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())

torch.manual_seed(0)
cases = []
for shape in ((2, 3, 64, 32), (1, 2, 77, 16), (2, 1, 5, 64), (1, 3, 1, 8), (3, 2, 33, 6)):
    given = [torch.randn(shape).bfloat16() for _ in range(3)]
    cases += [(given, torch.randn(shape).bfloat16(), causal, scale) for causal in (True, False) for scale in (None, 0.3)]
theirs = [gradients(torch.bfloat16, *case) for case in cases]
assert compute.enable() and compute.enable()
for limit, case, other in zip([compute.SHARES_BYTES, 1] * len(cases), cases, theirs):
    compute.SHARES_BYTES = limit  # 1: a head at a time
    wanted = gradients(torch.float64, *case)
    for got, their, want in zip(gradients(torch.bfloat16, *case), other, wanted):
        assert got.stride() == their.stride()
        if want.norm() > 1e-9:
            assert error(got, want) <= max(1.1 * error(their, want), 4e-3), (case[0][0].shape, error(got, want))
# what does not fit is PyTorch's: other types, masks, fewer heads of keys
masked = torch.randn(1, 1, 8, 8)
x = torch.randn(1, 2, 8, 16, requires_grad=True)
F.scaled_dot_product_attention(x, x, x, attn_mask=masked).sum().backward()
assert torch.isfinite(x.grad).all()
print("ours", compute.about())
"""


@needs_kernels
@pytest.mark.skipif("avx512_bf16" not in hardware.cpu_flags(), reason="needs AVX-512 BF16")
def test_attention_backward_is_as_exact_as_pytorchs() -> None:
    done = subprocess.run([sys.executable, "-c", ATTENTION], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "attention" in done.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n", [1, 15, 16, 4099])
def test_gelu(dtype: torch.dtype, n: int) -> None:
    x = (torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) * 4).to(dtype)
    grad = torch.linspace(-1, 1, n, dtype=dtype)
    results = []
    for kind, f in ((dtype, compute.gelu_tanh), (torch.float64, lambda v: F.gelu(v, approximate="tanh"))):
        mine = x.to(kind).requires_grad_()
        y = f(mine)
        (slope,) = torch.autograd.grad(y, mine, grad.to(kind))
        results.append((y.detach().double(), slope.double()))
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float64: 1e-14}[dtype]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def test_gelu_of_what_is_not_finite_and_of_no_kernel() -> None:
    x = torch.tensor([float("inf"), -200.0, 200.0, float("nan"), 0.0])
    y = compute.gelu_tanh(x)
    assert y[:3].tolist() == [float("inf"), 0.0, 200.0]
    assert torch.isnan(y[3])
    assert y[4] == 0
    strided = torch.randn(6, 8)[:, ::2]
    torch.testing.assert_close(compute.gelu_tanh(strided), F.gelu(strided, approximate="tanh"))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 16, 65, 1031])
def test_cross_entropy(dtype: torch.dtype, classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = (torch.randn(19, classes, generator=generator) * 5).to(dtype)
    targets = torch.randint(0, classes, (19,), generator=generator)
    targets[3] = -100
    logits[3] = float("nan")  # an ignored row counts nothing, whatever it holds
    clean = logits.double().masked_fill(targets.eq(-100).unsqueeze(1), 0.0).requires_grad_()
    mine = logits.requires_grad_()
    ours, reference = cross_entropy_sum(mine, targets), F.cross_entropy(clean, targets, reduction="sum")
    torch.testing.assert_close(ours.double(), reference, rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(ours * 0.5, mine)
    (wanted,) = torch.autograd.grad(reference * 0.5, clean)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(grad.double(), wanted, rtol=tolerance, atol=tolerance)


@needs_kernels
def test_log_norms_of_what_is_not_finite() -> None:
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor([[inf, 1.0], [nan, 1.0], [-inf, -inf], [90.0, -90.0]])
    torch.testing.assert_close(compute.log_norms(rows, "f32"), torch.logsumexp(rows, 1), equal_nan=True)


@needs_kernels
def test_the_same_bits_with_any_number_of_threads() -> None:
    x = torch.randn(33, 1000).bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((compute.log_norms(x, "bf16"), compute.gelu_tanh(x)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_quicken_replaces_the_modules_and_nothing_else() -> None:
    from transformers.activations import ACT2FN

    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4),
        ACT2FN["gelu_new"],
        torch.nn.GELU(approximate="tanh"),
        torch.nn.GELU(),
        ACT2FN["gelu_pytorch_tanh"],
    ).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    before, names = model(x), list(model.state_dict())
    assert quicken(model) == 3
    torch.testing.assert_close(model(x), before, rtol=1e-13, atol=1e-13)
    assert list(model.state_dict()) == names
    assert isinstance(model[3], torch.nn.GELU)


@pytest.mark.parametrize("name", ["gpt2-nano", "llama-nano"])
def test_a_narrow_residual_is_bf16_between_layers_and_close(name: str) -> None:
    seen: list[torch.dtype] = []
    outputs = []
    for narrowed in (False, True):
        model = build(name, task="pretrain", vocab_size=300, seq_len=32)
        if narrowed:
            narrow_residual(model)
        ids = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1))
        norm = next(m for n, m in model.named_modules() if n.endswith(("1.ln_1", "1.input_layernorm")))
        norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
        assert model(input_ids=ids).logits.dtype == torch.float32  # nothing is narrowed without autocast
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(model(input_ids=ids).logits.float())
        outputs[-1].square().mean().backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    assert seen == [torch.float32, torch.float32, torch.float32, torch.bfloat16]
    wide, narrow = (o.detach() for o in outputs)
    assert 0 < float((wide - narrow).abs().max()) < 0.03 * float(wide.abs().max())


def test_a_narrow_residual_needs_bf16() -> None:
    found = facts(has_bf16=True)
    assert derive(Job(residual="bf16"), found).precision == "bf16"
    with pytest.raises(UsageError, match="residual = 'bf16' with precision fp32"):
        derive(Job(residual="bf16", precision="fp32"), found)
