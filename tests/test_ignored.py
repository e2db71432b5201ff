"""No option is taken and ignored: one that would say nothing is refused, with the reason."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from facts import facts

from manyhands.cli import chaos
from manyhands.cli.main import main
from manyhands.core.events import Warned, ignore
from manyhands.launch import control, local
from manyhands.launch.job import resumed_layer
from manyhands.tasks.classify import Classify
from manyhands.train import ending
from manyhands.train.explain import targets_of
from manyhands.train.job import Job
from manyhands.train.material import gather_material
from manyhands.train.order import Order
from manyhands.train.plan import derive

TOKEN = ("--token-file", "{}/token")
PEM = ("--tls-cert", "c.pem", "--tls-key", "k.pem")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("evaluate", "{}", "--data", __file__, "--eval-fraction", "0.5"), "--eval-fraction 0.5 with --data"),
        (
            ("evaluate", "{}", "--data", __file__, "--quoting", "csv"),
            "quoting = 'csv' with data of text alone",
        ),
        (("evaluate", "{}", "--data", "{}/a.csv", "--document", "line"), "with data of csv alone"),
        (("prepare", "--data", "{}/a.parquet", "--encoding", "latin-1", "--cache", "{}"), "of parquet alone"),
        (("prepare", "--data", "hf:{}", "--format", "csv", "--cache", "{}"), "knows its own form"),
        (("prepare", "--data", __file__, "--task", "pretrain(text=body)", "--cache", "{}"), "no columns"),
        (
            ("train", "--eval-data", __file__, "--eval-fraction", "0.05"),
            "eval_fraction = 0.05 with eval_data",
        ),
        (("train", "--micro-batch", "8", "--device-batch", "4"), "micro_batch = 8 with device_batch = 4"),
        (("train", "--bf16", "--set", "precision=fp32"), "precision is given twice"),
        (("coordinate", "--plain", *PEM, "--output", "{}"), "--plain with --tls-cert"),
        (("coordinate", "--replace-s", "-1", "--output", "{}"), "--replace-s -1.0"),
        (
            ("coordinate", "--gradient-accumulation-steps", "2", "--device-batch", "4", "--output", "{}"),
            "--gradient-accumulation-steps 2 without --workers",
        ),
        (("serve-parameters", *TOKEN, "--durability", "synced"), "--durability synced without --state"),
        (("serve-parameters", *TOKEN, "--interval", "9"), "--interval 9.0 without --state"),
        (("serve-parameters", *TOKEN, "--listen", "unix:{}/s", *PEM), "with --tls-cert"),
        (("generate", "{}", "--prompt", "a", "--temperature", "0", "--top-p", "0.5"), "--top-p 0.5 with"),
        (("generate", "{}", "--prompt", "a", "--temperature", "0", "--seed", "0"), "--seed 0 with"),
        (("generate", "{}", "--prompt", "a", "--temperature", "nan"), "--temperature nan"),
        (("join", "{}", *TOKEN), "says how to reach that job"),
        (("join", "{}", "--fingerprint", "sha256:0"), "says how to reach that job"),
    ],
)
def test_what_would_say_nothing_is_refused(
    words: tuple[str, ...], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.csv", "a.parquet", control.CONTACT):
        (tmp_path / name).write_text("{}")
    assert main([word.format(tmp_path) for word in words]) == 2
    assert says in capfd.readouterr().err


@pytest.mark.parametrize(("given", "threads"), [([], 3), (["--threads", "2"], 2)])
def test_who_joins_has_the_threads_of_the_job_or_its_own(
    given: list[str], threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = Order(Job(threads=3, output=str(tmp_path)), {}).to_json()
    there = SimpleNamespace(fact=lambda *names: order, close=lambda: None)
    monkeypatch.setattr(control, "Joined", lambda remote: there)
    asked: list[Any] = []
    monkeypatch.setattr(
        local, "launch", lambda entry, argument, **options: asked.append((argument, options)) or 0
    )
    assert main(["join", "127.0.0.1:1", "--token-file", "any", "--workers", "2", *given]) == 0
    ((argument, options),) = asked
    assert options["threads"] == threads
    assert Order.from_json(argument).job.threads == threads  # a worker sets what its job says


@pytest.mark.parametrize(
    ("said", "words", "more"),
    [
        ("restarts = 3", [], ["--restarts", "1000000"]),  # the default, as a run's config.toml has it
        ("restarts = 4", [], []),
        ("", ["--restarts", "3"], []),
        ('elastic = "off"', [], []),
    ],
)
def test_lost_workers_are_replaced_under_chaos_as_often_as_is_said_or_always(
    said: str, words: list[str], more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.toml").write_text(f'data = "a.txt"\n{said}\n')
    asked: list[list[str]] = []
    monkeypatch.setattr(chaos, "_train", lambda words, *rest: asked.append(words) or (0, []))
    monkeypatch.setattr(chaos, "report", lambda *found: 0)
    assert main(["chaos", str(tmp_path / "job.toml"), "--output", str(tmp_path / "out"), *words]) == 0
    assert asked[1][:-2] == [*asked[0][:-2], *more]


def test_a_pass_has_at_most_the_rows_that_are_given() -> None:
    job, dropout = Job(global_batch=64, device_batch=2), facts(draws_random=True)
    assert derive(job, dropout).micro_batch == 2
    assert derive(dataclasses.replace(job, device_batch=None), dropout).micro_batch == 8
    found = derive(Job(global_batch=64, micro_batch=32, seq_len=1024), facts())
    assert (found.device_batch, found.reasons["device_batch"]) == (32, "one micro-batch, which is not cut")


def test_a_run_of_an_early_release_whose_passes_were_larger_than_it_said_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "config.toml").write_text("global_batch = 64\nmicro_batch = 8\ndevice_batch = 4\n")
    ((_, data),) = resumed_layer([("--resume", {"resume": str(tmp_path)})])
    assert (data["micro_batch"], data["device_batch"]) == (8, 8)


def test_who_asks_for_a_sample_hears_why_there_is_none() -> None:
    loop: Any = SimpleNamespace(
        replica=SimpleNamespace(model=SimpleNamespace(), method=None, steps=1), world=SimpleNamespace(rank=0)
    )
    told: list[Any] = []
    nothing: Any = None
    ending.sample(loop, Job(), nothing, nothing, told.append)
    assert told == []
    ending.sample(loop, Job(prompt="many"), nothing, nothing, told.append)
    assert isinstance(told[0], Warned)
    assert "does not generate" in told[0].message


def test_the_plan_counts_targets_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(
        "x" * 99
    )  # 99 targets with the end of the text: rows of 10, the last of 9
    world: Any = SimpleNamespace(rank=0)
    job = Job(data=(str(tmp_path / "a.txt"),), tokenizer="byte", seq_len=10, cache=str(tmp_path / "cache"))
    whole = gather_material(dataclasses.replace(job, eval_fraction=0.0), world, ignore)
    batches = -(-len(whole.train) // 4)
    assert targets_of(whole, 4, 2 * batches) == (2 * 99, True)
    assert targets_of(whole, 4, batches + 1) == (99 + 40, False)
    part = gather_material(job, world, ignore)
    assert targets_of(part, 4, 3) == (90, True)  # the last row is held out; batches of 4, 4 and 1
    rows = tmp_path / "b.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{i}", "label": i % 2}) + "\n" for i in range(10)))
    labelled = Job(data=(str(rows),), eval_fraction=0.0, cache=job.cache, task=Classify(), tokenizer="byte")
    assert targets_of(gather_material(labelled, world, ignore), 4, 3) == (10, True)
