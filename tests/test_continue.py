"""From a replica to disk and back, as the library does it: exactly, or refused before anything is touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_victims import taken
from safetensors.torch import load_file, save_file
from torch import nn

import manyhands
from manyhands.core.errors import CheckpointError, ModelError, UsageError
from manyhands.data import tokenize
from manyhands.exchange.combine import leaves
from manyhands.models import build
from manyhands.strategy import optimizers, schedules
from manyhands.train import checkpoint, durable, session


def save(output: Path, *steps: int) -> list[Path]:
    return [checkpoint.save(taken(step), output, keep=9) for step in steps]


class Tied(nn.Module):
    """Not of Transformers; input and output share their weights; one buffer."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.inner = nn.Embedding(11, width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.inner.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(ids)) * self.scale  # type: ignore[operator]


# -- models


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_our_preset_and_tokenizer_come_back_in_plain_transformers(dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = tmp_path / "byte"
    tokenize.train("byte", [], tokenizer)
    made = build.build(
        "gpt2-nano", task="pretrain", vocab_size=257, seq_len=32, seed=0, tokenizer_dir=tokenizer
    )
    model = made.eval().to(dtype)
    snapshot = checkpoint.snapshot(
        model, step=3, state={}, optimizer={}, exchange={}, tokenizer_dir=tokenizer
    )
    path = checkpoint.save(snapshot, tmp_path / "out", keep=1)
    again = AutoModelForCausalLM.from_pretrained(path).eval()
    words = AutoTokenizer.from_pretrained(path)
    text = "naïve: def f():\n\treturn 1"
    ids = words(text, return_tensors="pt").input_ids
    assert words.decode(ids[0]) == text
    named = again.state_dict()
    assert all(torch.equal(tensor, named[name]) for name, tensor in model.state_dict().items())
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    with torch.no_grad():  # products round by where in memory their factors begin
        torch.testing.assert_close(model(ids).logits, again(ids).logits, rtol=rtol, atol=rtol)
    assert again.dtype == dtype
    assert again.lm_head.weight is again.transformer.wte.weight, "tied as before"
    files = [p for p in path.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".txt"}
    for file in files:
        assert not file.read_bytes().startswith((b"PK\3\4", b"\x80")), f"{file} is a pickle"


def test_any_module_comes_back_through_the_library(tmp_path: Path) -> None:
    hands = manyhands.join(device="cpu")
    torch.manual_seed(1)
    model = Tied()
    path = hands.save(hands.replicate(model, manyhands.presets.ddp(lr=0.1)), tmp_path)
    assert sorted(load_file(path / "model.safetensors")) == ["inner.weight", "scale"]
    torch.manual_seed(2)
    other = Tied()
    build.load_weights(other, path)
    ids = torch.arange(11)
    assert torch.equal(other(ids), model(ids))
    torch.manual_seed(3)
    third = hands.replicate(Tied(), manyhands.presets.ddp(lr=0.1))
    assert hands.restore(third, tmp_path) == 0
    assert torch.equal(third.model(ids), model(ids))
    assert third.model.head.weight is third.model.inner.weight


def test_a_tokenizer_object_is_saved_with_the_replica(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenize.train("byte", [], tmp_path / "byte")
    words = AutoTokenizer.from_pretrained(tmp_path / "byte")
    hands = manyhands.join(device="cpu")
    replica = hands.replicate(nn.Linear(2, 2), manyhands.presets.ddp())
    for given in (words, tmp_path / "byte", str(tmp_path / "byte")):
        path = hands.save(replica, tmp_path / "out", tokenizer=given)
        assert AutoTokenizer.from_pretrained(path)("é").input_ids == words("é").input_ids
        checkpoint.verify(path)


def test_tied_weights_that_are_missing_are_missed(tmp_path: Path) -> None:
    model = Tied()
    snapshot = checkpoint.snapshot(model, step=1, state={}, optimizer={}, exchange={}, tokenizer_dir=None)
    path = checkpoint.save(snapshot, tmp_path, keep=1)
    held = load_file(path / "model.safetensors")
    save_file({"scale": held["scale"]}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"inner\.weight are missing"):
        session.load_parameters(Tied(), path)
    save_file({"scale": held["scale"], "head.weight": held["inner.weight"]}, path / "model.safetensors")
    other = Tied()
    session.load_parameters(other, path)  # under its other name it is the same
    assert torch.equal(other.inner.weight, held["inner.weight"])


# -- training that continues


def mlp() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    source = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, generator=source).double(), torch.randn(1, generator=source).double())
        for _ in range(25)
    ]


