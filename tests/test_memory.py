"""Memory: what a row needs is measured, what does not fit is cut, and sums stay the same."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import manyhands
from manyhands import presets
from manyhands.core.errors import ManyhandsError, OutOfMemory, PeerLost
from manyhands.core.passes import Pass, told
from manyhands.data.sample import Order
from manyhands.train import memory
from manyhands.train.feed import Feed
from manyhands.train.memory import Fits, Need, Torn, split_on_oom
from manyhands.train.method import Part, accumulate
from manyhands.train.replica import Replica
from manyhands.train.state_bytes import bytes_per_parameter
from manyhands.wire.solo import Solo

REFUSED = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1234 bytes."


class Full:
    """A memory that holds `most` rows at a time."""

    def __init__(self, most: int, late: bool = False) -> None:
        self.most, self.late, self.touched = most, late, False
        self.runs: list[tuple[list[int], bool]] = []

    def __call__(self, piece: Any, begin: int, final: bool) -> int:
        self.touched = False
        if len(piece["x"]) > self.most:
            self.touched = self.late
            raise RuntimeError(REFUSED)
        assert begin == int(piece["x"][:1].sum())
        self.runs.append((piece["x"].tolist(), final))
        return int(piece["x"].sum())


def split(run: Full, rows: int, fits: Fits, divisible: bool = True) -> list[int]:
    batch = {"x": torch.arange(rows)}
    return split_on_oom(run, batch, fits, divisible=divisible, untouched=lambda: not run.touched)


def test_a_pass_is_cut_until_it_fits_and_later_ones_begin_so() -> None:
    run, fits = Full(3), Fits()
    assert sum(split(run, 10, fits)) == 45
    assert fits.most == 3
    assert run.runs == [([0, 1, 2], False), ([3, 4, 5], False), ([6, 7, 8], False), ([9], True)]
    run.runs.clear()
    assert sum(split(run, 4, fits)) == 6
    assert run.runs == [([0, 1, 2], False), ([3], True)]
    assert split(run, 0, fits) == [0]  # a pass without rows is run once


def test_what_cannot_be_cut_is_told_clearly() -> None:
    with pytest.raises(ManyhandsError, match=r"no memory .* of 4 rows: DefaultCPUAllocator"):
        split(Full(3), 4, Fits(), divisible=False)
    with pytest.raises(ManyhandsError, match="of 1 row:"):
        split(Full(0), 4, Fits())
    with pytest.raises(RuntimeError, match="shapes"):  # another error is nobody's business here
        split_on_oom(
            lambda *_: (_ for _ in ()).throw(RuntimeError("shapes differ")),
            {"x": torch.arange(2)},
            Fits(),
            divisible=True,
            untouched=lambda: True,
        )


def test_a_backward_that_left_gradients_behind_is_done_again_from_the_start() -> None:
    fits = Fits()
    with pytest.raises(Torn):
        split(Full(3, late=True), 4, fits)
    assert fits.most == 2


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError(REFUSED), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_failed_allocations_are_known(error: Exception, is_one: bool) -> None:
    assert memory.is_out_of_memory(error) == is_one


# -- a replica's step


class Rows:
    bytes_per_target = 1.0

    def __len__(self) -> int:
        return 48

    def take(self, ids: np.ndarray) -> dict[str, torch.Tensor]:
        x = torch.from_numpy(np.asarray(ids)).double()[:, None] / 48
        return {"x": torch.cat([x, x * x], 1), "y": torch.sin(3 * x)}


class Model(nn.Module):
    """Fails in forward, or in backward after some gradients, where a pass has more rows than fit."""

    def __init__(self, most: int, late: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(2, 8).double(), nn.Linear(8, 1).double()
        self.most, self.late = most, late
        self.failed = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        if len(x) > self.most:
            if not self.late:
                self._fail()
            hidden.register_hook(lambda _: self._fail())  # `last` has its gradients by then
        return self.last(hidden)

    def _fail(self) -> None:
        self.failed += 1
        raise RuntimeError(REFUSED)


def squares(model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
    return ((model(batch["x"]) - batch["y"]) ** 2).sum(), len(batch["y"])


def train(
    most: int, late: bool = False, device_batch: int = 16, *, dropout: bool = False, **options: Any
) -> tuple[list[float], int, Feed, Any]:
    model: Any = Model(most, late)
    model.last = nn.Sequential(nn.Dropout(0.5), model.last) if dropout else model.last
    replica = Replica(
        model, manyhands.presets.ddp(lr=0.05, schedule="constant", **options), Solo("cpu"), max_grad_norm=1.0
    )
    feed = Feed(
        rows=Rows(),
        order=Order(48, 24, seed=2),
        rank=0,
        weights=[1.0],
        micro_batch=6 if dropout else 1,
        device_batch=device_batch,
        coalesce=not dropout,
        device=torch.device("cpu"),
        seed=2,
    )
    told: list[Any] = []
    losses = []
    for step in range(4):
        losses.append(replica.step(feed.part(step), squares).loss)
        memory.heed(feed, replica.fits, step, told.append)
    replica.close()
    return losses, model.failed, feed, told


@pytest.mark.parametrize("late", [False, True], ids=["in forward", "in backward"])
def test_memory_that_runs_out_in_mid_run_changes_no_loss(late: bool) -> None:
    plain, failed, feed, told = train(most=16)
    assert (failed, feed.device_batch, told) == (0, 16, [])
    losses, failed, feed, told = train(most=5, late=late)
    assert losses == pytest.approx(plain, rel=1e-12)
    assert failed == 2  # 16 and 8 rows, once each
    assert feed.device_batch == 4
    assert [event.where for event in told] == ["memory"]


def test_passes_with_dropout_are_cut_too_and_it_is_told() -> None:
    first = train(4, dropout=True)
    losses, failed, _, told = first
    assert failed == 1
    assert losses == train(4, dropout=True)[0], "pieces are seeded as a pass is"
    assert losses != train(6, dropout=True)[0], "by other numbers than of the whole"
    assert "their random numbers (dropout) are others" in told[0].message
    assert "random" not in train(4)[3][0].message


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a worker tells its launcher of its passes, as "w0"."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MANYHANDS_SEAT", "w0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MANYHANDS_STORE", str(tmp_path))
    return str(tmp_path)


@pytest.mark.parametrize("fresh", [False, True], ids=["added up before", "on their way"])
def test_what_cannot_be_taken_back_is_left_to_a_successor(launched: str, fresh: bool) -> None:
    """It halves the rows of the pass that failed; without elasticity the user is told."""
    strategy = presets.ddp(lr=0.05, schedule="constant", bucket_mb=1e-6)
    part = Part(0, [(0, Rows().take(np.arange(15)))], 15, 15, 0, [range(15)], divisible=True)
    for over in (threading.Event(), None):
        replica = Replica(Model(5, late=True), strategy, Solo("cpu"), over=over)
        gradients: Any = replica.method.gradients  # type: ignore[attr-defined]
        with pytest.raises(OutOfMemory, match="in a backward of 15 rows") as raised:
            accumulate(replica, gradients, part, squares, 1.0, fresh=fresh)
        assert ("give --device-batch 8" in str(raised.value)) == (over is None)
        assert told(launched, "w0") == Pass(15, divisible=True)
        replica.close()


@pytest.mark.parametrize("late", [False, True], ids=["in forward", "in backward"])
def test_a_pass_that_is_everybodys_is_begun_anew_in_halves_down_to_one_row(launched: str, late: bool) -> None:
    part = Part(0, [(0, Rows().take(np.arange(24)))], 24, 24, 0, [range(24)], divisible=True)

    def divided(most: int, over: threading.Event | None) -> tuple[Any, Replica]:
        model = Model(most, late)
        strategy = presets.zero3(lr=0.05, schedule="constant", shard=1)
        return model, Replica(model, strategy, Solo("cpu"), max_grad_norm=1.0, over=over)

    _, replica = divided(24, None)
    whole = replica.step(part, squares)
    model, replica = divided(5, threading.Event())
    for rows in (12, 6, 3):
        with pytest.raises(
            PeerLost, match=f"no memory for a forward and backward of {2 * rows} rows"
        ) as lost:
            replica.step(part, squares)
        assert lost.value.rank == replica.wire.rank
        assert lost.value.__context__ is None, "whoever holds the first error holds the pass"
        assert replica.fits.most == rows
    halved = replica.step(part, squares)
    assert (halved.loss, halved.grad_norm) == pytest.approx((whole.loss, whole.grad_norm), rel=1e-12)
    assert told(launched, "w0") is None
    model.most, replica.fits.most = 0, 1
    with pytest.raises(OutOfMemory, match="backward of 1 rows"):
        replica.step(part, squares)
    assert told(launched, "w0") == Pass(1, divisible=True)
    _, replica = divided(5, None)  # nobody would meet it again
    with pytest.raises(OutOfMemory, match="backward of 24 rows"):
        replica.step(part, squares)


def test_a_fixed_order_of_additions_is_not_cut() -> None:
    with pytest.raises(ManyhandsError, match="a fixed order of additions is not cut"):
        train(0, exchange="ordered")


ALLOCATION = """
import resource, torch
from torch import nn
if {allocator}:
    from manyhands.core.native import enable_allocator
    assert enable_allocator() == "caching"
