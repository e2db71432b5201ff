"""What every contender shares: the model, the rows, the recipe and the record. Nothing here trains anything.

The setting: GPT-2 of Transformers, 6 layers × 384, 6 heads, vocabulary 8,192, rows of 256 tokens, dropout 0; AdamW at a
constant 3e-4, betas 0.9 and 0.95, weight decay 0.1 on matrices only; global gradient norm clipped at 1. The initial
weights are one checkpoint, the rows one array; global batch t is rows [16t, 16t + 16).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

RESULTS = Path(__file__).parent / "results"
SEED = 0
VOCABULARY, LENGTH, GLOBAL_BATCH = 8192, 256, 16
LR, BETAS, WEIGHT_DECAY, MAX_NORM = 3e-4, (0.9, 0.95), 0.1, 1.0
ROWS = GLOBAL_BATCH * 64
SHAPE = {"n_layer": 6, "n_embd": 384, "n_head": 6, "vocab_size": VOCABULARY, "n_positions": LENGTH}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TOKENIZER_BYTES = 8 << 20


# -- material: made once, the same bits every time


def make_material(directory: Path) -> Path:
    """Tokenizer, rows and initial weights in `directory`, unless they are there."""
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "rows.npy").exists():
        _make_rows(directory)
    if not (directory / "model" / "config.json").exists():
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(SEED)
        config = GPT2Config(**SHAPE, **NO_DROPOUT, bos_token_id=None, eos_token_id=None, use_cache=False)
        GPT2LMHeadModel(config).save_pretrained(directory / "model")
    return directory


def library_files() -> list[Path]:
    """The Python standard library's sources, shuffled by the seed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(f for f in root.rglob("*.py") if "site-packages" not in f.parts and "test" not in f.parts)
    random.Random(SEED).shuffle(files)
    return files


def texts(size: int) -> Iterator[str]:
    """Whole sources, about `size` bytes together."""
    for file in library_files():
        if size <= 0:
            return
        text = file.read_text(encoding="utf-8", errors="replace")
        size -= len(text)
        yield text


def _make_rows(directory: Path) -> None:
    import numpy as np
    from tokenizers import Tokenizer

    from manyhands.data import tokenize

    if not (directory / "tokenizer").exists():
        tokenize.train(f"bpe:{VOCABULARY}", texts(TOKENIZER_BYTES), directory / "tokenizer")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer" / "tokenizer.json"))
    wanted, tokens = ROWS * (LENGTH + 1), []
    for text in texts(TOKENIZER_BYTES):
        tokens += tokenizer.encode(text).ids
        if len(tokens) >= wanted:
            break
    rows = np.array(tokens[:wanted], dtype=np.int32).reshape(ROWS, LENGTH + 1)  # [rows, 257]
    temporary = directory / "rows.tmp.npy"
    np.save(temporary, rows)
    temporary.replace(directory / "rows.npy")


# -- for the contenders


@dataclass(frozen=True)
class Given:
    """The command line of a contender.

    Attributes:
        report: file for one JSON line a step: {"step", "loss", "seconds"}.
        batch: rows of a step over all processes.
        tuned: bf16 autocast, torch.compile, fused AdamW, pinned; else as the library comes.
    """

    material: Path
    report: Path
    steps: int
    batch: int
    tuned: bool
    options: argparse.Namespace

    @property
    def model_path(self) -> str:
        return str(self.material / "model")


def arguments(parser: argparse.ArgumentParser | None = None, *, pin: bool = True) -> Given:
    """Read the command line; a tuned contender is pinned here, before torch is imported."""
    parser = parser or argparse.ArgumentParser()
    parser.add_argument("--material", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=GLOBAL_BATCH)
    parser.add_argument("--tuned", action="store_true")
    options = parser.parse_args()
    if pin and "BENCHMARK_CORES" in os.environ:  # "0,1" for one process, "0:1" for two of one core each
        cores = os.environ["BENCHMARK_CORES"].split(":")[int(os.environ.get("LOCAL_RANK", "0"))]
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    return Given(options.material, options.report, options.steps, options.batch, options.tuned, options)


def load_model(given: Given) -> nn.Module:
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(given.model_path, local_files_only=True).train()


def load_rows(given: Given) -> np.ndarray:
    """[rows, 257] int32, the rows of all steps in order."""
    import numpy as np

    return np.load(given.material / "rows.npy")[: given.steps * given.batch]


class Dataset:
    """Map-style: one row as the model's arguments. `shift_labels` says that targets are shifted already."""

    def __init__(self, given: Given) -> None:
        self._rows = load_rows(given)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        import torch

        row = torch.from_numpy(self._rows[i].astype("int64"))
        return {"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]}


def adamw(model: nn.Module, *, tuned: bool) -> torch.optim.Optimizer:
    import torch

    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True if tuned else None)


@dataclass
class Recorder:
    """Loss and seconds of each step; a step's seconds go from the end of the one before, so data counts."""

    path: Path
    lines: list[dict[str, Any]] = field(default_factory=list)
    _mark: float = 0.0

    def start(self) -> None:
        self._mark = time.perf_counter()

    def step(self, loss: float) -> None:
        now = time.perf_counter()
        self.lines.append({"step": len(self.lines), "loss": loss, "seconds": now - self._mark})
        self._mark = now

    def finish(self, losses: list[float] | None = None) -> None:
        """Write the lines; `losses` replaces one process's by the mean over processes."""
        for line, loss in zip(self.lines, losses or [], strict=False):
            line["loss"] = loss
        self.path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))


# -- for the scripts that compare


def write_json(name: str, value: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / name
    path.write_text(json.dumps(value, indent=1) + "\n")
    return path


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles, minimum and maximum."""
    import statistics

    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"median": middle, "q1": low, "q3": high, "min": min(values), "max": max(values)}


def default_work() -> Path:
    """Where material and compiled kernels are kept between runs."""
    from manyhands.core.hardware import cache_directory

    return cache_directory() / "benchmarks"