def zeroed() -> nn.Sequential:
    """What is loaded must all come from the checkpoint."""
    model = mlp()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def parts(hands: Any, rows: list[tuple[torch.Tensor, torch.Tensor]], start: int) -> Iterator[Any]:
    return iter(hands.share(rows, global_batch=6, seed=3, epochs=4, start=start))


def squared(model: Any, batch: Any) -> tuple[torch.Tensor, int]:
    x, y = batch
    return ((model(x) - y) ** 2).sum(), len(y)


COSINE = schedules.Cosine(warmup=2)
OPTIMIZERS: dict[str, Any] = {
    "adamw": optimizers.AdamW(0.05, schedule=COSINE),
    "sgd": optimizers.SGD(0.05, momentum=0.9, schedule=COSINE),
    "muon": optimizers.Muon(0.05, schedule=COSINE),
    "adamw by tokens": optimizers.AdamW(0.05, schedule=schedules.Cosine(warmup=12, unit="tokens")),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_replica_continues_as_if_nothing_had_been(name: str, tmp_path: Path) -> None:
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    hands = manyhands.join(device="cpu")
    rows = pairs()
    strategy = manyhands.Strategy(outer=OPTIMIZERS[name])
    total = 120.0 if "tokens" in name else 20.0

    def replicate(model: nn.Module) -> Any:
        return hands.replicate(model, strategy, max_grad_norm=0.5, total=total, precision="fp64")

    replica = replicate(mlp())
    results = []
    for part in parts(hands, rows, 0):
        results.append(replica.step(part, squared))
        if replica.steps == 7:
            hands.save(replica, tmp_path)
    assert len(results) == 20
    assert len({r.lr for r in results}) > 10, "the schedule moves"

    resumed = replicate(zeroed())
    start = hands.restore(resumed, tmp_path)
    assert start == 7
    assert [resumed.step(part, squared) for part in parts(hands, rows, start)] == results[7:]
    assert (resumed.steps, resumed.tokens) == (replica.steps, replica.tokens)
    for one, two in ((resumed, replica), (replica, resumed)):
        for key, tensor in one.model.state_dict().items():
            assert torch.equal(tensor, two.model.state_dict()[key])
        for key, tensor in one.optimizer_state().items():
            assert torch.equal(tensor, two.optimizer_state()[key])


STRATEGIES = [
    "hierarchical",
    "hierarchical(across=int8)",
    "powersgd(rank=2)",
    "ddp(exchange=ef21(topk(density=0.3)))",
    "ddp(exchange=warmup(error-feedback(topk(density=0.3)), rounds=3))",
    "ddp(optimizer=sgd, lr=0.01, exchange=momentum(topk(density=0.3)))",
    "local-sgd(every=3)",
    "post-local-sgd(every=3, start=4)",
    "slowmo(every=3)",
    "diloco(every=3, exchange=error-feedback(int4))",
    "streaming-diloco(every=4, fragments=2, delay=1)",
    "muloco(every=3)",
    "sparseloco(every=3)",
    "demo(lr=1e-3)",
    "eager",
    "eager(exchange=error-feedback(int4))",
    "forecast(every=3, delay=1, exchange=error-feedback(int4))",
    "forecast(every=4, delay=1, fragments=3, exchange=error-feedback(int4))",
    "zero1(exchange=error-feedback(int8))",
]


@pytest.mark.parametrize("text", STRATEGIES)
def test_every_method_continues_to_the_bit(text: str, tmp_path: Path) -> None:
    if text.startswith("muloco") and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    hands = manyhands.join(device="cpu")
    rows = pairs()
    replica = hands.replicate(mlp(), text, max_grad_norm=0.5, total=20.0, precision="fp64")
    for part in parts(hands, rows, 0):
        replica.step(part, squared)
        if replica.steps == 6:
            hands.save(replica, tmp_path)
    resumed = hands.replicate(zeroed(), text, max_grad_norm=0.5, total=20.0, precision="fp64")
    start = hands.restore(resumed, tmp_path)
    for part in parts(hands, rows, start):
        resumed.step(part, squared)
    for each in (replica, resumed):
        each.meet()
    assert start == 6
    assert resumed.steps == replica.steps == 20
    for key, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, replica.model.state_dict()[key]), key
    for one, two in zip(leaves(resumed.states), leaves(replica.states), strict=True):
        assert torch.equal(one[1], two[1]), one[0]


