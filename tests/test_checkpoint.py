"""Checkpoints: whole or absent under kills and full disks, refused by name when damaged, loaded by plain Transformers."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_victims import taken, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from manyhands.core.errors import CheckpointError, UsageError
from manyhands.core.events import Event, Saved, Warned
from manyhands.train import checkpoint, durable, tensors

VICTIMS = Path(__file__).with_name("checkpoint_victims.py")


def saved(output: Path, *steps: int, keep: int = 9) -> list[Path]:
    return [checkpoint.save(taken(step), output, keep=keep) for step in steps]


def names(output: Path) -> list[str]:
    return [path.name for path in checkpoint.checkpoints(output)]


def hidden(output: Path) -> list[str]:
    return [path.name for path in output.iterdir() if path.name.startswith(".")]


# ------------------------------------------------------------------------------------------- what is in it


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "many": 1, "hands": 2}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    directory = tmp_path / "tokenizer"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", chat_template="{{ messages }}"
    )
    fast.save_pretrained(directory)
    (directory / "pytorch_model.bin").write_bytes(b"not a tokenizer's")
    (directory / "config.json").write_text("{}")
    return directory


def transformers_model(kind: str) -> Any:
    import transformers as t

    size = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    marks = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "gpt2":  # head tied to the embedding
        return t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, **marks)
        )
    if kind == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**size, **marks, tie_word_embeddings=False))
    if kind == "llama-tied":
        return t.LlamaForCausalLM(t.LlamaConfig(**size, **marks, tie_word_embeddings=True))
    return t.BertForSequenceClassification(t.BertConfig(**size, num_labels=3))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama-tied", "bert"])
def test_plain_transformers_loads_it(kind: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    model = transformers_model(kind).eval()
    shot = checkpoint.snapshot(
        model, step=7, state={"step": 7}, optimizer={}, exchange={}, tokenizer_dir=tokenizer_dir
    )
    path = checkpoint.save(shot, tmp_path / "run", keep=1)
    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    loaded, report = auto.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, unexpected, mismatched
    ids = torch.randint(32, (2, 9))
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer("many hands")["input_ids"] == [1, 2]
    assert tokenizer.chat_template == "{{ messages }}"
    found = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert {"config.json", "model.safetensors", "training/state.json", "manifest.json"} <= found
    assert not [name for name in found if not name.endswith((".json", ".safetensors", ".jinja"))]
    assert set(checkpoint.verify(path)["files"]) == found - {"manifest.json"}


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    from safetensors import safe_open

    shot = checkpoint.snapshot(
        transformers_model("gpt2"), step=0, state={}, optimizer={}, exchange={}, tokenizer_dir=None
    )
    with safe_open(checkpoint.save(shot, tmp_path, keep=1) / "model.safetensors", "pt") as file:
        assert "transformer.wte.weight" in file.keys()  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


def test_a_snapshot_is_of_its_moment(tmp_path: Path) -> None:
    """Training that goes on changes neither weights, nor optimizer state, nor the state's data."""
    model, momentum, state = nn.Linear(3, 3), torch.ones(2), {"step": 1, "more": [1]}
    before = model.weight.detach().clone()
    shot = checkpoint.snapshot(
        model, step=1, state=state, optimizer={"m": momentum}, exchange={"e": momentum}, tokenizer_dir=None
    )
    with torch.no_grad():
        model.weight.zero_()
        momentum.zero_()
    state["more"].append(2)  # type: ignore[attr-defined]
    from safetensors.torch import load_file

    path = checkpoint.save(shot, tmp_path, keep=1)
    loaded = checkpoint.load_state(path)
    assert torch.equal(load_file(path / "model.safetensors")["weight"], before)
    assert torch.equal(loaded.optimizer["m"], torch.ones(2))
    assert torch.equal(loaded.exchange["e"], torch.ones(2))
    assert loaded.state == {"step": 1, "more": [1]}


