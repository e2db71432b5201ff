"""What faults cost: real worker processes under SIGKILL at random moments, through `manyhands chaos`.

    python benchmarks/faults.py efficiency --steps-between 5.5        # steps of about ten seconds, four workers
    python benchmarks/faults.py efficiency --steps-between 1
    python benchmarks/faults.py soak --slices 3                       # many kills; adds to what earlier calls have found
    python benchmarks/faults.py report

`efficiency` uses an emulated device (see faults_model.py). "goodput" is the undisturbed run's time for the same steps / the
time taken; "useful work" is the part of the time of all workers that were there which went into the result: what is
redone, and every wait, is not. `soak` kills workers of a job of short steps, by the hundred, and compares ledger and
parameters (bit by bit) with the run without faults.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import RESULTS, facts_of_machine, write_json

from manyhands.core.environment import forks_wanted

HERE = Path(__file__).resolve().parent
EFFICIENCY, SOAK = RESULTS / "faults.json", RESULTS / "faults_soak.json"


def chaos(output: Path, *arguments: object) -> dict[str, Any]:
    """`manyhands chaos`; its report. Raises `CalledProcessError` where the job did not come through."""
    command = [sys.executable, "-m", "manyhands", "chaos", "--output", str(output), *map(str, arguments)]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]),
    }
    report = output / "chaos.json"
    report.unlink(missing_ok=True)  # an earlier call's
    with (output.parent / f"{output.name}.log").open("w") as log:
        code = subprocess.run(command, cwd=HERE, env=environment, stdout=log, stderr=log).returncode
    if not report.exists():
        raise SystemExit(f"no report (exit code {code}): see {log.name}")
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def common(text: Path, workers: int, batch: int, steps: int, row_s: float) -> list[object]:
    """A tiny job whose bits do not depend on who computes what."""
    text.write_text("\n".join(f"{i} times {i} is {i * i}" for i in range(4000)))
    return [
        *("--data", text, "--tokenizer", "byte", "--seq-len", 32, "--eval-fraction", 0, "--prompt", ""),
        *("--model", f"faults_model:emulated(row_s={row_s})", "--precision", "fp32", "--device", "cpu"),
        *(
            "--reproducible",
            "--micro-batch",
            1,
            "--global-batch",
            batch,
            "--workers",
            workers,
            "--steps",
            steps,
        ),
        *("--log-every", 1),
    ]


def efficiency(given: argparse.Namespace, scratch: Path) -> None:
    """Steps of about `step_s` seconds and one kill in `steps_between` of them."""
    places = given.workers * given.places
    job = common(scratch / "data.txt", given.workers, places, given.steps, given.step_s / given.places)
    mtbf = given.steps_between * given.step_s
    again = ["--baseline", given.baseline] if given.baseline else []
    report = chaos(scratch / "chaos", *job, "--kills", mtbf, "--chaos-seed", given.seed, *again)
    row = {
        "workers": given.workers,
        "step_s": given.step_s,
        "places_a_worker": given.places,
        "forked": forks_wanted(),
        "steps_between_kills": given.steps_between,
        "kills": sum(f["outcome"] == "done" for f in report["faults"]),
        "machine": facts_of_machine(),
        "load": os.getloadavg(),
        "seed": given.seed,
        "report": report,
    }
    row["measured_steps_between_kills"] = report["steps"] / max(1, row["kills"])
    rows = json.loads(EFFICIENCY.read_text())["rows"] if EFFICIENCY.exists() else []
    write_json(EFFICIENCY, {"command": "python benchmarks/faults.py efficiency", "rows": [*rows, row]})
    print(said(row))


def said(row: dict[str, Any]) -> str:
    report = row["report"]
    recovery = report["recovery_s"] or {"median": float("nan"), "max": float("nan")}
    return (
        f"{row['workers']} workers, steps of {report['undisturbed_step_s']:.2f} s, a kill in "
        f"{row['measured_steps_between_kills']:.1f} steps ({row['kills']} kills in {report['steps']} steps): "
        f"goodput {report['goodput']:.1%}, useful work {report['useful_work']:.1%}, "
        f"recovery {recovery['median']:.2f} s median, {recovery['max']:.2f} s at most; ledger "
        f"{'ok' if report['ledger']['ok'] else 'NOT ok'}, parameters "
        f"{'equal' if report['same_parameters'] else 'NOT equal'} (exit code {report['exit_code']})"
    )


def soak(given: argparse.Namespace, scratch: Path) -> None:
    """Slices of many kills. Each is one job, compared with the same undisturbed one."""
    job = common(scratch / "data.txt", given.workers, 12, given.steps, given.row_s)
    slices = json.loads(SOAK.read_text())["slices"] if SOAK.exists() else []
    plain = scratch / "first" / "undisturbed"
    for i in range(given.slices):
        seed = given.seed + len(slices)
        again = [] if i == 0 else ["--baseline", plain]
        output = scratch / ("first" if i == 0 else f"slice-{i}")
        begun = time.monotonic()
        report = chaos(output, *job, "--kills", given.mtbf, "--chaos-seed", seed, *again)
        slices.append(
            {
                "seed": seed,
                "workers": given.workers,
                "forked": forks_wanted(),
                "steps": report["steps"] + 1,
                "step_s": report["undisturbed_step_s"],
                "mtbf_s": given.mtbf,
                "wall_s": time.monotonic() - begun,
                "kills": sum(f["outcome"] == "done" for f in report["faults"]),
                "exit_code": report["exit_code"],
                "ledger": report["ledger"],
                "same_parameters": report["same_parameters"],
                "recovery_s": report["recovery_s"],
                "reform_s": report["reform_s"],
                "load": os.getloadavg(),
            }
        )
        write_json(
            SOAK,
            {"command": "python benchmarks/faults.py soak", "machine": facts_of_machine(), "slices": slices},
        )
        print(
            json.dumps(
                {k: slices[-1][k] for k in ("seed", "kills", "exit_code", "same_parameters", "recovery_s")}
            )
        )
        print("   ", slices[-1]["ledger"]["verdict"], flush=True)


def report() -> None:
    """All that was found."""
    if EFFICIENCY.exists():
        for row in json.loads(EFFICIENCY.read_text())["rows"]:
            print(said(row))
    if SOAK.exists():
        slices = json.loads(SOAK.read_text())["slices"]
        kills = sum(s["kills"] for s in slices)
        bad = [s for s in slices if s["exit_code"] or not s["ledger"]["ok"] or not s["same_parameters"]]
        medians = [s["recovery_s"]["median"] for s in slices if s["recovery_s"]]
        print(
            f"soak: {kills} kills in {len(slices)} jobs, {len(bad)} of which did not end as the run without faults; "
            f"{sum(s['ledger']['lost'] for s in slices)} samples lost, {sum(s['ledger']['doubled'] for s in slices)} doubled; "
            f"recovery {statistics.median(medians) if medians else float('nan'):.2f} s (median of medians)"
        )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = p.add_subparsers(dest="verb", required=True)
    e = verbs.add_parser("efficiency")
    e.add_argument("--steps-between", type=float, default=5.5)
    e.add_argument("--step-s", type=float, default=10.0)
    e.add_argument("--steps", type=int, default=33)
    e.add_argument("--places", type=int, default=12, help="micro-batches of each worker in a step")
    e.add_argument(
        "--baseline", help="the undisturbed run of an earlier call with the same options and a --scratch"
    )
    s = verbs.add_parser("soak")
    s.add_argument("--slices", type=int, default=1)
    s.add_argument("--steps", type=int, default=1500)
    s.add_argument("--row-s", type=float, default=0.01)
    s.add_argument("--mtbf", type=float, default=6.0)
    for each in (e, s):
        each.add_argument("--workers", type=int, default=4)
        each.add_argument("--seed", type=int, default=1)
        each.add_argument("--scratch", help="directory for the runs (default: a temporary one)")
    verbs.add_parser("report")
    given = p.parse_args()
    if given.verb == "report":
        report()
        return
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        scratch = Path(given.scratch or temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        {"efficiency": efficiency, "soak": soak}[given.verb](given, scratch)


if __name__ == "__main__":
    main()
