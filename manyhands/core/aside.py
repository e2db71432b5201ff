"""Threads for what may never come back: whoever waits for it can leave it, and the interpreter ends without it.

gRPC's waiting does not always end with the call (grpc/grpc#20562, #20026). Pools of `concurrent.futures` are joined when the
interpreter ends, so that one such call would hold up its process for ever.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Aside:
    """As `concurrent.futures.ThreadPoolExecutor`, but of daemon threads: started as they are needed, kept for the next call.

    Args:
        name: of its threads.
        most: threads there may be; further calls wait for one.
    """

    def __init__(self, name: str, most: int = 1 << 20) -> None:
        self._name, self._most = name, most
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._threads = self._idle = 0
        self._closed = False

    def submit(self, call: Callable[P, T], /, *args: P.args, **named: P.kwargs) -> Future[T]:
        """Run `call` on a thread that is free, or on a new one; where the system has no more, it waits for one.

        Raises:
            RuntimeError: there is none, and none can be started.
        """
        future: Future[T] = Future()
        with self._changed:
            self._waiting.append((future, partial(call, *args, **named)))
            if len(self._waiting) > self._idle and self._threads < self._most:
                self._start()
            else:
                self._changed.notify()
        return future

    def close(self, wait_s: float = 0.0) -> None:
        """Its threads end as soon as they have nothing to do, for which it waits no longer than this."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._threads, wait_s)

    def _start(self) -> None:
        self._threads += 1
        try:
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        except RuntimeError:
            self._threads -= 1
            if not self._threads:
                self._waiting.pop()
                raise

    def _run(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                while not (self._waiting or self._closed):
                    self._changed.wait()
                self._idle -= 1
                if not self._waiting:
                    self._threads -= 1
                    self._changed.notify_all()
                    return
                future, call = self._waiting.popleft()
            _settle(future, call)
            del future, call  # nothing is held while it waits


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    try:
        if future.set_running_or_notify_cancel():
            future.set_result(call())
    except BaseException as error:
        future.set_exception(error)
    finally:
        del future, call  # an error's frames would hold the future that holds the error
