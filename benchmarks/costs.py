"""What safety costs while nothing goes wrong, and what tail work would gain. Ordinary jobs, held against themselves.

    python benchmarks/costs.py [--work DIRECTORY] [--saves 40] [--checks 40]

Two workers on two cores train the speed comparison's model (setting.py) through the command line, four times:

    checkpoints    a save every 4 steps: the two steps after each save, in which it is taken and written, against the two
                   after those. Their difference is what a save costs; a minute has one (the goal: below 1% of it)
    fingerprints   a comparison after every second step: the intervals with one against those without
    membership     processor time of all threads but the main one of each worker (signs of life, the coordinator's
                   stream), as a share of all; the same without a coordinator (``--elastic off``)
    tail           from each step's rows and seconds of each worker: the slowest worker's time / the time in which
                   both, at the speeds that they had in that step, could have done all rows, ending together to within
                   half, a quarter and an eighth of a share. That is the most that taking each other's last
                   micro-batches could gain; beside it, what it costs to run a share in so many passes instead of one

Writes ``results/costs.json``: every interval, medians with 95% intervals (order statistics).
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

import harness
import setting
from efficiency import summary

HALF = 2  # steps: a save every two halves; the first is longer than it takes to write
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def train(
    place: Path, output: Path, *arguments: object, watch: bool = False
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A job to its end: its events, and (with `watch`) the workers' processor seconds by kind of thread."""
    command = [
        *(sys.executable, "-m", "manyhands", "train", str(place / "bench.toml"), "--workers", "2"),
        *("--global-batch", str(setting.GLOBAL_BATCH), "--output", str(output), *map(str, arguments)),
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(harness.REMOVED)} | harness.ADDED
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    threads: dict[int, dict[str, float]] = {}
    while process.poll() is None:
        if watch:
            for pid in workers(output):
                threads[pid] = processor_s(pid) or threads.get(pid, {})
        time.sleep(0.5)
    if process.returncode:
        assert process.stderr is not None
        raise SystemExit(process.stderr.read())
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    total = {kind: sum(each.get(kind, 0.0) for each in threads.values()) for kind in ("main", "others")}
    return events, total


def workers(output: Path) -> list[int]:
    from manyhands.launch.chaos import workers_of

    return list(workers_of(output).values())


def processor_s(pid: int) -> dict[str, float]:
    """Of a process's main thread, and of its others; empty where it has ended."""
    found = {"main": 0.0, "others": 0.0}
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            fields = Path(f"/proc/{pid}/task/{task}/stat").read_text().rpartition(")")[2].split()
            found["main" if int(task) == pid else "others"] += (int(fields[11]) + int(fields[12])) * TICK_S
    except OSError:
        return {}
    return found


def times(events: list[dict[str, Any]]) -> dict[int, float]:
    """When each step was done."""
    return {e["step"]: e["time_s"] for e in events if e["event"] == "stepped"}


def checkpoints(place: Path, scratch: Path, saves: int) -> dict[str, Any]:
    steps = 2 * HALF * (saves + 1)
    events, _ = train(place, scratch / "saves", "--steps", steps, "--save-every", 2 * HALF)
    at = times(events)
    pairs = [
        (at[s + HALF] - at[s], at[s + 2 * HALF] - at[s + HALF])
        for s in range(2 * HALF, steps - 2 * HALF + 1, 2 * HALF)
    ]
    saved = [e for e in events if e["event"] == "saved"]
    cost = summary([with_save - without for with_save, without in pairs])
    return {
        "pairs_s": pairs,
        "bytes": saved[0]["size_bytes"],
        "written_in_s": statistics.median(e["wall_s"] for e in saved),
        "training_waited_s": statistics.median(e["blocked_s"] for e in saved),
        "cost_s": cost,
        "share_of_a_minute": {key: value / 60 for key, value in cost.items()},
    }


