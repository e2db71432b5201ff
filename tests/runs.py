"""Running the command line as a user would, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TINY = [
    *("--model", "gpt2-nano", "--tokenizer", "byte", "--seq-len", "32", "--global-batch", "12"),
    *("--prompt", "", "--precision", "fp32", "--log-every", "1"),
    *("--balance", "off"),  # shares that follow the clock change the last bits
]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "manyhands", *map(str, arguments)]


def environment() -> dict[str, str]:
    """Of commands that tests run.

    Workers are forked from a process that has imported everything: starting an interpreter for each is half of the suite's
    work. Tests of the launcher, and `manyhands(..., fresh=True)`, start them as a user does.
    """
    env = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    }
    return {"MANYHANDS_FORK": "1", **env, "PYTHONWARNINGS": "default", "HF_HUB_OFFLINE": "1"}


def manyhands(
    *arguments: object, code: int = 0, timeout_s: float = 300.0, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `manyhands ARGUMENTS` and check its exit code; `fresh`: each worker is an interpreter of its own."""
    env = {**environment(), "MANYHANDS_FORK": "0"} if fresh else environment()
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=timeout_s, check=False, env=env
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def summary(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return found


def events(output: Path, kind: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [e for e in found if kind in (None, e["event"])]


def losses(output: Path) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in events(output, "stepped")}
