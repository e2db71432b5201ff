"""Shown to work on public data: classifiers, characters, words, Chinese; one to three workers; recorded as data and a plot.

    python benchmarks/acceptance.py --data ../shared/data [--only NAME …]

Needs the data sets of the project's shared directory (each is public; see its README there). Writes
``benchmarks/results/acceptance.json`` and, for Tiny Shakespeare, ``acceptance_tinyshakespeare.png``.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from manyhands.core.hardware import machine_facts

RESULTS = Path(__file__).parent / "results"


def train(output: Path, *options: object) -> dict[str, Any]:
    """Run `manyhands train` and return its summary with its loss curve."""
    command = [sys.executable, "-m", "manyhands", "train", *map(str, options), "--output", str(output)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    lines = (output / "metrics.jsonl").read_text().splitlines()
    summary["curve"] = [[e["step"], e["loss"]] for e in map(json.loads, lines) if e["event"] == "stepped"]
    summary["eval_curve"] = [
        [e["step"], e["metrics"]["loss"]] for e in map(json.loads, lines) if e["event"] == "evaluated"
    ]
    shown = [c if not c.startswith("/") else Path(c).name for c in map(str, options)]
    summary["command"] = f"manyhands train {' '.join(shown)}"
    return summary


def figures(summary: dict[str, Any], *more: str) -> dict[str, Any]:
    keys = (
        "command",
        "steps",
        "eval",
        "train_loss",
        "wall_s",
        "tokens_per_s",
        "world_sizes",
        "parameters_sha256",
        *more,
    )
    return {key: summary[key] for key in keys}


def mr_polarity(data: Path, scratch: Path) -> dict[str, Any]:
    """Tutorial classifier from scratch, seeded 90/10 splits, one and two workers. Reference: CNN-rand 75.9."""
    table = scratch / "mr.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for name in ("neg", "pos"):
            for line in (data / "mr_polarity" / f"rt-polarity.{name}").read_text("latin-1").splitlines():
                writer.writerow([line, name])
    runs = {}
    for workers in (1, 2):
        for seed in (0, 1, 2):
            summary = train(
                scratch / f"mr-{workers}-{seed}",
                *(
                    "--task",
                    "classify",
                    "--data",
                    table,
                    "--eval-fraction",
                    0.1,
                    "--epochs",
                    6,
                    "--seed",
                    seed,
                ),
                *("--strategy", "ddp(lr=1e-3)", "--global-batch", 32, "--seq-len", 64, "--workers", workers),
            )
            runs[f"{workers} workers, seed {seed}"] = figures(summary)
    by_workers = {
        str(w): [r["eval"]["accuracy"] for name, r in runs.items() if name.startswith(f"{w} ")]
        for w in (1, 2)
    }
    worst = min(min(each) for each in by_workers.values())
    return {"runs": runs, "accuracy": by_workers, "target": 0.75, "reached": worst >= 0.75}


SHAKESPEARE = (
    *("--tokenizer", "char", "--eval-fraction", 0.1, "--seq-len", 64, "--global-batch", 12),
    *("--model", "gpt2-nano(n_layer=4, n_embd=128, n_head=4)", "--precision", "fp32"),
    *("--strategy", "ddp(lr=3e-3, schedule='cosine(warmup=100)')", "--prompt", ""),
)


def tinyshakespeare(data: Path, scratch: Path) -> dict[str, Any]:
    """nanoGPT's CPU setting at character level: 4 layers, 128 wide, block 64, batch 12, 2,000 steps. Reference: 1.88."""
    text = data / "tinyshakespeare" / "input.txt"
    curves, runs = {}, {}
    for workers in (1, 2, 3):
        output = scratch / f"shakespeare-{workers}"
        options = ("--steps", 2000, "--log-every", 20, "--eval-every", 250, "--workers", workers)
        summary = train(output, "--data", text, *SHAKESPEARE, *options)
        curves[str(workers)] = summary["curve"]
        runs[str(workers)] = {**figures(summary), "eval_curve": summary["eval_curve"]}
    plot(curves, {w: r["eval_curve"] for w, r in runs.items()})
    losses = {w: r["eval"]["loss"] for w, r in runs.items()}
    plain = score_plainly(output, text, seq_len=64, rows=summary["data"]["eval_rows"])
    return {
        "runs": runs,
        "curves": curves,
        "largest_relative_difference_to_one_worker": apart(curves),
        "relative_difference_of_validation_loss": {w: abs(x / losses["1"] - 1) for w, x in losses.items()},
        "plain_transformers": compared(plain, summary["eval"]["loss"]),
        "target": 1.88,
        "reached": max(losses.values()) <= 1.88,
    }


def reproducible(data: Path, scratch: Path) -> dict[str, Any]:
    """The same job with --reproducible, its first 300 steps by one, two and three workers: not a bit of difference."""
    text = data / "tinyshakespeare" / "input.txt"
    curves, runs = {}, {}
    for workers in (1, 2, 3):
        options = ("--steps", 300, "--log-every", 1, "--reproducible", "--workers", workers)
        summary = train(scratch / f"reproducible-{workers}", "--data", text, *SHAKESPEARE, *options)
        curves[str(workers)] = summary["curve"]
        runs[str(workers)] = figures(summary)
    equal = len({r["parameters_sha256"] for r in runs.values()}) == 1
    return {
        "runs": runs,
        "curves": {"1": curves["1"]},
        "largest_relative_difference_to_one_worker": apart(curves),
        "parameters_equal_to_the_bit": equal,
        "curves_equal_to_the_bit": all(curve == curves["1"] for curve in curves.values()),
    }