import manyhands
from manyhands.train.method import Part
from manyhands.train.replica import Replica
from manyhands.wire.solo import Solo
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Linear(8, 1 << 19)
def squares(model, batch):
    return (model(batch["x"]) ** 2).sum(), len(batch["x"])  # 2 MiB a row, and as much again for the square
strategy = manyhands.presets.ddp(lr=1e-30, schedule="constant")
replica = Replica(model, strategy, Solo("cpu"), max_grad_norm=1.0)
x = torch.arange(64 * 8).reshape(64, 8) / 512
def step(n):
    return replica.step(Part(n, [(0, {{"x": x}})], 64, 64, 0, [range(64)], divisible=True), squares)
replica.step(Part(0, [(0, {{"x": x[:1]}})], 1, 1, 0), squares)
limit = int(open("/proc/self/statm").read().split()[0]) * 4096 + (200 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
limited = step(1)
most = replica.fits.most
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
replica.fits.most = None
whole = step(2)
print(most, limited.loss, whole.loss, limited.grad_norm, whole.grad_norm)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is kept to by Linux")
@pytest.mark.parametrize("allocator", [False, True], ids=["PyTorch's allocator", "ours"])
def test_a_real_failed_allocation_is_survived(allocator: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATION.format(allocator=allocator)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)},  # what is freed is given back
    )
    assert done.returncode == 0, done.stderr
    most, loss, whole_loss, norm, whole_norm = map(float, done.stdout.split())
    assert 1 <= most < 64
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert norm == pytest.approx(whole_norm, rel=1e-5)


