"""What a GPU does differently, on a GPU: the same curves, updates that nobody waits for, codecs, checkpoints that travel.

Where there is none, those that can run the same code on the CPU, and the others skip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY, losses, manyhands, summary
from torch import nn
from torch.nn import functional

from manyhands.core import config, registry
from manyhands.core.errors import ManyhandsError
from manyhands.exchange import quantize, quantize_gpu
from manyhands.exchange.codec import Codec
from manyhands.exchange.int2 import Int2
from manyhands.exchange.int4 import Int4
from manyhands.exchange.int8 import Int8
from manyhands.exchange.natural import Natural
from manyhands.exchange.sign import Sign
from manyhands.strategy.base import Strategy
from manyhands.strategy.optimizers import SGD, Adagrad, Adam, AdamW
from manyhands.tasks import loss as loss_module
from manyhands.train.reading import Reading, Stopwatch
from manyhands.train.replica import Part, Replica
from manyhands.wire.solo import Solo

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")),
]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def _replica(device: str, outer: Any, max_grad_norm: float) -> Replica:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).to(device)
    return Replica(model, Strategy(outer=outer), Solo(device), max_grad_norm=max_grad_norm)


def _part(step: int, device: str, scale: float = 1.0) -> Part:
    g = torch.Generator().manual_seed(step)
    batch = {"x": scale * torch.randn(8, 6, generator=g), "y": torch.randn(8, 4, generator=g)}
    batches = [(i, {k: v[4 * i : 4 * i + 4].to(device) for k, v in batch.items()}) for i in range(2)]
    return Part(step, batches, 2, 8, 0)


def _loss(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    return functional.mse_loss(model(batch["x"]), batch["y"], reduction="sum"), len(batch["x"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "outer", [SGD(0.1, momentum=0.9), Adam(0.01), AdamW(0.01)], ids=lambda o: type(o).__name__
)
@pytest.mark.parametrize("max_grad_norm", [0.5, 1e9])
def test_an_update_that_nobody_waits_for_is_the_same(device: str, outer: Any, max_grad_norm: float) -> None:
    """Clipped or not; and where the norm is not finite nothing moves, neither parameters nor state."""
    seen, unseen = (_replica(device, outer, max_grad_norm) for _ in range(2))
    seen.method.unseen, unseen.method.unseen = False, True  # type: ignore[attr-defined]
    for step, scale in enumerate([1.0, 1.0, math.inf, 1.0, 2.0]):
        before = [p.detach().clone() for p in unseen.model.parameters()]
        state = {k: v.clone() for k, v in unseen.optimizer_state().items()}
        found = [replica.step(_part(step, device, scale), _loss, late=True) for replica in (seen, unseen)]
        assert found[0].late is None
        assert (found[1].late is None) == (not math.isfinite(found[1].loss))
        found[1] = found[1].settled()
        if scale == math.inf:
            assert found[1].skipped
            assert found[0].skipped
            assert found[1].lr == 0.0
            assert all(torch.equal(a, b) for a, b in zip(before, unseen.model.parameters(), strict=True))
            now = unseen.optimizer_state()
            assert all(torch.equal(now[k], v) for k, v in state.items())
            continue
        assert found[0].loss == pytest.approx(found[1].loss, rel=1e-5)
        assert found[0].grad_norm == pytest.approx(found[1].grad_norm, rel=1e-5)
        assert found[0].lr == found[1].lr
        for a, b in zip(seen.model.parameters(), unseen.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert unseen.skipped == seen.skipped == 1


def test_what_a_gradient_that_is_never_finite_ends_with() -> None:
    replica = _replica("cpu", AdamW(0.01), 1.0)
    replica.method.unseen = True  # type: ignore[attr-defined]

    def endlessly() -> None:
        for step in range(20):
            replica.step(_part(step, "cpu", math.inf), _loss)

    with pytest.raises(ManyhandsError, match="an update needs finite gradients"):
        endlessly()


def test_only_fused_optimizers_look_at_the_norm_themselves() -> None:
    named = [("w", nn.Parameter(torch.ones(3, 3)))]
    assert AdamW(0.1).build(named, "cpu").looks_itself
    assert not config.from_text("optimizers", "rmsprop(lr=0.1)").build(named, "cpu").looks_itself
    assert Adagrad(0.1).build(named, "cpu").looks_itself


@pytest.mark.parametrize("device", DEVICES)
def test_readings_and_stopwatches(device: str) -> None:
    stopwatch = Stopwatch(torch.device(device))
    x = torch.full((), 1.5, device=device)
    reading = Reading.of(x, 3)
    x.add_(1.0)  # later work is not waited for, nor seen
    stopwatch.stop()
    assert reading.values() == [1.5, 3.0]
    if device == "cuda":
        torch.cuda.synchronize()
    assert stopwatch.done
    assert 0 <= stopwatch.seconds() < 60


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_expressions_of_cross_entropy_that_a_gpu_fuses(device: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(64, 1000, generator=g)).to(device, dtype)
    targets = torch.randint(0, 1000, (64,), generator=g).to(device)
    targets[::5] = -100
    logits[5] = math.nan  # of a row that is not counted
    valid = targets != -100
    clean = logits.float().masked_fill(~valid.unsqueeze(1), 0.0).requires_grad_()
    functional.cross_entropy(clean, targets, reduction="sum").backward()
    norm = loss_module.log_norms(logits)
    torch.testing.assert_close(norm[valid], clean.detach().logsumexp(1)[valid])
    index = targets.masked_fill(~valid, 0).unsqueeze(1)
    ours = loss_module.gradient(logits, index, valid, norm, torch.ones((), device=device))
    assert ours.dtype == dtype
    assert clean.grad is not None
    torch.testing.assert_close(
        ours.float(), clean.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )


@gpu
def test_cross_entropy_fused_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "FUSED_FROM", 0)
    for rows, classes in ((64, 1000), (48, 1001)):
        logits = torch.randn(rows, classes, device="cuda", requires_grad=True)
        targets = torch.randint(0, classes, (rows,), device="cuda")
        targets[::3] = -100
        twin = logits.detach().clone().requires_grad_()
        ours = loss_module.cross_entropy_sum(logits, targets)
        reference = functional.cross_entropy(twin, targets, reduction="sum")
        (2 * ours).backward()
        (2 * reference).backward()
        torch.testing.assert_close(ours, reference)
        torch.testing.assert_close(logits.grad, twin.grad)


def _codecs() -> list[str]:
    found = []
    for name in registry.entries("exchanges"):
        try:
            value = config.from_text("exchanges", name)
        except Exception:  # it needs arguments: a combinator
            continue
        if isinstance(value, Codec) and hasattr(value, "decode"):
            found.append(name)
    return found


@gpu
@pytest.mark.parametrize("name", _codecs())
@pytest.mark.parametrize("numel", [1000, 100_003])
def test_a_codec_means_the_same_on_the_gpu(name: str, numel: int) -> None:
    """Decoded values agree with the CPU's but for what rounding a fused product may move by one level, in few places."""
    codec: Any = config.from_text("exchanges", name)
    x = torch.randn(numel, generator=torch.Generator().manual_seed(1)) * 1e-2
    there = codec.encode(x.cuda(), 7)
    assert there.numel() == codec.size_bytes(numel)
    assert there.device.type == "cuda"
    ours = codec.decode(there, numel, torch.float32).cpu()
    here = codec.decode(codec.encode(x, 7), numel, torch.float32)
    different = (ours - here).abs() > 1e-6
    assert int(different.sum()) <= numel * 1e-3
    # the same bytes mean the same on both
    torch.testing.assert_close(codec.decode(there.cpu(), numel, torch.float32), ours, rtol=1e-6, atol=1e-7)
    poisoned = x.clone()
    poisoned[5] = math.nan
    if name not in ("randomk",):  # which may not send that entry
        decoded = codec.decode(codec.encode(poisoned.cuda(), 7), numel, torch.float32)
        assert not bool(decoded.isfinite().all())


