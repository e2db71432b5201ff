"""Uneven workers: throughput beside DDP's, and steps until a change is answered.

    python benchmarks/balance.py                       # about 12 minutes on two quiet cores; needs Linux, root for cgroups
    python benchmarks/balance.py --only uneven         # one part: uneven or change; the other's figures are kept

* ``uneven``: three workers with 0.2, 0.4 and 0.8 of a processor (speeds 1:2:4). PyTorch's DDP and manyhands with ``--balance off``
  give each a third of the global batch, and wait for the slowest; balanced, 7/3 of that is possible.
* ``change``: three equal workers; in mid-run one is slowed to a quarter, later let go. How many steps until a step takes as long as
  it will?

What balancing costs where all are equal is `balance_equal.py`'s question.

Every run's loss curve is compared with that of one process. Processes are throttled (`throttle.py`) when all have done
their first step. Rates are tokens over time, all steps counted, after the first `--warmup`. Writes
``benchmarks/results/balance.json`` (raw figures), ``.md`` and ``.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import harness
from balance_report import markdown, plot
from harness import Steps
from throttle import Throttle, ranks

SEQ_LEN, ROWS, VOCABULARY = 256, 84, 2048  # 84 rows: 28 + 28 + 28, and 12 + 24 + 48
LAYERS, WIDTH, HEADS = 2, 192, 4
MAX_STEPS = 42
SPEEDS = (0.2, 0.4, 0.8)
EQUAL, SLOWED = 0.4, 0.1
TOLERANCE = 1e-3  # of the loss, relative to one process, in fp32
PEERS = Path(__file__).parent / "peers"
OUTPUT = harness.RESULTS / "balance"

JOB = """\
data = ["stdlib"]
tokenizer = "bpe:{vocabulary}"
cache = "{cache}"
model = "{model}"
seq_len = {seq_len}
global_batch = {rows}
eval_fraction = 0.0
max_grad_norm = 1.0
precision = "fp32"
log_every = 1
threads = 1
prompt = ""
strategy = "ddp(lr=3e-4, weight_decay=0.1, schedule='constant')"
"""


@dataclass(frozen=True)
class Run:
    """One run: seconds and loss of each step, the shares that it came to, others' part of the machine."""

    name: str
    seconds: Sequence[float]
    losses: Sequence[float]
    redivided: Sequence[Mapping[str, Any]]
    limited_at: int
    changed_at: Sequence[int]
    others_share: float


def make(place: Path) -> None:
    """Model, rows in the job's own order (for DDP) and the job."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config

    from manyhands.data.rows import TokenRows
    from manyhands.data.sample import Order
    from manyhands.train.job import Job
    from manyhands.train.material import prepare_job

    if (place / "balance.toml").exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    job = Job(tokenizer=f"bpe:{VOCABULARY}", cache=str(place / "prepared"), seq_len=SEQ_LEN)
    prepared, _ = prepare_job(job, processes=1)
    rows = TokenRows(prepared, SEQ_LEN)
    order = Order(len(rows), ROWS, 0)
    batch = rows.take(np.concatenate([order.ids(step) for step in range(MAX_STEPS)]))
    block = np.concatenate([batch["input_ids"].numpy(), batch["targets"].numpy()[:, -1:]], axis=1)
    assert (block[:, 1:] == batch["targets"].numpy()).all()  # every row is full
    np.save(place / "rows.npy", block.astype(np.uint16))
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=SEQ_LEN,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        summary_first_dropout=0.0,  # of no use here, but dropout above 0 makes places of several rows
        use_cache=False,
        bos_token_id=prepared.end_id,
        eos_token_id=prepared.end_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(place / "init")
    text = JOB.format(
        vocabulary=VOCABULARY,
        cache=place / "prepared",
        model=place / "init",
        seq_len=SEQ_LEN,
        rows=ROWS,
    )
    (place / "balance.toml").write_text(text)


def ddp(place: Path, steps: int, workers: int) -> list[str]:
    """PyTorch's DDP on the same rows, with fused AdamW."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    options = ["--setting", str(place), "--steps", str(steps), "--rows", str(ROWS), "--fused"]
    return [*start, str(PEERS / "ddp.py"), *options]