# -- before the start


class Wide(nn.Module):
    """Needs 16 MiB a row for its hidden layer, and as much again where it is squared."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1 << 22, bias=False)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return self.layer(x)


class Task:
    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
        return (model(batch["x"]) ** 2).sum(), len(batch["x"])


class WideRows(Rows):
    def take(self, ids: np.ndarray) -> dict[str, torch.Tensor]:
        return {"x": torch.ones(len(ids), 4)}


@pytest.fixture
def probed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MANYHANDS_CACHE", str(tmp_path))
    model = Wide()

    def ask(**changes: Any) -> int | None:
        asked: dict[str, Any] = {
            "wanted": 1000,
            "workers_here": 1,
            "state_bytes": 16.0,
            "key": {"seq_len": 4},
        }
        return memory.rows_that_fit(
            model, Task(), WideRows(), autocast=contextlib.nullcontext, **{**asked, **changes}
        )

    return model, ask, tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_rows_that_fit_follow_from_a_rows_need_and_from_the_limit(
    probed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ask, cache = probed
    monkeypatch.setattr(memory, "available_bytes", lambda _: 2 << 30)
    fits = ask()
    (kept,) = (cache / "memory").glob("*.json")
    need = Need(**json.loads(kept.read_text()))
    assert (
        24 << 20 <= need.per_row <= 128 << 20
    )  # pages, and what other threads of this process take meanwhile
    assert fits == int((0.9 * (2 << 30) - 16 * (1 << 24) - need.fixed) // need.per_row)
    assert ask(wanted=3) == 3
    assert ask(workers_here=3) < fits / 2
    assert float(model.seen) == 0  # buffers are as they were, and no gradient is left
    assert model.layer.weight.grad is None
    kept.write_text('{"fixed": 0, "per_row": 536870912}')  # what is known is not measured again
    assert ask() == 3
    monkeypatch.setattr(memory, "available_bytes", lambda _: 300 << 20)
    with pytest.raises(ManyhandsError, match="a row needs 512 MiB"):
        ask()


def test_memory_is_not_measured_where_peaks_cannot_be_read(
    probed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ask, _ = probed
    monkeypatch.setattr(memory, "_reset_peak", lambda: None)
    assert ask() is None


def _held() -> dict[int, int]:
    """Bytes of every tensor that is alive, by address."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


