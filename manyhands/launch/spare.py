"""A process that has imported what a worker needs and waits for a worker to be lost: its replacement is there at once.

Imports take seconds and much of a core; here they are done beforehand, in a thread of low priority, so that the workers are not
disturbed. While it waits it uses memory, and no time.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from manyhands.core import hardware

NICE = 10  # of the importing thread: about a tenth of a busy core
LEAST_BYTES = 2 << 30  # of memory that must be available

BOOT = f"import sys; sys.path[:] = sys.argv.pop(1).split({os.pathsep!r}); from manyhands.launch.spare import main; main()"


class Spare:
    """One waiting process.

    Args:
        modules: what it imports.
        entry: what it runs when it is woken.
        files: numbers of open files that it inherits.
        urgent: import at full speed.
    """

    def __init__(
        self,
        modules: Sequence[str],
        entry: str,
        variables: Mapping[str, str],
        *,
        flags: Sequence[str],
        files: Sequence[int],
        urgent: bool,
    ) -> None:
        words = [entry, "0" if urgent else str(NICE), *modules]
        self.process = subprocess.Popen(
            [sys.executable, *flags, "-c", BOOT, os.pathsep.join(sys.path), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(variables),
            pass_fds=list(files),
            start_new_session=True,
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self._ready = False

    @property
    def ready(self) -> bool:
        """Whether it has imported everything and lives."""
        if not self._ready and self.process.stdout is not None:
            with contextlib.suppress(OSError):
                self._ready = bool(os.read(self.process.stdout.fileno(), 16))
        return self._ready and self.process.poll() is None

    def wake(self, variables: Mapping[str, str], log: Path) -> subprocess.Popen[bytes] | None:
        """Let it become a worker: with these variables, writing to `log`. None: it has just died."""
        order = {"variables": dict(variables), "log": str(log.absolute())}
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self._hang_up()
        except OSError:
            return None
        return self.process

    def end(self) -> None:
        """It is not needed any more."""
        with contextlib.suppress(OSError):
            self._hang_up()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def _hang_up(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def affordable() -> bool:
    """Whether there is memory for a process that only waits."""
    return hardware.memory_available_bytes() > max(LEAST_BYTES, hardware.memory_bytes() // 8)


def main() -> None:
    """The waiting process: import, wait for one line, become a worker."""
    from manyhands.launch import child

    entry, nice, *modules = sys.argv[1:]
    child.die_with_parent(int(os.environ.pop("MANYHANDS_PARENT")))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    importing = threading.Thread(target=_import, args=(modules, int(nice)), daemon=True)
    importing.start()
    line = sys.stdin.readline()
    if not line:  # the launcher has no use for it
        os._exit(0)
    order = json.loads(line)
    importing.join()
    with open(order["log"], "ab") as log, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(order["variables"])
    os.environ.pop("MANYHANDS_PARENT", None)
    child.work(entry)


def _import(modules: Sequence[str], nice: int) -> None:
    if nice and sys.platform == "linux":  # elsewhere it would be the whole process's, for good
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
    for name in modules:
        with contextlib.suppress(ImportError):  # the worker will say so, if it needs it
            importlib.import_module(name)
    os.write(1, b"ready")
