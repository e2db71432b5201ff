"""SIGTERM and SIGINT in a worker: at once where nothing is lost, else at the next step boundary.

In an interruptible phase (preparing, building, compiling, generating, scoring a saved model) the handler raises `Stopped`. In
any other it only notes the signal, and the loop asks all workers to stop after the same step, or in the midst of an
evaluation, saves, and raises.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from manyhands.core.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PHASE = "manyhands_phase"  # attribute of an exception: the innermost phase that it left


class Interrupts:
    """Installs the handlers for the time of a ``with``; outside the main thread it does nothing.

    Attributes:
        requested: the number of the first signal that came, or None.
        current_phase: what is being done now, for messages.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self.current_phase = "start"
        self._interruptible = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                if (
                    signal.getsignal(signum) is not signal.SIG_IGN
                ):  # as under nohup: whoever started us decided
                    self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()

    @contextlib.contextmanager
    def phase(self, name: str, *, interruptible: bool = True) -> Iterator[None]:
        """Name what is being done.

        Raises `Stopped` in it, or at its begin, when a signal came and it may; at its end, too, because a library that
        catches everything (or a finalizer) may have swallowed the first. Other exceptions are told the phase's name.
        """
        outer = self.current_phase, self._interruptible
        self.current_phase, self._interruptible = name, interruptible
        try:
            if interruptible and self.requested is not None:
                raise Stopped(self.requested)
            yield
            if interruptible and self.requested is not None:
                raise Stopped(self.requested)
        except BaseException as error:
            if not hasattr(error, PHASE):
                setattr(error, PHASE, name)
            raise
        finally:
            self.current_phase, self._interruptible = outer

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = signum
        if self._interruptible:
            raise Stopped(self.requested)
