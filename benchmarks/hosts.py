"""Hosts that disappear, and links that are cut for a while: a job over three hosts of a network laboratory (root).

    python benchmarks/hosts.py [--only gone …] [--steps 1200]

Each host (`netlab.py`: a network namespace, with a host name of its own) has one worker, which has joined the coordinator on
host 0; gloo between them, `--reproducible`, `--hang-s 5`. In the midst of the job the port at the other end of a host's cable goes
down: nobody is told, no connection is reset. What must be: the coordinator's exit code is 0, every sample is used once, and the
parameters are to the bit those of a run that nobody disturbs.

Writes ``results/hosts.json``: of each row the time from the cut until the others went on, who was given up and why, the verdicts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import harness
import netlab

PORT = 7077
HANG_S = 5.0
DEADLINE_S = 300.0


@dataclass(frozen=True)
class Row:
    """What happens to which host's link.

    Attributes:
        down_s: seconds until it is up again; None: for ever.
        joins: exit codes of its `manyhands join` that are right.
    """

    name: str
    host: int | None
    down_s: float | None = None
    joins: tuple[int, ...] = (0,)


ROWS = (
    Row("undisturbed", None),
    Row("host 2 is gone for good", 2, joins=(1,)),
    Row("host 2's link is cut for 2 s", 2, 2.0),
    Row("host 2's link is cut for 15 s", 2, 15.0, joins=(0, 1)),
    Row("host 1's link is cut for 15 s", 1, 15.0, joins=(0, 1)),
    Row("the coordinator's host is cut off for 2 s", 0, 2.0),
)


def on(host: netlab.Host, *words: object) -> list[str]:
    """`manyhands WORDS` with the host's own name; the process keeps its number."""
    given = " ".join(f"'{word}'" for word in (sys.executable, "-m", "manyhands", *words))
    return ["unshare", "--uts", "sh", "-c", f"hostname h{host.index} && exec {given}"]


