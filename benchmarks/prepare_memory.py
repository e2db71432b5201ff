"""Preparation's memory: the peak of every process by size of corpus, under a limit that the system enforces.

    python benchmarks/prepare_memory.py [--limit-mb 512] [--processes 2]

The promise is below 1 GiB for each worker on a corpus of 20 GiB, whatever its files. Memory depends on the size of a piece (at most
32 MiB, reached by a corpus of 512 MiB) and not on the corpus, so smaller ones show it under a smaller limit: here one text file
and one CSV of 64 to 640 MiB, and half of the promise (RLIMIT_DATA: private memory of each process). The tokenizer is
trained within the run. Peaks are VmHWM, read while processes live. Writes ``results/prepare_memory.json``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import corpus
import harness

SIZES_MB = (64, 256, 640)
TOKENIZER = "bpe:8192"
POLL_S = 0.02


def make(work: Path, size_bytes: int, kind: str) -> Path:
    """One file of about that size, unless it is there. Raises `SystemExit` where it came out otherwise."""
    path = work / f"memory-{size_bytes}.{kind}"
    if path.exists():
        return path
    temporary = path.with_suffix(".tmp")
    parts = sorted(corpus.make(work / f"memory-parts-{size_bytes}", size_bytes).glob("*.txt"))
    written = 0
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        if kind == "csv":
            writer.writerow(["text", "number"])
        for number, part in enumerate(parts):
            if written >= size_bytes:
                break
            text = part.read_text(encoding="utf-8")
            if kind == "txt":
                file.write(text)
            else:  # rows of 40 lines, line ends and quotes within
                lines = text.splitlines(keepends=True)
                writer.writerows(["".join(lines[i : i + 40]), number] for i in range(0, len(lines), 40))
            written += len(text.encode())
    if written < 0.95 * size_bytes:
        raise SystemExit(
            f"{temporary} has {written} bytes instead of {size_bytes}: remove {work} and try again"
        )
    temporary.replace(path)
    return path


def run_one(data: Path, limit_bytes: int, processes: int) -> dict[str, Any]:
    """Prepare under the limit; peaks of this process and of those it starts."""
    from manyhands.data.prepare import prepare
    from manyhands.data.source import DataSpec

    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    peaks: dict[int, int] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(POLL_S):
            for task in Path("/proc/self/task").iterdir():
                for child in (task / "children").read_text().split():
                    if (peak := peak_of(child)) is not None:
                        peaks[int(child)] = max(peak, peaks.get(int(child), 0))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with tempfile.TemporaryDirectory(prefix="manyhands-prepare-", dir=data.parent) as cache:
            made = prepare(
                DataSpec(data=(str(data),), tokenizer=TOKENIZER), cache=Path(cache), processes=processes
            )
            pieces = len(json.loads((made.directory / "plan.json").read_text())["pieces"])
    finally:
        done.set()
        watcher.join()
    return {
        "tokens": made.tokens,
        "text_bytes": made.text_bytes,
        "pieces": pieces,
        "peak_bytes_parent": peak_of("self"),  # trains the tokenizer
        "peak_bytes_workers": sorted(peaks.values(), reverse=True)[:processes],
    }


def peak_of(process: str) -> int | None:
    """VmHWM in bytes, or None where the process is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), None
    )


def main() -> int:
    from manyhands.core.hardware import cache_directory

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit-mb", type=int, default=512, help="of private memory, each process")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--sizes-mb", type=int, nargs="+", default=list(SIZES_MB))
    parser.add_argument("--work", type=Path, default=cache_directory() / "benchmarks")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "prepare_memory.json")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    limit = given.limit_mb << 20
    if given.one:
        print(json.dumps(run_one(given.one.resolve(), limit, given.processes)))
        return 0
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    runs = []
    for kind in ("txt", "csv"):
        for size in given.sizes_mb:
            data = make(work, size << 20, kind)
            command = [sys.executable, __file__, "--one", str(data)]
            command += ["--limit-mb", str(given.limit_mb), "--processes", str(given.processes)]
            start = time.perf_counter()
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            runs.append(
                {
                    "kind": kind,
                    "corpus_bytes": data.stat().st_size,
                    "wall_s": time.perf_counter() - start,
                    **found,
                }
            )
            peaks = ", ".join(f"{peak / 2**20:.0f}" for peak in found["peak_bytes_workers"])
            print(
                f"{kind} {size} MiB: workers {peaks} MiB, parent {found['peak_bytes_parent'] / 2**20:.0f} MiB",
                flush=True,
            )
            os.unlink(data)
    growth = {
        kind: max(of[-1]["peak_bytes_workers"]) / max(of[-2]["peak_bytes_workers"])
        for kind in ("txt", "csv")
        if len(of := [run for run in runs if run["kind"] == kind]) > 1
    }
    data = {
        "command": f"python benchmarks/prepare_memory.py --limit-mb {given.limit_mb} --processes {given.processes}",
        "machine": harness.facts_of_machine(),
        "limit_bytes": limit,
        "tokenizer": TOKENIZER,
        "growth_of_the_peak_from_the_second_largest_to_the_largest_corpus": growth,
        "runs": runs,
    }
    harness.write_json(given.output, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
