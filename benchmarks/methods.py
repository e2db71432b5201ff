"""Methods of agreeing over limited links: tokens/s, bytes on the interface, loss after equal tokens, time to a common loss.

    python benchmarks/methods.py rates --workers 2 4            # speed at 10 Gbit/s, 1 Gbit/s, 100 and 20 Mbit/s (root)
    python benchmarks/methods.py quality --seeds 0 1 2          # losses, without a network
    python benchmarks/methods.py report                         # tables and plots from what was measured

Each command adds to ``benchmarks/results/methods.json``, so the whole can be measured in slices (``--only NAME …``,
``--budget SECONDS``); ``report`` writes ``methods.md`` and ``methods.png``. What is compared, and how, is in README.md beside it.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import methods_catalogue
import methods_report
import methods_run
import methods_setting as setting
import netlab
from methods_catalogue import RATES, USUAL, Method


def merge(path: Path, kind: str, records: Sequence[dict[str, Any]]) -> None:
    """Add records to the results, also while another slice does so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        data = json.loads(path.read_text()) if path.exists() else {}
        data.setdefault("machine", harness.facts_of_machine())
        data.setdefault(kind, []).extend(records)
        harness.write_json(path, data)
    path.with_suffix(".lock").unlink(missing_ok=True)


def main() -> int:
    given = _arguments()
    signal.signal(signal.SIGTERM, _leave)  # workers and namespaces go with us
    if given.what == "report":
        methods_report.write(given.output)
        return 0
    if reason := setting.missing():
        print(f"skipped: {reason}")
        return 0
    if given.what == "rates" and (reason := netlab.missing()):
        print(f"skipped: {reason}")
        return 0
    chosen = choose(methods_catalogue.catalogue(given.torchft), given.only)
    return (_rates if given.what == "rates" else _quality)(given, chosen)


def _leave(number: int, _frame: Any) -> None:
    raise SystemExit(128 + number)


def choose(every: Sequence[Method], only: Sequence[str] | None) -> list[Method]:
    """Those of the names, or all."""
    names = [m.name for m in every]
    if unknown := [o for o in only or () if o not in names]:
        raise SystemExit(f"{unknown}: the methods are {', '.join(names)}")
    return [m for m in every if not only or m.name in only]


def _rates(given: argparse.Namespace, chosen: Sequence[Method]) -> int:
    size, place = setting.SIZES[given.size], given.work / given.size
    setting.make(place, size, 0)

    def measure(method: Method, world: int) -> None:
        found = methods_run.rates(
            method, world=world, names=given.rates, size=size, place=place, seed=0, timeout_s=given.timeout
        )
        merge(given.output.with_suffix(".json"), "rates", found)
        for one in found:
            mb = max(one["sent_bytes_per_step"]) / 1e6
            print(
                f"{method.name:<28} {world} workers {one['rate']:>8}: {one['tokens_per_s']:8.0f} tokens/s, "
                f"{mb:.3f} MB/step, others {one['others_share']:.0%}",
                flush=True,
            )

    return _each(given, [(m, w) for w in given.workers for m in chosen], measure)


def _quality(given: argparse.Namespace, chosen: Sequence[Method]) -> int:
    size, place = setting.SIZES[given.size], given.work / given.size
    path = given.output.with_suffix(".json")

    def measure(method: Method, seed: int) -> None:
        if method.apart:
            return
        workers, steps = given.workers[0], given.steps or size.steps
        if not given.again and path.exists():
            for one in json.loads(path.read_text()).get("quality", []):
                key = (one["method"], one["strategy"], one["size"], one["seed"], one["workers"], one["steps"])
                if key == (method.name, method.strategy, size.name, seed, workers, steps):
                    return
        setting.make(place, size, seed)
        one = methods_run.quality(
            method,
            workers=workers,
            size=size,
            place=place,
            seed=seed,
            steps=steps,
            timeout_s=given.timeout,
            device=given.device,
        )
        merge(path, "quality", [one])
        print(
            f"{method.name:<28} seed {seed}: held-out loss {one['eval_loss']:.4f} after {one['tokens']:,} tokens "
            f"({one['wall_s']:.0f} s)",
            flush=True,
        )

    return _each(given, [(m, s) for s in given.seeds for m in chosen], measure)


def _each(
    given: argparse.Namespace, jobs: Sequence[tuple[Method, int]], measure: Callable[[Method, int], None]
) -> int:
    begun, longest, failed = time.monotonic(), 0.0, 0
    for method, number in jobs:
        start = time.monotonic()
        if start - begun + longest > given.budget:
            print(f"out of time before {method.name}, {number}", flush=True)
            return 3
        try:
            measure(method, number)
        except methods_run.RunFailed as error:
            failed += 1
            print(error, flush=True)
        longest = max(longest, time.monotonic() - start)
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    from manyhands.core.hardware import cache_directory

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["rates", "quality", "report"])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="methods")
    parser.add_argument("--workers", nargs="+", type=int, default=[2])
    parser.add_argument("--rates", nargs="+", choices=list(RATES), default=list(USUAL))
    parser.add_argument(
        "--size", choices=list(setting.SIZES), help="default: large for rates, small for quality"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="of a quality run; default: the size's")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="of quality runs (ours alone)"
    )
    parser.add_argument("--again", action="store_true", help="also quality runs that are there already")
    parser.add_argument(
        "--budget", type=float, default=1e9, help="begin no run that would not end within so many seconds"
    )
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="seconds: of one rate, or of a quality run"
    )
    parser.add_argument("--torchft", metavar="PYTHON", help="an interpreter that has torchft, for its DiLoCo")
    parser.add_argument("--work", type=Path, default=cache_directory() / "benchmarks" / "methods")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "methods", help="without its ending")
    given = parser.parse_args()
    given.size = given.size or ("small" if given.what == "quality" else "large")
    given.work = given.work.resolve()
    return given


if __name__ == "__main__":
    sys.exit(main())
