"""Join a job that another launcher started: torchrun, srun, mpirun, anything that sets RANK and WORLD_SIZE."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from manyhands.core import hardware
from manyhands.core.environment import read_env
from manyhands.core.errors import ManyhandsError, PeerLost, Stopped
from manyhands.core.registry import resolve_target


def join(entry: str, argument: str) -> int:
    """Run `entry` in this process as one worker; returns the exit code. The launcher watches the others.

    Where the launcher has said nothing of threads, the cores that it allows are divided among this machine's workers.
    """
    env = read_env()
    _keep_log(argument, env.rank)
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ.update(hardware.cpu_environment(_threads(env.local_world_size)))
    try:
        return int(resolve_target(entry)(argument) or 0)
    except Stopped as stopped:
        return stopped.exit_code
    except ManyhandsError as error:
        kind = "lost a peer" if isinstance(error, PeerLost) else "failed"
        _tell_agent(error)
        print(f"manyhands: worker {env.rank} {kind}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception as error:
        _tell_agent(error)
        traceback.print_exc()
        return 1


class Copied:
    """A text stream whose text also goes to a log; a log that cannot be written is left alone."""

    def __init__(self, stream: TextIO, log: TextIO) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._log.write(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _keep_log(argument: str, rank: int) -> None:
    """What this worker says goes to ``OUTPUT/logs/rank-k.log``, too, as under our own launcher (a live display does not)."""
    try:
        path = Path(json.loads(argument)["job"]["output"]) / "logs" / f"rank-{rank}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("a", encoding="utf-8", errors="replace", buffering=1)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"manyhands: no log of worker {rank}: {error}", file=sys.stderr, flush=True)
        return
    faulthandler.enable(log)
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR1, log)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if name == "stderr" or not stream.isatty():
            setattr(sys, name, Copied(stream, log))


def _threads(local_workers: int) -> int:
    """This worker's threads. An affinity smaller than the machine was made for this worker alone (srun, mpirun bind)."""
    cores = hardware.core_count()
    bound = (
        len(os.sched_getaffinity(0)) < (os.cpu_count() or 1) if hasattr(os, "sched_getaffinity") else False
    )
    return cores if bound else max(1, cores // local_workers)


def _tell_agent(error: BaseException) -> None:
    """torchrun's error file, without which its report of the first failure says only ``error_file: <N/A>``."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    stack = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    extra = {"py_callstack": stack, "timestamp": str(int(time.time()))}
    record = {"message": {"message": f"{type(error).__name__}: {error}", "extraInfo": extra}}
    try:
        Path(path).write_text(json.dumps(record), encoding="utf-8")
    except OSError as problem:
        print(f"{path} cannot be written: {problem}", file=sys.stderr)
