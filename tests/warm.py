"""Worker processes forked from one that has imported everything, for tests whose subject is what workers do.

A launched worker is a fresh interpreter, and importing PyTorch and Transformers takes it seconds of a core. Where a test
is not about the launcher, its workers come from here: real processes all the same, in which nothing has run yet.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing as mp
import os
import tempfile
import time
from collections.abc import Mapping
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import pytest

from manyhands.cli.main import main
from manyhands.core import hardware
from manyhands.launch import child, local, place
from manyhands.launch.control import Elastic, Embedded
from manyhands.launch.job import WARM

TIMEOUT_S = 300.0
PRELOAD = [*WARM, "pytest", "hypothesis", "hypothesis.strategies"]


def context() -> Any:
    """A context of `multiprocessing` whose processes begin with torch and Transformers imported."""
    found = mp.get_context("forkserver")
    found.set_forkserver_preload(PRELOAD)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**hardware.cpu_environment(1), "OPENBLAS_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)  # read when the libraries are loaded
        forkserver.ensure_running()
    return found


def manyhands(*arguments: object) -> str:
    """`manyhands ARGUMENTS` in this process, with workers that are forked; returns what it says on its standard output.

    Only the launcher is left out. The workers have its variables, its coordinator's among them, and run the entry point that
    it would run; nobody watches them or replaces one that is lost. Raises AssertionError, with their logs, where one fails.
    """
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(local, "launch", _launch)
        code = main([str(a) for a in arguments])
    assert code == 0, f"exit code {code}\n{said.getvalue()}"
    return said.getvalue()


def _launch(
    entry: str,
    argument: str,
    *,
    workers: int,
    output: Path,
    threads: int | None = None,
    servers: object = None,
    elastic: Elastic | None = None,
) -> int:
    assert servers is None, "parameter servers are the launcher's"
    logs = place.make_logs(output)
    with tempfile.TemporaryDirectory(prefix="manyhands-test-") as store:
        (Path(store) / "argument").write_text(argument, encoding="utf-8")
        control = Embedded(elastic, store=Path(store), output=output) if elastic is not None else None
        processes: list[Any] = []
        try:
            if control is not None:
                control.expect(*(f"w{rank}" for rank in range(workers)))
            for rank, seat in enumerate(hardware.seats(workers, threads)):
                more = {
                    **(control.variables if control is not None else {}),
                    "MANYHANDS_SEAT": f"w{rank}",
                    "MANYHANDS_ERROR_FILE": str(logs / f"rank-{rank}.error.json"),
                }
                variables = place.variables(rank, workers, seat, store, more)
                given = (entry, variables, str(logs / f"rank-{rank}.log"))
                processes.append(context().Process(target=_work, args=given, daemon=True))
                processes[-1].start()
            _wait(processes, logs)
        finally:
            for process in processes:
                process.kill()
                process.join()
            if control is not None:
                control.close()
    return 0


def _work(entry: str, variables: Mapping[str, str], log: str) -> None:
    """A worker's process, from here on as the launcher's is."""
    import torch

    os.environ.clear()
    os.environ.update(variables)
    with open(log, "ab") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    del os.environ["MANYHANDS_PARENT"]
    child.work(entry)


def _wait(processes: list[Any], logs: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while any(process.exitcode is None for process in processes):
        late = time.monotonic() > deadline
        if late or any(process.exitcode for process in processes):
            break
        connection.wait([p.sentinel for p in processes if p.exitcode is None], 0.5)
    codes = [process.exitcode for process in processes]
    if codes != [0] * len(codes):
        said = [path.read_text() for path in sorted(logs.glob("rank-*.log"))]
        raise AssertionError("\n".join([f"exit codes {codes}", *said]))