def wikitext2(data: Path, scratch: Path) -> dict[str, Any]:
    """A small GPT-2 over BPE tokens, two workers: validation while training, the test text by `manyhands evaluate`."""
    source = data / "wikitext2"
    output = scratch / "wikitext2"
    summary = train(
        output,
        *("--data", source / "train.txt", "--eval-data", source / "valid.txt", "--tokenizer", "bpe:8192"),
        *("--model", "gpt2-micro", "--seq-len", 128, "--global-batch", 16, "--steps", 600, "--workers", 2),
        *("--strategy", "ddp(lr=2e-3, schedule='cosine(warmup=50)')", "--prompt", " = ", "--log-every", 10),
    )
    test = evaluate(output, "--data", source / "test.txt", "--precision", "fp32")
    plain = score_plainly(output, source / "test.txt", seq_len=128)
    return {
        "runs": {"2": {**figures(summary), "curve": summary["curve"]}},
        "test": test,
        "plain_transformers": compared(plain, test["loss"]),
    }


def tang_poetry(data: Path, scratch: Path) -> dict[str, Any]:
    """Tang poems (JSON arrays whose `paragraphs` are lists of lines), characters; two workers."""
    summary = train(
        scratch / "tang",
        *("--task", "pretrain(text=paragraphs)", "--data", data / "tang_poetry_zh" / "*.json"),
        *("--tokenizer", "char", "--model", "gpt2-micro", "--seq-len", 128, "--epochs", 6, "--workers", 2),
        *("--strategy", "ddp(lr=2e-3)", "--prompt", "春", "--log-every", 10),
    )
    return {"runs": {"2": {**figures(summary), "curve": summary["curve"]}}}


def apart(curves: dict[str, list[list[float]]]) -> dict[str, float]:
    """Largest relative difference of each loss curve to that of one worker."""
    reference = dict(curves["1"])
    return {
        w: max(abs(loss - reference[step]) / reference[step] for step, loss in curve)
        for w, curve in curves.items()
    }


def evaluate(run: Path, *options: object) -> dict[str, Any]:
    """Scores of `manyhands evaluate`."""
    result = run / "scores.json"
    command = [sys.executable, "-m", "manyhands", "evaluate", run, *options, "--json", result]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    scores = json.loads(result.read_text())
    return {name: value for name, value in scores.items() if name != "checkpoint"}  # a path of this machine


def score_plainly(run: Path, text: Path, *, seq_len: int, rows: int | None = None) -> dict[str, Any]:
    """The same text scored by plain Transformers (`plain_score.py`) from the run's last checkpoint."""
    checkpoint = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    script = Path(__file__).with_name("plain_score.py")
    command = [sys.executable, script, checkpoint, text, "--seq-len", seq_len]
    command += [] if rows is None else ["--rows", rows]
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
    plain: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return plain


def compared(plain: dict[str, Any], loss: float) -> dict[str, Any]:
    return {**plain, "loss_here": loss, "relative_difference": abs(plain["loss"] / loss - 1)}


def plot(curves: dict[str, Any], evals: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for i, (workers, curve) in enumerate(curves.items()):
        smooth = [
            [curve[j][0], statistics.fmean(v for _, v in curve[max(0, j - 4) : j + 1])]
            for j in range(len(curve))
        ]
        axes.plot(
            *zip(*smooth, strict=True),
            linewidth=3.2 - i,
            label=f"{workers} worker{'s' if workers != '1' else ''}: training",
        )
        axes.plot(
            *zip(*evals[workers], strict=True), "o^s"[i], markersize=8 - 2 * i, label=f"{workers}: validation"
        )
    axes.axhline(1.88, color="grey", linestyle="--", linewidth=1, label="nanoGPT's published 1.88")
    axes.set(
        xlabel="step",
        ylabel="loss (nats per character)",
        ylim=(1.4, 3.2),
        title="Tiny Shakespeare, 4 × 128, batch 12 × 64",
    )
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "acceptance_tinyshakespeare.png", dpi=110)


PARTS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "mr_polarity": mr_polarity,
    "tinyshakespeare": tinyshakespeare,
    "reproducible": reproducible,
    "wikitext2": wikitext2,
    "tang_poetry": tang_poetry,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    given = parser.parse_args()
    path = RESULTS / "acceptance.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in given.only:
        with tempfile.TemporaryDirectory(prefix="manyhands-acceptance-") as scratch:
            results[name] = PARTS[name](given.data, Path(scratch))
        results[name]["machine"] = machine_facts()
        results[name]["made_by"] = f"python benchmarks/acceptance.py --data DATA --only {name}"
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        print(name, {k: r["eval"] for k, r in results[name]["runs"].items()}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