def test_training_state_comes_back(tmp_path: Path) -> None:
    state = {
        "step": 3,
        "job": {"steps": 10, "lr": 3e-4, "text": "唐诗"},
        "world_sizes": [2, 3],
        "labels": None,
    }
    optimizer = {"a.step": torch.tensor(3.0), "a.exp_avg": torch.randn(2, 3), "b": torch.zeros(0, 4)}
    exchange = {"0.0": torch.randn(5).bfloat16(), "0.1": torch.arange(3)}
    model = nn.Linear(1, 1)
    for held in (exchange, {}):
        shot = checkpoint.snapshot(
            model, step=3, state=state, optimizer=optimizer, exchange=held, tokenizer_dir=None
        )
        loaded = checkpoint.load_state(checkpoint.save(shot, tmp_path, keep=1))
        assert loaded.state == state
        for found, given_ in ((loaded.optimizer, optimizer), (loaded.exchange, held)):
            assert list(found) == sorted(given_) or set(found) == set(given_)
            assert all(torch.equal(found[n], given_[n]) and found[n].dtype == given_[n].dtype for n in given_)


# --------------------------------------------------------------------------------------------- tensor files

DTYPES = [getattr(torch, name) for name in tensors.TYPES]
SHAPES = st.lists(st.integers(0, 4), max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text(min_size=1, max_size=9), st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=6)
)
def test_safetensors_reads_what_we_write(
    tmp_path_factory: pytest.TempPathFactory, spec: dict[str, Any]
) -> None:
    from safetensors import safe_open

    spec.pop("__metadata__", None)  # the format's own word
    path = tmp_path_factory.mktemp("t") / "a.safetensors"
    named = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in spec.items()}
    written = tensors.write(path, named, {"format": "pt"})
    data = path.read_bytes()
    assert written == (len(data), hashlib.sha256(data).hexdigest())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(named)
        for name, tensor in named.items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found.to(torch.float64), tensor.to(torch.float64))