def records(output: Path) -> list[dict[str, Any]]:
    try:
        text = (output / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@contextmanager
def started(host: netlab.Host, log: Path, *words: object) -> Iterator[subprocess.Popen[Any]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with log.open("w") as sink:
        process = host.popen(on(host, *words), env=environment, stdout=sink, stderr=sink)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def until(found: Any, what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (value := found()):
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not within {DEADLINE_S:.0f} s")
        time.sleep(0.02)
    return value


def last_step(output: Path) -> int:
    return max((r["step"] for r in records(output) if r["event"] == "stepped"), default=0)


def run(row: Row, text: Path, scratch: Path, steps: int) -> dict[str, Any]:
    """One job; what came of it. Raises `SystemExit`: it hung."""
    output = scratch / re.sub(r"\W+", "-", row.name)
    output.mkdir()
    logs = [output / f"said-{n}.txt" for n in range(4)]
    job = [
        *(
            "--data",
            text,
            "--cache",
            scratch / "cache",
            "--output",
            output,
            "--model",
            "gpt2-nano",
            "--tokenizer",
            "byte",
        ),
        *(
            "--seq-len",
            64,
            "--global-batch",
            24,
            "--reproducible",
            "--prompt",
            "",
            "--log-every",
            1,
            "--device",
            "cpu",
        ),
        *("--eval-fraction", 0, "--steps", steps, "--workers", 3, "--hang-s", HANG_S, "--check-every", 50),
    ]
    with netlab.Lab(3, 1e9) as lab:
        address = f"{lab.hosts[0].address}:{PORT}"
        with started(lab.hosts[0], logs[3], "coordinate", *job, "--listen", address) as coordinator:
            said: list[str] = until(
                lambda: re.findall(r"--fingerprint (\S+)", logs[3].read_text()), "the coordinator"
            )
            token = ["--token-file", output / "coordinator.token", "--fingerprint", said[0]]
            return _see(row, lab, output, logs, coordinator, ["join", address, *token, "--workers", 1], steps)


def _see(
    row: Row,
    lab: netlab.Lab,
    output: Path,
    logs: Sequence[Path],
    coordinator: subprocess.Popen[Any],
    join: Sequence[object],
    steps: int,
) -> dict[str, Any]:
    with (
        started(lab.hosts[0], logs[0], *join) as a,
        started(lab.hosts[1], logs[1], *join) as b,
        started(lab.hosts[2], logs[2], *join) as c,
    ):
        cut_s = up_s = 0.0
        if row.host is not None:
            until(lambda: last_step(output) >= steps // 10, f"{row.name}: step {steps // 10}")
            lab.plug(row.host, in_=False)
            cut_s = time.time()
            if row.down_s is not None:
                time.sleep(row.down_s)
                lab.plug(row.host)
                up_s = time.time()
        until(lambda: coordinator.poll() is not None, row.name)
        ended = [each for n, each in enumerate((a, b, c)) if row.down_s is not None or n != row.host]
        until(lambda: all(each.poll() is not None for each in ended), f"{row.name}: the joined launches")
        codes = [a.poll(), b.poll(), c.poll()]
    found = records(output)
    after = [r for r in found if r["event"] == "stepped" and r["time_s"] > cut_s + 0.5] if cut_s else []
    ledger = subprocess.run(
        [sys.executable, "-m", "manyhands", "ledger", str(output)], capture_output=True, text=True
    )
    return {
        "row": row.name,
        "down_s": row.down_s,
        "exit_code": coordinator.returncode,
        "joined_exit_codes": codes,
        "went_on_after_s": after[0]["time_s"] - cut_s if after else None,
        "lost": [
            {
                **{k: r.get(k) for k in ("seat", "host", "how", "detail", "phase", "step")},
                "after_s": r["time_s"] - cut_s,
            }
            for r in found
            if r["event"] == "lost"
        ],
        "joined_again_after_s": next(
            (r["time_s"] - up_s for r in found if r["event"] == "joined" and up_s and r["time_s"] > up_s),
            None,
        ),
        "ledger": ledger.stdout.strip().splitlines()[-1:],
        "every_sample_once": ledger.returncode == 0 and "every sample once" in ledger.stdout,
        "parameters_sha256": _summary(output).get("parameters_sha256"),
        "said": [log.read_text()[-1500:] for log in logs],
    }


def _summary(output: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((output / "summary.json").read_text())
    except FileNotFoundError:
        return {}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="*",
        default=[],
        help="rows whose names contain one of these (and the undisturbed one)",
    )
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "hosts.json")
    given = parser.parse_args()
    if reason := netlab.missing():
        print(f"skipped: {reason}")
        return 0
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="hosts-") as temporary:
        scratch = Path(temporary)
        text = scratch / "data.txt"
        text.write_text("\n".join(f"{i} times {i} is {i * i}" for i in range(3000)))
        for row in ROWS:
            if row.host is not None and given.only and not any(word in row.name for word in given.only):
                continue
            found = run(row, text, scratch, given.steps)
            same = found["parameters_sha256"] == (rows[0] if rows else found)["parameters_sha256"] is not None
            whole = found["exit_code"] == 0 and found["every_sample_once"] and same
            codes = found["joined_exit_codes"]
            mine = row.host is None or row.down_s is None or codes[row.host] in row.joins
            others = all(code == 0 for n, code in enumerate(codes) if n != row.host)
            rows.append({**found, "same_parameters": same, "ok": bool(whole and mine and others)})
            print(f"{'ok ' if rows[-1]['ok'] else 'NOT'} {row.name}: {summary_of(rows[-1])}", flush=True)
            if not rows[-1]["ok"]:
                _say(rows[-1], sys.stdout)
            data = {
                "command": "python benchmarks/hosts.py",
                "machine": harness.facts_of_machine(),
                "rows": rows,
            }
            harness.write_json(given.output, data)
    return 0 if all(row["ok"] for row in rows) else 1


def summary_of(found: dict[str, Any]) -> str:
    given_up = (
        ", ".join(f"{r['seat']} after {r['after_s']:.1f} s ({r['how']})" for r in found["lost"])
        or "nobody given up"
    )
    on_after = found["went_on_after_s"]
    went = f"went on after {on_after:.1f} s, " if on_after is not None else ""
    return f"{went}{given_up}; exit codes {found['exit_code']}, {found['joined_exit_codes']}"


def _say(found: dict[str, Any], out: IO[str]) -> None:
    for text in found["said"]:
        print("    ----", *text.splitlines(), sep="\n    ", file=out, flush=True)


if __name__ == "__main__":
    sys.exit(main())
