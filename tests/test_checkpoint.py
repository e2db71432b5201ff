"""Checkpoints: loaded by plain Transformers, refused by name when damaged, found, rotated and replaced."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_victims import hidden, names, saved, whole
from torch import nn

from manyhands.core.errors import CheckpointError, UsageError
from manyhands.train import checkpoint, durable

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
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 3}))
    with pytest.raises(CheckpointError, match="format 3, this version reads up to 2"):
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
