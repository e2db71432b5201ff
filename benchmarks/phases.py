"""One worker of three is killed in each phase of a job in turn: how soon it is noticed, what is said of it, what comes of the job.

    python benchmarks/phases.py                  # about ten minutes; writes results/phases.json
    python benchmarks/phases.py --only save      # places whose names contain it
    python benchmarks/phases.py --fault stop     # SIGSTOP in place of SIGKILL; raise: an exception of its own; term: SIGTERM
    python benchmarks/phases.py --strategy zero3 # another strategy than ddp; both write results/phases_more.json

Real processes. The worker stops at the place (tests/traps.py: its thread stands still, its heartbeats go on) and is then killed by
SIGKILL. Noticed: until the first of the others has heard from the coordinator that the epoch is over (before the first
meeting: until the launcher has said so). Each run must end with exit code 0, every sample used once, and with ddp the parameters
of a run that nobody disturbs (`--reproducible`). A stopped process is noticed once it has been silent for `--hang-s` (2 s
here); who is asked to leave is missed by nobody.
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
import threading
import time
from pathlib import Path
from typing import Any

from harness import RESULTS, facts_of_machine, write_json

HERE = Path(__file__).resolve().parent
OUT = RESULTS / "phases.json"
START = """
import sys
from manyhands.cli.main import main
from manyhands.launch import job
job.ENTRY = "traps:main"
sys.exit(main(sys.argv[1:]))
"""
# name, place of the trap, the seat that walks into it, after which step
PLACES = (
    ("starting, before the first meeting", "connect", "w1", 0),
    ("preparing (rank 0)", "claim", "w0", 0),
    ("building", "build", "w1", 0),
    ("first step: compiling and warming up (rank 0)", "compile", "w0", 0),
    ("forward", "forward", "w1", 3),
    ("a collective of the step", "exchange", "w1", 3),
    ("a collective of the step (rank 0)", "exchange", "w0", 3),
    ("comparing fingerprints", "check", "w2", 3),
    ("evaluating", "evaluate", "w1", 4),
    ("saving (rank 0, which writes)", "save", "w0", 5),
    ("saving (not the one that writes)", "save", "w1", 5),
    ("the writer of the checkpoint (rank 0)", "writing", "w0", 5),
    ("waiting for the last checkpoint", "wait", "w1", 12),
)
LIMIT_S = 2.0
HANG_S = 2.0
DEADLINE_S = 240.0
MORE = RESULTS / "phases_more.json"
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}


def command(text: Path, output: Path, strategy: str) -> list[str]:
    exact = ["--reproducible"] if strategy == "ddp" else ["--strategy", strategy]
    options: list[object] = [
        *("--data", text, "--cache", output.parent / f"{output.name}-cache", "--output", output),
        *("--model", "gpt2-nano", "--tokenizer", "byte", "--seq-len", 32, "--global-batch", 12),
        *("--prompt", "", "--precision", "fp32", "--log-every", 1, "--device", "cpu", *exact),
        *("--check-every", 3, "--eval-every", 4, "--save-every", 5, "--steps", 12, "--workers", 3),
        *("--hang-s", HANG_S),
    ]
    return [sys.executable, "-c", START, "train", *map(str, options)]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(
    text: Path, output: Path, traps: list[dict[str, Any]], *, fault: str = "kill", strategy: str = "ddp"
) -> dict[str, Any]:
    """One job; where it has a trap, what came of the fault there. Raises `SystemExit`: it did not get there, or hung."""
    said = output.parent / f"{output.name}-said"
    said.mkdir()
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TRAPS": json.dumps({"directory": str(said), "traps": traps}),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent / "tests"), os.getcwd(), *sys.path]),
    }
    process = subprocess.Popen(
        command(text, output, strategy),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines: list[tuple[float, str]] = []
    assert process.stderr is not None
    told = process.stderr
    reader = threading.Thread(target=lambda: lines.extend((time.time(), line) for line in told), daemon=True)
    reader.start()
    killed_s, deadline = 0.0, time.monotonic() + DEADLINE_S
    while process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
            raise SystemExit(f"{output.name}: not at its end: {lines}")
        if not killed_s and (trapped := [r for r in records(said / "said") if r["what"] == "trapped"]):
            killed_s = time.time()
            if fault in SIGNALS:
                os.kill(trapped[0]["pid"], SIGNALS[fault])
            (said / "open").touch()  # who was asked to leave goes on, to do so
        time.sleep(0.002)
    reader.join()
    found: dict[str, Any] = {"exit_code": process.returncode, "said": [line for _, line in lines]}
    found["met"] = bool(killed_s)
    if traps:
        heard = [r["time_s"] - killed_s for r in records(said / "said") if r["what"] == "over"]
        first = [at - killed_s for at, line in lines if f"worker {traps[0]['seat']} " in line]
        after = [s for s in (*heard, *first) if s >= 0]
        found["noticed_after_s"] = min(after) if after else None
        found["told_after_s"] = first[0] if first else None
    ledger = subprocess.run(
        [sys.executable, "-m", "manyhands", "ledger", str(output)], capture_output=True, text=True
    )
    found["every_sample_once"] = ledger.returncode == 0 and "every sample once" in ledger.stdout
    if (output / "summary.json").exists():
        found["parameters_sha256"] = json.loads((output / "summary.json").read_text())["parameters_sha256"]
    reformed = [r for r in records(output / "metrics.jsonl") if r["event"] == "reformed"]
    found["reformed_in_s"] = reformed[0]["wall_s"] if reformed else None
    return found


def _add(facts: dict[str, Any], row: dict[str, Any]) -> None:
    """Instead of the last row of its kind."""
    rows = json.loads(MORE.read_text())["rows"] if MORE.exists() else []
    key = ("fault", "strategy", "place")
    others = [each for each in rows if any(each[k] != row[k] for k in key)]
    write_json(MORE, {**facts, "rows": [*others, row]})


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="", help="places whose names contain it")
    p.add_argument("--fault", choices=("kill", "stop", "raise", "term"), default="kill")
    p.add_argument("--strategy", default="ddp")
    given = p.parse_args()
    act = {"raise": "exit", "term": "wait"}.get(given.fault, "stop")
    limit_s = {"stop": LIMIT_S + HANG_S}.get(given.fault, LIMIT_S)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="phases-") as temporary:
        scratch = Path(temporary)
        text = scratch / "data.txt"
        text.write_text("\n".join(f"{i} times {i} is {i * i}" for i in range(900)))
        quiet = run(text, scratch / "quiet", [], strategy=given.strategy)
        for number, (name, place, seat, step) in enumerate(PLACES):
            if given.only not in name:
                continue
            load = os.getloadavg()
            trap = {"seat": seat, "place": place, "step": step, "act": act}
            kind = {"fault": given.fault, "strategy": given.strategy}
            found = run(text, scratch / f"run-{number}", [trap], **kind)
            if not found.pop("met"):
                print(f"    {name}: this strategy has no such place", flush=True)
                continue
            same = found.pop("parameters_sha256", None) == quiet["parameters_sha256"]
            noticed = found["noticed_after_s"]
            in_time = given.fault == "term" or (noticed is not None and noticed < limit_s)
            good = (
                found["exit_code"] == 0 and found["every_sample_once"] and (same or given.strategy != "ddp")
            )
            row = {"place": name, "seat": seat, "same_parameters": same, **found, "load": load}
            rows.append({**kind, **row, "ok": bool(good and in_time)})
            print(f"{'ok ' if rows[-1]['ok'] else 'NOT'} {name}: noticed after {noticed} s", flush=True)
            for line in found["said"]:
                print("    ", line.rstrip(), flush=True)
            times = [r["noticed_after_s"] for r in rows if r["noticed_after_s"] is not None]
            spread = {"median": statistics.median(times), "max": max(times)} if times else None
            command_, machine = "python benchmarks/phases.py", facts_of_machine()
            if (given.fault, given.strategy) != ("kill", "ddp"):
                _add({"command": f"{command_} --fault … --strategy …", "machine": machine}, rows[-1])
            elif not given.only:
                data = {"command": command_, "machine": machine, "noticed_after_s": spread, "rows": rows}
                write_json(OUT, data)
    sys.exit(0 if rows and all(row["ok"] for row in rows) else 1)


if __name__ == "__main__":
    main()
