"""How long one waits: from the command to the first step of `manyhands train` with its defaults, and for `--help`.

    python benchmarks/startup.py [--runs 5]

Caches are warm: one run of each before is not counted. A training run is stopped (SIGTERM) once its first "stepped" event is in
metrics.jsonl; its time is the event's own. Writes ``results/startup.json``.
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
from pathlib import Path

import harness

TIMEOUT_S = 300.0
POLL_S = 0.02


def first_step_s() -> float:
    """Seconds from the command to the end of the first step. Raises RuntimeError where there was none."""
    with tempfile.TemporaryDirectory(prefix="manyhands-startup-") as scratch:
        output, log = Path(scratch) / "run", Path(scratch) / "log"
        command = [sys.executable, "-m", "manyhands", "train", "--output", str(output)]
        with log.open("wb") as sink:
            start = time.time()
            process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
        try:
            while time.time() - start < TIMEOUT_S and process.poll() is None:
                stepped = _first_stepped(output / "metrics.jsonl")
                if stepped is not None:
                    return stepped - start
                time.sleep(POLL_S)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(timeout=TIMEOUT_S)
        raise RuntimeError(f"no step in {TIMEOUT_S:.0f} s\n{log.read_text()[-2000:]}")


def _first_stepped(metrics: Path) -> float | None:
    if not metrics.exists():
        return None
    for line in metrics.read_text().splitlines(keepends=True):
        if line.endswith("\n") and (event := json.loads(line))["event"] == "stepped":
            return float(event["time_s"])
    return None


def help_s() -> float:
    """Wall seconds of the installed command's --help, or of `python -m manyhands --help` where it is not installed."""
    installed = Path(sys.executable).with_name("manyhands")
    command = [str(installed)] if installed.exists() else [sys.executable, "-m", "manyhands"]
    start = time.perf_counter()
    subprocess.run([*command, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "startup.json")
    given = parser.parse_args()
    load = os.getloadavg()[0]
    found = {}
    for name, measure, target in (("help", help_s, 0.3), ("first_step", first_step_s, 10.0)):
        measure()
        seconds = [measure() for _ in range(given.runs)]
        found[name] = {"median_s": statistics.median(seconds), "target_s": target, "seconds": seconds}
        print(f"{name}: {found[name]['median_s']:.2f} s, to be below {target} s", flush=True)
    data = {
        "command": f"python benchmarks/startup.py --runs {given.runs}",
        "machine": harness.facts_of_machine(),
        "load_before": load,
        **found,
    }
    harness.write_json(given.output, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
