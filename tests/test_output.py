"""An output directory belongs to one run: others are refused, and what a broken attempt has left is set aside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from manyhands.cli.main import main
from manyhands.launch import job as launch_job

Begin = Callable[..., int]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The outputs of runs that have begun; no worker is started for them."""
    found: list[str] = []

    def begin(entry: str, argument: str, job: launch_job.Job) -> int:
        found.append(job.output)
        return 0

    monkeypatch.setattr(launch_job, "begin", begin)
    return found


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
