"""Memory of each worker under ZeRO 0 (ddp) to 3, for 1 to 4 workers, against the theory; and the speed beside `ddp`.

    python benchmarks/zero_memory.py [--model MODEL] [--steps 4] [--rounds 12] [--part memory|speed]
                                     [--results DIRECTORY]

Each case is a job of its own of real processes on one machine. Counted in every worker, in the middle of a step's update:
the bytes of the tensors that hold parameters, gradients and optimizer state (each storage once), and what the kernel
says: the largest resident set since the model was built (VmHWM) less the resident set before. Shared memory is counted
where a worker touched it. The speed is measured separately: all stages in one job of two workers with a core each,
steps in turn (A B C D, D C B A, …), ratios within a round; each stage over the transport that it gets by default on one
machine. Writes ``zero_memory.json`` and ``.md`` there.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import multiprocessing as mp
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MODEL = "gpt2-mini(n_layer=8,n_embd=512,n_head=8)"
VOCABULARY, SEQ_LEN, SEED = 8192, 128, 3
WORKERS, STAGES = (1, 2, 3, 4), (0, 1, 2, 3)
MIB = 1 << 20


def theory(stage: int, workers: int) -> dict[str, float]:
    """Bytes a parameter with float32 and Adam's two moments (arXiv:1910.02054, figure 1), at the time of the update."""
    n = workers
    return {
        "parameters": 4 / n if stage > 1 else 4,  # stage 2 gathers them for forward and backward
        "gradients": 4 / n if stage > 1 else 4,
        "optimizer": 8 / n if stage > 0 else 8,
    }


def worker(pipe: Any, rank: int, size: int, directory: str, transport: str, task: Any) -> None:
    import torch

    from manyhands.wire.world import connect

    torch.set_num_threads(1)
    world = connect(
        rank=rank,
        size=size,
        local_size=size,
        device=torch.device("cpu"),
        store_path=directory,
        master=None,
        agent_store=False,
        transport=transport,
        timeout_s=300.0,
    )
    name, arguments = task
    pipe.send(globals()[name](world, *arguments))
    pipe.recv()  # all are done: nobody leaves early


def job(size: int, transport: str, task: Any) -> list[Any]:
    """Run `task` = (function, arguments) on `size` workers; their answers."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        pipes, processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=worker, args=(theirs, rank, size, directory, transport, task))
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        answers = [pipe.recv() for pipe in pipes]
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join()
        return answers


def replica_of(world: Any, stage: int, model: str) -> Any:
    from manyhands.models.build import build
    from manyhands.strategy import presets
    from manyhands.train.replica import Replica

    built = build(model, task="pretrain", vocab_size=VOCABULARY, seq_len=SEQ_LEN, seed=SEED)
    make = (presets.ddp, presets.zero1, presets.zero2, presets.zero3)[stage]
    return Replica(
        built, make(lr=1e-3, schedule="constant"), world.wire, max_grad_norm=1.0, targets_per_row=SEQ_LEN
    )


def part(world: Any, step: int, rows: int, length: int) -> Any:
    import torch

    from manyhands.train.replica import Part

    generator = torch.Generator().manual_seed(SEED + step)
    tokens = torch.randint(0, VOCABULARY, (rows * world.size, length + 1), generator=generator)
    mine = tokens[rows * world.rank : rows * (world.rank + 1)]
    batch = {"input_ids": mine[:, :-1], "targets": mine[:, 1:]}
    return Part(step, [(world.rank, batch)], world.size, rows * world.size, SEED)


def memory(world: Any, stage: int, model: str, steps: int) -> dict[str, Any]:
    """What one worker holds."""
    from manyhands.models.build import build
    from manyhands.tasks.pretrain import Pretrain

    build("gpt2-nano", task="pretrain", vocab_size=64, seq_len=8, seed=0)  # imports what is needed
    gc.collect()
    before = status("VmRSS")
    replica = replica_of(world, stage, model)
    held: dict[str, int] = {}
    optimizer = replica.method.optimizer
    step = optimizer.step

    def watched() -> None:
        step()
        held.update(tensors(replica))

    optimizer.step = watched
    replica.step(part(world, 0, 1, 32), Pretrain().loss)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: building the model is not counted
    for i in range(1, steps):
        replica.step(part(world, i, 1, 32), Pretrain().loss)
    return {**held, "peak_rss": status("VmHWM") - before}


def tensors(replica: Any) -> dict[str, int]:
    """Bytes of the storages of parameters, gradients and optimizer state, each counted once."""
    from manyhands.train.sharded_gradients import local

    method = replica.method
    params = [local(p) for p in replica.model.parameters()]
    grads = list(getattr(method.gradients, "buckets", []))
    if not grads:
        grads = list(method.gradients.views)
    grads += [local(p.grad) for p in replica.model.parameters() if p.grad is not None]
    state = list(method.optimizer.state_by_name().values())
    found = {}
    for name, group in (("parameters", params), ("gradients", grads), ("optimizer", state)):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in group if t.numel()}
        found[name] = sum(storages.values())
    return found


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def speed(world: Any, model: str, rounds: int, rows: int) -> dict[str, Any]:
    """Seconds of each stage's steps, in turn."""
    from manyhands.tasks.pretrain import Pretrain

    shared = dataclasses.replace(
        world, wire=world.wire.within([list(range(world.size))])
    )  # what ddp and zero1 get
    replicas = [replica_of(shared if stage < 2 else world, stage, model) for stage in STAGES]
    seconds: list[list[float]] = [[] for _ in STAGES]
    losses: list[list[float]] = [[] for _ in STAGES]
    for turn in range(rounds + 2):
        for stage in STAGES if turn % 2 else reversed(STAGES):
            batch = part(world, turn, rows, SEQ_LEN)
            start = time.perf_counter()
            losses[stage].append(replicas[stage].step(batch, Pretrain().loss).loss)
            if turn >= 2:
                seconds[stage].append(time.perf_counter() - start)
    return {"seconds": seconds, "losses": losses}


