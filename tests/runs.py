"""Running the command line as a user would, for tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TINY = [
    *("--model", "gpt2-nano", "--tokenizer", "byte", "--seq-len", "32", "--global-batch", "12"),
    *("--prompt", "", "--precision", "fp32", "--log-every", "1"),
    *("--balance", "off"),  # shares that follow the clock change the last bits
    *("--stuck-s", "20"),  # who stands still in the first step is replaced before a test gives up
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
    words = command(*arguments)
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            stands = where_it_stands(process.pid)
            process.kill()
            out, err = process.communicate()
            logs = [] if "--output" not in arguments else _logs(arguments)
            raise AssertionError("\n".join([f"stands still: {words}", out, err, stands, *logs])) from None
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def python(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """An interpreter with these arguments, which must succeed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**environment(), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """PyTorch's own launcher with these arguments and two workers, which must succeed."""
    return python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *arguments)


def _logs(arguments: tuple[object, ...]) -> list[str]:
    directory = Path(str(arguments[arguments.index("--output") + 1])) / "logs"
    return [f"{path.name}:\n{path.read_text()}" for path in sorted(directory.glob("*.log"))]


def where_it_stands(pid: int) -> str:
    """What each thread of a process and of its descendants does; workers write their stacks to their logs."""
    parents: dict[int, list[int]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            parents.setdefault(int(stat[1]), []).append(int(entry))
    lines, todo = [], [pid]
    while todo:
        one = todo.pop()
        todo += parents.get(one, [])
        with contextlib.suppress(OSError):
            for task in sorted(os.listdir(f"/proc/{one}/task")):
                at = Path(f"/proc/{one}/task/{task}")
                name, _, rest = (at / "stat").read_text().rpartition(")")
                state, ticks = rest.split()[0], rest.split()[11:13]
                channel = (at / "wchan").read_text()
                lines.append(f"{one}/{name}) {state}, ticks of user and system {ticks}, in {channel}")
        if one != pid:
            with contextlib.suppress(OSError):
                os.kill(one, signal.SIGUSR1)
    time.sleep(2.0)  # for them to write
    return "\n".join(lines)


def summary(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return found


def events(output: Path, kind: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [e for e in found if kind in (None, e["event"])]


def losses(output: Path) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in events(output, "stepped")}
