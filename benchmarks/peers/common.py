"""What the contenders share, so that each script is its library's own training loop and nothing else.

The same arguments, initial weights, rows, weight decay groups and stop-watch for all. Nothing here knows manyhands.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

LR, BETAS, WEIGHT_DECAY, MAX_NORM = 3e-4, (0.9, 0.95), 0.1, 1.0


def arguments() -> argparse.Namespace:
    """The command line of every contender; pins this process where asked to (before torch makes threads)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--setting", type=Path, required=True, help="directory made by benchmarks/setting.py")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--rows", type=int, default=16, help="the global batch")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--fused", action="store_true", help="PyTorch's fused AdamW")
    parser.add_argument("--pin", action="store_true", help="this process to OMP_NUM_THREADS cores of its own")
    given = parser.parse_args()
    given.rank = int(os.environ.get("LOCAL_RANK", "0"))
    given.world = int(os.environ.get("WORLD_SIZE", "1"))
    if given.rows % given.world:
        parser.error(f"{given.rows} rows do not divide among {given.world} processes")
    if given.pin:
        each = int(os.environ["OMP_NUM_THREADS"])
        cores = sorted(os.sched_getaffinity(0))[given.rank * each :][:each]
        os.sched_setaffinity(0, cores)
    return given


def load_model(given: argparse.Namespace) -> Any:
    """The shared initial model, in float32, ready to train."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(given.setting / "init").train()


class Rows:
    """The shared rows as a map-style data set.

    An item holds ``input_ids`` [256] and its targets, twice: Transformers' models compute a loss where ``labels`` is
    given, and take ``shift_labels`` as targets that are shifted already.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        import numpy as np

        self._rows = np.load(given.setting / "rows.npy", mmap_mode="r")[: given.steps * given.rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        import torch

        row = torch.from_numpy(self._rows[i].astype("int64"))  # [257]
        return {"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]}


def decay_groups(model: Any) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for biases and norms."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


def adamw(model: Any, given: argparse.Namespace) -> Any:
    """PyTorch's AdamW: its default implementation, or the fused one."""
    import torch

    chosen = {"fused": True} if given.fused else {}
    return torch.optim.AdamW(decay_groups(model), lr=LR, betas=BETAS, **chosen)


class Stopwatch:
    """Time and loss of each step; rank 0 prints them at the end, one JSON line a step, then one of facts."""

    def __init__(self) -> None:
        self._marks: list[float] = []
        self._losses: list[float] = []

    def start(self) -> None:
        self._marks = [time.perf_counter()]

    def step(self, loss: Any) -> None:
        """The end of a step whose mean loss over this process's rows is `loss`."""
        self._losses.append(float(loss))
        self._marks.append(time.perf_counter())
        if ready := os.environ.get("BENCHMARK_READY"):  # for who waits for the first step
            Path(ready).touch()

    def mark(self) -> None:
        """The end of a step whose loss is told later, by `loss`."""
        self._marks.append(time.perf_counter())

    def loss(self, loss: float) -> None:
        self._losses.append(loss)

    def report(self, *, averaged: bool = False) -> None:
        """Print. The mean over processes is taken here, outside the timed steps, unless the losses are it already."""
        import torch
        import torch.distributed as dist

        losses = torch.tensor(self._losses, dtype=torch.float64)
        if dist.is_initialized() and dist.get_world_size() > 1 and not averaged:
            dist.all_reduce(losses)
            losses /= dist.get_world_size()
        if os.environ.get("RANK", "0") != "0":
            return
        assert len(self._losses) == len(self._marks) - 1, "each step has a loss and an end"
        for i, loss in enumerate(losses.tolist()):
            print(json.dumps({"step": i, "loss": loss, "seconds": self._marks[i + 1] - self._marks[i]}))
        facts = {
            "world": int(os.environ.get("WORLD_SIZE", "1")),
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        print(json.dumps({"done": facts}), flush=True)