def test_mistakes_of_a_loop_of_ones_own_are_one_message(tmp_path: Path) -> None:
    hands = manyhands.join(device="cpu")
    rows = [(torch.randn(4).double(), torch.randn(1).double()) for _ in range(6)]
    replica = hands.replicate(mlp(), "ddp(lr=1e-3)", precision="fp64")
    part = next(parts(hands, rows, 0))
    for said, words in (
        (lambda model, batch: squared(model, batch)[0], "loss returned a Tensor of shape"),
        (lambda model, batch: ((model(batch[0]) - batch[1]) ** 2, 6), "Tensor, int"),
        (lambda model, batch: (1.0, 6), "float, int"),
    ):
        with pytest.raises(UsageError, match=words):
            replica.step(part, said)
    assert replica.step(part, squared).target_tokens == 6
    with pytest.raises(UsageError, match="did you mean 'ddp'"):
        hands.replicate(mlp(), "dpp")
    with pytest.raises(UsageError, match="call form"):
        hands.replicate(mlp(), 3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="epochs = inf"):
        next(hands.share(rows, global_batch=2, epochs=float("inf")))
    path = hands.save(replica, tmp_path)
    with pytest.raises(ModelError, match="into=model"):
        manyhands.load(path)
    loaded = manyhands.load(path, into=mlp().double())
    assert not loaded.training
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, replica.model.state_dict()[key])


def test_a_checkpoint_of_something_else_changes_nothing(tmp_path: Path) -> None:
    hands = manyhands.join(device="cpu")
    ddp = manyhands.presets.ddp

    def stepped(model: nn.Module, strategy: Any) -> Any:
        replica = hands.replicate(model, strategy)
        for part in parts(hands, [(torch.ones(4), torch.ones(1))] * 6, 0):
            replica.step(part, squared)
        return replica

    hands.save(stepped(mlp(), ddp(lr=0.1)), tmp_path)
    wider = nn.Sequential(*list(mlp())[:4], nn.Linear(8, 2))
    less = nn.Sequential(*list(mlp())[:4])
    more = nn.Sequential(*mlp(), nn.Linear(1, 1))
    cases = [
        (stepped(wider, ddp()), r"4\.\w+ has shape \[1"),
        (hands.replicate(less, ddp()), r"4\.bias, 4\.weight are unknown"),
        (hands.replicate(more, ddp()), r"5\.bias, 5\.weight are missing"),
        (stepped(mlp(), ddp(optimizer="sgd", lr=0.1)), "optimizer state"),
    ]
    for replica, said in cases:
        before = {name: tensor.clone() for name, tensor in replica.model.state_dict().items()}
        steps = replica.steps
        with pytest.raises(CheckpointError, match=said):
            hands.restore(replica, tmp_path)
        assert replica.steps == steps
        assert all(torch.equal(t, before[name]) for name, t in replica.model.state_dict().items()), said


def test_the_library_refuses_a_damaged_checkpoint(tmp_path: Path) -> None:
    hands = manyhands.join(device="cpu")
    replica = hands.replicate(nn.Linear(2, 2), manyhands.presets.ddp())
    path = hands.save(replica, tmp_path)
    before = replica.model.weight.detach().clone()
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed"):
        hands.restore(replica, tmp_path)
    assert torch.equal(replica.model.weight, before)


def test_training_state_without_its_counters_is_refused(tmp_path: Path) -> None:
    hands = manyhands.join(device="cpu")
    model = nn.Linear(2, 2)
    snapshot = checkpoint.snapshot(model, step=1, state={}, optimizer={}, exchange={}, tokenizer_dir=None)
    checkpoint.save(snapshot, tmp_path, keep=1)
    with pytest.raises(CheckpointError, match=r"state\.json has no 'step'"):
        hands.restore(hands.replicate(model, manyhands.presets.ddp()), tmp_path)


# -- edits of what says what is there