def test_every_tensor_starts_at_a_multiple_of_its_width(tmp_path: Path) -> None:
    named = {
        "a": torch.ones(3, dtype=torch.uint8),
        "b": torch.ones(5),
        "c": torch.ones(1, dtype=torch.float64),
    }
    tensors.write(tmp_path / "f", named)
    data = (tmp_path / "f").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, tensor in named.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_views_and_transposes_are_written_in_their_own_order(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = torch.arange(12.0).reshape(3, 4)
    tensors.write(tmp_path / "f", {"t": base.t(), "v": base[:, 1]})
    found = load_file(tmp_path / "f")
    assert torch.equal(found["t"], base.t())
    assert torch.equal(found["v"], base[:, 1])


def test_a_type_outside_the_format_is_named(tmp_path: Path) -> None:
    shot = dataclasses.replace(taken(1), optimizer={"phase": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(CheckpointError, match="phase is of type complex64"):
        checkpoint.save(shot, tmp_path, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_digest_of_parameters_is_what_its_contract_says() -> None:
    weight, step = torch.tensor([[1.5, -2.0], [0.25, 3.0]]), torch.tensor(7)
    naive = hashlib.sha256()
    naive.update(b"a.step\0torch.int64\0[]\0" + struct.pack("<q", 7))
    naive.update(b"b.weight\0torch.float32\0[2, 2]\0" + struct.pack("<4f", 1.5, -2.0, 0.25, 3.0))
    digest = checkpoint.sha256_of_parameters({"b.weight": weight, "a.step": step})
    assert digest == naive.hexdigest()
    strided = torch.stack([weight, weight], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert checkpoint.sha256_of_parameters({"a.step": step, "b.weight": strided}) == digest
    others = [{"b.weight": weight.t(), "a.step": step}, {"b.weight": weight.double(), "a.step": step}]
    others += [{"b.weight": weight.reshape(4), "a.step": step}, {"c.weight": weight, "a.step": step}]
    assert len({digest, *map(checkpoint.sha256_of_parameters, others)}) == 5


# ---------------------------------------------------------------------------------------------- refused by name


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def edit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, edit, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "training/state.json", "training/optimizer.safetensors"]
)
def test_damage_is_refused_by_name_and_the_previous_offered(name: str, damage: Any, tmp_path: Path) -> None:
    first, _, last = saved(tmp_path, 1, 2, 3)
    damage(last / name)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.verify(last)
    words = {"truncate": "bytes, its manifest says", "edit": "was changed", "unlink": "is missing"}
    assert str(last / name) in str(caught.value)
    assert words[damage.__name__] in str(caught.value)
    assert str(tmp_path / "checkpoint-2") in caught.value.remedy
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-2"
    edit(tmp_path / "checkpoint-2" / "model.safetensors")
    assert checkpoint.latest(tmp_path) == first
    with pytest.raises(CheckpointError, match="checkpoint-1 continues"):
        checkpoint.verify(last)
    edit(first / "config.json")
    assert checkpoint.latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="no other good checkpoint"):
        checkpoint.verify(last)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"format": 1}',
        '{"format": 1, "files": {"a": 3}}',
        '{"format": 1, "files": {"a": {"bytes": "x"}}}',
    ],
)
def test_a_manifest_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    _, last = saved(tmp_path, 1, 2)
    (last / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing or not a manifest.*checkpoint-1 "):
        checkpoint.verify(last)
    assert checkpoint.resolve_resume(str(tmp_path), tmp_path) == last  # never silently an older one


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(CheckpointError, match="format 2, this version reads 1"):
        checkpoint.verify(path)


def test_training_state_that_is_none_is_an_error_of_ours(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 1)
    (path / "training/optimizer.safetensors").write_bytes(b"\1" * 40)
    with pytest.raises(CheckpointError, match="training"):
        checkpoint.load_state(path)
    shutil.rmtree(path / "training")
    with pytest.raises(CheckpointError, match="training"):
        checkpoint.load_state(path)


# ----------------------------------------------------------------------------------------- which one is meant


def test_resume_by_output_or_by_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    first, last = saved(run, 9, 10)
    assert checkpoint.resolve_resume(str(run), run) == last
    assert checkpoint.resolve_resume(str(first), run) == first
    moved = tmp_path / "best"
    shutil.copytree(first, moved)
    assert checkpoint.resolve_resume(str(moved), run) == moved
    assert checkpoint.verify(moved)["step"] == 9
    monkeypatch.chdir(first)
    assert checkpoint.verify(checkpoint.resolve_resume(".", run))["step"] == 9
    edit(first / "config.json")
    with pytest.raises(
        CheckpointError, match=r"newest good one is \S*checkpoint-10: --resume \S*checkpoint-10 continues"
    ):
        checkpoint.verify(Path())


def test_resume_from_nothing_says_what_there_is(tmp_path: Path) -> None:
    run, empty = tmp_path / "run", tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"empty holds no checkpoint.*give the --output"):
        checkpoint.resolve_resume(str(empty), empty)
    with pytest.raises(CheckpointError, match=r"run does not exist"):
        checkpoint.resolve_resume(str(run), run)
    (path,) = saved(run, 4)
    with pytest.raises(CheckpointError, match=r"checkpoint-8 does not exist.*give .*checkpoint-4"):
        checkpoint.resolve_resume(str(run / "checkpoint-8"), run)
    assert path.name in names(run)


# ---------------------------------------------------------------------------------------------------- rotation


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    saved(tmp_path, 8, 9, 10, 11, keep=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]
    saved(tmp_path, 12, keep=1)
    assert names(tmp_path) == ["checkpoint-12"]
    assert hidden(tmp_path) == []
    with pytest.raises(UsageError, match="keep = 0"):
        saved(tmp_path, 13, keep=0)


