"""Language models on one GPU: tokens/s, MFU, and what our layer costs over a loop written by hand.

    python benchmarks/gpu_speed.py [--models gpt2-small llama-1b] [--rounds 6]

Contenders in one process, each with a model of its own, the same weights and rows, bf16 autocast, compiled, PyTorch's fused
AdamW, clipping at 1: *bare* is a loop written by hand (it looks at the loss once a window) over our model and loss,
*manyhands* is `Replica.step` in a world of one, with `--residual bf16` or without. They run windows of `--window`
steps in turn, the order turning by one every round; a window
ends when the GPU has done all of it, and ratios are formed within a round. *script* is what one writes without us: Transformers'
model and PyTorch's own cross entropy, compiled together.

MFU is tokens/s · FLOPs a token / peak; FLOPs a token are 6·N + 12·L·d·s (arXiv:2204.02311, appendix B; N without tables
that are only looked up, recomputation not counted), the peak is the measured rate of bf16 matrix products. Writes
``results/gpu_speed.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

LR, BETAS, WEIGHT_DECAY, MAX_NORM = 3e-4, (0.9, 0.95), 0.1, 1.0  # betas: AdamW's default here
WARMUP = 4  # steps that are not counted
BLOCKS = 4  # of rows, which are trained on in turn


@dataclass(frozen=True)
class Shape:
    """A model of `manyhands list models`, and the rows of a step."""

    name: str
    vocabulary: int
    seq_len: int
    rows: int
    contenders: tuple[str, ...] = ("bare", "manyhands", "manyhands, residual bf16", "script")


SHAPES = {
    "gpt2-small": Shape("gpt2-small", 50_304, 1024, 32),
    "llama-1b": Shape("llama-1b", 32_768, 1024, 16, ("bare", "manyhands")),
    "gpt2-nano": Shape("gpt2-nano", 512, 64, 8),  # to try the program out
}

Step = Callable[[int, dict[str, Any]], Any]


def autocast(device: str) -> Any:
    import torch

    return torch.autocast(device, dtype=torch.bfloat16)


def by_hand(model: Any, device: str, mean_loss: Callable[[dict[str, Any]], Any]) -> Step:
    """Forward, backward, clipping, optimizer."""
    import torch

    from manyhands.strategy.named import decay_groups

    optimizer = torch.optim.AdamW(
        decay_groups(list(model.named_parameters()), WEIGHT_DECAY), lr=LR, betas=BETAS, fused=True
    )

    def step(_: int, batch: dict[str, Any]) -> Any:
        with autocast(device):
            mean = mean_loss(batch)
        mean.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return mean

    return step


def bare(model: Any, device: str) -> Step:
    """With our loss, over the model as we compile it."""
    from manyhands.tasks.pretrain import Pretrain
    from manyhands.train.forward import compiled

    forward, loss = compiled(model), Pretrain().loss

    def mean_loss(batch: dict[str, Any]) -> Any:
        summed = loss(forward, batch)
        return summed.loss_sum / summed.count

    return by_hand(model, device, mean_loss)


def script(model: Any, device: str) -> Step:
    """With PyTorch's cross entropy, compiled together with the model."""
    import torch
    from torch.nn import functional

    @torch.compile(dynamic=False)
    def whole(ids: Any, targets: Any) -> Any:
        logits = model(input_ids=ids, use_cache=False).logits
        return functional.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.view(-1))

    return by_hand(model, device, lambda batch: whole(batch["input_ids"], batch["targets"]))


def layered(model: Any, device: str, seq_len: int) -> Step:
    """Through `Replica.step`, as the main job's loop does: losses are on the host after every step, norms one later."""
    from manyhands.strategy.presets import ddp
    from manyhands.tasks.pretrain import Pretrain
    from manyhands.train.forward import compiled
    from manyhands.train.replica import Part, Replica
    from manyhands.wire.solo import Solo

    replica = Replica(
        model,
        ddp(lr=LR, weight_decay=WEIGHT_DECAY, schedule="constant"),
        Solo(device),
        max_grad_norm=MAX_NORM,
        targets_per_row=seq_len,
        autocast=lambda: autocast(device),
        forward=compiled(model),
    )
    loss = Pretrain().loss
    earlier: list[Any] = []

    def step(number: int, batch: dict[str, Any]) -> Any:
        part = Part(number, [(0, batch)], 1, len(batch["targets"]), 0)
        result = replica.step(part, loss, late=True)
        if earlier:
            earlier.pop().settled()
        earlier.append(result)
        return result.loss

    return step