def ours(place: Path, steps: int, workers: int, *, balance: str) -> list[str]:
    """`manyhands train`."""
    options = ["--steps", str(steps), "--workers", str(workers), "--balance", balance]
    return ["-m", "manyhands", "train", str(place / "balance.toml"), *options, "--output", "run"]


def run(
    name: str,
    command: Sequence[str],
    *,
    shares: Sequence[float] = (),
    changes: Mapping[int, Mapping[int, float]] | None = None,
) -> Run:
    """One program, from its first step on with `shares` of a processor for each worker.

    Args:
        changes: after that many steps, ranks and their new shares (manyhands only, which tells of each step).
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(harness.REMOVED)}
    waiting = sorted((changes or {}).items())
    limited_at, changed_at = 0, []
    with tempfile.TemporaryDirectory(prefix="manyhands-balance-") as scratch, Throttle() as throttle:
        ready, metrics = Path(scratch) / "ready", Path(scratch) / "run" / "metrics.jsonl"
        environment |= {**harness.ADDED, "OMP_NUM_THREADS": "1", "BENCHMARK_READY": str(ready)}
        busy, own, begun = harness.busy_seconds(), harness._children_seconds(), time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=scratch,
            env=environment,
            stdout=(Path(scratch) / "out").open("w"),
            stderr=(Path(scratch) / "err").open("w"),
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                if time.perf_counter() - begun > harness.TIMEOUT_S:
                    raise harness.RunFailed(f"{name} did not end")
                done = 1 if ready.exists() else _steps_in(metrics)
                if done and shares and not limited_at:
                    limited_at = done
                    for rank, pid in ranks(process.pid).items():
                        throttle.limit(pid, shares[rank])
                if waiting and done >= waiting[0][0]:
                    changed_at.append(done)
                    pids = ranks(process.pid)
                    for rank, share in waiting.pop(0)[1].items():
                        throttle.limit(pids[rank], share)
                time.sleep(0.02)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        wall = time.perf_counter() - begun
        others = (harness.busy_seconds() - busy) - (harness._children_seconds() - own)
        said, complained = (Path(scratch, stream).read_text() for stream in ("out", "err"))
        if process.returncode != 0:
            raise harness.RunFailed(
                f"{name}: exit code {process.returncode}\n{said[-2000:]}\n{complained[-2000:]}"
            )
        steps, told = _read(metrics) if metrics.exists() else (harness.read_json_lines(said, metrics), [])
    share = max(0.0, others / wall / (os.cpu_count() or 1))
    return Run(name, steps.seconds, steps.losses, told, limited_at, changed_at, share)


def _steps_in(metrics: Path) -> int:
    return metrics.read_bytes().count(b'"event": "stepped"') if metrics.exists() else 0


def _read(metrics: Path) -> tuple[Steps, list[dict[str, Any]]]:
    events = [json.loads(line) for line in metrics.read_text().splitlines()]
    stepped = [e for e in events if e["event"] == "stepped"]
    ends = [e["time_s"] for e in stepped]
    first = ROWS * SEQ_LEN / stepped[0]["tokens_per_s"]
    seconds = [first, *(b - a for a, b in pairwise(ends))]
    told = [{k: e[k] for k in ("step", "shares", "rows_per_s")} for e in events if e["event"] == "redivided"]
    return Steps(seconds, [e["loss"] for e in stepped]), told


def rate(one: Run, warmup: int) -> float:
    """Tokens per second, all steps after the first `warmup` counted."""
    return ROWS * SEQ_LEN * len(one.seconds[warmup:]) / sum(one.seconds[warmup:])


Taken = list[dict[str, Any]]


def uneven(place: Path, given: argparse.Namespace, first: int) -> Taken:
    """Speeds 1:2:4."""
    taken = []
    for round in range(first, first + given.rounds):
        contenders = [
            ("DDP", ddp(place, given.steps, 3)),
            ("manyhands, balance off", ours(place, given.steps, 3, balance="off")),
            ("manyhands", ours(place, given.steps + 8, 3, balance="auto")),
        ]
        for name, command in harness.rotated(contenders, round % 3, 3):
            taken.append(_taken(run(name, command, shares=SPEEDS), round, given))
    return taken


def uneven_figures(runs: Taken) -> dict[str, Any]:
    """The lead within rounds."""
    rates = _rates(runs)
    ratios = {name: asdict(harness.ratios(rates["manyhands"], theirs)) for name, theirs in rates.items()}
    return {"shares_of_a_core": SPEEDS, "ideal": sum(SPEEDS) / 3 / min(SPEEDS), "ratios": ratios}


def change(place: Path, given: argparse.Namespace, first: int) -> Taken:
    """One of three is slowed after 12 steps and let go after 28."""
    taken = []
    for round in range(first, first + given.rounds):
        changes = {12: {1: SLOWED}, 28: {1: EQUAL}}
        command = ours(place, MAX_STEPS, 3, balance="auto")
        taken.append(_taken(run("manyhands", command, shares=(EQUAL,) * 3, changes=changes), round, given))
    return taken


def change_figures(runs: Taken) -> dict[str, Any]:
    """Steps until each change was answered."""
    for each in runs:
        ends = [*each["changed_at"][1:], len(each["seconds"])]
        pairs = zip(each["changed_at"], ends, strict=True)
        each["steps_needed"] = [_needed(each["seconds"], at, until) for at, until in pairs]
    worst = max(n for each in runs for n in each["steps_needed"])
    return {"shares_of_a_core": {"at first": EQUAL, "slowed": SLOWED}, "most_steps_needed": worst}


def _needed(seconds: Sequence[float], changed_at: int, until: int) -> int:
    """Steps after the change, until the first of two in a row that take at most a tenth longer than those at the end."""
    settled = statistics.median(seconds[until - 6 : until])
    for i in range(changed_at, until - 1):
        if max(seconds[i], seconds[i + 1]) <= 1.1 * settled:
            return i - changed_at
    return until - changed_at


def _taken(found: Run, round: int, given: argparse.Namespace) -> dict[str, Any]:
    rates = rate(found, given.warmup)
    print(f"{found.name:<24} {rates:8,.0f} tokens/s, others used {found.others_share:.0%}", flush=True)
    return {"round": round, **asdict(found), "tokens_per_s": rates}


def _rates(runs: Taken) -> dict[str, dict[int, float]]:
    rates: dict[str, dict[int, float]] = {}
    for each in runs:
        rates.setdefault(each["name"], {})[each["round"]] = each["tokens_per_s"]
    return rates


PARTS = {
    "uneven": (uneven, uneven_figures),
    "change": (change, change_figures),
}


def main() -> int:
    from manyhands.core.hardware import cache_directory

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of each run, those of --warmup included")
    parser.add_argument("--warmup", type=int, default=5, help="first steps that are not timed")
    parser.add_argument("--only", choices=sorted(PARTS), nargs="*", default=list(PARTS))
    parser.add_argument("--append", action="store_true", help="add rounds to those of an existing output")
    parser.add_argument("--work", type=Path, default=cache_directory() / "benchmarks" / "balance")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="without its ending")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended, too
    place = given.work.resolve()
    make(place)
    path = given.output.with_suffix(".json")
    data = json.loads(path.read_text()) if path.exists() else {}
    alone = data.get("one_process")
    if not alone:
        alone = asdict(run("one process", ours(place, MAX_STEPS, 1, balance="auto")))
    data |= {
        "machine": harness.facts_of_machine(),
        "throttled_by": Throttle().how,
        "setting": {
            "rows": ROWS,
            "seq_len": SEQ_LEN,
            "model": f"GPT-2, {LAYERS} layers × {WIDTH}, vocabulary {VOCABULARY}",
            "precision": "fp32",
            "seed": 0,
            "tolerance": TOLERANCE,
        },
        "one_process": alone,
    }
    for part in given.only:
        take, figures = PARTS[part]
        runs = data[part]["runs"] if given.append and part in data else []
        runs = [*runs, *take(place, given, max((r["round"] + 1 for r in runs), default=0))]
        for each in runs:
            each["loss_difference"] = harness.largest_difference(each["losses"], alone["losses"])
        rounds = max(r["round"] for r in runs) + 1
        options = f"--rounds {rounds} --steps {given.steps} --warmup {given.warmup}"
        data[part] = {
            "command": f"python benchmarks/balance.py --only {part} {options}",
            "date": time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime()),
            **figures(runs),
            "runs": runs,
        }
        harness.write_json(path, data)
    given.output.with_suffix(".md").write_text(markdown(data))
    plot(given.output.with_suffix(".png"), data)
    print(markdown(data))
    wrong = [r for part in given.only for r in data[part]["runs"] if r["loss_difference"] > TOLERANCE]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
