"""Every family of strategies under SIGKILL at random moments, by `manyhands chaos`: does it end, is every sample used once?

    python benchmarks/faults_families.py [--only diloco zero …] [--kills 4] [--again]

Three workers and gpt2-nano; a worker is killed every `--kills` seconds on average and replaced. What must be: exit code 0,
no sample used twice, and none lost but those that the ledger has as left out (`drop`: methods without a common point
between agreements, and `discard`). Adds to ``results/faults_families.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults import chaos
from harness import RESULTS, facts_of_machine, write_json

OUT = RESULTS / "faults_families.json"
EF = "exchange=error-feedback(int4)"
FAMILIES = (
    "ddp",
    f"ddp({EF})",
    "hierarchical",
    f"accumulate(every=3, {EF})",
    "powersgd(rank=2)",
    f"local-sgd(every=4, {EF})",
    "slowmo(every=4)",
    f"diloco(every=4, {EF})",
    "streaming-diloco(every=4, fragments=2, delay=1)",
    "muloco(every=4)",
    "sparseloco(every=4)",
    "demo",
    "gossip(every=4)",
    f"eager({EF})",
    f"forecast(every=4, fragments=4, {EF})",
    "hogwild",
    "zero1",
    "zero2",
    f"zero3(shard=1, {EF})",
    "zero3",
    "parameter-server",
    "parameter-server(consistency=bounded(3), servers=2)",
    "parameter-server(consistency=async)",
)


def run(strategy: str, text: Path, scratch: Path, given: argparse.Namespace) -> dict[str, Any]:
    begun = time.monotonic()
    report = chaos(
        scratch / "chaos",
        *(
            "--data",
            text,
            "--cache",
            scratch / "cache",
            "--model",
            "gpt2-nano",
            "--tokenizer",
            "byte",
            "--seq-len",
            64,
        ),
        *(
            "--eval-fraction",
            0,
            "--prompt",
            "",
            "--device",
            "cpu",
            "--precision",
            "fp32",
            "--global-batch",
            24,
        ),
        *("--workers", 3, "--threads", 1, "--steps", given.steps, "--save-every", 100, "--log-every", 1),
        *("--restarts", 99, "--strategy", strategy, "--kills", given.kills, "--chaos-seed", given.seed),
    )
    ledger = report["ledger"]
    kills = sum(f["outcome"] == "done" for f in report["faults"])
    whole = report["exit_code"] == 0 and ledger["ok"] and not ledger["lost"] and not ledger["doubled"]
    return {
        "strategy": strategy,
        "seed": given.seed,
        "kills": kills,
        "phases": sorted({loss["phase"] for loss in report["lost"]}),
        "goodput": report["goodput"],
        "useful_work": report["useful_work"],
        "steps": report["steps"] + 1,
        "exit_code": report["exit_code"],
        "ledger": ledger,
        "recovery_s": report["recovery_s"],
        "losses": report["losses"],
        "wall_s": time.monotonic() - begun,
        "load": os.getloadavg(),
        "ok": bool(whole and kills),
    }


def said(row: dict[str, Any]) -> str:
    recovery = row["recovery_s"] or {"median": float("nan"), "max": float("nan")}
    return (
        f"{'ok ' if row['ok'] else 'NOT'} {row['strategy']}: {row['kills']} kills, exit code {row['exit_code']}, "
        f"{row['ledger']['verdict']}; recovery {recovery['median']:.2f} s median, {recovery['max']:.2f} s at most"
    )


def chosen(only: list[str]) -> Iterator[str]:
    for strategy in FAMILIES:
        if not only or any(strategy.startswith(word) for word in only):
            yield strategy


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="*", default=[], help="strategies that begin so")
    p.add_argument("--kills", type=float, default=4.0, help="seconds between two, on average")
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--again", action="store_true", help="also those that are there already")
    p.add_argument("--output", type=Path, default=OUT)
    given = p.parse_args()
    data = json.loads(given.output.read_text()) if given.output.exists() else {"rows": []}
    rows: list[dict[str, Any]] = data["rows"]
    for strategy in chosen(given.only):
        if not given.again and any(row["strategy"] == strategy and row["ok"] for row in rows):
            continue
        with tempfile.TemporaryDirectory(prefix="families-") as temporary:
            scratch = Path(temporary)
            text = scratch / "data.txt"
            text.write_text("\n".join(f"{i} times {i} is {i * i}" for i in range(2000)))
            found = run(strategy, text, scratch, given)
        rows = [*(row for row in rows if row["strategy"] != strategy), found]
        print(said(found), flush=True)
        command = "python benchmarks/faults_families.py"
        write_json(given.output, {"command": command, "machine": facts_of_machine(), "rows": rows})
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