QUANTIZERS: list[Any] = [
    *(kind(rounding=r) for kind in (Int8, Int4, Int2, Natural) for r in ("nearest", "stochastic")),
    *(Sign(), Int8(block=32, rounding="stochastic"), Int4(block=4096), Sign(block=64), Natural(block=1024)),
]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, but that one NaN is as good as another."""
    nan = a.isnan() & b.isnan()
    a, b = a.masked_fill(nan, 0), b.masked_fill(nan, 0)
    return a.dtype is b.dtype and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def _trying(numel: int) -> torch.Tensor:
    """Values of many magnitudes, among them what is zero, not normal, near the largest and not finite."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(numel, generator=generator) * 10 ** torch.randn(numel, generator=generator)
    x[7000:7400] = 0
    x[9000:9600] *= 1e-40
    x[11000:11600] = torch.finfo(torch.float32).max * torch.linspace(-1, 1, 600)
    x[13000:13300] = 127 / 32  # with int8, a block whose quotient needs no rounding
    for place, value in ((5, math.nan), (3000, math.inf), (numel - 1, -math.inf), (20_000, -0.0)):
        x[place] = value
    return x


@gpu
@pytest.mark.parametrize("codec", QUANTIZERS, ids=repr)
@pytest.mark.parametrize("numel", [1 << 17, 100_003])
def test_a_gpus_kernels_give_the_references_bits(codec: Any, numel: int) -> None:
    """Where codes are moved in whole words; where they begin at any address and end within a byte."""
    assert numel >= quantize.FUSED_FROM
    assert quantize_gpu.ready()  # Triton comes with PyTorch's builds for GPUs
    x, key = _trying(numel), 2**64 - 5
    for values in (x, x.to(torch.bfloat16)):
        payload = codec.encode(values.cuda(), key)
        assert torch.equal(payload.cpu(), codec.reference_encode(values, key))
        assert torch.equal(payload, codec.reference_encode(values.cuda(), key))
    shifted = torch.cat([payload.new_zeros(1), payload])[1:]  # as in a buffer of many payloads
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        decoded = codec.decode(payload, numel, dtype)
        assert _same(decoded.cpu(), codec.reference_decode(payload.cpu(), numel, dtype))
        assert _same(decoded, codec.reference_decode(payload, numel, dtype))
        assert _same(decoded, codec.decode(shifted, numel, dtype))
    assert quantize_gpu.ready()  # no launch has failed


