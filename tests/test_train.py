"""The main job as a user runs it: real processes, real files, real signals."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
from pathlib import Path
from typing import Any

import contract
import pytest
import warm
from runs import TINY, command, environment, events, losses, manyhands, summary, torchrun

from manyhands.cli.main import main
from manyhands.core import hardware

STEPS = 8


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text with some structure."""
    rng = random.Random(1)
    words = ["hand", "many", "light", "work", "makes", "slow", "fast", "exact"]
    directory = tmp_path_factory.mktemp("corpus")
    for i in range(4):
        lines = (" ".join(rng.choice(words) for _ in range(9)) for _ in range(120))
        (directory / f"{i}.txt").write_text("\n".join(lines) + "\n")
    return directory


@pytest.fixture(scope="session")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two workers."""
    output = tmp_path_factory.mktemp("trained") / "run"
    manyhands(
        "train",
        "--data",
        corpus,
        *TINY,
        "--steps",
        STEPS,
        "--workers",
        2,
        "--save-every",
        4,
        "--output",
        output,
        fresh=True,
    )
    return output


def test_the_output_contract(trained: Path) -> None:
    found = summary(trained)
    contract.check(found, contract.SUMMARY)
    contract.check_lines(trained / "metrics.jsonl")
    assert (found["resumed_from"], len(found["workers"])) == (0, 2)
    assert found["steps"] == STEPS
    assert found["samples"] == STEPS * 12 == sum(w["samples"] for w in found["workers"])
    assert found["target_tokens"] == STEPS * 12 * 32 == sum(w["tokens"] for w in found["workers"])
    assert found["world_sizes"] == [2]
    assert len(found["parameters_sha256"]) == 64
    assert found["tokens_per_s"] > 0
    assert 0 < found["mfu"] < 1
    assert found["wall_s"] > 0
    assert {e["event"] for e in events(trained)} >= {
        "planned",
        "prepareddata",
        "stepped",
        "evaluated",
        "saved",
        "finished",
    }
    assert sorted(losses(trained)) == list(range(1, STEPS + 1))
    assert {p.name for p in trained.iterdir()} >= {"config.toml", "metrics.jsonl", "summary.json", "logs"}
    assert sorted(p.name for p in (trained / "logs").glob("*.log")) == ["rank-0.log", "rank-1.log"]
    assert [p.name for p in sorted(trained.glob("checkpoint-*"))] == ["checkpoint-4", "checkpoint-8"]


def test_the_effective_configuration_is_the_same_job(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "again"
    warm.manyhands("train", trained / "config.toml", "--output", output)
    assert summary(output)["parameters_sha256"] == summary(trained)["parameters_sha256"]


def test_transformers_alone_loads_it_and_scores_the_same_loss(trained: Path, corpus: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = trained / f"checkpoint-{STEPS}"
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids: list[int] = []
    for file in sorted(corpus.glob("*.txt")):
        ids += [*tokenizer(file.read_text(), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    rows = -(-(len(ids) - 1) // 32)
    first = (rows - max(1, round(rows * 0.05))) * 32
    total, count = 0.0, 0
    with torch.no_grad():
        for begin in range(first, len(ids) - 1, 32):
            window = torch.tensor([ids[begin : begin + 33]])
            loss = model(window[:, :-1]).logits.log_softmax(-1).gather(2, window[:, 1:, None])
            total -= float(loss.double().sum())
            count += window.shape[1] - 1
    scores = summary(trained)["eval"]
    assert total / count == pytest.approx(scores["loss"], rel=1e-6)
    size = sum(len(t.encode()) for t in [tokenizer.decode(ids[first + 1 :], skip_special_tokens=True)])
    assert scores["bits_per_byte"] == pytest.approx(total / 0.6931471805599453 / size, rel=1e-3)


def test_evaluate_and_generate(trained: Path, tmp_path: Path) -> None:
    scored = manyhands("evaluate", trained).stdout
    assert float(scored.split("loss")[1].split()[0]) == pytest.approx(
        summary(trained)["eval"]["loss"], rel=1e-5
    )
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(
        b'{"text": "many hands make light work, and more"}\n' * 3 + b'{"text": 1}\n{"text\n\xff\n'
    )
    fresh = manyhands(
        "evaluate", trained, "--data", broken, "--workers", 1, "--json", tmp_path / "scores.json"
    )
    assert json.loads((tmp_path / "scores.json").read_text())["skipped"] == 3
    assert [line.split()[0] for line in fresh.stdout.splitlines()[:3]] == ["checkpoint", "rows", "skipped"]
    assert "warning" not in fresh.stdout
    assert f"warning: {broken}:5: not JSON" in fresh.stderr
    assert "3 documents" in fresh.stderr
    text = warm.manyhands("generate", trained, "--prompt", "many ", "--max-new-tokens", 20)
    assert text.startswith("many ")
    assert len(text) > 10


def test_reproducible_is_the_same_bits_for_any_workers_and_over_a_resume(
    corpus: Path, tmp_path: Path
) -> None:
    """Also with dropout, with bf16, with uneven shares."""
    job = [
        "--data",
        corpus,
        *TINY,
        "--precision",
        "bf16",
        "--model",
        "gpt2-nano(resid_pdrop=0.1)",
        "--reproducible",
    ]
    job += ["--steps", STEPS]
    digests = {}
    for name, more in {
        "1": ["--workers", 1],
        "4": ["--workers", 4],
        "uneven": ["--workers", 3, "--shares", "5,1,2"],
        "group": ["--workers", 2, "--transport", "group"],
    }.items():
        warm.manyhands("train", *job, *more, "--output", tmp_path / name)
        digests[name] = summary(tmp_path / name)["parameters_sha256"]
    manyhands("train", *job, "--workers", 2, "--save-every", 3, "--keep", 9, "--output", tmp_path / "resumed")
    for later in ("checkpoint-6", "checkpoint-8"):
        subprocess.run(["rm", "-r", str(tmp_path / "resumed" / later)], check=True)
    warm.manyhands("train", "--resume", tmp_path / "resumed", "--workers", 3)
    digests["resumed"] = summary(tmp_path / "resumed")["parameters_sha256"]
    assert len(set(digests.values())) == 1, digests
    assert summary(tmp_path / "resumed")["world_sizes"] == [2, 3]


def test_any_workers_and_transports_give_the_same_curve(trained: Path, corpus: Path, tmp_path: Path) -> None:
    expected = losses(trained)
    job = ["--data", corpus, *TINY, "--steps", STEPS]
    warm.manyhands("train", *job, "--workers", 1, "--output", tmp_path / "one")
    warm.manyhands("train", *job, "--workers", 3, "--shares", "1,0,3", "--output", tmp_path / "uneven")
    warm.manyhands("train", *job, "--workers", 2, "--transport", "group", "--output", tmp_path / "group")
    torchrun("-m", "manyhands", "train", *job, "--output", tmp_path / "torchrun")
    logs = [tmp_path / "torchrun" / "logs" / f"rank-{rank}.log" for rank in range(2)]
    assert "done after step" in logs[0].read_text()
    assert logs[1].is_file()
    for name in ("one", "uneven", "group", "torchrun"):
        assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-5), name


def _started(output: Path, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("train", *arguments, "--output", output),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )


def _until(process: subprocess.Popen[str], words: str) -> str:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if words in line:
            return seen
    raise AssertionError(f"{words!r} never came:\n{seen}\n{process.stderr.read() if process.stderr else ''}")


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130)]
)  # the launcher hands others on: test_launch
def test_a_signal_saves_and_the_run_goes_on_later(
    corpus: Path, tmp_path: Path, signum: int, code: int
) -> None:
    output = tmp_path / "run"
    process = _started(output, "--data", corpus, *TINY, "--steps", 100_000, "--workers", 2)
    _until(process, "step 5/")
    process.send_signal(signum)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    saved = sorted(output.glob("checkpoint-*"))
    assert len(saved) == 1
    step = int(saved[0].name.split("-")[1])
    assert step >= 5
    assert summary(output)["steps"] == step
    warm.manyhands("train", "--resume", output, "--steps", step + 2, "--workers", 1)
    found = summary(output)
    contract.check(found, contract.SUMMARY)
    assert (found["steps"], found["resumed_from"]) == (step + 2, step)
    assert (found["samples"], found["workers"][0]["samples"]) == (
        (step + 2) * 12,
        2 * 12,
    )  # of the run; of its end
    contract.check_lines(output / "metrics.jsonl")
    assert sorted(losses(output))[-2:] == [step + 1, step + 2]


def test_what_is_trained_is_saved_before_it_is_scored(corpus: Path, tmp_path: Path) -> None:
    """So a signal, or anything else, in the last evaluation costs no step."""
    output = tmp_path / "run"
    big = tmp_path / "big.txt"
    big.write_text((corpus / "0.txt").read_text() * 400)
    process = _started(output, "--data", corpus, "--eval-data", big, *TINY, "--steps", 3, "--workers", 2)
    if "saved " not in _until(process, "evaluate:"):
        _until(process, "saved ")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, out + err
    assert [p.name for p in output.glob("checkpoint-*")] == ["checkpoint-3"]
    assert summary(output)["eval"] == {}  # it was not done


def test_a_signal_while_preparing_leaves_no_half_shard(tmp_path: Path) -> None:
    big = tmp_path / "big.txt"
    rng = random.Random(2)
    with big.open("w") as file:
        for _ in range(15_000):
            file.write(f"{rng.random()} many hands {rng.random()}\n")
    job = [
        "--data",
        big,
        *TINY,
        "--tokenizer",
        "bpe:500",
        "--steps",
        1,
        "--cache",
        tmp_path / "cache",
        "--workers",
        2,
    ]
    process = _started(tmp_path / "run", *job)
    _until(process, "tokeniz")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, out + err
    warm.manyhands("train", *job, "--output", tmp_path / "run")
    assert summary(tmp_path / "run")["steps"] == 1


def test_classification_learns_and_does_not_depend_on_the_workers(tmp_path: Path) -> None:
    rng = random.Random(3)
    good, bad = ["fine", "great", "lovely", "superb"], ["awful", "dull", "poor", "weak"]
    lines = ["review,stars"]
    for i in range(400):
        words = [rng.choice(good if i % 2 else bad), *rng.choices(["the", "film", "was", "a", "plot"], k=5)]
        rng.shuffle(words)
        lines.append(f"{' '.join(words)},{'five' if i % 2 else 'one'}")
    (tmp_path / "reviews.csv").write_text("\n".join(lines) + "\nragged,row,here\n")
    job = ["--task", "classify(text=review, label=stars)", "--data", tmp_path / "reviews.csv", "--epochs", 6]
    job += ["--log-every", 1, "--precision", "fp32", "--strategy", "ddp(lr=3e-3)", "--eval-fraction", "0.1"]
    for workers in (1, 3):
        warm.manyhands("train", *job, "--workers", workers, "--output", tmp_path / str(workers))
    found = summary(tmp_path / "1")
    contract.check(found, {**contract.SUMMARY, "eval": contract.CLASSIFIER})
    assert found["model"]["name"] == "tutorial"
    assert found["eval"]["accuracy"] > 0.95
    assert found["eval"]["macro_f1"] > 0.95
    assert found["data"]["skipped"] == 1
    assert losses(tmp_path / "3") == pytest.approx(losses(tmp_path / "1"), rel=1e-4, abs=1e-6)
    assert summary(tmp_path / "3")["eval"]["accuracy"] == found["eval"]["accuracy"]
    scored = warm.manyhands("evaluate", tmp_path / "3", "--data", tmp_path / "reviews.csv")
    assert "macro_f1" in scored


def test_an_encoder_of_transformers_classifies(tmp_path: Path) -> None:
    rows = ["text\tlabel", *(f"{'yes indeed' if i % 2 else 'not at all'}\t{i % 2}" for i in range(64))]
    (tmp_path / "a.tsv").write_text("\n".join(rows) + "\n")
    warm.manyhands(
        *(
            "train",
            "--task",
            "classify",
            "--data",
            tmp_path / "a.tsv",
            "--model",
            "bert-tiny",
            "--tokenizer",
            "word:50",
        ),
        *("--steps", 12, "--strategy", "ddp(lr=3e-3)", "--workers", 2, "--output", tmp_path / "run"),
    )
    assert summary(tmp_path / "run")["eval"]["accuracy"] == 1.0


BAD: list[tuple[list[Any], str, int]] = [
    (["--global-bach", "4"], "did you mean '--global-batch'", 2),
    (["--global-batch", "0"], "at least 1", 2),
    (["--strategy", "dpp"], "did you mean 'ddp'", 2),
    (["--set", "strategy.outer.lr"], "KEY=VALUE", 2),
    (["absent.toml"], "does not exist", 2),
    (["--resume", "/nonexistent/run"], "is not a run", 1),
    (["--gradient-accumulation-steps", "4"], "give --global-batch alone", 2),
    (["--micro-batch", "99"], "part of the global batch", 2),
    (["--reproducible", "--compile", "on"], "leave out --compile on", 2),
]

# of these the process around tells nothing more
BAD_VALUES: list[tuple[list[str], str]] = [
    (["--warmup-ratio", "3"], "below 1"),
    (["--warmup-steps", "0.5"], "whole number"),
    (["--warmup-ratio", "0.1", "--warmup-steps", "3"], "both given"),
    (["--epochs", "inf"], "and ends"),
    (["--max-grad-norm", "nan"], "must be a number"),
    (["--report-to", "tensorbord"], "did you mean 'tensorboard'"),
    (["--model", "json:dmps"], "did you mean 'dump"),
    (["--format", "parket"], "did you mean 'parquet'"),
    (["--strategy", "ddp(consistency=bounded(4))"], "parameter-server(consistency=bounded(4))"),
    (["--strategy", "ddp(staleness=4)"], "parameter-server(consistency=bounded(4))"),
    (["--strategy", "ddp(every=4)"], "it belongs to accumulate"),
    (["--strategy", "parameter-server(exchange=error-feedback(powersgd))"], "one way"),
    (["--strategy", "parameter-server(exchange=topk(average=senders))"], "average='all'"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD_VALUES, ids=lambda v: str(v)[:60])
def test_values_that_cannot_be_are_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments, "--output", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.strip().splitlines()) <= 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("arguments", "words", "code"), BAD, ids=lambda v: str(v)[:40])
def test_mistakes_are_one_line_and_the_right_code(
    arguments: list[Any], words: str, code: int, tmp_path: Path
) -> None:
    done = manyhands("train", *arguments, "--output", tmp_path / "run", code=code)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
    assert not (tmp_path / "run" / "checkpoint-1").exists()


BAD_DATA: list[tuple[list[Any], str, int]] = [
    (["--data", "/nonexistent/*.txt"], "matches no file|does not exist", 1),
    (["--data", "EMPTY", "--workers", 1], "holds no text", 1),
    (["--tokenizer", "bqe:300", "--workers", 1], "it is one of", 2),
    (["--model", "gpt3-nano"], "gpt2-nano", 2),
    (["--resume", "EMPTY", "--workers", 1], "", 1),
    (["--shares", "1,2,3", "--workers", "2"], "one share", 2),
]


@pytest.mark.parametrize(("arguments", "words", "code"), BAD_DATA, ids=lambda v: str(v)[:40])
def test_mistakes_met_by_workers_are_printed_last(
    arguments: list[Any], words: str, code: int, corpus: Path, tmp_path: Path
) -> None:
    import re

    empty = tmp_path / "empty.txt"
    empty.touch()
    given = [str(empty) if a == "EMPTY" else a for a in arguments]
    base = [] if "--data" in given or "--resume" in given else ["--data", corpus]
    done = manyhands("train", *base, *TINY, "--steps", 1, *given, "--output", tmp_path / "run", code=code)
    assert re.search(words, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_an_output_of_another_run_is_not_overwritten(trained: Path, corpus: Path) -> None:
    before = summary(trained)
    job = ["--data", corpus, *TINY, "--steps", 1, "--workers", 1]
    done = manyhands("train", *job, "--output", trained, code=2)
    assert "--resume" in done.stderr
    assert summary(trained) == before


def test_a_resumed_run_keeps_its_batches(trained: Path) -> None:
    done = manyhands("train", "--resume", trained, "--global-batch", 8, "--steps", 20, "--workers", 1, code=2)
    assert "global_batch = 8" in done.stderr


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--model", "gpt2-nano(n_head=4)", "the model's n_head = 4, but"),
        ("--steps", STEPS - 3, f"the job has {STEPS - 3} steps, but"),
    ],
)
def test_a_resumed_run_keeps_its_model_and_its_length(
    option: str, value: object, says: str, trained: Path
) -> None:
    done = manyhands("train", "--resume", trained, option, value, "--workers", 1, code=2)
    assert says in done.stderr


def test_a_resumed_run_keeps_its_rows(trained: Path) -> None:
    done = manyhands("train", "--resume", trained, "--eval-fraction", 0.4, "--steps", 20, code=2)
    assert "rows to train on" in done.stderr
    assert "--eval-fraction" in done.stderr


def test_the_end_says_how_to_load_it_and_a_finished_run_keeps_its_figures(
    trained: Path, tmp_path: Path
) -> None:
    """Also in the other unit of length, though the run's own configuration says steps."""
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(trained), str(copy)], check=True)
    before = summary(copy)
    epochs = STEPS / math.ceil(before["data"]["rows"] / 12)
    said = manyhands("train", "--resume", copy, "--epochs", epochs).stdout
    assert f'AutoModelForCausalLM.from_pretrained("{copy}/checkpoint-{STEPS}")' in said
    after = summary(copy)
    assert {k: v for k, v in after.items() if k != "eval"} == {k: v for k, v in before.items() if k != "eval"}
    assert after["eval"]["loss"] == pytest.approx(before["eval"]["loss"])


