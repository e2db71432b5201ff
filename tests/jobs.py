"""Jobs that run beside a test: real processes, which are waited for, sent signals and ended."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runs import TINY, command, environment, events, where_it_stands

from manyhands.launch.chaos import workers_of

DEADLINE_S = 240.0
STEPS = 60


class Launched:
    """A process and what it says. A context manager: it does not outlive the test."""

    def __init__(self, words: Sequence[str], **variables: str) -> None:
        # a file: nobody reads while the job runs, and after 540 lines a pipe is full and the job stands still
        handle, name = tempfile.mkstemp(suffix=".log")
        self._log = Path(name)
        self.process = subprocess.Popen(
            list(words),
            stdout=handle,
            stderr=subprocess.STDOUT,
            env={**environment(), "OMP_NUM_THREADS": "1", **variables},
        )
        os.close(handle)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._log.unlink()

    def printed(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(encoding="utf-8")

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + DEADLINE_S
        while not (found := condition()):
            assert self.process.poll() is None, f"ended before {what}: {self.printed()}"
            assert time.monotonic() < deadline, self._stands(what)
            time.sleep(0.005)
        return found

    def _stands(self, what: str) -> str:
        return f"{what} is awaited for {DEADLINE_S} s: {self.printed()}\n{where_it_stands(self.process.pid)}"

    def end(self, code: int = 0) -> str:
        try:
            self.process.wait(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(self._stands("its end")) from None
        said = self.printed()
        assert self.process.returncode == code, said
        return said


class Job(Launched):
    """A running `manyhands train`, whose workers can be reached by their seats."""

    def __init__(
        self, output: Path, corpus: Path, *options: object, workers: int = 3, **variables: str
    ) -> None:
        self.output = output
        given = [*("--data", corpus, *TINY, "--steps", STEPS, "--workers", workers), *("--output", output)]
        super().__init__(command("train", *given, *options), **variables)

    def reach(self, step: int) -> None:
        """Wait until `step` steps are done."""
        self.wait_for(lambda: self.step >= step, f"step {step}")

    @property
    def step(self) -> int:
        return max((e["step"] for e in self.seen("stepped")), default=0)

    def seen(self, kind: str) -> list[dict[str, object]]:
        try:
            return events(self.output, kind)
        except (FileNotFoundError, ValueError):
            return []

    def send(self, seat: str, signum: int) -> None:
        os.kill(self._pids(seat)[seat], signum)

    def kill_all(self, *seats: str) -> None:
        """All of them at once."""
        for pid in self._pids(*seats).values():
            os.kill(pid, signal.SIGKILL)

    def _pids(self, *seats: str) -> dict[str, int]:
        """A worker is not seen while it begins another ledger."""
        found: dict[str, int] = {}

        def all_seen() -> bool:
            found.update({seat: pid for seat, pid in workers_of(self.output).items() if seat in seats})
            return len(found) == len(seats)

        self.wait_for(all_seen, f"workers {', '.join(seats)}")
        return found
