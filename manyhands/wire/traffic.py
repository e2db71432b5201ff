"""Seconds and bytes of a wire: the only place where communication is counted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Traffic:
    """Counters of one worker since its start.

    Attributes:
        communicate_s: seconds in which this worker moved or added others' data.
        idle_s: seconds in which it waited for others to arrive.
        sent_bytes, received_bytes: payload handed to others and taken from them.
    """

    communicate_s: float = 0.0
    idle_s: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0

    @contextmanager
    def communicating(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.communicate_s += time.perf_counter() - start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.idle_s += time.perf_counter() - start

    def count(self, sent: int, received: int) -> None:
        self.sent_bytes += sent
        self.received_bytes += received
