"""Training speed against peers: two cores, one small GPT-2, the same rows in the same order, loss curves checked.

    python benchmarks/train_speed.py                           # about 25 minutes on two quiet cores
    python benchmarks/train_speed.py --rounds 1 --steps 5 --warmup 3 --only plain manyhands

Writes ``benchmarks/results/train_speed.json`` (all raw figures), ``.md`` (the table) and ``.png``. What is compared, and how, is in
README.md beside it.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import harness
import report
import setting
from harness import Contender, Sample, Steps

PEERS = Path(__file__).parent / "peers"
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}  # of the loss, relative to plain PyTorch in fp32
REFERENCE = {16: "plain", 8: "plain, one core"}  # whose curve a global batch of so many rows is held against

ONE_PROCESS = {  # two threads that sleep soon and stay on their cores
    "OMP_NUM_THREADS": "2",
    "GOMP_SPINCOUNT": "1000",
    "OMP_PROC_BIND": "close",
    "OMP_PLACES": "cores",
}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
FASTEST = ("--bf16", "--compile", "--fused")


def peer(
    name: str,
    script: str,
    place: Path,
    steps: int,
    *,
    tuned: bool,
    processes: int,
    threads: int,
    rows: int = 16,
    allocator: str | None = None,
) -> Contender:
    """A peer's script, as it comes or tuned: bf16, compiled, fused AdamW, pinned, threads set.

    Args:
        allocator: a library to preload besides.
    """
    # the Trainer's AdamW is fused by its own default, ours always
    flags = [f for f in FASTEST if f != "--fused" or script not in ("trainer.py", "manyhands_loop.py")]
    one_core = processes * threads == 1
    options = [*(flags if tuned else []), *(["--pin"] if tuned or one_core else [])]
    options += ["--setting", str(place), "--steps", str(steps), "--rows", str(rows)]
    start = TORCHRUN if processes > 1 else ()
    environment: dict[
        str, str
    ] = {}  # as it comes: torch takes all cores, torchrun gives its processes one thread each
    if tuned or one_core:
        environment = dict(ONE_THREAD if threads == 1 else ONE_PROCESS)
    if allocator:
        environment["LD_PRELOAD"] = allocator
    group = "allocator" if allocator else "one core" if one_core else "tuned" if tuned else "defaults"
    return Contender(
        name=name,
        group=group,
        command=lambda _: [*start, str(PEERS / script), *options],
        read=harness.read_json_lines,
        processes=processes,
        threads=threads,
        rows=rows,
        precision="bf16" if tuned else "fp32",
        ours=script.startswith("manyhands"),
        environment=environment,
    )


def ours(
    name: str,
    group: str,
    place: Path,
    steps: int,
    *options: str,
    workers: int,
    rows: int,
    precision: str = "bf16",
) -> Contender:
    """`manyhands train` on the same job."""
    given = ["--steps", str(steps), "--workers", str(workers), "--global-batch", str(rows), *options]

    def command(scratch: Path) -> list[str]:
        return [
            "-m",
            "manyhands",
            "train",
            str(place / "bench.toml"),
            *given,
            "--output",
            str(scratch / "run"),
        ]

    return Contender(
        name=name,
        group=group,
        command=command,
        read=read_run,
        processes=workers,
        threads=1,
        rows=rows,
        precision=precision,
        ours=True,
    )


def read_run(_out: str, scratch: Path) -> Steps:
    """The steps of a manyhands run: losses, and the time between the ends of steps, from metrics.jsonl.

    The first step's time counts from the job's own start of training (its tokens per second).
    """
    events = [json.loads(line) for line in (scratch / "run" / "metrics.jsonl").read_text().splitlines()]
    stepped = [e for e in events if e["event"] == "stepped"]
    summary = json.loads((scratch / "run" / "summary.json").read_text())
    tokens = [
        b["target_tokens"] - a
        for a, b in zip([0, *(e["target_tokens"] for e in stepped)], stepped, strict=False)
    ]
    seconds = [n / e["tokens_per_s"] for n, e in zip(tokens, stepped, strict=True)]
    facts = {
        key: summary[key] for key in ("tokens_per_s", "precision", "compile", "parameters_sha256", "workers")
    }
    facts["workers"] = [{k: v for k, v in w.items() if k != "host"} for w in facts["workers"]]
    return Steps(seconds, [e["loss"] for e in stepped], facts)


LOOPS = (  # name, script, (processes, threads) of each shape
    ("plain", "plain.py", ((1, 2),)),
    ("Trainer", "trainer.py", ((1, 2), (2, 1))),
    ("Accelerate", "accelerate_loop.py", ((1, 2), (2, 1))),
    ("Fabric", "fabric.py", ((1, 2), (2, 1))),
    ("DDP", "ddp.py", ((2, 1),)),
)


def contenders(place: Path, steps: int) -> list[Contender]:
    """Everybody, in the order of the table."""
    found = []
    for tuned in (False, True):
        for name, script, shapes in LOOPS:
            for processes, threads in shapes:
                shape = f" {processes}×{threads}" if len(shapes) > 1 else ""
                full = f"{name}{shape}{', tuned' if tuned else ''}"
                found.append(
                    peer(full, script, place, steps, tuned=tuned, processes=processes, threads=threads)
                )
    for allocator in filter(None, [ctypes.util.find_library("tcmalloc_minimal")]):
        for name, script, (processes, threads) in (("plain", "plain.py", (1, 2)), ("DDP", "ddp.py", (2, 1))):
            full = f"{name}, tuned, tcmalloc"
            found.append(
                peer(
                    full,
                    script,
                    place,
                    steps,
                    tuned=True,
                    processes=processes,
                    threads=threads,
                    allocator=allocator,
                )
            )
    one, compiled = ("--threads", "1"), ("--compile", "on")
    return [
        *found,
        ours("manyhands", "defaults", place, steps, workers=2, rows=16),
        ours("manyhands, tuned", "tuned", place, steps, *compiled, workers=2, rows=16),
        peer("manyhands loop, tuned", "manyhands_loop.py", place, steps, tuned=True, processes=2, threads=1),
        ours("manyhands, one core", "one core", place, steps, *one, workers=1, rows=8),
        ours("manyhands, one core, tuned", "one core", place, steps, *one, *compiled, workers=1, rows=8),
        peer("plain, one core", "plain.py", place, steps, tuned=False, processes=1, threads=1, rows=8),
        peer("plain, one core, tuned", "plain.py", place, steps, tuned=True, processes=1, threads=1, rows=8),
    ]


def check_curves(
    samples: Mapping[str, Sequence[Sample]], everyone: Sequence[Contender]
) -> dict[str, dict[str, Any]]:
    """Each contender's largest relative difference from the reference curve of its global batch, over all runs."""
    checked: dict[str, dict[str, Any]] = {}
    for one in everyone:
        reference = samples[REFERENCE[one.rows]][0].losses
        apart = max(harness.largest_difference(s.losses, reference) for s in samples[one.name])
        limit = TOLERANCE[one.precision]
        checked[one.name] = {
            "largest_relative_difference": apart,
            "tolerance": limit,
            "equal": apart <= limit,
        }
    return checked


