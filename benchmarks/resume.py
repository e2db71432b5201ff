"""Resume N → M: every strategy through a ring of worker counts that has every N in 1 … 8 as source and as target.

    python benchmarks/resume.py                       # everything; adds to what results/resume.json holds of this code
    python benchmarks/resume.py --only diloco zero3   # rows whose names begin so
    python benchmarks/resume.py --again               # measure anew what is there already
    python benchmarks/resume.py --table               # the table alone, from the figures

A few strategies go through all 56 pairs of unequal N and M (*every pair*).

Each leg of the ring is a job of its own: real processes, the real wires, `--resume` from the last leg's checkpoint, a few
steps, then stopped in the middle of an epoch and of a round. Worker processes are forked from one that has imported everything (an
import takes longer than a leg); rows marked "command line" go through `manyhands train` instead.

What must hold, and is compared, of each row:

    exact     (nothing is lost on the way, every step agrees)  the loss curve is that of one worker, in float64: largest
              relative difference below 1e-9
    learns    (local steps, lossy codecs, free-running workers: another number of workers is another course of training) the
              last losses' mean is within 25% of two workers'

              compared is a run that was never stopped; but where updates do not come at every step, one that was stopped
              and resumed at the same steps: a stop in the middle of a round is an agreement more
    ledger    every sample once over the whole chain
    owed      Σ over workers of what error feedback holds back: as stored, and as the next leg's workers have it once they
              have loaded it (forked workers tell)
    refused   a strategy that cannot run on a number of workers says so as a `UsageError` (exit code 2, one line, the nearest
              number that can be), before it touches anything; the ring goes on from where it was
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing as mp
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

from harness import RESULTS, facts_of_machine, largest_difference, write_json

RING = (1, 8, 3, 5, 2, 7, 4, 6, 1)
SHORT = (2, 5, 1, 3)  # through the command line, where start-up dominates
PAIRS = (
    *(n for i in range(1, 9) for j in range(i + 1, 9) for n in (i, j)),
    1,
)  # all 56 ordered ones, each once
STRIDES = (
    3,
    2,
    4,
    2,
    3,
    3,
    2,
    3,
    3,
)  # steps of each leg, again and again: it ends in the middle of rounds (of 4 steps)
ENDS = tuple(itertools.accumulate(itertools.islice(itertools.cycle(STRIDES), len(PAIRS))))
REFERENCE = 2  # workers, where their number matters
EXACT, NEAR = 1e-9, 0.25
TIMEOUT_S = 300.0
OUT = RESULTS / "resume.json"
LR = "lr=3e-3, schedule=constant"
EF = "exchange=error-feedback(int4)"
ENTRY = "manyhands.train.worker:main"
MORE = (
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "safetensors.torch",
    "manyhands.train.session",
    "manyhands.train.summary",
    "manyhands.train.terminal",
    "manyhands.data.prepare",
    "manyhands.coordinate.client",
)


@dataclass(frozen=True)
class Row:
    """One strategy and what must hold of it.

    Attributes:
        strategy: in call form.
        exact: its curve is that of one worker.
        rounds: a stop is an agreement more, so that what it is compared with is stopped at the same steps.
        every: steps between agreements, where the curve is compared (in between each worker tells its own loss).
        ring: worker counts, in order; cli: through `manyhands train`.
    """

    strategy: str
    exact: bool = False
    rounds: bool = False
    every: int = 1
    ring: tuple[int, ...] = RING
    cli: bool = False

    @property
    def name(self) -> str:
        return (
            self.strategy
            + (" (command line)" if self.cli else "")
            + (" (every pair)" if self.ring == PAIRS else "")
        )


ROWS = (
    Row(f"ddp({LR})", exact=True),
    Row(f"ddp({LR}, {EF})"),
    Row(f"accumulate({LR}, every=3)", exact=True, rounds=True, every=3),
    Row(f"accumulate({LR}, every=3, {EF})", rounds=True),
    Row(f"hierarchical({LR})", exact=True),
    Row(f"hierarchical({LR}, across=int4)"),
    Row(f"powersgd({LR}, rank=2)"),
    Row(f"local-sgd({LR}, every=4, {EF})", rounds=True),
    Row(f"post-local-sgd({LR}, every=4, start=7, {EF})", rounds=True),
    Row(f"slowmo({LR}, every=4, {EF})", rounds=True),
    Row(f"diloco({LR}, every=4, {EF})", rounds=True),
    Row(f"streaming-diloco({LR}, every=4, fragments=2, delay=1)", rounds=True),
    Row("muloco(lr=3e-3, schedule=constant, every=4)", rounds=True),
    Row(f"sparseloco({LR}, every=4)", rounds=True),
    Row("demo(lr=1e-3, schedule=constant)"),
    Row(f"gossip({LR}, every=4)", rounds=True),
    Row(f"eager({LR}, {EF})", rounds=True),
    Row(f"forecast({LR}, every=3, delay=1, {EF})", rounds=True),
    Row("hogwild(lr=0.1, schedule=constant, every=3)", rounds=True),
    Row(f"zero1({LR})", exact=True),
    Row(f"zero1({LR}, {EF})"),
    Row(f"zero2({LR})", exact=True),
    Row(f"zero2({LR}, shard=2, {EF})"),
    Row(f"zero3({LR})", exact=True),
    Row(f"zero3({LR}, shard=2, {EF})"),
    Row(f"ddp({LR})", exact=True, ring=SHORT, cli=True),
    Row(f"zero3({LR})", exact=True, ring=SHORT, cli=True),
    Row(f"diloco({LR}, every=4, {EF})", ring=SHORT, cli=True, rounds=True),
    Row(f"parameter-server({LR})", exact=True, cli=True),
    Row(f"parameter-server({LR}, {EF})", cli=True),
    Row(f"parameter-server({LR}, consistency=bounded(2), {EF})", cli=True),
    Row(f"parameter-server({LR}, consistency=async, servers=2)", cli=True),
    Row(f"ddp({LR}, {EF})", ring=PAIRS),
    Row(f"zero1({LR}, {EF})", ring=PAIRS),
    Row(f"zero3({LR})", exact=True, ring=PAIRS),
    Row(f"diloco({LR}, every=4, {EF})", rounds=True, ring=PAIRS),
)


# -- running one leg


def forked() -> Any:
    """A context of `multiprocessing` whose processes begin with what a worker imports."""
    from manyhands.core import hardware
    from manyhands.launch.job import WARM

    found = mp.get_context("forkserver")
    found.set_forkserver_preload([*WARM, *MORE])
    os.environ.update(
        {**hardware.cpu_environment(1), "OPENBLAS_NUM_THREADS": "1"}
    )  # read when libraries load
    forkserver.ensure_running()
    return found


def be_worker(variables: Mapping[str, str], log: str, taken: str) -> None:
    """A worker's process, from here on as the launcher's is; `taken`: where it writes what it takes over of residuals."""
    import torch
    from safetensors.torch import save_file

    from manyhands.launch import child
    from manyhands.train import exchange_state, session

    restore = session.restore_replica

    def watched(replica: Any, *args: Any, **options: Any) -> int:
        steps = restore(replica, *args, **options)
        whole = getattr(
            replica.method, "exchange_state", None
        )  # of divided models: by parameter, on rank 0, collective
        if whole is not None:
            own = {name: leaf for name, leaf in whole().items() if "residual" in name}
        else:
            own = {name: leaf for name, leaf, mine in exchange_state.named_leaves(replica.states) if mine}
        copies = {name: leaf.clone().contiguous() for name, leaf in own.items()}
        save_file(copies, f"{taken}/{replica.wire.rank}.safetensors")
        return steps

    session.restore_replica = watched

    os.environ.clear()
    os.environ.update(variables)
    with open(log, "ab") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    torch.set_num_threads(1)
    del os.environ["MANYHANDS_PARENT"]
    child.work(ENTRY)


def train_forked(context: Any, arguments: Sequence[str]) -> tuple[int, str]:
    """`manyhands train ARGUMENTS` on forked workers: (the first exit code that is not 0, what was said)."""
    from manyhands.cli import options
    from manyhands.cli import train as command
    from manyhands.core import hardware
    from manyhands.launch import place
    from manyhands.launch.control import Embedded
    from manyhands.launch.job import elastic_of, placed, workers_of
    from manyhands.train.order import Order

    job, origins = command.assemble(options.parse(command.parser(), list(arguments)))
    job = placed(job, origins)
    size, output = workers_of(job), Path(job.output)
    logs, taken = place.make_logs(output), output / "taken"
    shutil.rmtree(taken, ignore_errors=True)
    taken.mkdir()
    for old in logs.glob("rank-*.log"):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="manyhands-resume-") as store:
        text = Order(job, dict(origins), time.time()).to_json()
        (Path(store) / "argument").write_text(text, encoding="utf-8")
        elastic = elastic_of(job)
        control = Embedded(elastic, store=Path(store), output=output) if elastic is not None else None
        processes = []
        try:
            if control is not None:
                control.expect(*(f"w{rank}" for rank in range(size)))
            for rank, seat in enumerate(hardware.seats(size, 1)):
                more = {
                    **(control.variables if control is not None else {}),
                    "MANYHANDS_SEAT": f"w{rank}",
                    "MANYHANDS_ERROR_FILE": str(logs / f"rank-{rank}.error.json"),
                }
                variables = place.variables(rank, size, seat, store, more)
                log = str(logs / f"rank-{rank}.log")
                processes.append(
                    context.Process(target=be_worker, args=(variables, log, str(taken)), daemon=True)
                )
                processes[-1].start()
            deadline = time.monotonic() + TIMEOUT_S
            while any(p.exitcode is None for p in processes) and time.monotonic() < deadline:
                if any(p.exitcode for p in processes):
                    deadline = min(deadline, time.monotonic() + 20.0)
                connection.wait([p.sentinel for p in processes if p.exitcode is None], 0.5)
        finally:
            for process in processes:
                process.kill()
                process.join()
            if control is not None:
                control.close()
    code = next((p.exitcode for p in processes if p.exitcode), 0)
    if not code:
        return 0, ""
    errors = [json.loads(path.read_text()) for path in sorted(logs.glob("rank-*.error.json"))]
    ours = [e["message"] for e in errors if e["ours"] and e["kind"] == "failed"]
    return code, (ours or [p.read_text()[-2000:] for p in sorted(logs.glob("rank-0.log"))] or [""])[0]


def train_cli(arguments: Sequence[str]) -> tuple[int, str]:
    """`manyhands train ARGUMENTS`: exit code, and what was said on standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "manyhands", "train", *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S * 2,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    return done.returncode, (done.stderr.strip() or done.stdout.strip())[-2000:]


