"""What the peers of the comparison over limited links share: arguments, model, rows, AdamW with its schedule, the record.

Every worker prints each step as one JSON line with the time of its end, as it ends: who runs the script changes the rate of the
links in between. Nothing here knows manyhands.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

BETAS, WEIGHT_DECAY, MAX_NORM, IGNORED = (0.9, 0.95), 0.1, 1.0, -100
WIDEST_EVAL_ROWS = 32


def parser() -> argparse.ArgumentParser:
    """The command line of every peer."""
    p = argparse.ArgumentParser()
    p.add_argument(
        "--setting", type=Path, required=True, help="directory made by benchmarks/methods_setting.py"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, required=True)
    p.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="of the matrix products")
    p.add_argument("--evaluate", action="store_true", help="score the held-out rows at the end (rank 0)")
    return p


class Peer:
    """One worker: its place, the shared model and rows, and what it prints."""

    def __init__(self, given: argparse.Namespace) -> None:
        import numpy as np
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.given = given
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.facts = json.loads((given.setting / f"setting-{given.seed}.json").read_text())
        self.rows = np.load(given.setting / f"rows-{given.seed}.npy", mmap_mode="r")
        self.batch = self.facts["global_batch"]
        self.model: Any = AutoModelForCausalLM.from_pretrained(given.setting / f"init-{given.seed}").train()

    def optimizer(self) -> Any:
        """PyTorch's fused AdamW with weight decay on matrices."""
        import torch

        params = list(self.model.parameters())
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.facts["lr"], betas=BETAS, fused=True)

    def schedule(self, optimizer: Any) -> Any:
        """Warm-up, then a cosine to a tenth, by steps."""
        import torch

        warmup, total = self.facts["warmup"], self.given.steps

        def factor(done: int) -> float:
            if done < warmup:
                return (done + 1) / (warmup + 1)
            x = min(1.0, (done - warmup) / max(1, total - warmup))
            return 0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * x))

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def loss(self, forward: Any, step: int) -> Any:
        """Mean loss of this worker's share of a step's rows. Rows are used again after the last."""
        import torch

        each = self.batch // self.world
        first = (step * self.batch) % (len(self.rows) - self.batch + 1) + self.rank * each
        return self._loss(forward, torch.from_numpy(self.rows[first : first + each].astype("int64")))

    def _loss(self, forward: Any, rows: Any, reduction: str = "mean") -> Any:
        import torch

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.given.precision == "bf16"):
            logits = forward(input_ids=rows[:, :-1]).logits  # [rows, seq_len, vocabulary]
        return torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), rows[:, 1:].flatten(), ignore_index=IGNORED, reduction=reduction
        )

    def clip(self) -> None:
        import torch

        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)

    def say(self, step: int, loss: Any) -> None:
        """The end of a step: its (own) loss and the time."""
        print(json.dumps({"step": step + 1, "loss": float(loss), "time_s": time.time()}), flush=True)

    def finish(self) -> None:
        """Score the held-out rows where asked to, on rank 0; print the end."""
        import numpy as np
        import torch

        found: dict[str, Any] = {"parameters": self.facts["parameters"]}
        if self.given.evaluate and self.rank == 0:
            held = np.load(self.given.setting / "eval.npy", mmap_mode="r")
            self.model.eval()
            total, count = 0.0, 0
            with torch.no_grad():
                for start in range(0, len(held), WIDEST_EVAL_ROWS):
                    rows = torch.from_numpy(held[start : start + WIDEST_EVAL_ROWS].astype("int64"))
                    total += float(self._loss(self.model, rows, "sum"))
                    count += int((rows[:, 1:] != IGNORED).sum())
            found["eval_loss"] = total / count
        if self.rank == 0:
            print(json.dumps({"done": found}), flush=True)
