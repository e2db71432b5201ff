"""Worker processes forked from one that has imported everything, for tests whose subject is what workers do.

A launched worker is a fresh interpreter, and importing PyTorch and Transformers takes it seconds of a core. Where a test
is not about the launcher, its workers come from here: real processes all the same, in which nothing has run yet.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import time
from collections.abc import Mapping
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import pytest

from manyhands.core import hardware
from manyhands.launch import place
from manyhands.launch.job import ENTRY, WARM, elastic_of, placed, servers_of, workers_of

TIMEOUT_S = 300.0
PRELOAD = [
    *WARM,
    *(
        "pytest",
        "hypothesis",
        "hypothesis.strategies",
        "fsspec",
        "rich.table",
        "grpc._channel",
        "safetensors.torch",
    ),
    *(
        "torch.distributed.tensor",
        "manyhands.train.replica",
        "manyhands.train.synchronous",
        "manyhands.train.session",
    ),
    *(
        "manyhands.data.prepare",
        "manyhands.train.summary",
        "manyhands.train.terminal",
        "manyhands.coordinate.client",
    ),
    *(
        "manyhands.strategy.optimizers",
        "manyhands.train.sinks",
        "manyhands.train.ledger",
        "manyhands.train.explain",
    ),
]


def context() -> Any:
    """A context of `multiprocessing` whose processes begin with torch and Transformers imported."""
    found = mp.get_context("forkserver")
    found.set_forkserver_preload(PRELOAD)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**hardware.cpu_environment(1), "OPENBLAS_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)  # read when the libraries are loaded
        forkserver.ensure_running()
    return found


def train(*arguments: object, timeout_s: float = TIMEOUT_S) -> None:
    """`manyhands train ARGUMENTS` on forked workers; raises AssertionError with their logs where one fails.

    They get the launcher's variables, the coordinator's among them, and run its entry point; nobody replaces one that is lost.
    """
    from manyhands.cli import options
    from manyhands.cli import train as command
    from manyhands.launch.control import Embedded
    from manyhands.train.order import Order

    job, origins = command.assemble(options.parse(command.parser(), [str(a) for a in arguments]))
    job = placed(job, origins)
    assert servers_of(job) is None, "parameter servers are the launcher's"
    size, output = workers_of(job), Path(job.output)
    logs = place.make_logs(output)
    with tempfile.TemporaryDirectory(prefix="manyhands-test-") as store:
        (Path(store) / "argument").write_text(
            Order(job, dict(origins), time.time()).to_json(), encoding="utf-8"
        )
        elastic = elastic_of(job)
        control = Embedded(elastic, store=Path(store), output=output) if elastic is not None else None
        processes = []
        try:
            if control is not None:
                control.expect(*(f"w{rank}" for rank in range(size)))
            for rank, seat in enumerate(hardware.seats(size, 1 if job.reproducible else job.threads)):
                more = {
                    **(control.variables if control is not None else {}),
                    "MANYHANDS_SEAT": f"w{rank}",
                    "MANYHANDS_ERROR_FILE": str(logs / f"rank-{rank}.error.json"),
                }
                variables = place.variables(rank, size, seat, store, more)
                log = logs / f"rank-{rank}.log"
                processes.append(context().Process(target=_work, args=(variables, str(log)), daemon=True))
                processes[-1].start()
            _wait(processes, logs, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
            if control is not None:
                control.close()


def _work(variables: Mapping[str, str], log: str) -> None:
    """A worker's process, from here on as the launcher's is."""
    import torch

    from manyhands.launch import child

    os.environ.clear()
    os.environ.update(variables)
    with open(log, "ab") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    del os.environ["MANYHANDS_PARENT"]
    child.work(ENTRY)


def _wait(processes: list[Any], logs: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(process.exitcode is None for process in processes):
        late = time.monotonic() > deadline
        if late or any(process.exitcode for process in processes):
            break
        connection.wait([p.sentinel for p in processes if p.exitcode is None], 0.5)
    codes = [process.exitcode for process in processes]
    if codes != [0] * len(codes):
        said = [path.read_text() for path in sorted(logs.glob("rank-*.log"))]
        raise AssertionError("\n".join([f"exit codes {codes}", *said]))
