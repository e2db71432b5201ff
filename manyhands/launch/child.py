"""A worker process of the local launcher; of others, who start this module, too (`launchers`).

It pins itself before anything imports torch, dies with its launcher, and leaves a record of its end in
``logs/rank-k.error.json``, from which the launcher tells the first failure.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from manyhands.core import streams
from manyhands.core.errors import (
    CheckpointError,
    DataError,
    Diverged,
    ManyhandsError,
    ModelError,
    OutOfMemory,
    PeerLost,
    Stopped,
    Superseded,
    UsageError,
)
from manyhands.core.signals import PHASE

PR_SET_PDEATHSIG = 1
# what lies in the command, its data or the installation: whoever tried again would meet the same
FINAL = (UsageError, DataError, ModelError, CheckpointError, Diverged, Superseded, ImportError, SyntaxError)
LEAVE_S = 30.0  # for exit handlers; a finished worker is not held up for longer

# The launcher's own search path, as multiprocessing's spawn hands it on: what it could import, we can.
BOOT = f"import sys; sys.path[:] = sys.argv.pop(1).split({os.pathsep!r}); from manyhands.launch.child import main; main()"


def main() -> None:
    """Run the entry point that the command line names; ends the process.

    Our launcher says the rest in the environment; others start ``python -m manyhands.launch.child ENTRY ARGUMENT``.
    """
    if "MANYHANDS_PARENT" not in os.environ:
        sys.exit(_join(sys.argv[1:]))
    die_with_parent(int(os.environ.pop("MANYHANDS_PARENT")))
    work(sys.argv[1])


def work(entry: str, tell_code: Callable[[int], None] | None = None) -> None:
    """Be a worker, as the environment says; ends the process, having told `tell_code` with which exit code."""
    error_file = Path(os.environ.pop("MANYHANDS_ERROR_FILE"))
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # an ignored SIGINT is inherited; ours are the launcher's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _pin(os.environ.pop("MANYHANDS_CORES", ""))
    faulthandler.enable()
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR1)  # kill -USR1 PID: where is it? The stacks go to the log
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout, sys.stderr = (streams.lossy(number, encoding=encoding) for number in (1, 2))
    if "MANYHANDS_CONSOLE" in os.environ:
        os.set_inheritable(int(os.environ["MANYHANDS_CONSOLE"]), False)
    _leave(_run(entry, error_file), tell_code)


def _join(words: list[str]) -> int:
    """Be a worker of another launcher."""
    from manyhands.launch.environment import join

    try:
        if len(words) != 2:
            raise UsageError(
                f"{len(words)} arguments of manyhands.launch.child",
                "they are ENTRY (module:function) and ARGUMENT",
                "a launcher is handed both, and hands them on",
            )
        return join(words[0], words[1])
    except UsageError as error:  # of these words, or of the variables; `join` itself tells of the rest
        print(f"manyhands: {error}", file=sys.stderr)
        return error.exit_code


def _run(entry: str, error_file: Path) -> int:
    from manyhands.core.registry import resolve_target

    try:
        argument = (Path(os.environ["MANYHANDS_STORE"]) / "argument").read_text(encoding="utf-8")
        return int(resolve_target(entry)(argument) or 0)
    except KeyboardInterrupt as error:
        _record(error, error_file)
        return 128 + signal.SIGINT
    except Stopped as error:
        _record(error, error_file)
        return error.exit_code
    except BaseException as error:
        traceback.print_exc()
        _record(error, error_file)
        return error.exit_code if isinstance(error, ManyhandsError) else 1


def die_with_parent(parent: int) -> None:
    """The kernel kills us with the launcher (Linux; elsewhere and for our own children, `guard` does)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(128 + signal.SIGKILL)


def _pin(cores: str) -> None:
    """Pin the whole process: a warmed-up one may have threads already."""
    if cores:
        tasks = os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else ["0"]
        for task in tasks:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(task), {int(core) for core in cores.split(",")})


def _record(error: BaseException, path: Path) -> None:
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    record = {
        "time_s": time.time(),
        "type": type(error).__name__,
        "message": str(error),
        "ours": isinstance(error, ManyhandsError),
        "final": isinstance(error, FINAL),
        "code": error.exit_code if isinstance(error, ManyhandsError) else 1,
        "kind": "stopped"
        if isinstance(error, (Stopped, KeyboardInterrupt))
        else "peer-lost"
        if isinstance(error, PeerLost)
        else "failed",
        "starved": isinstance(error, OutOfMemory),
        "phase": getattr(error, PHASE, None),
        "where": f"{last.filename}:{last.lineno} in {last.name}" if last else "",
        "traceback": "".join(traceback.format_exception(type(error), error, error.__traceback__)),
    }
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
        temporary.replace(path)
    except OSError as problem:  # a full disk must not hide the error itself, which the log has
        print(f"{path} cannot be written: {problem}", file=sys.stderr)


def _leave(code: int, tell_code: Callable[[int], None] | None) -> None:
    """End now: exit handlers run, but threads and process groups of libraries do not hold a finished worker."""
    overdue = threading.Timer(LEAVE_S, os._exit, (code,))
    overdue.daemon = True
    overdue.start()
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        if tell_code is not None:
            tell_code(code)
        os._exit(code)


if __name__ == "__main__":
    main()