# -- what is compared


def owed_error(stored: Mapping[str, Any], taken: Path) -> float:
    """Largest difference, relative, between Σ of stored residuals and Σ of what the resumed workers took over."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in taken.glob("*.safetensors"):
        for name, value in load_file(path).items():
            found[name] = found[name] + value.double() if name in found else value.double()
    if stored.keys() != found.keys():
        return float("inf")
    scale = {name: max(float(value.abs().max()), 1e-30) for name, value in stored.items()}
    return max((float((found[n] - stored[n]).abs().max()) / scale[n] for n in stored), default=0.0)


def residuals(path: Path) -> dict[str, Any]:
    """Per bucket Σ over workers of what is held back, float64."""
    from manyhands.train import exchange_state

    stored, found = exchange_state.Stored(path / "training" / "exchange.safetensors"), {}
    for name in stored:
        plain = name.rpartition("@")[0] if "@" in name else name
        if "residual" in plain:
            value = stored[name].double()
            found[plain] = found[plain] + value if plain in found else value
    return found


def losses(output: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["event"] == "stepped"}


def ledger(output: Path) -> tuple[bool, str]:
    from manyhands.cli.ledger import verdict
    from manyhands.train.audit import audit, load

    report = audit(load([output]))
    return report.ok, verdict(report)


# -- one row


def measure(row: Row, work: Path, context: Any) -> dict[str, Any]:
    """The ring, the uninterrupted run, and the comparison."""
    text = work / "corpus.txt"
    if not text.exists():
        text.write_text("\n".join(f"{i} times {i % 7} is {i * (i % 7)}" for i in range(330)))
    precision = "fp64" if row.exact else "fp32"
    common = [
        *(
            "--data",
            str(text),
            "--tokenizer",
            "byte",
            "--seq-len",
            "32",
            "--eval-fraction",
            "0",
            "--prompt",
            "",
        ),
        *("--model", "gpt2-nano", "--precision", precision, "--device", "cpu"),
        *(
            "--global-batch",
            "16",
            "--micro-batch",
            "1",
            "--log-every",
            "1",
            "--balance",
            "off",
            "--keep",
            "99",
        ),
        *("--cache", str(work / "cache"), "--threads", "1", "--restarts", "0"),
    ]

    def train(output: Path, workers: int, steps: int, *more: str) -> tuple[int, str]:
        given = [*common, "--strategy", row.strategy, "--output", str(output)]
        given += ["--workers", str(workers), "--steps", str(steps), *more]
        return train_cli(given) if row.cli else train_forked(context, given)

    begun, output = time.perf_counter(), work / "ring"
    shutil.rmtree(output, ignore_errors=True)
    legs: list[dict[str, Any]] = []
    done, before = 0, 0
    for workers, steps in zip(row.ring, ENDS, strict=False):
        code, said = train(output, workers, steps, *(["--resume", str(output)] if done else []))
        leg: dict[str, Any] = {"workers": workers, "from": before, "steps": steps, "code": code}
        if code:
            leg["said"] = said.strip().splitlines()[-1][:300] if said.strip() else ""
        else:
            saved = output / f"checkpoint-{steps}"
            if done and not row.cli:
                leg["owed_error"] = owed_error(residuals(output / f"checkpoint-{done}"), output / "taken")
            leg["owed"] = sum(float(t.abs().sum()) for t in residuals(saved).values())
            done, before = steps, workers
        legs.append(leg)
    plain = work / "plain"
    shutil.rmtree(plain, ignore_errors=True)
    stops = [leg["steps"] for leg in legs if not leg["code"]] if row.rounds else [done]
    for i, steps in enumerate(stops):
        workers = 1 if row.exact else REFERENCE
        code, said = train(plain, workers, steps, *(["--resume", str(plain)] if i else []))
        if code:
            break
    if code or not done:
        wall_s = time.perf_counter() - begun
        return {"strategy": row.strategy, "legs": legs, "ok": False, "said": said, "wall_s": wall_s}
    ours, theirs = losses(output), losses(plain)
    steps_ = sorted(step for step in ours.keys() & theirs.keys() if step % row.every == 0)
    difference = largest_difference([ours[s] for s in steps_], [theirs[s] for s in steps_])
    ends = [statistics.fmean(list(dict(sorted(each.items())).values())[-4:]) for each in (ours, theirs)]
    first = ours[min(ours)]
    once, words = ledger(output)
    refused = [leg for leg in legs if leg["code"]]
    found = {
        "strategy": row.strategy,
        "through": "command line" if row.cli else "forked workers",
        "must": "exact" if row.exact else "learns",
        "legs": legs,
        "refused": [leg["workers"] for leg in refused],
        "largest_difference": difference,
        "first_loss": first,
        "last_losses": ends,
        "losses": [[each[s] for s in steps_] for each in (ours, theirs)],
        "ledger": words,
        "wall_s": time.perf_counter() - begun,
    }
    near = abs(ends[0] - ends[1]) <= NEAR * ends[1] and ends[0] < first
    found["ok"] = bool(
        once
        and (difference <= EXACT if row.exact else near)
        and all(leg["code"] == 2 for leg in refused)
        and all(leg.get("owed_error", 0.0) < 1e-6 for leg in legs)
        and sorted(ours) == list(range(1, done + 1))
    )
    return found


def ring(counts: Sequence[int]) -> str:
    return " → ".join(map(str, counts))


def table(data: Mapping[str, Any]) -> str:
    lines = [
        "# Resume N → M",
        "",
        f"Ring {ring(RING)}; of ddp, zero3 and diloco on the command line {ring(SHORT)}; of *every pair* {ring(PAIRS)}.",
        f"Stopped after steps {', '.join(map(str, ENDS[: len(RING)]))}, and so on.",
        "",
        "| strategy | through | must be | curve's largest difference | last losses, ring / reference | refused | ledger | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"].values():
        if "ledger" not in row:
            lines.append(f"| `{row['strategy']}` | | | | | | | NOT ok: {row['said'].splitlines()[-1]} |")
            continue
        ends = "{:.3f} / {:.3f}".format(*row["last_losses"])
        refused = ", ".join(map(str, row["refused"])) or "–"
        said = row["ledger"].partition(":")[0]
        through = row["through"] + (", every pair" if len(row["legs"]) > len(RING) else "")
        shown = (
            f"{row['largest_difference']:.1e}"
            if row["must"] == "exact"
            else f"({row['largest_difference']:.1e})"
        )
        lines.append(
            f"| `{row['strategy']}` | {through} | {row['must']} | {shown} | {ends} | {refused} | {said} | "
            f"{'ok' if row['ok'] else 'NOT ok'} |"
        )
    reasons = {leg["said"] for row in data["rows"].values() for leg in row["legs"] if leg["code"]}
    if reasons:
        lines += ["", "Refusals, as they are said:", "", *(f"* {reason}" for reason in sorted(reasons))]
    return "\n".join(lines) + "\n"


def chosen(only: Sequence[str]) -> Iterator[Row]:
    for row in ROWS:
        if not only or any(row.name.startswith(name) for name in only):
            yield row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[], help="rows whose names begin so")
    parser.add_argument("--again", action="store_true", help="measure anew what is there already")
    parser.add_argument("--table", action="store_true", help="the table alone")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    data: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {"rows": {}}
    if not given.table:
        context = forked()
        data |= {
            "command": "python benchmarks/resume.py",
            "machine": facts_of_machine(),
            "ring": RING,
            "ends": ENDS,
        }
        for row in chosen(given.only):
            if row.name in data["rows"] and not given.again and data["rows"][row.name]["ok"]:
                continue
            with tempfile.TemporaryDirectory(prefix="manyhands-resume-") as work:
                found = measure(row, Path(work), context)
            data["rows"] = {
                name: each
                for name in [r.name for r in ROWS]
                if (each := found if name == row.name else data["rows"].get(name))
            }
            print(f"{row.name}: {'ok' if found['ok'] else 'NOT ok'} in {found['wall_s']:.0f} s", flush=True)
            write_json(given.out, data)
    given.out.with_suffix(".md").write_text(table(data))
    return 0 if all(row["ok"] for row in data["rows"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