def test_after_a_resume_from_an_earlier_one_the_newest_is_the_one_saved_last(tmp_path: Path) -> None:
    saved(tmp_path, 50, 100, 150)
    saved(tmp_path, 60, keep=2)  # resumed from 50: 100 and 150 lead nowhere now
    assert names(tmp_path) == ["checkpoint-150", "checkpoint-60"]
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-60"
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("checkpoint-60", "checkpoint-150"):  # what is newest survives a copy without times
        shutil.copytree(tmp_path / name, copy / name, copy_function=shutil.copyfile)
    assert checkpoint.resolve_resume(str(copy), copy).name == "checkpoint-60"


def test_a_damaged_checkpoint_takes_no_place_of_a_whole_one(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    truncate(tmp_path / "checkpoint-2" / "model.safetensors")
    (tmp_path / "checkpoint-3" / "manifest.json").unlink()
    saved(tmp_path, 4, keep=2)
    assert "checkpoint-1" in names(tmp_path)
    saved(tmp_path, 5, keep=2)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "two-renames"])
def test_a_checkpoint_of_the_same_step_is_replaced(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(durable, "_exchange", lambda one, other: False)
    (path,) = saved(tmp_path, 1)
    (path / "mine").touch()
    (again,) = saved(tmp_path, 1)
    assert again == path
    assert whole(path) == 1
    assert not (path / "mine").exists()
    assert hidden(tmp_path) == []


def test_leftovers_of_dead_writers_are_removed_and_of_living_ones_kept(tmp_path: Path) -> None:
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        for pid in (alive.pid, dead.pid, os.getpid()):  # the last: an earlier process with this one's number
            (tmp_path / f".checkpoint-7.{pid}.0badcafe-12345678.tmp").mkdir(parents=True)
        (tmp_path / f".checkpoint-7.{dead.pid}.0badcafe-12345678.tmp.old").mkdir()
        saved(tmp_path, 1)
        assert hidden(tmp_path) == [f".checkpoint-7.{alive.pid}.0badcafe-12345678.tmp"]
    finally:
        alive.communicate(b"\n")


# --------------------------------------------------------------------------------------------------- real faults


def run_victim(name: str, output: Path) -> Any:
    done = subprocess.run(
        [sys.executable, VICTIMS, name, output], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_kill_at_any_file_operation_loses_nothing(tmp_path: Path) -> None:
    report = run_victim("die_everywhere", tmp_path)
    for entry in report:
        assert entry["left"] in {2: ([1, 2],), 3: ([1, 2], [1, 2, 3], [2, 3])}[entry["step"]], entry
        assert entry["latest"] in ("checkpoint-2", f"checkpoint-{entry['step']}"), entry
        assert entry["names"][-1] == "checkpoint-9", entry
        assert len(entry["names"]) == 2, entry
        assert not [name for name in entry["names"] if name.startswith(".")], entry
    survived = [entry for entry in report if not entry["died"]]
    assert [entry["step"] for entry in survived] == [2, 3]
    assert [entry["latest"] for entry in survived] == ["checkpoint-2", "checkpoint-3"]
    assert min(entry["at"] for entry in survived) > 30  # the hook saw the operations


def test_a_kill_at_random_moments_loses_nothing(tmp_path: Path) -> None:
    rng = random.Random(time.time_ns())
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, VICTIMS, "save_for_ever", tmp_path], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(rng.randint(3, 6)):
            assert process.stdout.readline()
        time.sleep(rng.random() * 0.05)  # not to wait for anything: to hit anywhere in a save
        process.kill()
        process.wait()
        process.stdout.close()
        newest = checkpoint.latest(tmp_path)
        assert newest is not None
        assert [whole(path) for path in checkpoint.checkpoints(tmp_path)]
    saved(tmp_path, 9, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-9"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this root may not mount: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_loses_nothing_and_training_goes_on(small_disk: Path) -> None:
    events: list[Event] = []
    run = small_disk / "run"
    saver = checkpoint.AsyncSaver(run, keep=9, emit=events.append)
    for step in (1, 2, 3):
        saver.submit(taken(step, width=230))  # 3 × 212 kB of weights, optimizer and exchange
    saver.submit(taken(4, width=230))
    with pytest.raises(
        CheckpointError, match=r"checkpoint-4: No space left.*nothing that was saved before is lost"
    ):
        saver.wait()
    warned = [event for event in events if isinstance(event, Warned)]
    assert [event.where for event in warned] == ["checkpoint-4"]
    assert "free some space" in warned[0].message
    assert [whole(path) for path in checkpoint.checkpoints(run)] == [1, 2, 3]
    assert hidden(run) == []
    with pytest.raises(CheckpointError, match="No space left"):
        durable.write_text(run / "summary.json", "x" * 2_000_000)
    assert not (run / "summary.json").exists()
    assert hidden(run) == []
    shutil.rmtree(run / "checkpoint-1")
    saver.submit(taken(5, width=230))
    saver.wait()  # there is room again: nothing is left to complain of
    saver.close()
    assert [whole(path) for path in checkpoint.checkpoints(run)] == [2, 3, 5]


def test_a_limit_on_files_is_a_full_disk(tmp_path: Path) -> None:
    report = run_victim("outgrow_the_limit", tmp_path)
    assert os.strerror(errno.EFBIG) in report["error"]
    assert "nothing that was saved before is lost" in report["error"]
    assert report["left"] == ["checkpoint-1"]
    assert [whole(path) for path in checkpoint.checkpoints(tmp_path)] == [1, 3]


def test_where_nothing_can_be_written_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="it must be possible to write there"):
        saved(tmp_path / "file", 1)


def test_a_failed_replacement_of_a_text_keeps_the_old(tmp_path: Path) -> None:
    durable.write_text(tmp_path / "a", "old")
    (tmp_path / "b").mkdir()
    with pytest.raises(CheckpointError):
        durable.write_text(tmp_path / "b", "new")  # a directory is in the way
    assert (tmp_path / "a").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


# -------------------------------------------------------------------------------------------------- in background


class Gate:
    """A `write_config` that waits, so that a test decides when a save goes on."""

    def __init__(self, error: Exception | None = None) -> None:
        self.reached, self.opened, self.error = threading.Event(), threading.Event(), error

    def __call__(self, directory: Path) -> None:
        self.reached.set()
        assert self.opened.wait(60)
        if self.error is not None:
            raise self.error


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    gate, events = Gate(), []
    saver = checkpoint.AsyncSaver(tmp_path, keep=2, emit=events.append)
    saver.submit(dataclasses.replace(taken(1), write_config=gate))
    assert gate.reached.wait(60)
    assert names(tmp_path) == []  # submit returned; nothing that looks like a checkpoint is there
    second = threading.Thread(target=saver.submit, args=(taken(2),))
    second.start()
    second.join(0.05)
    assert second.is_alive()  # two copies in memory are enough
    gate.opened.set()
    second.join(60)
    saver.wait()
    saver.close()
    assert [whole(path) for path in checkpoint.checkpoints(tmp_path)] == [1, 2]
    steps = [event for event in events if isinstance(event, Saved)]
    assert [event.step for event in steps] == [1, 2]
    size = sum(p.stat().st_size for p in (tmp_path / "checkpoint-1").rglob("*") if p.is_file())
    assert steps[0].size_bytes == size - (tmp_path / "checkpoint-1/manifest.json").stat().st_size
    assert steps[1].blocked_s > taken(2).taken_s  # the wait for the first one counts


def test_a_defect_in_the_background_surfaces_at_the_next_call(tmp_path: Path) -> None:
    for call in ("submit", "wait"):
        gate = Gate(ZeroDivisionError("a defect"))
        gate.opened.set()
        saver = checkpoint.AsyncSaver(tmp_path, keep=2)
        saver.submit(dataclasses.replace(taken(1), write_config=gate))
        with pytest.raises(ZeroDivisionError, match="a defect"):
            saver.submit(taken(2)) if call == "submit" else saver.wait()
        saver.wait()
        saver.close()
        assert names(tmp_path) == []
        assert hidden(tmp_path) == []