def main() -> int:
    given = _arguments()
    place = given.work.resolve()
    facts = setting.make(place)
    every = contenders(place, given.steps)
    chosen = _choose(every, given.only)
    say: Callable[[str], None] = lambda text: print(text, flush=True)  # noqa: E731
    peaks = {
        "1 process × 2 threads": harness.matrix_peak(1, 2),
        "2 processes × 1 thread": harness.matrix_peak(2, 1),
    }
    say(f"bf16 matrix peak: {', '.join(f'{k} {v / 1e12:.2f} TFLOP/s' for k, v in peaks.items())}")
    started = time.time()
    samples = _earlier(given, chosen)
    done = max((s.round + 1 for taken in samples.values() for s in taken), default=0)
    common = {"TORCHINDUCTOR_CACHE_DIR": str(place / "inductor")}
    if not given.cold:
        warm(chosen, common, say)
    for one, sample in harness.alternate(chosen, rounds=given.rounds, common=common, say=say):
        samples[one.name].append(replace(sample, round=sample.round + done))
        data = {
            "command": "python benchmarks/train_speed.py " + " ".join(_shown(sys.argv[1:])),
            "machine": harness.facts_of_machine(),
            "setting": {
                **asdict(facts),
                "seq_len": setting.SEQ_LEN,
                "steps": given.steps,
                "warmup": given.warmup,
            },
            "started": time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(started)),
            "wall_s": time.time() - started,
            "peak_flops": peaks,
            "contenders": [_described(c, place, samples[c.name]) for c in chosen],
        }
        harness.write_json(given.output.with_suffix(".json"), data)
    curves = check_curves(samples, chosen)
    rows = report.table_rows(chosen, samples, curves, facts, warmup=given.warmup, peak=max(peaks.values()))
    harness.write_json(given.output.with_suffix(".json"), {**data, "results": rows})
    given.output.with_suffix(".md").write_text(report.markdown(data, rows))
    report.plot(given.output.with_suffix(".png"), rows)
    say(report.markdown(data, rows))
    wrong = [name for name, curve in curves.items() if not curve["equal"]]
    if wrong:
        say(f"loss curves differ: {', '.join(wrong)}")
    return 1 if wrong else 0


