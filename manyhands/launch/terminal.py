"""What stands between the launcher and whoever started it: signals, and the way to the terminal."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, TextIO


class Requests:
    """Notes the signals sent to this process; the watching loop acts on them, so none falls between two workers' starts.

    Attributes:
        stop: signals that asked for the end, in order; a hang-up of the terminal counts as SIGTERM.
        pause: whether a Ctrl-Z came.
    """

    def __init__(self) -> None:
        self.stop: list[int] = []
        self.pause = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Requests:
        if threading.current_thread() is threading.main_thread():  # else the signals are somebody else's
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
                if signal.getsignal(signum) is not signal.SIG_IGN:  # as under nohup
                    self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        if signum == signal.SIGTSTP:
            self.pause = True
        else:
            self.stop.append(signal.SIGTERM if signum == signal.SIGHUP else signum)


class Console:
    """Rank 0's way to our standard output: a duplicate of it, or a pipe into it where it is no file (a notebook).

    Attributes:
        number: of the file, for rank 0 to inherit.
    """

    def __enter__(self) -> Console:
        sys.stdout.flush()
        self._pump: threading.Thread | None = None
        try:
            self.number = os.dup(sys.stdout.fileno())
        except (OSError, ValueError):
            reading, self.number = os.pipe()
            self._pump = threading.Thread(target=_pump, args=(reading, sys.stdout), daemon=True)
            self._pump.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.number)
        if self._pump is not None:
            self._pump.join()  # it ends with rank 0, which held the last writing end


def _pump(reading: int, to: TextIO) -> None:
    with os.fdopen(reading, encoding="utf-8", errors="replace", newline="") as source:
        for line in source:
            to.write(line)
            to.flush()
