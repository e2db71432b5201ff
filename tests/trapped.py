"""Launched jobs whose workers walk into traps (`traps`)."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs import Launched
from runs import TINY

OPTIONS = (*TINY, "--reproducible", "--steps", 12)
START = """
import json, os, sys
from pathlib import Path
from manyhands.cli import train
from manyhands.cli.main import main
from manyhands.launch import job
from manyhands.core import hardware
kills = Path(json.loads(os.environ["TRAPS"])["directory"]) / "oom"  # a worker that kills itself tells it here, as the kernel would
hardware.oom_kills = lambda: len(kills.read_text().splitlines()) if kills.exists() else 0
job.ENTRY = "traps:main"
sys.exit(main(sys.argv[1:]))
"""


class Job(Launched):
    """`manyhands train` whose workers walk into traps."""

    def __init__(
        self,
        output: Path,
        corpus: Path,
        *options: object,
        traps: list[dict[str, Any]],
        workers: int = 3,
        base: Sequence[object] = OPTIONS,
    ) -> None:
        self.output, self.directory = output, output.parent / f"{output.name}-said"
        self.directory.mkdir()
        given = [*("--data", corpus, *base, "--workers", workers)]
        given += ["--output", output, "--cache", output.parent / f"{output.name}-cache", *options]
        tests = str(Path(__file__).parent)
        super().__init__(
            [sys.executable, "-c", START, "train", *map(str, given)],
            TRAPS=json.dumps({"directory": str(self.directory), "traps": traps}),
            PYTHONPATH=os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]),
        )

    def said(self, what: str, seat: str = "") -> list[dict[str, Any]]:
        try:
            lines = (self.directory / "said").read_text().splitlines()
        except FileNotFoundError:
            return []
        found = [json.loads(line) for line in lines]
        return [r for r in found if r["what"] == what and seat in ("", r["seat"])]

    def kill(self, seat: str, signum: signal.Signals = signal.SIGKILL, *, place: str = "") -> None:
        """Once it has walked into the trap that stops it (at `place`)."""
        os.kill(self.trapped(seat, place=place), signum)

    def trapped(self, seat: str, *, place: str = "") -> int:
        """Its process, once it has walked into that trap."""

        def found() -> list[dict[str, Any]]:
            return [r for r in self.said("trapped", seat) if place in ("", r["place"])]

        return int(self.wait_for(found, f"{seat} in its trap")[0]["pid"])

    def open(self) -> None:
        """Let those go on that wait."""
        (self.directory / "open").touch()