def test_what_the_kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_gpu, "ready", lambda: True)
    there, enough = torch.device("cuda"), quantize.FUSED_FROM
    assert quantize_gpu.serves(there, enough, 256)
    assert not quantize_gpu.serves(torch.device("cpu"), enough, 256)
    assert not quantize_gpu.serves(there, enough - 1, 256)
    for block in (0, 1, 16, 100, 8192):  # the whole tensor, or what is no tile
        assert not quantize_gpu.serves(there, enough, block)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text("\n".join(f"line {i} says {i * i}" for i in range(1500)))
    return path


def _train(text: Path, output: Path, *more: object) -> dict[int, float]:
    common = ("train", *TINY, "--data", text, "--eval-fraction", "0.05", "--output", output)
    manyhands(*common, "--steps", 6, *more)
    return losses(output)


@gpu
@pytest.mark.parametrize(
    "strategy",
    ["ddp", "powersgd", "local-sgd(every=2)", "zero1", "ddp(exchange='error-feedback(topk(density=0.1))')"],
)
def test_a_gpu_gives_the_cpus_curve(strategy: str, text: Path, tmp_path: Path) -> None:
    """One worker; two that share one GPU (over gloo)."""
    curves = []
    for name, workers, device in (("cpu", 1, "cpu"), ("one", 1, "cuda"), ("two", 2, "cuda")):
        more = ("--strategy", strategy, "--workers", workers, "--device", device)
        curves.append(_train(text, tmp_path / name, *more))
        assert summary(tmp_path / name)["eval"]["loss"] > 0
    assert curves[1] == pytest.approx(curves[0], rel=2e-3)
    if strategy in ("ddp", "zero1"):
        assert curves[2] == pytest.approx(curves[0], rel=2e-3)


@gpu  # on a CPU alone others do it
@pytest.mark.parametrize("device", ["cuda"])
def test_a_checkpoint_goes_on_where_there_is_another_device(device: str, text: Path, tmp_path: Path) -> None:
    whole = _train(text, tmp_path / "whole", "--workers", 1, "--device", device, "--save-every", 2)
    later = _train(
        *(text, tmp_path / "resumed", "--resume", tmp_path / "whole" / "checkpoint-2"),
        *("--device", "cpu", "--workers", 2),
    )
    assert sorted(later) == [3, 4, 5, 6]
    assert later == pytest.approx({step: whole[step] for step in later}, rel=2e-3)


@gpu
def test_reproducible_on_a_gpu_is_refused(text: Path, tmp_path: Path) -> None:
    done = manyhands(
        *("train", *TINY, "--data", text, "--steps", 2, "--reproducible", "--device", "cuda"),
        *("--output", tmp_path / "o"),
        code=2,
    )
    assert "reproducible" in done.stderr
