"""How much of two cores two workers use: their joint step against a step of one of them alone, in turn within one run.

    python benchmarks/efficiency.py [--rounds 40] [--rows 8] [--compile]

Two workers, started by the launcher as `manyhands train` starts its own (pinned, one thread, our allocator and kernels), go
through rounds of four steps:

    together   both compute `rows` rows each and agree (ddp over shared memory, clipping, AdamW): 2 · rows rows
    alone 0    worker 0 computes `rows` rows as a world of one, while worker 1 sleeps at a barrier
    alone 1    the other way round
    apart      both compute `rows` rows each at the same time, each as a world of one: what the machine allows

so that all meet the same machine within two seconds, however it changes from minute to minute. The efficiency of
a round is mean(alone) / together: the share of twice one core's rate that two workers reach; apart / together is what our
agreement costs, and mean(alone) / apart what two busy cores cost each other (caches, memory, clock). The order
changes from round to round. ``--kernels torch`` is the same without our kernels. Computed in bf16 where the CPU has units for
it, else in fp32.

Writes ``results/efficiency.json``: every round, the median with a 95% interval from the order statistics of the rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import setting

WARMUP = 3


def interval(values: list[float]) -> tuple[float, float]:
    """A 95% interval of the median, from order statistics (binomial, normal approximation); needs six values."""
    ordered = sorted(values)
    n = len(ordered)
    reach = 1.96 * math.sqrt(n) / 2
    return ordered[max(0, math.floor(n / 2 - reach))], ordered[min(n - 1, math.ceil(n / 2 + reach) - 1)]


def summary(values: list[float]) -> dict[str, float]:
    low, high = interval(values)
    return {"median": statistics.median(values), "low": low, "high": high}


def work(argument: str) -> int:
    """Entry point of a worker."""
    import torch
    from transformers import AutoModelForCausalLM

    from manyhands.core import compute, hardware
    from manyhands.core.native import enable_allocator
    from manyhands.core.request import Gather
    from manyhands.strategy import presets
    from manyhands.tasks.pretrain import Pretrain
    from manyhands.train import session
    from manyhands.train.forward import compiled, quicken
    from manyhands.train.replica import Part, Replica
    from manyhands.wire.solo import Solo

    given = json.loads(argument)
    place, rows, rounds = Path(given["work"]), given["rows"], given["rounds"]
    allocator = enable_allocator()
    compute.enable()
    world, _ = session.connect_from_environment(device="cpu")
    loss = Pretrain().loss

    def replica(wire: Any) -> Any:
        model = AutoModelForCausalLM.from_pretrained(place / "init").train()
        quicken(model)
        return Replica(
            model,
            presets.ddp(lr=3e-4, weight_decay=0.1, schedule="constant"),
            wire,
            max_grad_norm=1.0,
            targets_per_row=setting.SEQ_LEN,
            autocast=session.autocast_for("bf16" if hardware.cpu_has_bf16() else "fp32", "cpu"),
            forward=compiled(model) if given["compile"] else None,
        )

    together, alone = replica(world.wire), replica(Solo())
    data = torch.randint(0, setting.VOCABULARY, (64 * rows, setting.SEQ_LEN + 1))

    def barrier() -> None:
        world.wire.begin(Gather(torch.zeros(1), even=True)).wait()

    def step(who: Any, number: int, total_rows: int) -> float:
        block = data[number * rows % len(data) :][:rows]
        batch = {"input_ids": block[:, :-1].contiguous(), "targets": block[:, 1:].contiguous()}
        part = Part(number, [(world.rank if who is together else 0, batch)], 2, total_rows, 0)
        start = time.perf_counter()
        who.step(part, loss)
        return time.perf_counter() - start

    found = []
    for number in range(WARMUP + rounds):
        seconds: dict[str, float] = {}
        for turn in range(4):
            kind = ("together", "alone0", "alone1", "apart")[(turn + number) % 4]
            barrier()
            if kind == "together":
                seconds[kind] = step(together, number, 2 * rows)
            elif kind in (f"alone{world.rank}", "apart"):
                seconds[kind] = step(alone, number, rows)
        gathered: dict[str, float] = {}
        for each in world.gather(seconds):
            for kind, value in each.items():
                gathered[kind] = max(gathered.get(kind, 0.0), value)
        if number >= WARMUP:
            found.append(gathered)
    if world.rank == 0:
        facts = {"rounds": found, "allocator": allocator, "kernels": compute.about()}
        Path(given["answer"]).write_text(json.dumps(facts))
    world.wire.close()
    return 0


def measure(work_place: Path, rounds: int, rows: int, compile: bool, kernels: bool) -> dict[str, Any]:
    from manyhands.launch.local import launch

    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        argument = {
            "work": str(work_place),
            "rows": rows,
            "rounds": rounds,
            "answer": str(answer),
            "compile": compile,
        }
        code = launch(
            "efficiency:work",
            json.dumps(argument),
            workers=2,
            output=Path(scratch),
            threads=1,
            env={} if kernels else {"MANYHANDS_KERNELS": "off"},
        )
        if code:
            raise SystemExit(code)
        found: dict[str, Any] = json.loads(answer.read_text())
    rounds_of = found["rounds"]
    shares = {
        "efficiency": [(r["alone0"] + r["alone1"]) / 2 / r["together"] for r in rounds_of],
        "agreement": [r["apart"] / r["together"] for r in rounds_of],
        "machine": [(r["alone0"] + r["alone1"]) / 2 / r["apart"] for r in rounds_of],
    }
    together = [r["together"] for r in found["rounds"]]
    return {
        **found,
        **{name: summary(values) for name, values in shares.items()},
        "tokens_per_s": 2 * rows * setting.SEQ_LEN / statistics.median(together),
        "best_tokens_per_s": 2 * rows * setting.SEQ_LEN / min(together),
    }


def main() -> int:
    from manyhands.core.hardware import cache_directory

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--rows", type=int, default=8, help="of each worker")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--kernels", choices=("ours", "torch"), default="ours")
    parser.add_argument("--work", type=Path, default=cache_directory() / "benchmarks")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "efficiency.json")
    given = parser.parse_args()
    setting.make(given.work.resolve())
    found = measure(given.work.resolve(), given.rounds, given.rows, given.compile, given.kernels == "ours")
    for name in ("efficiency", "agreement", "machine"):
        e = found[name]
        print(f"{name}: {e['median']:.4f} (95%: {e['low']:.4f} to {e['high']:.4f})")
    print(f"{found['tokens_per_s']:,.0f} tokens/s")
    before = json.loads(given.output.read_text())["runs"] if given.output.exists() else {}
    name = f"{'compiled' if given.compile else 'eager'}, {given.kernels} kernels"
    data = {
        "command": "python benchmarks/efficiency.py [--compile] [--kernels torch]",
        "machine": harness.facts_of_machine(),
        "rows": given.rows,
        "seq_len": setting.SEQ_LEN,
        "target": 0.97,
        "runs": {**before, name: found},
    }
    harness.write_json(given.output, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