def main() -> int:
    import torch

    from manyhands.core import hardware
    from manyhands.models.build import build

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--rows", type=int, default=4, help="of one worker, where speed is measured")
    parser.add_argument(
        "--part", choices=("memory", "speed"), help="measure this, keep the rest of the results"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where they are kept and written")
    given = parser.parse_args()
    built = build(given.model, task="pretrain", vocab_size=VOCABULARY, seq_len=SEQ_LEN, seed=SEED)
    numel = sum(p.numel() for p in built.parameters())
    del built
    file = given.results / "zero_memory.json"
    before = json.loads(file.read_text()) if given.part and file.exists() else {}
    if before and before["model"] != given.model:
        parser.error(f"{file} is of {before['model']}: give that --model, other --results, or no --part")
    cases, timed = before.get("cases", []), before.get("speed", [])
    if given.part != "speed":
        cases = []
        for workers in WORKERS:
            for stage in STAGES:
                answers = job(workers, "group", ("memory", (stage, given.model, given.steps)))
                cases.append({"workers": workers, "stage": stage, "of_each": answers})
                print(json.dumps(cases[-1]), flush=True)
    if given.part != "memory":
        timed = job(2, "group", ("speed", (given.model, given.rounds, given.rows)))
    result = {
        "command": " ".join(["python benchmarks/zero_memory.py", *sys.argv[1:]]),
        "model": given.model,
        "parameters": numel,
        "cases": cases,
        "speed": timed,
        "seed": SEED,
        "torch": torch.__version__,
        "machine": hardware.machine_facts(),
    }
    given.results.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    text = report(result)
    (given.results / "zero_memory.md").write_text(text)
    print(text)
    return 0


def report(result: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    numel = result["parameters"]
    lines = [
        "# Memory of a worker under ZeRO",
        "",
        f"{result['model']}: {numel / 1e6:.1f}M parameters in float32, AdamW; MiB of the worker that holds most.",
        "Theory: bytes of parameters, gradients and moments at the time of the update (figure 1 of arXiv:1910.02054).",
        "",
        "| workers | stage | parameters | gradients | optimizer | all three | theory | ratio | peak resident set |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        most = {k: max(each[k] for each in case["of_each"]) / MIB for k in case["of_each"][0]}
        total = max(sum(v for k, v in each.items() if k != "peak_rss") for each in case["of_each"]) / MIB
        expected = sum(theory(case["stage"], case["workers"]).values()) * numel / MIB
        cells = [
            f"{case['workers']}",
            f"{case['stage']}",
            *(f"{most[k]:.1f}" for k in ("parameters", "gradients", "optimizer")),
            f"{total:.1f}",
            f"{expected:.1f}",
            f"{total / expected:.3f}",
            f"{most['peak_rss']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if not result["speed"]:
        return "\n".join(lines) + "\n"
    seconds = result["speed"][0]["seconds"]
    lines += [
        "",
        "Speed, two workers with a core each, on one machine, where all stages travel through shared memory: tokens/s as",
        "a share of `ddp`'s, the median of rounds (quartiles).",
        "",
        "| stage | step, ms | beside ddp |",
        "|---|---|---|",
    ]
    for stage, mine in enumerate(seconds):
        ratios = sorted(base / own for base, own in zip(seconds[0], mine, strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4)
        lines.append(
            f"| {stage} | {1e3 * statistics.median(mine):.0f} | {middle:.2f} ({low:.2f} … {high:.2f}) |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