def as_float(loss: Any) -> float:
    return float(loss.detach()) if hasattr(loss, "detach") else float(loss)


def wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def measure(shape: Shape, device: str, rounds: int, window: int) -> dict[str, Any]:
    """Tokens/s of each contender, MFU, and ratios within rounds."""
    import torch

    from manyhands.core.hardware import peak_flops
    from manyhands.models.build import build
    from manyhands.models.describe import describe
    from manyhands.train.forward import narrow_residual, quicken

    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, shape.vocabulary, (BLOCKS, shape.rows, shape.seq_len + 1), generator=g).to(device)
    batches = [
        {"input_ids": block[:, :-1].contiguous(), "targets": block[:, 1:].contiguous()} for block in ids
    ]
    steps: dict[str, Step] = {}
    compile_s = {}
    losses: dict[str, list[float]] = {}
    for name in shape.contenders:
        model = build(shape.name, task="pretrain", vocab_size=shape.vocabulary, seq_len=shape.seq_len, seed=0)
        about = describe(model, seq_len=shape.seq_len)
        if name != "script":
            quicken(model)
        if name.endswith("residual bf16"):
            narrow_residual(model)
        model.to(device)
        made = {"bare": bare, "script": script}
        ours = name.startswith("manyhands")
        steps[name] = layered(model, device, shape.seq_len) if ours else made[name](model, device)
        start = time.perf_counter()
        losses[name] = [as_float(steps[name](number, batches[number % BLOCKS])) for number in range(WARMUP)]
        wait(device)
        compile_s[name] = time.perf_counter() - start
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round in range(rounds):
        for name in harness.rotated(list(steps), round, rounds):
            wait(device)
            start = time.perf_counter()
            for number in range(window):
                last = steps[name](number, batches[number % BLOCKS])
            as_float(last)
            wait(device)
            seconds[name].append((time.perf_counter() - start) / window)
    peak = peak_flops(device, "bfloat16", 1)
    tokens = shape.rows * shape.seq_len
    found: dict[str, Any] = {
        "parameters": about.parameters,
        "flops_per_token": about.flops_per_token,
        "peak_flops": peak,
        "rows": shape.rows,
        "seq_len": shape.seq_len,
        "vocabulary": shape.vocabulary,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "largest_difference_of_losses": max(
            harness.largest_difference(losses[name], losses["bare"]) for name in steps
        ),
        "warmup_s": compile_s,
    }
    for name, values in seconds.items():
        rate = tokens / statistics.median(values)
        ratios = sorted(mine / theirs for mine, theirs in zip(values, seconds["bare"], strict=True))
        found[name] = {
            "tokens_per_s": rate,
            "mfu": rate * about.flops_per_token / peak,
            "seconds_over_bare": {
                "min": ratios[0],
                "median": statistics.median(ratios),
                "max": ratios[-1],
            },
            "step_s": values,
        }
    return found


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["gpt2-small", "llama-1b"])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--window", type=int, default=10, help="steps that are timed together")
    parser.add_argument("--rows", type=int, help="of a step; default: the shape's")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "gpu_speed.json")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("skipped: PyTorch sees no GPU here")
        return 0
    torch.set_float32_matmul_precision("high")
    gpu = torch.cuda.get_device_name() if given.device == "cuda" else None
    data: dict[str, Any] = {
        "command": f"python benchmarks/gpu_speed.py --models {' '.join(given.models)} --rounds {given.rounds} "
        f"--window {given.window}" + (f" --rows {given.rows}" if given.rows else ""),
        "machine": {**harness.facts_of_machine(), "gpu": gpu},
        "rounds": given.rounds,
        "window": given.window,
        "models": {},
    }
    for name in given.models:
        shape = SHAPES[name]
        if given.rows:
            shape = Shape(name, shape.vocabulary, shape.seq_len, given.rows, shape.contenders)
        found = data["models"][name] = measure(shape, given.device, given.rounds, given.window)
        for contender in shape.contenders:
            one = found[contender]
            ratio = one["seconds_over_bare"]
            print(
                f"{name} {contender:<24} {one['tokens_per_s']:>10,.0f} tokens/s, MFU {one['mfu']:.1%}, "
                f"{ratio['median']:.4f} ({ratio['min']:.4f} – {ratio['max']:.4f}) of bare's time",
                flush=True,
            )
        print(json.dumps({k: v for k, v in found.items() if k not in shape.contenders}), flush=True)
        harness.write_json(given.output, data)
        if given.device == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
