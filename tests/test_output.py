"""An output directory belongs to one run: others are refused, and what a broken attempt has left is set aside."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import warm
from runs import TINY

from manyhands.cli.main import main
from manyhands.core import config, hardware
from manyhands.core.errors import UsageError
from manyhands.launch import claim
from manyhands.launch import job as launch_job
from manyhands.launch.claim import claimed, in_use, make_fresh
from manyhands.train import manifest
from manyhands.train.anchor import anchored
from manyhands.train.job import Job

Begin = Callable[..., int]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The outputs of runs that have begun; no worker is started for them."""
    found: list[str] = []

    def begin(entry: str, argument: str, job: launch_job.Job) -> int:
        assert in_use(Path(job.output)) == (os.environ.get("RANK", "0") == "0")
        found.append(job.output)
        resumed.append(job.resume)
        return 0

    monkeypatch.setattr(launch_job, "begin", begin)
    resumed.clear()
    return found


resumed: list[str | None] = []  # what the runs that have `begun` continue from


def saved(output: Path, *steps: int) -> Path:
    """A run of the given checkpoints, as far as a launcher looks at it."""
    for step in steps:
        path = output / f"checkpoint-{step}"
        path.mkdir(parents=True)
        (path / "manifest.json").write_text(json.dumps({"saved_s": step, "step": step}))
    (output / "config.toml").write_text('model = "gpt2-nano"\n')
    return output