def warm(chosen: Sequence[Contender], common: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Run once what compiles and had no run with these caches, so that no round pays for it."""
    marks = Path(common["TORCHINDUCTOR_CACHE_DIR"]) / "warm"
    versions = json.dumps(harness.facts_of_machine()["versions"], sort_keys=True)
    for one in chosen:
        mark = marks / one.name.replace(" ", "-")
        if "tuned" in one.name and not (mark.exists() and mark.read_text() == versions):
            say(
                f"filling the compile caches of {one.name}: {harness.run(one, round=-1, common=common).wall_s:.0f} s"
            )
            marks.mkdir(parents=True, exist_ok=True)
            mark.write_text(versions)


def _arguments() -> argparse.Namespace:
    from manyhands.core.hardware import cache_directory

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="of each run, those of --warmup included")
    parser.add_argument("--warmup", type=int, default=3, help="first steps that are not timed")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders whose name begins so")
    parser.add_argument("--append", action="store_true", help="add rounds to those of an existing output")
    parser.add_argument("--cold", action="store_true", help="do not fill the compile caches first")
    parser.add_argument(
        "--work", type=Path, default=cache_directory() / "benchmarks", help="the setting, and compile caches"
    )
    parser.add_argument(
        "--output", type=Path, default=harness.RESULTS / "train_speed", help="without its ending"
    )
    given = parser.parse_args()
    if not 0 <= given.warmup < given.steps <= setting.MAX_STEPS or given.rounds < 1:
        parser.error(f"needs 0 <= warmup < steps <= {setting.MAX_STEPS} and a round at least")
    return given


def _earlier(given: argparse.Namespace, chosen: Sequence[Contender]) -> dict[str, list[Sample]]:
    """With --append, the runs of these contenders that the output already holds; they count as rounds of their own."""
    samples: dict[str, list[Sample]] = {one.name: [] for one in chosen}
    path = given.output.with_suffix(".json")
    if given.append and path.exists():
        data = json.loads(path.read_text())
        same = ("steps", "warmup")
        if any(data["setting"][key] != getattr(given, key) for key in same):
            raise SystemExit(f"{path} holds runs with other {' or '.join(same)}: append with the same")
        for one in data["contenders"]:
            if one["name"] in samples:
                samples[one["name"]] = [Sample(**run) for run in one["runs"]]
    return samples


def _choose(every: Sequence[Contender], only: Sequence[str] | None) -> list[Contender]:
    """Those named by `only` (or, where none has that name, those whose name begins so), and the references they need."""
    if not only:
        return list(every)
    exact = {c.name for c in every} & set(only)
    begins = tuple(set(only) - exact)
    wanted = exact | {c.name for c in every if begins and c.name.startswith(begins)}
    unknown = [o for o in only if not any(c.name.startswith(o) for c in every)]
    if unknown:
        raise SystemExit(f"{unknown}: the contenders are {', '.join(c.name for c in every)}")
    wanted |= {REFERENCE[c.rows] for c in every if c.name in wanted}
    return [c for c in every if c.name in wanted]


def _described(one: Contender, place: Path, samples: Sequence[Sample]) -> dict[str, Any]:
    command = " ".join(["python", *one.command(Path("SCRATCH"))])
    return {
        "name": one.name,
        "group": one.group,
        "processes": one.processes,
        "threads": one.threads,
        "rows": one.rows,
        "precision": one.precision,
        "command": command.replace(str(place), "SETTING").replace(str(PEERS), "benchmarks/peers"),
        "environment": dict(one.environment),
        "runs": [asdict(s) for s in samples],
    }


def _shown(arguments: Sequence[str]) -> list[str]:
    return [Path(a).name if a.startswith("/") else a for a in arguments]


if __name__ == "__main__":
    sys.exit(main())