STATE = {
    "ddp": 16,
    "powersgd": 20.25,
    "diloco": 24,
    "gossip": 24,
    "eager": 36,
    "forecast": 36,
}


@pytest.mark.parametrize("name", STATE)
def test_what_a_method_will_keep_is_known_before_it_is_there(name: str) -> None:
    strategy = getattr(presets, name)()
    predicted = bytes_per_parameter(strategy)
    assert predicted == pytest.approx(STATE[name], abs=0.01)
    model, before = torch.nn.Linear(256, 256, bias=False), _held()
    replica = Replica(model, strategy, Solo("cpu"))
    for step in range(getattr(strategy.cadence, "every", 1) + 3):
        part = Part(step, [(0, {"x": torch.ones(1, 256)})], 1, 1, 0)
        replica.step(part, lambda model, batch: (model(batch["x"]).square().sum() / 1e4, 1))
    held = sum(size for at, size in _held().items() if at not in before) / 256**2
    replica.close()
    # alone a worker sends from its gradients' own place
    assert held <= predicted + 0.1
    assert held >= predicted - 4.3


# -- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpus_memory_is_probed_and_an_oom_in_mid_run_survived(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYHANDS_CACHE", str(tmp_path))
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((2 << 30) / total)
    try:
        model = Wide().cuda()
        fits = memory.rows_that_fit(
            model,
            Task(),
            WideRows(),
            autocast=contextlib.nullcontext,
            wanted=1000,
            workers_here=1,
            state_bytes=16.0,
            key={"seq_len": 4},
        )
        assert fits is not None
        assert 4 <= fits <= 64  # 32 to 48 MiB a row, 2 GiB
        assert model.layer.weight.grad is None
        learnt, batch = Fits(), {"x": torch.ones(512, 4, device="cuda")}

        def run(piece: Any, begin: int, final: bool) -> float:
            loss = Task().loss(model, piece)[0]
            loss.backward()
            return float(loss.detach().double())

        whole = sum(split_on_oom(run, batch, learnt, divisible=True, untouched=lambda: True))
        assert learnt.most is not None
        one = float((model.layer.weight.detach().double().sum(1) ** 2).sum())
        assert whole == pytest.approx(512 * one, rel=1e-4)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
