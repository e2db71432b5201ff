"""Strategies as a user runs them: the command line, real workers, checkpoints, resume on other numbers, signals."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
import warm
from runs import TINY, command, environment, events, losses, manyhands, summary

TEXT = "Many hands make light work; too many cooks spoil the broth.\n" * 400


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "a.txt"
    path.write_text(TEXT)
    return path


def _train(corpus: Path, output: Path, strategy: str, *more: object) -> None:
    warm.manyhands(
        *("train", "--data", corpus, *TINY, "--strategy", strategy, "--output", output),
        *("--cache", corpus.parent / "cache", "--save-every", 4, "--eval-fraction", 0.2, *more),
    )


@pytest.mark.parametrize(
    "strategy",
    [
        "diloco(lr=3e-3, every=4, exchange=error-feedback(int8))",
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(corpus: Path, tmp_path: Path, strategy: str) -> None:
    """Inner optimizers and residuals of every worker survive: the same losses, to the last digit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    _train(corpus, whole, strategy, "--workers", 2, "--steps", 12)
    _train(corpus, cut, strategy, "--workers", 2, "--steps", 12, "--keep", 9)
    for path in cut.glob("checkpoint-*"):
        if path.name != "checkpoint-8":
            subprocess.run(["rm", "-r", str(path)], check=True)
    _train(corpus, cut, strategy, "--workers", 2, "--steps", 12, "--resume", cut)
    assert summary(cut)["parameters_sha256"] == summary(whole)["parameters_sha256"]
    assert summary(cut)["world_sizes"] == [2, 2]


@pytest.mark.parametrize(
    ("strategy", "warns"),
    [
        ("forecast(lr=3e-3, every=3, delay=1, exchange=error-feedback(int4))", ""),
        ("zero3(lr=3e-3, shard=2, exchange=error-feedback(int4))", "groups of 3"),
    ],
)
def test_a_run_goes_on_with_another_number_of_workers(
    corpus: Path, tmp_path: Path, strategy: str, warns: str
) -> None:
    output = tmp_path / "run"
    _train(corpus, output, strategy, "--workers", 2, "--steps", 8)
    before = summary(output)
    _train(corpus, output, strategy, "--workers", 3, "--steps", 16, "--resume", output)
    after = summary(output)
    assert after["world_sizes"] == [2, 3]
    assert after["steps"] == 16
    assert after["eval"]["loss"] < before["eval"]["loss"]
    assert after["strategy"] == before["strategy"]
    assert warns in "".join(e["message"] for e in events(output, "warned"))


def test_a_run_goes_on_with_another_exchange_but_not_another_optimizer(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    _train(corpus, output, "ddp(lr=3e-3)", "--workers", 2, "--steps", 4)
    compressed = "ddp(lr=3e-3, exchange=error-feedback(int8))"
    _train(corpus, output, compressed, "--workers", 2, "--steps", 6, "--resume", output)
    assert summary(output)["steps"] == 6
    done = manyhands(
        *("train", "--data", corpus, *TINY, "--strategy", "diloco(lr=3e-3)", "--output", output),
        *("--cache", corpus.parent / "cache", "--eval-fraction", 0.2, "--workers", 2, "--steps", 8),
        *("--resume", output / "checkpoint-4"),
        code=1,
    )
    assert "optimizer state of" in done.stderr
    assert "continue with the optimizer" in done.stderr


def test_sigterm_between_agreements_is_heard_at_the_next_one(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = subprocess.Popen(
        command(
            *("train", "--data", corpus, *TINY, "--strategy", "diloco(lr=1e-3, every=5)", "--output", output),
            *("--cache", corpus.parent / "cache", "--workers", 2, "--steps", 100_000),
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(
            "step 6/"
        ):  # all have left their first step, in which a signal ends a worker at once
            process.send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=120)
    assert process.returncode == 143
    (saved,) = output.glob("checkpoint-*")
    assert int(saved.name.split("-")[1]) % 5 == 0, "saved where all workers agree"
    assert json.loads((output / "summary.json").read_text())["reason"] == "stopped by SIGTERM"


@pytest.mark.parametrize(
    "strategy",
    [
        "eager(lr=3e-3)",
        "hogwild(lr=0.1, every=3)",
    ],
)
def test_checkpoints_of_methods_that_never_rest(corpus: Path, tmp_path: Path, strategy: str) -> None:
    """They are brought to rest for it; the run is continued and ends with a model that plain Transformers loads."""
    from transformers import AutoModelForCausalLM

    output = tmp_path / "run"
    _train(corpus, output, strategy, "--workers", 2, "--steps", 6, "--eval-every", 3)
    assert [e["step"] for e in events(output, "saved")] == [4, 6]
    assert [e["step"] for e in events(output, "evaluated")] == [3, 6]
    _train(corpus, output, strategy, "--workers", 2, "--steps", 10, "--resume", output)
    assert max(losses(output)) == 10
    AutoModelForCausalLM.from_pretrained(output / "checkpoint-10")


def test_a_schedule_of_own_steps_may_count_tokens(corpus: Path, tmp_path: Path) -> None:
    """The rate of each worker's own steps falls over the run's tokens, though the averages are taken by steps."""
    falls = "local-sgd(lr=1e-3, every=2, schedule=linear(warmup=0, unit=tokens))"
    _train(corpus, tmp_path, falls, "--workers", 1, "--steps", 5)
    rates = [event["lr"] for event in events(tmp_path, "stepped")]
    assert rates == pytest.approx([1e-3 * (1 - step / 5) for step in range(5)])
