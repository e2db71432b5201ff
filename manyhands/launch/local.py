"""This machine as the cluster: one fresh interpreter per worker, watched until all have ended.

The workers meet through a private directory (`MANYHANDS_STORE`), which also hands them their argument. Each writes to
``OUTPUT/logs/rank-k.log``; rank 0 also gets this terminal for its display. Nothing is left behind, however this process
ends (see `guard`).

The first failure of any worker ends the others and is printed last; but in an elastic launch survivors go on, the loss is
printed as it happens, and a replacement is started (`Crew`), unless, before the first step, it would meet the same.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.core import hardware
from manyhands.core.errors import UsageError, WorkerFailed
from manyhands.launch import place
from manyhands.launch.crew import Crew
from manyhands.launch.terminal import Console, Requests
from manyhands.launch.verdict import judge

if TYPE_CHECKING:
    from manyhands.launch.control import Elastic, Remote
    from manyhands.launch.served import ServerProcesses


def launch(
    entry: str,
    argument: str,
    *,
    workers: int,
    output: Path,
    threads: int | None = None,
    env: Mapping[str, str] | None = None,
    servers: ServerProcesses | None = None,
    elastic: Elastic | None = None,
    remote: Remote | None = None,
) -> int:
    """Run `entry` (``module:function``) with `argument` on `workers` new processes; returns the exit code.

    Args:
        output: logs go to ``output/logs``.
        threads: of each worker; None: the allowed cores divided among them.
        env: further environment variables.
        servers: parameter servers that run beside the workers.
        elastic: how to go on when workers are lost; None: the first loss ends the launch.
        remote: the coordinator of a job that these workers join; None: one of their own, where `elastic` is given.

    Returns:
        0; 128 + signal after SIGINT or SIGTERM; else the first failure's code (2 for usage, 1 otherwise), which is
        printed on stderr.
    """
    if workers < 1:
        raise UsageError(
            f"workers = {workers}", "at least one does the work", "leave it out for one per core or GPU"
        )
    logs = place.make_logs(output, keep=remote is not None)
    with Requests() as requests, place.scratch() as (store, watcher), Console() as console:
        (Path(store) / "argument").write_text(argument, encoding="utf-8")
        seats = hardware.seats(workers, threads)
        control = None
        if elastic is not None:
            from manyhands.launch.control import Embedded, Joined

            control = (
                Joined(remote) if remote is not None else Embedded(elastic, store=Path(store), output=output)
            )
        prefix = remote.name + "-" if remote is not None else ""
        crew = Crew(requests, watcher, entry, logs, console.number, servers, control, elastic, prefix)
        try:
            if servers is not None:
                servers.start(store, {**os.environ, **hardware.cpu_environment(1), **(env or {})}, crew.tell)
            crew.prepare(place.variables(0, workers, seats[0], store, env or {}))
            if control is not None:  # from now on their start takes time
                control.expect(*(crew.name(rank, 0) for rank in range(workers)))
            for rank, seat in enumerate(seats):
                if not requests.stop:
                    _start(crew, rank, place.variables(rank, workers, seat, store, env or {}))
            crew.watch()
        finally:
            crew.end()
            if control is not None:
                control.close()
        if not crew.workers:  # stopped before the first one started
            return 128 + requests.stop[0]
        verdict = judge(
            [w.end() for w in crew.workers],
            stopped_by=requests.stop[0] if requests.stop else None,
            told_s=crew.told_s,
            out_of_memory=crew.out_of_memory(),
            ended=control.ended if control is not None and not crew.hopeless else None,
        )
    if servers is not None and not requests.stop:
        verdict = servers.judged(verdict)
    if verdict.words:
        print(verdict.words, file=sys.stderr, flush=True)
    return verdict.exit_code


def _start(crew: Crew, rank: int, variables: dict[str, str]) -> None:
    try:
        crew.start(rank, variables)
    except OSError as error:  # no memory, no process
        raise WorkerFailed(
            f"worker {rank} cannot be started: {error.strerror or error}",
            "each worker is a process of its own, with a log",
            "start fewer (--workers), or raise the limit of processes or memory"
            if error.errno in (errno.EAGAIN, errno.ENOMEM)
            else "",
        ) from error
