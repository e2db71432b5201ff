"""Preparation: tokens/s beside the `tokenizers` library's own batch encoder on the same cores.

    python benchmarks/prepare_speed.py [--rounds 5]

`manyhands prepare` with two processes reads files, encodes, and writes checked shards into a fresh cache; the library
reads the same files and encodes them with `encode_batch_fast` on two threads, and keeps nothing. The same byte-pair encoding, about
60 MB, in turn, each run a process of its own; import and start of the processes count for both. The library's time inside
`encode_batch_fast` alone, its text in memory already, is given too. Writes ``results/prepare_speed.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import corpus
import harness

CORES = 2
SPEED_BYTES = 60_000_000
VOCABULARY = 8192
TRAIN_FILES = 32  # of the corpus, for the tokenizer


# -- one run, in a process of its own


def run_ours(data: Path, tokenizer: Path) -> dict[str, Any]:
    """Prepare `data` into a fresh cache."""
    from manyhands.data.prepare import prepare
    from manyhands.data.source import DataSpec

    with tempfile.TemporaryDirectory(prefix="manyhands-prepare-", dir=data.parent) as cache:
        spec = DataSpec(data=(f"{data}/*.txt",), tokenizer=str(tokenizer))
        made = prepare(spec, cache=Path(cache), processes=CORES)
    # an end of text after each document is ours alone
    return {"tokens": made.tokens - made.documents, "text_bytes": made.text_bytes}


def run_library(data: Path, tokenizer: Path) -> dict[str, Any]:
    """Encode `data` by the library's batch encoder, a batch at a time (all at once takes gigabytes)."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    files = sorted(data.glob("*.txt"))
    tokens, encode_s = 0, 0.0
    for first in range(0, len(files), 16 * CORES):
        texts = [file.read_text(encoding="utf-8") for file in files[first : first + 16 * CORES]]
        start = time.perf_counter()
        encoded = encoder.encode_batch_fast(texts, add_special_tokens=False)
        encode_s += time.perf_counter() - start
        tokens += sum(len(one.ids) for one in encoded)
    return {"tokens": tokens, "encode_s": encode_s}


def measure(kind: str, data: Path, tokenizer: Path) -> dict[str, Any]:
    """One run on two cores; adds the wall seconds of its whole process."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(CORES)}
    if kind == "ours":  # as `manyhands prepare` finds it
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAYON", "TOKENIZERS"))}
    command = [sys.executable, __file__, "--one", kind, str(data), str(tokenizer)]
    busy, used, start = harness.busy_seconds(), _cpu_seconds(), time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    wall, cpu = time.perf_counter() - start, _cpu_seconds() - used
    others = max(0.0, (harness.busy_seconds() - busy - cpu) / wall / (os.cpu_count() or 1))
    found = json.loads(done.stdout.splitlines()[-1])
    return {**found, "wall_s": wall, "cpu_s": cpu, "others_share": others}


def _cpu_seconds() -> float:
    """Of this process and its ended children."""
    return sum(os.times()[:4])


# -- what is compared


def train_tokenizer(data: Path, directory: Path) -> Path:
    from manyhands.data import tokenize

    if not directory.exists():
        texts = (file.read_text() for file in sorted(data.glob("*.txt"))[:TRAIN_FILES])
        tokenize.train(f"bpe:{VOCABULARY}", texts, directory)
    return directory


def speed(work: Path, rounds: int) -> dict[str, Any]:
    data = corpus.make(work / f"corpus-{SPEED_BYTES}", SPEED_BYTES)
    tokenizer = train_tokenizer(data, work / "prepare-tokenizer")
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "library": []}
    for number in range(rounds):
        for kind in ("ours", "library") if number % 2 == 0 else ("library", "ours"):
            runs[kind].append(measure(kind, data, tokenizer))
        ours, library = runs["ours"][-1], runs["library"][-1]
        if ours["tokens"] != library["tokens"]:
            raise SystemExit(f"{ours['tokens']} tokens here, {library['tokens']} from the library")
        print(f"round {number + 1}: {ours['wall_s']:.1f} s, library {library['wall_s']:.1f} s", flush=True)
    rates = {
        "manyhands": [r["tokens"] / r["wall_s"] for r in runs["ours"]],
        "library": [r["tokens"] / r["wall_s"] for r in runs["library"]],
        "library, encoding alone": [r["tokens"] / r["encode_s"] for r in runs["library"]],
    }
    pairs = {
        name: [a / b for a, b in zip(rates["manyhands"], theirs, strict=True)]
        for name, theirs in rates.items()
        if name != "manyhands"
    }
    return {
        "tokens_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "ratio": {
            name: {"min": min(p), "median": statistics.median(p), "max": max(p)} for name, p in pairs.items()
        },
        "target": 0.9,
        "tokens": runs["ours"][0]["tokens"],
        "text_bytes": runs["ours"][0]["text_bytes"],
        "runs": runs,
    }


def main() -> int:
    from manyhands.core.hardware import cache_directory

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=cache_directory() / "benchmarks")
    parser.add_argument("--output", type=Path, default=harness.RESULTS, help="directory of the result files")
    parser.add_argument("--one", nargs=3, metavar=("KIND", "DATA", "TOKENIZER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        kind, data, tokenizer = given.one
        print(
            json.dumps((run_ours if kind == "ours" else run_library)(Path(data).resolve(), Path(tokenizer)))
        )
        return 0
    found = speed(given.work.resolve(), given.rounds)
    command = f"python benchmarks/prepare_speed.py --rounds {given.rounds}"
    data = {"command": command, "machine": harness.facts_of_machine(), **found}
    harness.write_json(given.output / "prepare_speed.json", data)
    (given.output / "prepare_speed.md").write_text(table(data))
    return 0


def table(data: dict[str, Any]) -> str:
    """The figures for people."""
    machine, versions = data["machine"], data["machine"]["versions"]
    rows = [
        f"| {name} | {rate:,.0f} | "
        + (
            ""
            if name == "manyhands"
            else "{median:.2f} ({min:.2f} to {max:.2f})".format(**data["ratio"][name])
        )
        + " |"
        for name, rate in data["tokens_per_s"].items()
    ]
    others = max(run["others_share"] for runs in data["runs"].values() for run in runs)
    about = (
        f"`{data['command']}`: {data['text_bytes'] / 1e6:.0f} MB of text, {data['tokens']:,} tokens of bpe:{VOCABULARY}, "
        f"{CORES} cores ({machine['cpu']}), tokenizers {versions['tokenizers']}, Python {machine['python']}; "
        f"{len(data['runs']['ours'])} alternating rounds, medians; others used at most {others:.0%} of the machine."
    )
    return "\n".join(
        [
            "# Preparation beside the tokenizers library",
            "",
            about,
            "",
            "| who | tokens/s | manyhands over it: median (min to max) |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
