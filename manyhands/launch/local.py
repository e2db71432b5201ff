"""This machine as the cluster: one fresh interpreter per worker, watched until all have ended.

No ports: the workers meet through a private directory (`MANYHANDS_STORE`), which also hands them their argument. Each
writes to ``OUTPUT/logs/rank-k.log``; rank 0 also gets this terminal for its display. The first failure of any worker
ends the others and is printed last. Nothing is left behind, however this process ends (see `guard`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.core import hardware
from manyhands.core.errors import UsageError
from manyhands.launch import child, guard
from manyhands.launch.terminal import Console, Requests
from manyhands.launch.verdict import End, judge, read_record, read_tail

if TYPE_CHECKING:
    from manyhands.launch.served import ServerProcesses

GRACE_S = 10.0  # between SIGTERM and SIGKILL for the peers of a failed worker
POLL_S = 0.02


def launch(
    entry: str,
    argument: str,
    *,
    workers: int,
    output: Path,
    threads: int | None = None,
    env: Mapping[str, str] | None = None,
    servers: ServerProcesses | None = None,
) -> int:
    """Run `entry` (``module:function``) with `argument` on `workers` new processes; returns the exit code.

    Args:
        output: logs go to ``output/logs``.
        threads: of each worker; None: the allowed cores divided among them.
        env: further environment variables.
        servers: parameter servers that run beside the workers.

    Returns:
        0; 128 + signal after SIGINT or SIGTERM; else the first failure's code (2 for usage, 1 otherwise), which is
        printed on stderr.
    """
    if workers < 1:
        raise UsageError(
            f"workers = {workers}", "at least one does the work", "leave it out for one per core or GPU"
        )
    logs = _make_logs(output)
    with Requests() as requests, _scratch() as (store, watcher), Console() as console:
        (Path(store) / "argument").write_text(argument, encoding="utf-8")
        run = _Run(requests, watcher, servers)
        seats = hardware.seats(workers, threads)
        try:
            if servers is not None:
                servers.start(store, {**os.environ, **hardware.cpu_environment(1), **(env or {})}, run.tell)
            for rank, seat in enumerate(seats):
                if not requests.stop:
                    variables = _variables(rank, workers, seat, store, env or {})
                    run.start(rank, entry, logs, variables, console.number if rank == 0 else None)
            run.watch()
        finally:
            run.end()
        if not run.workers:  # stopped before the first one started
            return 128 + requests.stop[0]
        verdict = judge(
            [w.end() for w in run.workers],
            stopped_by=requests.stop[0] if requests.stop else None,
            told_s=run.told_s,
            out_of_memory=run.out_of_memory(),
        )
    if verdict.words:
        print(verdict.words, file=sys.stderr, flush=True)
    return verdict.exit_code


@dataclass
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    log: Path
    log_begin: int  # where this run's part of the log begins: an earlier run's may stand before it
    error: Path
    ended_s: float | None = None

    def end(self) -> End:
        record = read_record(self.error)
        return End(
            rank=self.rank,
            host=hardware.hostname(),
            code=self.process.returncode,
            time_s=self.ended_s or time.time(),
            record=record,
            log=self.log,
            tail=read_tail(self.log, self.log_begin),
        )


@dataclass
class _Run:
    """The workers of one launch."""

    requests: Requests
    watcher: subprocess.Popen[bytes]
    servers: ServerProcesses | None = None
    workers: list[_Worker] = field(default_factory=list)
    told_s: float | None = None
    _kills_before: int = field(default_factory=lambda: _oom_kills())
    _forwarded: int = 0

    def start(
        self, rank: int, entry: str, logs: Path, variables: dict[str, str], console: int | None
    ) -> None:
        log, error = logs / f"rank-{rank}.log", logs / f"rank-{rank}.error.json"
        variables["MANYHANDS_ERROR_FILE"] = str(error.absolute())
        if console is not None:
            variables["MANYHANDS_CONSOLE"] = str(console)
        with log.open("ab") as sink:
            begin = sink.tell()
            process = subprocess.Popen(
                [sys.executable, *_flags(), "-c", child.BOOT, os.pathsep.join(sys.path), entry],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=variables,
                pass_fds=[] if console is None else [console],
                start_new_session=True,  # a Ctrl-C reaches us alone, and we hand it on once
            )
        self.workers.append(_Worker(rank, process, log, begin, error))
        self.tell(f"started {process.pid}")

    def watch(self) -> None:
        """Until all have ended; after a first failure the others get SIGTERM and, later, SIGKILL."""
        while True:
            for worker in self.workers:
                if worker.ended_s is None and worker.process.poll() is not None:
                    worker.ended_s = time.time()
                    if worker.process.returncode != 0 and self.told_s is None and not self.requests.stop:
                        self.told_s = time.time()
                        self._signal(signal.SIGTERM)
            if all(worker.ended_s is not None for worker in self.workers):
                return
            self._serve()
            if self.servers is not None:
                self.servers.watch()
            if self.told_s is not None and time.time() - self.told_s > GRACE_S:
                self._signal(signal.SIGKILL)
            time.sleep(POLL_S)

    def end(self) -> None:
        """Whatever still runs is killed, with all that the workers had started."""
        self._signal(signal.SIGKILL)
        for worker in self.workers:
            worker.process.wait()
            worker.ended_s = worker.ended_s or time.time()
            guard.end_group(worker.process.pid)
            self.tell(f"ended {worker.process.pid}")
        if self.servers is not None:
            self.servers.end()
        guard.clear(worker.process.pid for worker in self.workers)

    def out_of_memory(self) -> bool:
        return _oom_kills() > self._kills_before

    def _serve(self) -> None:
        """Hand on what we were asked: the first SIGINT or SIGTERM once, later ones as SIGKILL; a Ctrl-Z to all."""
        asked = list(self.requests.stop)
        for place in range(self._forwarded, len(asked)):
            signum = asked[0] if place == 0 else signal.SIGKILL
            what = "stopping the workers; once more to kill them" if place == 0 else "killing the workers"
            print(f"manyhands: {signal.Signals(asked[place]).name}: {what}", file=sys.stderr, flush=True)
            self._signal(signum)
        self._forwarded = len(asked)
        if self.requests.pause:
            self.requests.pause = False
            self._signal(signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            self._signal(signal.SIGCONT)  # here we are in the foreground again

    def _signal(self, signum: int) -> None:
        for worker in self.workers:
            if worker.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    worker.process.send_signal(signum)

    def tell(self, line: str) -> None:
        assert self.watcher.stdin is not None
        with contextlib.suppress(OSError):  # somebody killed it
            self.watcher.stdin.write(line.encode() + b"\n")
            self.watcher.stdin.flush()


def _make_logs(output: Path) -> Path:
    logs = output / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        for stale in logs.glob("rank-*.error.json"):
            stale.unlink()
    except OSError as error:
        raise UsageError(
            f"output = {str(output)!r}: {error.strerror}",
            "it is a directory that can be written",
            "give another --output",
        ) from None
    return logs


@contextlib.contextmanager
def _scratch() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A private directory, and the process that clears up should this one be killed."""
    store = tempfile.mkdtemp(prefix="manyhands-")
    try:
        watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, store],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield store, watcher
        finally:
            with contextlib.suppress(OSError):
                watcher.communicate(b"done\n")
            watcher.wait()
    finally:
        shutil.rmtree(store, ignore_errors=True)


def _variables(
    rank: int, workers: int, seat: hardware.Seat, store: str, extra: Mapping[str, str]
) -> dict[str, str]:
    """The environment of one worker."""
    return {
        **os.environ,
        **hardware.cpu_environment(seat.threads),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(workers),
        "LOCAL_WORLD_SIZE": str(workers),
        "MANYHANDS_STORE": store,
        "MANYHANDS_PARENT": str(os.getpid()),
        "MANYHANDS_CORES": ",".join(map(str, seat.cpus)),
        **extra,
    }


def _flags() -> list[str]:
    """This interpreter's own options (-X, -W, -O …), as multiprocessing hands them on."""
    return list(subprocess._args_from_interpreter_flags())  # type: ignore[attr-defined]


def _oom_kills() -> int:
    """How many processes this machine's kernel has killed for memory; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
