"""What `Replica.step` costs over bare forward, backward, clipping and optimizer: one process, a world of one.

    python benchmarks/step_overhead.py [--pairs 40] [--rows 8]

Two copies of one model take single steps in turn (A B B A …) on the same rows, so that both meet the same machine. Once with
the system's allocator and once with ours, each in a process of its own. Writes ``results/step_overhead.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import setting

WARMUP = 4  # pairs that are not counted
LR, BETAS, WEIGHT_DECAY, MAX_NORM = 3e-4, (0.9, 0.95), 0.1, 1.0


def bare(model: Any, optimizer: Any, loss: Callable[..., Any]) -> Callable[[int, dict[str, Any]], float]:
    """The loop that one writes by hand, with the same loss, precision and optimizer."""
    import torch

    def step(_: int, batch: dict[str, Any]) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            summed = loss(model, batch)
        mean = summed.loss_sum / summed.count
        mean.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return mean.item()

    return step


def layered(model: Any, loss: Callable[..., Any]) -> Callable[[int, dict[str, Any]], float]:
    """The same through `Replica.step`."""
    import manyhands
    from manyhands.train.replica import Part

    replica = manyhands.join(device="cpu").replicate(
        model,
        manyhands.presets.ddp(lr=LR, weight_decay=WEIGHT_DECAY, schedule="constant"),
        max_grad_norm=MAX_NORM,
        targets_per_row=setting.SEQ_LEN,
        precision="bf16",
    )

    def step(number: int, batch: dict[str, Any]) -> float:
        rows = len(batch["targets"])
        return replica.step(Part(number, [(0, batch)], 1, rows, 0), loss).loss

    return step


def measure(place: Path, pairs: int, rows: int) -> dict[str, Any]:
    """Seconds of each step of both, and the largest relative difference of their losses."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from manyhands.strategy.named import decay_groups
    from manyhands.tasks.pretrain import Pretrain

    models = [AutoModelForCausalLM.from_pretrained(place / "init").train() for _ in range(2)]
    groups = decay_groups(list(models[0].named_parameters()), WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
    loss = Pretrain().loss
    steps = {"bare": bare(models[0], optimizer, loss), "manyhands": layered(models[1], loss)}
    data = torch.from_numpy(np.load(place / "rows.npy", mmap_mode="r")[: rows * 64].astype("int64"))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    apart = 0.0
    for pair in range(WARMUP + pairs):
        block = data[pair * rows % len(data) :][:rows]  # [rows, 257]
        batch = {"input_ids": block[:, :-1].contiguous(), "targets": block[:, 1:].contiguous()}
        losses = {}
        for name in ("bare", "manyhands") if pair % 2 == 0 else ("manyhands", "bare"):
            start = time.perf_counter()
            losses[name] = steps[name](pair, batch)
            seconds[name].append(time.perf_counter() - start)
        apart = max(apart, abs(losses["bare"] - losses["manyhands"]) / losses["bare"])
    kept = {name: values[WARMUP:] for name, values in seconds.items()}
    ratios = [a / b for a, b in zip(kept["manyhands"], kept["bare"], strict=True)]
    q1, median, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "ratio": {"q1": q1, "median": median, "q3": q3},
        "median_s": {name: statistics.median(values) for name, values in kept.items()},
        "threads": torch.get_num_threads(),
        "largest_difference_of_losses": apart,
        "seconds": kept,
    }


def main() -> int:
    from manyhands.core.hardware import cache_directory

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--work", type=Path, default=cache_directory() / "benchmarks")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "step_overhead.json")
    parser.add_argument("--allocator", choices=("system", "caching"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.allocator:  # one of our own processes
        if given.allocator == "caching":
            from manyhands.core.native import enable_allocator

            if (used := enable_allocator()) != "caching":
                raise SystemExit(f"the allocator is {used}")
        print(json.dumps(measure(given.work.resolve(), given.pairs, given.rows)))
        return 0
    setting.make(given.work.resolve())
    found = {}
    for allocator in ("system", "caching"):
        command = [sys.executable, __file__, "--allocator", allocator, "--work", str(given.work)]
        command += ["--pairs", str(given.pairs), "--rows", str(given.rows)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[allocator] = json.loads(done.stdout.splitlines()[-1])
        ratio = found[allocator]["ratio"]
        print(
            f"{allocator} allocator: {ratio['median']:.4f} ({ratio['q1']:.4f} – {ratio['q3']:.4f})",
            flush=True,
        )
    data = {
        "command": f"python benchmarks/step_overhead.py --pairs {given.pairs} --rows {given.rows}",
        "machine": harness.facts_of_machine(),
        "rows": given.rows,
        "seq_len": setting.SEQ_LEN,
        "allocators": found,
        "target": 1.01,
    }
    harness.write_json(given.output, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
