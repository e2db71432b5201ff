"""What a parameter server costs and what staleness does: transfers, steps beside ddp, and losses after equal batches.

    python benchmarks/parameter_server.py [--only transfers steps losses] [--mib 100] [--rounds 5]

* *transfers*: one worker, one server process of one thread, float32 over loopback: GB/s of a push and of a pull, over a
  socket file, plain TCP and TLS. A push's time is the whole call less the server's own time and the pull in its answer.
* *steps*: `manyhands train` with two workers, tokens/s of ddp and of the server, in rounds that alternate.
* *losses*: the same batches with four workers by ddp and by the server, held-out loss, seeds 0 to 2.

Writes ``results/parameter_server.json``; parts that are not run keep their earlier figures.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from manyhands.core import hardware

RESULT = Path(__file__).parent / "results" / "parameter_server.json"
STEPS = ("ddp(BASE)", "parameter-server(BASE)", "parameter-server(BASE, durability=interval)")
STEPS += (
    "parameter-server(BASE, consistency=async)",
    "parameter-server(BASE, exchange=error-feedback(int8))",
)
LOSSES = (
    "ddp(lr=3e-3)",
    "parameter-server(lr=3e-3)",
    "parameter-server(lr=3e-3, consistency=bounded(2))",
    "parameter-server(lr=3e-3, consistency=async)",
    "parameter-server(lr=3e-3, consistency=async, accumulate=4)",
    "parameter-server(lr=3e-3, consistency=async, discard=4)",
    "parameter-server(lr=0.5, optimizer=sgd, consistency=async)",
    "parameter-server(lr=0.5, optimizer=sgd, consistency=async, compensation=0.04)",
    "parameter-server(lr=0.1, optimizer=delayed-nesterov(every=4), consistency=async)",
    "ddp(lr=0.5, optimizer=sgd)",
)


@contextmanager
def server(directory: Path, *arguments: str) -> Iterator[tuple[Any, str]]:
    """A server process; its endpoint and token."""
    from manyhands.core import tls
    from manyhands.serve.link import endpoints

    ready, token = directory / "ready.json", directory / "token"
    command = [sys.executable, "-m", "manyhands", "serve-parameters", "--ready", str(ready)]
    process = subprocess.Popen(
        [*command, "--token-file", str(token), *arguments], stderr=subprocess.DEVNULL, env=os.environ
    )
    try:
        while not ready.exists():
            time.sleep(0.02)
        yield next(endpoints(str(ready))), tls.read_token(str(token))
    finally:
        process.terminate()
        process.wait()


def transfers(mib: int, rounds: int) -> dict[str, Any]:
    """GB/s of a push and of a pull by transport: the middle of `rounds`, with the least and the most."""
    import torch

    from manyhands.core import config
    from manyhands.serve.client import Servers
    from manyhands.serve.link import Link
    from manyhands.strategy.optimizers import SGD

    torch.set_num_threads(1)
    params = {f"p{i}": torch.zeros(mib << 15) for i in range(8)}  # mib MiB of float32 in all
    size = mib << 20
    found: dict[str, Any] = {"mib": mib}
    for kind in ("unix", "plain", "tls"):
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary)
            listen = f"unix:{directory}/socket" if kind == "unix" else "127.0.0.1:0"
            more = ["--plain"] if kind == "plain" else []
            with server(directory, "--listen", listen, *more) as (where, token):
                servers = Servers([Link(lambda w=where: w, token)], member="me", job="speed")
                servers.lay_out(params)
                rules = {"optimizer": config.to_data(SGD(0.1), "optimizers"), "consistency": "async"}
                servers.begin(rules, params, {}, serial=0, steps=0, tokens=0)
                servers.join(0)
                out = [torch.zeros(size, dtype=torch.uint8)]
                payload = [torch.zeros(size, dtype=torch.uint8)]
                used = dict.fromkeys(params, True)
                pushes, pulls, whole = [], [], []
                for step in range(rounds + 1):
                    begin = time.perf_counter()
                    answer = servers.pull(out)
                    pull = time.perf_counter() - begin - answer["served_s"]
                    fields = {"step": step, "version": step, "share": 1.0, "nominal": 1.0, "loss": 0.0}
                    begin = time.perf_counter()
                    answer = servers.push({**fields, "count": 1, "norm": 1.0}, used, payload, out)
                    spent = time.perf_counter() - begin
                    if step:  # the first one fills caches
                        pulls.append(size / pull / 1e9)
                        pushes.append(size / (spent - pull - answer["served_s"]) / 1e9)
                        whole.append(spent)
                servers.close()
        found[kind] = {
            "push_gb_per_s": spread(pushes),
            "pull_gb_per_s": spread(pulls),
            "step_s": spread(whole),
        }
        print(kind, json.dumps(found[kind]), flush=True)
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Least, middle and most."""
    return {k: round(f(values), 4) for k, f in (("min", min), ("median", statistics.median), ("max", max))}


def train(output: Path, strategy: str, *more: str) -> dict[str, Any]:
    """One run of the main job; its summary."""
    command = [sys.executable, "-m", "manyhands", "train", "--output", str(output), "--strategy", strategy]
    done = subprocess.run([*command, "--prompt", "", *more], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{strategy}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return found


def steps(rounds: int, model: str) -> dict[str, Any]:
    """tokens/s of two workers, alternating."""
    rates: dict[str, list[float]] = {}
    more = ["--model", model, "--workers", "2", "--steps", "12", "--seq-len", "128", "--eval-fraction", "0"]
    with tempfile.TemporaryDirectory() as temporary:
        for round_ in range(rounds):
            order = STEPS if round_ % 2 == 0 else STEPS[::-1]
            for i, name in enumerate(order):
                strategy = name.replace("BASE", "lr=1e-3")
                found = train(Path(temporary) / f"{round_}-{i}", strategy, *more, "--compile", "off")
                rates.setdefault(strategy, []).append(found["tokens_per_s"])
                print(strategy, round(found["tokens_per_s"]), flush=True)
    return {"model": model, "tokens_per_s": {name: spread(values) for name, values in rates.items()}}


def losses(seeds: int, n_steps: int) -> dict[str, Any]:
    """Held-out loss after equal batches, four workers."""
    table: dict[str, Any] = {}
    more = [
        "--model",
        "gpt2-nano",
        "--workers",
        "4",
        "--steps",
        str(n_steps),
        "--seq-len",
        "64",
        "--threads",
        "1",
    ]
    more += ["--compile", "off", "--precision", "fp32", "--check-every", "0"]
    with tempfile.TemporaryDirectory() as temporary:
        for name in LOSSES:
            runs = [
                train(Path(temporary) / f"{len(table)}-{s}", name, *more, "--seed", str(s))
                for s in range(seeds)
            ]
            values = [r["eval"]["loss"] for r in runs]
            table[name] = {
                "loss": spread(values),
                "staleness": [r.get("served", {}).get("staleness") for r in runs],
            }
            print(name, json.dumps(table[name]["loss"]), flush=True)
    return {"steps": n_steps, "seeds": seeds, "workers": 4, "methods": table}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=["transfers", "steps", "losses"])
    parser.add_argument("--mib", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="gpt2-micro")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    parts = {
        "transfers": lambda: transfers(given.mib, given.rounds),
        "steps": lambda: steps(given.rounds, given.model),
        "losses": lambda: losses(given.seeds, given.steps),
    }
    for part in given.only:
        load = os.getloadavg()[0]
        found[part] = {**parts[part](), "command": " ".join(sys.argv), "load_before": load}
        found["machine"] = hardware.machine_facts()
        RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
