"""Jobs whose passes are larger than their container: a real memory cgroup, and a kernel that kills (root).

    python benchmarks/memory_limit.py [--limit-mib 1100] [--only ddp …]

Two workers with passes of 256 rows each (`--device-batch 256`, or `--micro-batch` where a pass is one micro-batch) in a cgroup
of so many MiB, for all processes of the job together. Recorded: who was killed and what came of it, the rows of passes in
the end, the ledger's verdict, and the largest difference of the losses from those of the same job without a limit.

Writes ``results/memory_limit.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness

STEPS = 6
JOBS = {
    "ddp": ["--device-batch", "256"],
    "zero3": ["--strategy", "zero3", "--device-batch", "256"],
    "diloco": ["--strategy", "diloco(every=3)", "--device-batch", "256"],
    "zero3, one micro-batch": ["--strategy", "zero3", "--micro-batch", "128"],
}


@contextmanager
def limited(limit_bytes: int) -> Iterator[Path]:
    """A memory cgroup: the file that a process writes its number into to live in it."""
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    root = v1 if v1.is_dir() else v2
    group = root / f"manyhands-limit-{os.getpid()}"
    if root is v2:
        (v2 / "cgroup.subtree_control").write_text("+memory")
    group.mkdir()
    try:
        if root is v1:
            (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
        else:
            (group / "memory.max").write_text(str(limit_bytes))
            (group / "memory.swap.max").write_text("0")
        yield group / "cgroup.procs"
    finally:
        deadline = time.monotonic() + 30
        while (group / "cgroup.procs").read_text().split() and time.monotonic() < deadline:
            time.sleep(0.1)
        group.rmdir()


def train(output: Path, given: list[str], procs: Path | None) -> int:
    """One job; its exit code. Its words go into ``output.log``."""
    data = str(Path(json.__file__).parents[1] / "*.py")  # the standard library's own modules
    command = [
        *(sys.executable, "-m", "manyhands", "train", "--data", data, "--tokenizer", "byte"),
        *("--model", "gpt2-nano", "--seq-len", "256", "--global-batch", "512", "--workers", "2"),
        *("--steps", str(STEPS), "--eval-fraction", "0", "--prompt", "", "--balance", "off"),
        *("--log-every", "1", "--output", str(output), *given),
    ]
    enter = f"echo $$ > {procs} && " if procs else ""
    with output.with_suffix(".log").open("w") as log:
        return subprocess.run(
            ["sh", "-c", f'{enter}exec "$@"', "sh", *command], stdout=log, stderr=log
        ).returncode


def told(output: Path) -> dict[str, Any]:
    """What the job's own records say."""
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = {e["step"]: e["loss"] for e in events if e["event"] == "stepped"}
    ledger = subprocess.run(
        [sys.executable, "-m", "manyhands", "ledger", str(output)], capture_output=True, text=True
    )
    keys = ("seat", "phase", "step", "detail", "then")
    return {
        "lost": [{key: e.get(key) for key in keys} for e in events if e["event"] == "lost"],
        "losses": [losses[step] for step in sorted(losses)],
        "ledger": ledger.stdout.splitlines()[-1:],
        "ledger_code": ledger.returncode,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit-mib", type=int, default=1100)
    parser.add_argument("--only", nargs="+", choices=list(JOBS), default=list(JOBS))
    given = parser.parse_args()
    if os.geteuid() != 0:
        print("skipped: only root makes a cgroup")
        return 0
    rows = []
    with tempfile.TemporaryDirectory(prefix="manyhands-limit-") as scratch:
        free = Path(scratch) / "without"
        if train(free, [], None):
            raise SystemExit(free.with_suffix(".log").read_text()[-2000:])
        reference = told(free)["losses"]
        for i, name in enumerate(given.only):
            output, begun = Path(scratch) / f"job-{i}", time.monotonic()
            with limited(given.limit_mib << 20) as procs:
                code = train(output, JOBS[name], procs)
            row = {"job": name, "arguments": JOBS[name], "exit_code": code, **told(output)}
            pairs = list(zip(row["losses"], reference, strict=False))
            row["loss_difference"] = max(abs(a - b) for a, b in pairs) if pairs else None
            rows.append({**row, "wall_s": time.monotonic() - begun})
            print(
                f"{name}: exit code {code}, {len(row['lost'])} lost, {row['ledger']}, "
                f"loss difference {row['loss_difference']}"
            )
            for lost in row["lost"]:
                print("   ", lost["seat"], lost["phase"], lost["step"], lost["detail"], "->", lost["then"])
    harness.write_json(
        harness.RESULTS / "memory_limit.json",
        {
            "command": f"python benchmarks/memory_limit.py --limit-mib {given.limit_mib}",
            "machine": harness.facts_of_machine(),
            "limit_mib": given.limit_mib,
            "rows": rows,
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
