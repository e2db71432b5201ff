"""Joining a job that somebody else started, as they do: by variables of the environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import torchrun

from manyhands.core import hardware

CODE = (
    "import sys; sys.path.insert(0, sys.argv[2]); from manyhands.launch.environment import join;"
    "assert 'torch' not in sys.modules; sys.exit(join('launch_entries:' + sys.argv[1], 'argument'))"
)
PLACE = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "29500",
}


def run(entry: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", CODE, entry, str(Path(__file__).parent)]
    return subprocess.run(
        command, env={**env, **PLACE, **variables}, capture_output=True, text=True, check=False, timeout=60
    )


def test_cores_are_divided_where_the_launcher_says_nothing() -> None:
    done = run("report")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[0])
    assert facts["length"] == len("argument")
    if len(os.sched_getaffinity(0)) == os.cpu_count():
        assert facts["OMP_NUM_THREADS"] == str(max(1, hardware.core_count() // 2))


def test_the_launchers_threads_are_kept() -> None:
    facts = json.loads(run("report", OMP_NUM_THREADS="7").stdout.splitlines()[0])
    assert facts["OMP_NUM_THREADS"] == "7"


def test_a_failure_is_told_to_torchruns_agent(tmp_path: Path) -> None:
    done = run("misuse", TORCHELASTIC_ERROR_FILE=str(tmp_path / "error.json"))
    assert done.returncode == 2
    assert "worker 1 failed: lr = -1. a rate is positive. give --lr 3e-4." in done.stderr
    assert "Traceback" not in done.stderr
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["message"].startswith("UsageError: lr = -1")
    assert "Traceback" in message["extraInfo"]["py_callstack"]


def test_an_unforeseen_error_has_its_stack() -> None:
    done = run("fail_second")
    assert done.returncode == 1
    assert "ValueError: boom" in done.stderr


@pytest.mark.parametrize("number", ["x", "-1"])
def test_garbage_in_the_environment(number: str) -> None:
    done = run("report", RANK=number)
    assert done.returncode != 0
    assert "RANK=" in done.stderr


AGAIN = """
import os, sys, time
import manyhands
hands = manyhands.join(device="cpu", transport=sys.argv[1])
attempts = hands.world.gather(os.environ["TORCHELASTIC_RESTART_COUNT"])
if attempts[0] == "0":
    if hands.rank == 1:
        os._exit(1)
    time.sleep(60)
os.write(1, f"met again: {attempts}\\n".encode())  # at once: both write into one pipe
"""


@pytest.mark.parametrize("transport", ["shared"])  # elsewhere they meet in the same way
def test_workers_that_torchrun_starts_anew_meet_each_other_and_nobody_of_before(
    tmp_path: Path, transport: str
) -> None:
    """The agent's store still has what the workers before them have said."""
    script = tmp_path / "again.py"
    script.write_text(AGAIN)
    done = torchrun("--max-restarts", 1, script, transport)
    assert done.stdout.count("met again: ['1', '1']") == 2
