"""What seeding before every forward pass costs: the CPU's generator alone, and `torch.manual_seed`, in turn in one run.

    python benchmarks/seeding.py                       # writes benchmarks/results/seeding.json

A step is forward and backward of `PASSES` micro-batches of one row, with a seed before each as a training step has it
(`manyhands/core/rng.py`). Rounds alternate; ratios are the old over the new within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import harness

OUT = harness.RESULTS / "seeding.json"
ROUNDS, STEPS, PASSES, SEQ_LEN, VOCABULARY = 20, 10, 4, 128, 257


def old(*parts: int) -> None:
    import torch

    from manyhands.core import rng

    torch.manual_seed(rng.key(*parts) >> 1)


def seconds(model: Any, ids: Any, seed: Callable[..., None]) -> float:
    """Of one step, in the mean of `STEPS`."""
    import torch

    start = time.perf_counter()
    for step in range(STEPS):
        for place in range(PASSES):
            seed(0, step, place)
            logits = model(input_ids=ids[:, :-1]).logits.flatten(0, 1)
            torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
    return (time.perf_counter() - start) / STEPS


def measured(name: str) -> dict[str, Any]:
    import torch

    from manyhands.core import rng
    from manyhands.models.build import build

    torch.set_num_threads(1)
    model = build(name, task="pretrain", vocab_size=VOCABULARY, seq_len=SEQ_LEN)
    ids = torch.randint(0, VOCABULARY, (1, SEQ_LEN + 1))
    ways: dict[str, Callable[..., None]] = {"old": old, "new": rng.seed_torch}
    for seed in ways.values():
        seconds(model, ids, seed)
    rounds = []
    for turn in range(ROUNDS):
        order = list(ways) if turn % 2 else list(ways)[::-1]
        rounds.append({way: seconds(model, ids, ways[way]) for way in order})
    ratios = sorted(each["old"] / each["new"] for each in rounds)
    spread = {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}
    return {"model": name, "rounds": rounds, "old_over_new": spread}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    before, start = harness.busy_seconds(), time.perf_counter()
    own = time.process_time()
    models = [measured(name) for name in ("gpt2-nano", "gpt2-micro")]
    wall = time.perf_counter() - start
    others = harness.busy_seconds() - before - (time.process_time() - own)
    harness.write_json(
        OUT,
        {
            "command": "python benchmarks/seeding.py",
            "machine": harness.facts_of_machine(),
            "setting": {"rounds": ROUNDS, "steps": STEPS, "passes": PASSES, "rows": 1, "seq_len": SEQ_LEN},
            "others_cpu": max(0.0, others) / wall,
            "models": models,
        },
    )
    for each in models:
        print(each["model"], each["old_over_new"])


if __name__ == "__main__":
    main()