def test_one_step_has_a_rate_and_a_prompt_that_is_too_long_costs_no_figures(
    corpus: Path, tmp_path: Path
) -> None:
    job = ["--data", corpus, *TINY, "--prompt", "x" * 99, "--steps", 1, "--workers", 1]
    said = manyhands("train", *job, "--output", tmp_path / "run").stdout
    found = summary(tmp_path / "run")
    assert "no sample" in said
    assert found["tokens_per_s"] > 0
    assert found["machine"]["cores"] == hardware.cores_here()
    assert losses(tmp_path / "run").keys() == {1}
    assert events(tmp_path / "run", "stepped")[0]["communicate_share"] < 0.9


def test_a_model_with_a_generate_of_its_own_trains(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small_one.py").write_text(OWN_MODEL)
    monkeypatch.chdir(tmp_path)
    job = ["--data", corpus, *TINY, "--model", "small_one:make", "--prompt", "many", "--steps", 2]
    said = manyhands("train", *job, "--workers", 1, "--output", tmp_path / "run").stdout
    assert summary(tmp_path / "run")["steps"] == 2
    assert f'manyhands.load("{tmp_path}/run/checkpoint-2", trust=True)' in said


OWN_MODEL = """
import torch

class Model(torch.nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.inner = torch.nn.Embedding(vocab_size, 8)

    def forward(self, input_ids):
        return self.inner(input_ids) @ self.inner.weight.T

    def generate(self, idx, max_new_tokens):
        raise AssertionError("its arguments are its own")

def make(vocab_size):
    return Model(vocab_size)
"""


def test_scores_need_nothing_that_training_needed(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(trained), str(copy)], check=True)
    written = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(written.replace("min_workers = 1", "min_workers = 2"))
    assert "min_workers = 2" in (copy / "config.toml").read_text()
    assert "perplexity" in warm.manyhands("evaluate", copy, "--workers", 1)


