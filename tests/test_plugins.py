"""What third parties add by entry points works from end to end, in launched workers, too."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from plugins import install
from runs import TINY, losses, manyhands, summary

from manyhands.cli.coordinate import _check_launch
from manyhands.core.errors import UsageError
from manyhands.core.needs import LABELLED, TEXT, needs_of
from manyhands.launch.launchers import chosen, joined, locally
from manyhands.models.build import build
from manyhands.tasks.classify import Classify
from manyhands.tasks.pretrain import Pretrain
from manyhands.train.job import Job

HEAVY = '''
    """A language model whose loss weighs more."""
    from dataclasses import dataclass

    from manyhands.core.types import Summed
    from manyhands.tasks.pretrain import Pretrain

    @dataclass(frozen=True)
    class Heavy(Pretrain):
        """Next tokens, in units of one's own."""

        weight: float = 1.0

        def loss(self, model, batch):
            loss, count = super().loss(model, batch)
            return Summed(self.weight * loss, count)
'''
MARGIN = '''
    """Labels by a margin."""
    from dataclasses import dataclass

    from manyhands.core.types import Summed
    from manyhands.tasks.classify import Classify

    @dataclass(frozen=True)
    class Margin(Classify):
        """One label for each text, by a margin."""

        def loss(self, model, batch):
            from torch.nn.functional import multi_margin_loss

            labels = batch["label"]
            if len(labels) == 0:
                return super().loss(model, batch)
            logits = model(batch["input_ids"], batch["attention_mask"])
            return Summed(multi_margin_loss(logits, labels, reduction="sum"), len(labels))
'''
THIN = '''
    """Two processes that meet at a free port."""
    import os, socket, subprocess, sys

    def launch(entry, argument, job):
        """Two workers, without a watch over them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "manyhands.launch.child", entry, argument]
        sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        workers = [
            subprocess.Popen(command, env={**os.environ, **place, **sizes, "RANK": r, "LOCAL_RANK": r}) for r in "01"
        ]
        return max(worker.wait() for worker in workers)
'''


def test_a_third_partys_language_model_trains_and_is_scored_again(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "heavy_task", HEAVY, {"tasks.heavy": "Heavy"}, monkeypatch)
    given = ["--data", corpus, *TINY, "--steps", 2, "--workers", 2, "--output", tmp_path / "out"]
    manyhands("train", "--task", "heavy(weight=3)", *given)
    manyhands("evaluate", tmp_path / "out", "--json", tmp_path / "scores.json", "--workers", 1)
    scored = summary(tmp_path / "out")["eval"]["loss"]
    assert json.loads((tmp_path / "scores.json").read_text())["loss"] == pytest.approx(scored, rel=1e-5)
    assert losses(tmp_path / "out")[1] > 2 * scored  # its own loss is what is learnt
    assert 'kind = "heavy"' in (tmp_path / "out" / "config.toml").read_text()


def test_a_third_partys_classifier_trains_and_is_scored_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "margin_task", MARGIN, {"tasks.margin": "Margin"}, monkeypatch)
    rows = [{"review": f"{'good' if i % 2 else 'bad'} film {i % 7}", "stars": i % 2} for i in range(80)]
    data = tmp_path / "reviews.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    task = "margin(text=review, label=stars)"
    given = [*("--data", data, "--seq-len", 16, "--global-batch", 8, "--steps", 4, "--order", "by-length")]
    manyhands("train", "--task", task, *given, "--workers", 2, "--output", tmp_path / "out")
    manyhands("evaluate", tmp_path / "out", "--json", tmp_path / "scores.json", "--workers", 1, "--trust")
    told = summary(tmp_path / "out")
    assert json.loads((tmp_path / "scores.json").read_text())["macro_f1"] == pytest.approx(
        told["eval"]["macro_f1"]
    )
    assert told["samples"] == 32
    assert 'model = "tutorial"' in (tmp_path / "out" / "config.toml").read_text()


def test_a_task_that_does_not_say_what_it_needs_is_known_by_its_columns() -> None:
    @dataclass(frozen=True)
    class Words:
        text: str = "text"

    @dataclass(frozen=True)
    class Stars:
        label: str

    assert (needs_of(Words()), needs_of(Stars)) == (TEXT, LABELLED)
    assert (needs_of(Pretrain), needs_of(Classify())) == (TEXT, LABELLED)

    class Wrong:
        needs = "text"

    with pytest.raises(UsageError, match="needs = 'text' of a task"):
        needs_of(Wrong)


def test_a_task_names_the_class_that_builds_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from manyhands.core import registry
    from manyhands.core.needs import Needs

    class Masked(Pretrain):
        needs = Needs(head="AutoModelForMaskedLM")

    class Misspelt(Pretrain):
        needs = Needs(head="AutoModelForMasks")

    known: dict[str, Any] = {"masked": Masked, "misspelt": Misspelt}
    resolve = registry.resolve
    monkeypatch.setattr(registry, "resolve", lambda kind, name: known.get(name) or resolve(kind, name))
    model = build("bert-tiny", task="masked", vocab_size=50, seq_len=16)
    assert type(model).__name__ == "BertForMaskedLM"
    with pytest.raises(UsageError, match="head = 'AutoModelForMasks' of task misspelt"):
        build("bert-tiny", task="misspelt", vocab_size=50, seq_len=16)


def test_a_third_partys_launcher_trains_as_the_local_one_does(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "thin_launcher", THIN, {"launchers.thin": "launch"}, monkeypatch)
    given = ["--data", corpus, *TINY, "--steps", 3, "--workers", 2, "--output"]
    manyhands("train", "--launcher", "thin", *given, tmp_path / "thin")
    manyhands("train", *given, tmp_path / "local", "--threads", 1)
    assert losses(tmp_path / "thin") == losses(tmp_path / "local")
    assert 'launcher = "thin"' in (tmp_path / "thin" / "config.toml").read_text()


def test_a_launcher_is_chosen_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert chosen(Job()) is chosen(Job(launcher="local")) is locally
    with pytest.raises(UsageError, match="'local' with manyhands coordinate"):
        _check_launch(Job(launcher="local"))
    with pytest.raises(UsageError, match=r"'lokal' is not among the launchers.*did you mean 'local'"):
        chosen(Job(launcher="lokal"))
    with pytest.raises(UsageError, match="'torchrun' where RANK is not set"):
        chosen(Job(launcher="torchrun"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert chosen(Job()) is chosen(Job(launcher="torchrun")) is chosen(Job(launcher="thin")) is joined
    with pytest.raises(UsageError, match="'local' where RANK is set"):
        chosen(Job(launcher="local"))


def test_a_worker_without_its_words_says_which() -> None:
    words = [sys.executable, "-m", "manyhands.launch.child", "json:loads"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "1 arguments of manyhands.launch.child. they are ENTRY" in done.stderr
