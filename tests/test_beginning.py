"""Workers that are lost before the job's first step: the others go on, with a replacement; what nobody can mend ends the job."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
import warm
from runs import events, manyhands, summary
from trapped import OPTIONS, Job


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several files, so that preparation has several pieces."""
    rng = random.Random(3)
    words = ["hand", "many", "light", "work", "makes", "slow", "fast", "exact"]
    directory = tmp_path_factory.mktemp("corpus")
    for name in "abcdef":
        lines = (" ".join(rng.choice(words) for _ in range(9)) for _ in range(90))
        (directory / f"{name}.txt").write_text("\n".join(lines))
    return directory


def test_losses_before_the_first_step(corpora: Path, tmp_path: Path) -> None:
    """Rank 0 is killed while it prepares a piece, its replacement in the first step; another is asked to leave meanwhile."""
    traps = [
        {"seat": "w0", "place": "piece"},
        {"seat": "w1", "place": "claim", "act": "wait"},
        {"seat": "w2", "place": "claim", "act": "wait"},  # so that the piece is rank 0's
        {"seat": "w0-1", "place": "compile"},
    ]
    quiet, run = tmp_path / "quiet", tmp_path / "run"
    with Job(run, corpora, "--restarts", 1, traps=traps) as job:
        job.kill("w0")
        job.kill("w1", signal.SIGTERM)
        job.open()
        job.kill("w0-1")
        said = job.end()
    told = [line for line in said.splitlines() if line.startswith("manyhands: worker")]
    assert len(told) == 3, said  # each of them once
    words = {  # the first two end at the same time: either may be told first
        "worker w0 (rank 0) on ": "container's memory ran out); w0-1 takes its place",
        "worker w1 (rank 1) on ": "has left, as a signal asked it to; the others go on",
        "worker w0-1 (rank 1) on ": "it is not replaced (restarts = 1)",
    }
    for who, what in words.items():
        assert [what in line for line in told if who in line] == [True], said
    assert all(" while preparing its data at " in line for line in told[:2])
    assert " in compile of step 1 at " in told[2]
    assert "lost w0" not in said
    (first, second) = events(run, "lost")
    assert (first["seat"], first["phase"], second["seat"], second["phase"]) == (
        *("w0", "prepare"),
        *("w0-1", "compile"),
    )
    assert "takes its place" in first["then"]
    assert [e["seat"] for e in events(run, "left")] == ["w1"]
    warm.manyhands("train", "--data", corpora, *OPTIONS, "--workers", 2, "--output", quiet)
    assert summary(run)["parameters_sha256"] == summary(quiet)["parameters_sha256"]
    assert summary(run)["steps"] == 12
    assert "every sample once" in manyhands("ledger", run).stdout


def test_what_would_happen_to_everybody_ends_the_job(corpora: Path, tmp_path: Path) -> None:
    """An error of the data, on every worker: the message once, nobody is replaced."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": \n')
    with Job(tmp_path / "run", broken, "--on-error", "fail", traps=[], workers=2) as job:
        said = job.end(1)
    assert said.count("manyhands: worker") == 1
    assert "broken.jsonl" in said
    assert "takes its place" not in said


def test_a_thread_that_stands_still_in_the_first_step_is_replaced(corpora: Path, tmp_path: Path) -> None:
    """Its heart beats on, and the others wait for it."""
    traps = [{"seat": "w1", "place": "compile"}]
    with Job(tmp_path / "run", corpora, "--restarts", 1, "--stuck-s", 2.5, traps=traps) as job:
        said = job.end()
    (told,) = [line for line in said.splitlines() if line.startswith("manyhands: worker")]
    assert "worker w1 (rank 1) on" in told
    assert "was given up: its main thread has stood still in compile of step 1 for" in told
    assert "w1-1 takes its place" in told