def test_an_edited_checkpoint_is_refused_and_the_previous_one_offered(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(trained), str(copy)], check=True)
    victim = copy / f"checkpoint-{STEPS}" / "model.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    done = manyhands("train", "--resume", copy, "--steps", 20, "--workers", 1, code=1)
    assert "model.safetensors was changed" in done.stderr
    assert "checkpoint-4" in done.stderr


def test_listing() -> None:
    for kind in ("strategies", "exchanges", "cadences", "optimizers", "tasks", "models", "launchers"):
        names = warm.manyhands("list", kind, "--names").split()
        full = warm.manyhands("list", kind).splitlines()
        assert names == [line.split()[0] for line in full]
        assert all(len(line.split()) > 2 for line in full)


def test_every_worker_of_torchrun_is_given_the_summary(corpus: Path, tmp_path: Path) -> None:
    """Whichever of them comes to its end first: the first one writes it."""
    job = {
        "data": str(corpus),
        "model": "gpt2-nano",
        "tokenizer": "byte",
        "seq_len": 32,
        "steps": 2,
        "prompt": "",
    }
    (tmp_path / "job.py").write_text(
        "import manyhands, os\n"
        f"summary = manyhands.run({job!r}, global_batch=12, output={str(tmp_path / 'run')!r})\n"
        "os.write(1, f'told of {summary[\"steps\"]}\\n'.encode())\n"  # at once: both write into one pipe
    )
    done = torchrun(tmp_path / "job.py")
    assert done.stdout.count("told of 2") == 2
