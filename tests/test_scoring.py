"""What `manyhands evaluate` scores: prepared once, alone, and what its run held out."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from manyhands.core import config
from manyhands.core.errors import CheckpointError, DataError, ManyhandsError, OutOfMemory, UsageError
from manyhands.core.events import PreparedData, Warned, ignore
from manyhands.core.passes import Pass, told
from manyhands.data import tokenize
from manyhands.data.prepare import VERSION, prepare
from manyhands.data.rows import TokenRows
from manyhands.data.source import DataSpec
from manyhands.train import checkpoint, scoring, session
from manyhands.train.evaluate import evaluate
from manyhands.train.job import Job
from manyhands.train.material import gather_material, gather_scored
from manyhands.train.memory import Fits
from manyhands.train.resume import same_held_out, same_order
from manyhands.wire.solo import Solo


def test_what_is_scored_is_prepared_once_and_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("many hands make light work\n" * 50)
    spec = DataSpec(data=(str(tmp_path / "a.txt"),), tokenizer="bpe:270")
    first = prepare(spec, cache=tmp_path / "cache")
    copy = tmp_path / "checkpoint"  # its tokenizer's files are copied, and more of them are there
    shutil.copytree(first.tokenizer, copy)
    state = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(state, indent=7))
    (copy / "more_tokens.json").write_text("{}")
    job = Job(
        data=("gone",), eval_data=spec.data, eval_every=1, tokenizer=str(copy), cache=str(tmp_path / "cache")
    )
    world: Any = SimpleNamespace(rank=0)
    events: list[Any] = []
    found = gather_scored(job, world, events.append, labels=None)
    assert found.identity == first.identity
    assert [event.reused for event in events if isinstance(event, PreparedData)] == [True]
    merges = state["model"]["merges"]
    state["model"]["merges"] = merges[:-1]
    (copy / "tokenizer.json").write_text(json.dumps(state))
    assert gather_scored(job, world, events.append, labels=None).identity != first.identity


def test_rows_that_were_not_held_out_are_not_scored_as_such(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("many hands make light work\n" * 100)
    job = Job(data=(str(text),), tokenizer="byte", seq_len=32, cache=str(tmp_path / "cache"))
    world: Any = SimpleNamespace(rank=0)
    material = gather_material(job, world, ignore)
    before = {
        "job": config.to_data(job),
        "data": material.identity,
        "prepared": VERSION,
        "eval_data": None,
        "rows": len(material.train),
    }

    def check(job: Job) -> None:
        same_held_out(Path("run"), before, job, gather_scored(job, world, ignore, labels=None))

    def resume(job: Job) -> None:
        same_order(Path("run"), before, job, gather_material(job, world, ignore))

    check(job)
    resume(job)
    with pytest.raises(UsageError, match=r"eval_fraction = 0\.5, but run was written with 0\.05"):
        check(replace(job, eval_fraction=0.5))
    with pytest.raises(
        UsageError, match=r"rows to train on, but run was written with .*leave out --eval-fraction"
    ):
        resume(replace(job, eval_fraction=0.5))
    with pytest.raises(UsageError, match="written without eval_data"):
        resume(replace(job, eval_data=(str(text),)))
    with text.open("a") as file:
        file.write("and more\n" * 50)
    with pytest.raises(CheckpointError, match=r"held out rows of other data than .*give --data"):
        check(job)
    with pytest.raises(CheckpointError, match="trained on other data than"):
        resume(job)
    for made, words in ((None, "an early one"), (VERSION - 1, f"version {VERSION - 1}")):
        before["prepared"] = made
        for each in (check, resume):
            with pytest.raises(
                CheckpointError, match=rf"a release that prepared data otherwise \({words}, here"
            ):
                each(job)
    before |= {"eval_data": "of another text", "prepared": VERSION}
    with pytest.raises(CheckpointError, match="other data"):
        check(replace(job, eval_data=(str(text),)))


def test_an_unknown_character_has_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("abc" * 100)
    (tmp_path / "b.txt").write_text("abcd" * 500 + "ü" * 500)
    cache = tmp_path / "cache"
    known = prepare(DataSpec(data=(str(tmp_path / "a.txt"),), tokenizer="char"), cache=cache)
    made = prepare(DataSpec(data=(str(tmp_path / "b.txt"),), tokenizer=str(known.tokenizer)), cache=cache)
    rows = TokenRows(made, 32)
    # targets are all but the first character, and the end, which stands for no text
    assert rows.bytes_per_target == pytest.approx((2000 + 1000 - 1) / 2500, rel=1e-12)
    # "d" is one byte, "ü" two: of 1,000 unknown characters the mean is one and a half
    part = TokenRows(made, 32, range(60))
    assert part.bytes_per_target == pytest.approx((1440 + 480 * 1.5) / 1920, rel=1e-12)
    monkeypatch.setattr(tokenize, "Encoder", None)  # it is found once
    assert part.bytes_per_target > 1


def test_all_workers_score_the_first_ones_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on meanwhile saves a new one when some have looked already."""
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "manifest.json").write_text(json.dumps({"saved_s": step}))
    world = SimpleNamespace(
        rank=1,
        gather=lambda mine: [str(tmp_path / "checkpoint-1"), mine],
        wire=SimpleNamespace(close=lambda: None),
    )
    looked = []

    def verify(path: Path) -> None:
        looked.append(path)
        raise CheckpointError("that will do")

    monkeypatch.setattr(session, "connect_from_environment", lambda **_: (world, "cpu"))
    monkeypatch.setattr(checkpoint, "verify", verify)
    with pytest.raises(CheckpointError, match="that will do"):
        scoring.score(Job(resume=str(tmp_path)), held_out=True, trust=False)
    assert looked == [tmp_path / "checkpoint-1"]


