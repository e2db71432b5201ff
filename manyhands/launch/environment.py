"""Join a job that another launcher started: torchrun, srun, mpirun, anything that sets RANK and WORLD_SIZE."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path

from manyhands.core import hardware
from manyhands.core.environment import read_env
from manyhands.core.errors import ManyhandsError, PeerLost, Stopped
from manyhands.core.registry import resolve_target


def join(entry: str, argument: str) -> int:
    """Run `entry` in this process as one worker; returns the exit code. The launcher watches the others.

    Where the launcher has said nothing of threads, the cores that it allows are divided among this machine's workers.
    """
    env = read_env()
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
