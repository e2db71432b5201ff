"""Long messages whole or in pieces over gloo, in turn in one run, between hosts joined by limited links.

    python benchmarks/pieces.py                        # needs root and iproute2; writes benchmarks/results/pieces.json

Each round sends the same bytes whole and in pieces (manyhands/wire/flying.py), in an order that alternates: an all-gather and
a swap, both ways at once. `ideal_s` is the bytes over the link's rate. Ratios are whole over pieces, within a round.
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

import harness
import netlab
from methods_run import PORT, environment

ROUNDS, SIZE_BYTES, RATE = 10, 16_500_000, 100e6  # the 4-bit codes of 33M values


def worker(out: Path) -> None:
    import torch

    import manyhands
    from manyhands.core.request import Gather, Swap
    from manyhands.wire import flying

    torch.set_num_threads(1)
    wire: Any = manyhands.join(device="cpu", transport="group").world.wire
    source = torch.zeros(SIZE_BYTES, dtype=torch.uint8)
    requests = {"all-gather": Gather(source, even=True), "swap": Swap(source, 0)}
    cut, found = flying.PIECE_BYTES, []
    for round in range(ROUNDS):
        for way in ("whole", "pieces") if round % 2 else ("pieces", "whole"):
            flying.PIECE_BYTES = cut if way == "pieces" else 1 << 40
            for name, request in requests.items():
                wire.begin(Gather(torch.zeros(1), even=True)).wait()  # all begin together
                start = time.perf_counter()
                wire.begin(request).wait()
                seconds = time.perf_counter() - start
                found.append({"round": round, "request": name, "way": way, "seconds": seconds})
    out.write_text(json.dumps(found))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "pieces")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        worker(given.worker)
        return 0
    if reason := netlab.missing():
        print(f"skipped: {reason}")
        return 0
    with tempfile.TemporaryDirectory() as scratch, netlab.Lab(2, RATE) as lab:
        outs = [Path(scratch) / str(host.index) for host in lab.hosts]
        processes: list[subprocess.Popen[Any]] = []
        for host, out in zip(lab.hosts, outs, strict=True):
            env = environment(host.index, 2, lab.hosts[0].address, PORT, host.namespace)
            env |= {"GLOO_SOCKET_IFNAME": host.interface}
            command = [sys.executable, os.fspath(Path(__file__).resolve()), "--worker", os.fspath(out)]
            processes.append(host.popen(command, env=env))
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit("a worker failed")
        rows = json.loads(outs[0].read_text())
    summary = {}
    for name in ("all-gather", "swap"):
        seconds = {
            way: [r["seconds"] for r in rows if r["request"] == name and r["way"] == way]
            for way in ("whole", "pieces")
        }
        ratios = []
        for round in range(ROUNDS):
            at = {r["way"]: r["seconds"] for r in rows if r["request"] == name and r["round"] == round}
            ratios.append(at["whole"] / at["pieces"])
        summary[name] = {
            **{f"{way}_s": statistics.median(values) for way, values in seconds.items()},
            "ratio": statistics.median(ratios),
            "ratio_smallest": min(ratios),
            "ratio_largest": max(ratios),
        }
        print(name, json.dumps({k: round_to(v) for k, v in summary[name].items()}))
    record = {
        "command": "python benchmarks/pieces.py",
        "machine": harness.facts_of_machine(),
        "size_bytes": SIZE_BYTES,
        "rate_bits_per_s": RATE,
        "ideal_s": SIZE_BYTES * 8 / RATE,
        "summary": summary,
        "rounds": rows,
    }
    harness.write_json(given.output.with_suffix(".json"), record)
    return 0


def round_to(value: float) -> float:
    return float(f"{value:.3g}")


if __name__ == "__main__":
    sys.exit(main())