def add(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text("{}")


def add_pickle(path: Path) -> None:
    (path / "training" / "scheduler.pt").write_bytes(b"\x80\x02.")


def dangling(path: Path) -> None:
    (path / "config.json").unlink()
    (path / "config.json").symlink_to("gone")


def directory(path: Path) -> None:
    (path / "config.json").unlink()
    (path / "config.json").mkdir()


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        file = path / "manifest.json"
        data = json.loads(file.read_text())
        changed = change(data)
        file.write_text(json.dumps(changed if isinstance(changed, (dict, list)) else data))

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "file added": (add, "model.safetensors.index.json is not in its manifest"),
    "pickle added": (add_pickle, "training/scheduler.pt is not in its manifest"),
    "dangling link": (dangling, "config.json is missing"),
    "directory for a file": (directory, "config.json"),
    "manifest missing": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest truncated": (lambda p: os.truncate(p / "manifest.json", 40), "not a manifest"),
    "manifest binary": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe\0"), "not a manifest"),
    "manifest a list": (manifest(lambda m: [1]), "not a manifest"),
    "files a list": (manifest(lambda m: {**m, "files": list(m["files"])}), "not a manifest"),
    "file left out": (manifest(lambda m: m["files"].pop("config.json") and None), "config.json is not in"),
    "hash changed": (
        manifest(lambda m: m["files"]["config.json"].update(sha256="0" * 64)),
        "config.json was changed",
    ),
    "size changed": (
        manifest(lambda m: m["files"]["config.json"].update(bytes=1)),
        "config.json has .* bytes, its manifest says 1",
    ),
    "step changed": (manifest(lambda m: m.update(step=8)), "says step 8"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_whatever_was_edited_is_refused_and_the_previous_offered(name: str, tmp_path: Path) -> None:
    save(tmp_path, 3, 9)
    newest = tmp_path / "checkpoint-9"
    damage, said = DAMAGES[name]
    damage(newest)
    assert checkpoint.resolve_resume(str(tmp_path), tmp_path) == newest, "no silent fallback"
    with pytest.raises(CheckpointError, match=said) as caught:
        checkpoint.verify(newest)
    assert str(newest) in str(caught.value)
    assert f"--resume {tmp_path / 'checkpoint-3'} continues" in str(caught.value)


def test_renamed_or_linked_it_is_as_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = save(tmp_path, 3)
    (tmp_path / "link").symlink_to(path)
    shutil.copytree(path, tmp_path / "best")
    (path / ".DS_Store").touch()  # file managers leave hidden files everywhere
    for other in (path, tmp_path / "link", tmp_path / "best"):
        assert checkpoint.resolve_resume(str(other), tmp_path) == other
        checkpoint.verify(other)
    monkeypatch.chdir(path)
    assert checkpoint.resolve_resume(".", tmp_path).resolve() == path
    checkpoint.verify(Path("."))


# -- several writers


def test_two_savers_of_one_process_leave_each_other_alone(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def work(steps: range) -> None:
        try:
            for step in steps:
                checkpoint.save(taken(step), tmp_path, keep=99)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(range(i, 30, 3),)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(os.listdir(tmp_path)) == 30
    for path in checkpoint.checkpoints(tmp_path):
        checkpoint.verify(path)


def test_what_a_killed_child_of_a_living_process_left_is_removed(tmp_path: Path) -> None:
    """A forked writer shares its parent's token, not its number."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / f".checkpoint-1.{ended.pid}.{checkpoint._PROCESS}-0123abcd.tmp"
    mine = tmp_path / f".checkpoint-1.{os.getpid()}.{checkpoint._PROCESS}-0123abcd.tmp"
    impossible = tmp_path / f".checkpoint-1.{10**30}.0123abcd-0123abcd.tmp"
    for path in (left, mine, impossible):
        path.mkdir()
    save(tmp_path, 3)
    assert not left.exists()
    assert not impossible.exists()
    assert mine.exists()


def test_a_disk_that_fails_to_sync_a_rename_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(number: int) -> Callable[[Path], None]:
        def sync(path: Path) -> None:
            raise OSError(number, os.strerror(number), str(path))

        return sync

    monkeypatch.setattr(durable, "sync_file", failing(22))  # a system that cannot sync directories: no error
    durable.sync_directory(tmp_path)
    monkeypatch.setattr(durable, "sync_file", failing(5))
    with pytest.raises(OSError, match="Input/output error"):
        durable.sync_directory(tmp_path)