def fingerprints(place: Path, scratch: Path, checks: int) -> dict[str, Any]:
    events, _ = train(place, scratch / "checks", "--steps", 2 * checks + 4, "--check-every", 2)
    at = times(events)
    begin = range(4, 2 * checks + 1, 2)  # a comparison follows an even step
    with_check, without = [at[s + 1] - at[s] for s in begin], [at[s + 2] - at[s + 1] for s in begin]
    cost = summary([a - b for a, b in zip(with_check, without, strict=True)])
    return {"with_s": with_check, "without_s": without, "cost_s": cost, "step_s": statistics.median(without)}


def membership(place: Path, scratch: Path, steps: int) -> dict[str, Any]:
    found = {}
    for name, mode in (("with", "auto"), ("without", "off")):
        _, spent = train(place, scratch / f"elastic-{mode}", "--steps", steps, "--elastic", mode, watch=True)
        found[name] = {**spent, "share": spent["others"] / (spent["main"] + spent["others"])}
    return found


PARTS = (1, 2, 4, 8)  # of a worker's share


def tail(events: list[dict[str, Any]], place: Path, rounds: int) -> dict[str, Any]:
    """The most that sharing the last micro-batches could gain, and what smaller passes cost."""
    steps = [e["workers"] for e in events if e["event"] == "balance"][4:]
    slowest = [max(w["compute_s"] for w in step) for step in steps]
    together = [
        sum(w["rows"] for w in step) / sum(w["rows"] / w["compute_s"] for w in step) for step in steps
    ]
    row_s = [min(w["compute_s"] / w["rows"] for w in step) for step in steps]
    share = setting.GLOBAL_BATCH // 2
    gains = {
        parts: sum(slowest) / sum(t + s * share / parts / 2 for t, s in zip(together, row_s, strict=True)) - 1
        for parts in PARTS[1:]
    }
    return {
        "steps": len(steps),
        "slowest_over_ideal": sum(slowest) / sum(together),
        "most_gain_by_parts": gains,
        "passes_cost": passes(place, share, rounds),
    }


def passes(place: Path, rows: int, rounds: int) -> dict[int, float]:
    """Forward and backward of `rows` rows in so many passes / in one: medians of alternating rounds, one thread."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from manyhands.core import compute
    from manyhands.core.native import enable_allocator
    from manyhands.tasks.pretrain import Pretrain

    torch.set_num_threads(1)
    enable_allocator()
    compute.enable()
    model = AutoModelForCausalLM.from_pretrained(place / "init").train()
    data = torch.from_numpy(np.load(place / "rows.npy", mmap_mode="r")[:rows].astype("int64"))
    loss, seconds = Pretrain().loss, {parts: list[float]() for parts in PARTS}
    for turn in range(rounds + 2):
        for parts in harness.rotated(PARTS, turn, rounds + 2):
            begun = time.perf_counter()
            for piece in data.split(rows // parts):
                batch = {"input_ids": piece[:, :-1], "targets": piece[:, 1:]}
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss_sum, _ = loss(model, batch)
                loss_sum.backward()
            seconds[parts].append(time.perf_counter() - begun)
            model.zero_grad()
    ratios = {p: [a / b for a, b in zip(seconds[p], seconds[1], strict=True)][2:] for p in PARTS[1:]}
    return {parts: statistics.median(each) for parts, each in ratios.items()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--work",
        type=Path,
        help="where the setting is made, or lies already (default: a temporary directory)",
    )
    p.add_argument("--saves", type=int, default=40)
    p.add_argument("--checks", type=int, default=40)
    given = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="costs-") as temporary:
        place, scratch = given.work or Path(temporary) / "setting", Path(temporary)
        setting.make(place)
        found = {
            "command": "python benchmarks/costs.py",
            "machine": harness.facts_of_machine(),
            "load": os.getloadavg(),
            "checkpoints": checkpoints(place, scratch, given.saves),
            "fingerprints": fingerprints(place, scratch, given.checks),
            "membership": membership(place, scratch, given.checks),
            "tail": tail(
                train(place, scratch / "tail", "--steps", 2 * given.checks)[0], place, given.checks // 4
            ),
        }
    harness.write_json(harness.RESULTS / "costs.json", found)
    print(
        json.dumps(
            {name: found[name] for name in ("checkpoints", "fingerprints", "membership", "tail")}, indent=1
        )
    )


if __name__ == "__main__":
    main()