def test_all_workers_stop_where_one_lacks_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "verify", lambda path: None)
    hosts = [SimpleNamespace(host="here"), SimpleNamespace(host="there")]
    world: Any = SimpleNamespace(gather=lambda mine: [mine, False], members=hosts)
    with pytest.raises(CheckpointError, match="worker 1 on there cannot read run"):
        scoring._verify_everywhere(Path("run"), world)
    world.gather = lambda mine: [mine, True]
    scoring._verify_everywhere(Path("run"), world)


def test_held_out_data_without_a_target_are_refused_at_once(tmp_path: Path) -> None:
    """Not when all is trained, and before it is saved."""
    (tmp_path / "a.txt").write_text("many hands make light work\n" * 50)
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n')  # the end of a text alone
    job = Job(
        data=(str(tmp_path / "a.txt"),),
        eval_data=(str(tmp_path / "b.jsonl"),),
        tokenizer="byte",
        cache=str(tmp_path / "cache"),
    )
    world: Any = SimpleNamespace(rank=0)
    with pytest.raises(DataError, match=r"b\.jsonl holds no row to score"):
        gather_material(job, world, ignore)


class Narrow:
    """Rows that are their own numbers, and a task that has memory for `most` of them at once."""

    bytes_per_target = 1.0

    def __init__(self, most: int, error: Exception) -> None:
        self.most, self.error, self.failed = most, error, 0

    def __len__(self) -> int:
        return 50

    def take(self, ids: Any) -> dict[str, torch.Tensor]:
        return {"x": torch.as_tensor(ids)}

    def score(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if len(batch["x"]) > self.most:
            self.failed += 1
            raise self.error
        return {"sum": batch["x"].double().sum(), "rows": torch.tensor(float(len(batch["x"])))}

    def metrics(self, totals: dict[str, torch.Tensor], *, bytes_per_target: float) -> dict[str, float]:
        return {name: float(total) for name, total in totals.items()}


REFUSED = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1234 bytes.")


def scored(narrow: Any, **options: Any) -> dict[str, float]:
    world: Any = SimpleNamespace(rank=0, size=1, wire=Solo(), gather=lambda mine: [mine])
    given = {"batch_rows": 16, "device": torch.device("cpu"), "autocast": nullcontext, **options}
    return evaluate(torch.nn.Identity(), narrow, narrow, world, **given)


@pytest.mark.parametrize(
    "error", [REFUSED, torch.OutOfMemoryError("CUDA out of memory.")], ids=["CPU", "GPU"]
)
def test_an_evaluation_without_memory_is_made_in_halves(error: Exception) -> None:
    narrow, fits, events = Narrow(5, error), Fits(), list[Any]()
    for _ in range(2):  # the second knows
        assert scored(narrow, fits=fits, emit=events.append) == {"rows": 50.0, "sum": sum(range(50))}
    assert (narrow.failed, fits.most) == (2, 4)
    (event,) = [event for event in events if isinstance(event, Warned)]
    assert "at most 4 rows" in event.message
    with pytest.raises(ManyhandsError, match="no memory for a forward pass of 1 row"):
        scored(Narrow(0, error))
    with pytest.raises(RuntimeError, match="shapes"):
        scored(Narrow(5, RuntimeError("shapes differ")))


def test_an_evaluation_of_several_workers_together_is_left_to_a_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MANYHANDS_SEAT", "w0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MANYHANDS_STORE", str(tmp_path))
    with pytest.raises(OutOfMemory, match="no memory for a forward pass of 16 rows"):
        scored(Narrow(5, REFUSED), share=(0, 1, True))
    assert told(str(tmp_path), "w0") == Pass(16, divisible=True)