def test_a_resumed_run_does_not_mix_with_another(
    tmp_path: Path, begun: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = saved(tmp_path / "one", 2, 4), saved(tmp_path / "other", 2, 3)
    for resume in (one, one / "checkpoint-4"):
        assert main(["train", "--resume", str(resume), "--output", str(other)]) == 2
        assert f"{other} already holds checkpoints of another run" in capsys.readouterr().err
    assert begun == []
    (tmp_path / "link").symlink_to(one)
    for output in (one, tmp_path / "link", tmp_path / "new"):
        assert main(["train", "--resume", str(one), "--output", str(output)]) == 0
    assert main(["train", "--resume", str(one)]) == 0
    assert begun == [str(path) for path in (one, tmp_path / "link", tmp_path / "new", one)]


def attempt(output: Path) -> Path:
    """What an attempt leaves that is killed before its first checkpoint."""
    (output / "ledger").mkdir(parents=True)
    for name in ("metrics.jsonl", "config.toml", "summary.json", "ledger/w0.jsonl"):
        (output / name).write_text("{}\n" if name != "config.toml" else "seed = 1\n")
    return output


@pytest.mark.parametrize("resumed", [False, True])
def test_what_an_attempt_without_a_checkpoint_left_is_set_aside(
    resumed: bool, tmp_path: Path, begun: list[str]
) -> None:
    output = tmp_path / "run"
    other = ["--resume", str(saved(tmp_path / "other", 2))] if resumed else []
    for number in (1, 2):
        attempt(output) if number == 1 else (output / "ledger").mkdir()
        assert main(["train", *other, "--output", str(output)]) == 0
        assert (output / f"earlier-{number}" / "ledger").is_dir()
    found = sorted(path.name for path in (output / "earlier-1").rglob("*.*"))
    assert found == ["config.toml", "metrics.jsonl", "summary.json", "w0.jsonl"]
    assert sorted(path.name for path in output.iterdir()) == [
        ".lock",
        "config.toml",
        "earlier-1",
        "earlier-2",
    ]
    (output / "metrics.jsonl").write_text('{"event": "planned"}\n')
    assert main(["train", str(output / "config.toml"), "--output", str(output)]) == 0
    assert not (output / "metrics.jsonl").exists()
    assert not (output / "earlier-3").exists()
    (output / "metrics.jsonl").write_text("another program's\n")
    assert main(["train", str(output / "config.toml"), "--output", str(output)]) == 0
    assert (output / "earlier-3" / "metrics.jsonl").read_text() == "another program's\n"
    assert len(begun) == 4


def test_a_run_that_goes_on_keeps_its_records(tmp_path: Path, begun: list[str]) -> None:
    output = saved(attempt(tmp_path), 2)
    (output / "checkpoint-2").rename(output / "best")
    for resume in (output / "best", output):
        make_fresh(output, str(resume))
        assert (output / "metrics.jsonl").exists() == (output / "ledger").exists() is True
    saved(output, 2)
    assert main(["train", "--resume", str(output)]) == 0
    with pytest.raises(UsageError, match="already holds"):
        make_fresh(output, None)
    assert (output / "metrics.jsonl").exists()


def test_resume_auto_continues_what_is_there_else_starts(
    tmp_path: Path, begun: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["train", "--resume", "auto", "--output", "run"]
    assert main(command) == 0
    saved(Path("run"), 2)
    assert main(command) == 0
    (tmp_path / "job.toml").write_text('resume = "auto"\noutput = "run"\n')
    assert main(["train", "job.toml"]) == 0
    assert resumed == [None, "run", "run"]
    assert main(["train", "--resume", "auto"]) == 0
    saved(Path("output"), 2)  # the default output is that one, never output-2
    assert main(["train", "--resume", "auto"]) == 0
    assert resumed[3:] == [None, "output"]
    assert begun == ["run"] * 3 + ["output"] * 2
    assert main(["train", "--output", "run"]) == 2
    assert "already holds" in capsys.readouterr().err


def test_workers_that_see_different_checkpoints_do_not_begin(tmp_path: Path) -> None:
    manifest.check_alike(tmp_path, [4, 4])
    with pytest.raises(UsageError, match=r"worker 0 step 4, worker 1 none.* on a file system that all"):
        manifest.check_alike(tmp_path, [4, -1])


# -- one owner


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "LOOK_S", 0.0)


def test_an_output_in_use_is_refused(
    tmp_path: Path, begun: list[str], no_patience: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saved(tmp_path / "run", 2)
    new = tmp_path / "new"
    with claimed(run), claimed(new):
        for command in (
            ["train", "--output", str(new)],
            ["train", "--resume", str(run)],
            ["coordinate", "--output", str(new)],
        ):
            assert main(command) == 2
            said = capsys.readouterr().err
            assert f"is in use by process {os.getpid()} on {hardware.hostname()} since" in said
            assert "give another --output." in said
        (new / "coordinator.json").write_text("{}")
        assert main(["train", "--output", str(new)]) == 2
        assert f"; manyhands join {new} helps it." in capsys.readouterr().err
    assert begun == []
    assert main(["train", "--output", str(new)]) == 0
    assert not in_use(new)


def test_where_no_output_is_given_one_that_is_free_is_taken(
    tmp_path: Path, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "output", 2)
    with claimed(Path("output-2")):
        assert main(["train"]) == 0
    assert begun == ["output-3"]


def test_under_another_launcher_rank_0_owns_it(
    tmp_path: Path, begun: list[str], no_patience: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(["train", "--output", str(tmp_path)]) == 0
    with claimed(tmp_path):
        monkeypatch.setenv("RANK", "0")
        assert main(["train", "--output", str(tmp_path)]) == 2
    assert begun == [str(tmp_path)] * 2


def test_a_killed_owner_leaves_it_free(tmp_path: Path, no_patience: None) -> None:
    """Also where it had forked a process that lives on."""
    script = """
import os, sys, time
from pathlib import Path
from manyhands.launch.claim import claimed
with claimed(Path(sys.argv[1])):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(60)
"""
    owner = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    try:
        with pytest.raises(UsageError, match=f"in use by process {owner.pid} on"), claimed(tmp_path):
            pass
        owner.kill()
        owner.wait()
        with claimed(tmp_path):
            os.kill(child, 0)  # it lives
    finally:
        owner.kill()
        os.kill(child, 9)
        owner.stdout.close()


def test_where_nothing_can_be_locked_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuses)
    with claimed(tmp_path), claimed(tmp_path):
        assert not in_use(tmp_path)
    (tmp_path / "file").touch()
    with claimed(tmp_path / "file"):
        pass


# -- read from anywhere


def test_local_paths_hold_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model", "words"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").touch()
    kept = ("stdlib", "hf:org/set:train", "s3://bucket/*.txt", "zip://*.csv::s3://b/data.zip", "/data/*.txt")
    ours = ("hf:words:train", "hf:words", "zip://*.csv::data.zip")
    job = Job(
        data=("a.txt", "corpus/*.txt", "../b", "~/c.txt", *ours, *kept),
        eval_data=("held.txt",),
        model="model(n_layer=4)",
        tokenizer="words",
        cache="cache",
        output="run",
    )
    found = anchored(job)
    here, home = str(tmp_path), str(Path.home())
    ours = (f"hf:{here}/words:train", f"hf:{here}/words", f"zip://*.csv::{here}/data.zip")
    there = (f"{here}/a.txt", f"{here}/corpus/*.txt", f"{here}/../b", f"{home}/c.txt")
    assert found.data == (*there, *ours, *kept)
    assert found.eval_data == (f"{here}/held.txt",)
    assert (found.model, found.tokenizer) == (f"{here}/model(n_layer=4)", f"{here}/words")
    assert (found.cache, found.output) == (f"{here}/cache", "run")
    assert anchored(found) == found
    (tmp_path / "gpt2-nano").mkdir()  # the preset goes before
    for name in ("gpt2-nano", "gpt2-nano(n_layer=4)", "package.module:function(depth=3)", "auto"):
        assert anchored(Job(model=name, tokenizer="bpe:400")).model == name
    assert anchored(Job(model="config:shape.json(n_layer=4)")).model == f"config:{here}/shape.json(n_layer=4)"
    (tmp_path / "job.toml").write_text(config.to_toml(found))
    assert config.assemble(Job, [("file", config.read_toml("job.toml"))])[0] == found


def test_a_run_is_continued_and_scored_from_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("many hands make light work\n" * 40)
    job = ("--data", "t.txt", *TINY, "--eval-fraction", "0.2", "--workers", 1)
    warm.manyhands("train", *job, "--steps", 2, "--output", "run")
    monkeypatch.chdir(tmp_path / "run" / "checkpoint-2")
    assert "perplexity" in warm.manyhands("evaluate", ".")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    warm.manyhands("train", "--resume", "../run", "--steps", 3)
    assert (tmp_path / "run" / "checkpoint-3").is_dir()


def test_a_checkpoint_may_be_named_by_where_one_is(
    tmp_path: Path, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved(tmp_path / "run", 2)
    for place, name in ((run / "checkpoint-2", "."), (run / "checkpoint-2", ".."), (run, "checkpoint-2")):
        monkeypatch.chdir(place)
        assert main(["train", "--resume", name]) == 0
        assert Path(begun[-1]).resolve() == run


def test_python_continues_a_run_as_the_command_does(tmp_path: Path, begun: list[str]) -> None:
    """A new length takes back the one that the run's own configuration says."""
    output = saved(tmp_path / "run", 2)
    (output / "config.toml").write_text('model = "gpt2-nano"\nsteps = 2\n')
    (output / "summary.json").write_text("{}")
    assert launch_job.run(resume=str(output), epochs=3) == {}
    assert begun == resumed == [str(output)]
    with pytest.raises(UsageError, match="both given"):
        launch_job.run(resume=str(output), steps=4, epochs=3)


def test_more_workers_than_begin_are_not_asked_for() -> None:
    with pytest.raises(UsageError, match=r"min_workers = 9999 with \d+ workers"):
        launch_job.elastic_of(Job(min_workers=9999))
