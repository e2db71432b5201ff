"""A worker process of the local launcher: ``python -m manyhands.launch.child ENTRY ARGUMENT``.

It pins itself before anything imports torch, dies with its parent however that dies, and leaves a record of its failure
in ``logs/rank-k.error.json`` for the launcher to tell the first one.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from manyhands.core.errors import ManyhandsError, PeerLost, Stopped

PR_SET_PDEATHSIG = 1


def main() -> int:
    entry, argument = sys.argv[1:3]
    _die_with_parent()
    _pin()
    from manyhands.core.registry import resolve_target

    try:
        return int(resolve_target(entry)(argument) or 0)
    except Stopped as stopped:
        return stopped.exit_code
    except BaseException as error:
        traceback.print_exc()
        _record(error)
        return error.exit_code if isinstance(error, ManyhandsError) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _die_with_parent() -> None:
    """The kernel kills us with the parent (Linux); everywhere, the end of its pipe does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    number = os.environ.pop("MANYHANDS_PARENT", None)
    if number is None:
        return
    pipe = int(number)
    os.set_inheritable(pipe, False)

    def watch() -> None:
        os.read(pipe, 1)  # returns only when every writing end is closed
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _pin() -> None:
    cores = os.environ.pop("MANYHANDS_CORES", "")
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})


def _record(error: BaseException) -> None:
    path = os.environ.get("MANYHANDS_ERROR_FILE")
    if path is None:
        return
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    record = {
        "time_s": time.time(),
        "type": type(error).__name__,
        "message": str(error),
        "ours": isinstance(error, ManyhandsError),
        "secondary": isinstance(error, (PeerLost, KeyboardInterrupt)),
        "where": f"{last.filename}:{last.lineno} in {last.name}" if last else "",
        "traceback": traceback.format_exc(),
    }
    temporary = Path(path + ".tmp")
    temporary.write_text(json.dumps(record))
    temporary.replace(path)


if __name__ == "__main__":
    code = main()
    # Libraries' threads and process groups must not hold a finished worker; everything is flushed and closed by now.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
