"""The process that workers are forked from: real forks and signals, without a launcher around them."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from manyhands.launch.nursery import Nursery
from manyhands.launch.spare import Forked, Spare, has_pidfd

pytestmark = pytest.mark.skipif(not has_pidfd(), reason="this kernel has no descriptors of processes")
TIMEOUT_S = 60.0
SLEEP = "import pathlib, sys, time\n\n\ndef work(argument):\n    pathlib.Path(argument).touch()\n    time.sleep(600)\n"
PATIENT = (
    "while not pathlib.Path(argument).with_name('end').exists():\n        time.sleep(0.01)\n    return 7"
)
Make = Callable[..., Spare]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes a waiting process that can import what stands in `tmp_path`, and waits until it is ready."""
    made: list[Spare] = []
    (tmp_path / "sleeper.py").write_text(SLEEP)
    (tmp_path / "argument").write_text(str(tmp_path / "works"))

    def start(*modules: str, **sources: str) -> Spare:
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
        more = {"files": [], "log": tmp_path / "imports.log", "urgent": True, "forks": True}
        made.append(Spare(modules, "sleeper:work", variables(tmp_path), flags=[], **more))  # type: ignore[arg-type]
        made[-1].await_ready(lambda: False)
        return made[-1]

    yield start
    for spare in made:
        spare.end()


def variables(place: Path) -> dict[str, str]:
    path = os.pathsep.join([str(place), *sys.path])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "MANYHANDS_PARENT": str(os.getpid()),
        "MANYHANDS_STORE": str(place),
        "MANYHANDS_ERROR_FILE": str(place / "error.json"),
    }


@pytest.fixture(autouse=True)
def _importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))  # the waiting process has the launcher's path


def woken(spare: Spare, place: Path) -> Forked:
    found = spare.wake(variables(place), place / "rank-0.log")
    assert isinstance(found, Forked)
    return found


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_a_ctrl_c_right_after_the_fork_is_heard(make: Make, tmp_path: Path) -> None:
    spare = make()
    for _ in range(10):
        worker = woken(spare, tmp_path)
        worker.send_signal(signal.SIGINT)
        assert worker.wait() in (-signal.SIGINT, 128 + signal.SIGINT)


def test_what_an_import_prints_or_raises_harms_nobody(make: Make, tmp_path: Path) -> None:
    spare = make(
        *("prints", "fails", "leaves", "sleeper"),
        prints="import os\nprint('ready\\n\\nborn to be wild')\nos.write(1, b'ended 7\\n')\n",
        fails="raise ValueError('numpy.dtype size changed')\n",
        leaves="raise SystemExit(3)\n",
    )
    assert spare.ready
    worker = woken(spare, tmp_path)
    until(lambda: (tmp_path / "works").exists(), "the worker works")
    worker.send_signal(signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL
    assert "born to be wild" in (tmp_path / "imports.log").read_text()


def test_a_fork_that_nobody_has_heard_of_ends(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The waiting process is killed after the birth and before the launcher's word; the worker must not begin."""
    spare = make()
    say = spare._say

    def cut_off(line: bytes, deadline: float) -> bool:
        if line == b"go\n":
            spare.process.kill()
            spare.process.wait()
            return False
        return say(line, deadline)

    monkeypatch.setattr(spare, "_say", cut_off)
    worker = woken(spare, tmp_path)
    assert worker.wait() == -signal.SIGKILL
    assert not (tmp_path / "works").exists()


def test_how_an_orphan_left_is_known(make: Make, tmp_path: Path) -> None:
    """It tells itself with which code it leaves, where the process that had made it was killed before."""
    (tmp_path / "sleeper.py").write_text(SLEEP.replace("time.sleep(600)", PATIENT))
    spare = make()
    worker = woken(spare, tmp_path)
    until(lambda: (tmp_path / "works").exists(), "the worker works")
    spare.abandon()
    assert worker.poll() is None
    (tmp_path / "end").touch()
    assert worker.wait() == 7


def test_workers_end_with_the_launcher_even_where_a_fork_of_it_lives_on(make: Make, tmp_path: Path) -> None:
    make()  # the files
    program = f"""
import os, signal, sys, time
sys.path[:0] = {[str(tmp_path), str(Path(__file__).parent)]!r}
from pathlib import Path
from test_spare import variables
from manyhands.launch.spare import Spare
place = Path({str(tmp_path)!r})
spare = Spare([], "sleeper:work", variables(place), flags=[], files=[], log=place / "x.log", urgent=True, forks=True)
spare.await_ready(lambda: False)
worker = spare.wake(variables(place), place / "rank-0.log")
child = os.fork()
if child == 0:
    time.sleep(600)
print(worker.pid, child, flush=True)
time.sleep(600)
"""
    launcher = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    worker, child = map(int, launcher.stdout.readline().split())
    gone = os.pidfd_open(worker)
    try:
        launcher.kill()
        launcher.wait()
        assert select.select([gone], [], [], TIMEOUT_S)[0], "the worker lives"
        os.kill(child, 0)  # this one does, as it should
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(gone)
        launcher.stdout.close()


def test_one_that_ends_by_itself_is_not_made_again_at_once(make: Make, tmp_path: Path) -> None:
    make(dies="import os\nos._exit(1)\n")
    told: list[str] = []
    nursery = Nursery(["dies"], "sleeper:work", log=tmp_path / "imports.log", files=[], tell=told.append)
    for _ in range(3):
        nursery.keep(variables(tmp_path), after_s=0.0, urgent=True)
        until(lambda: nursery._spare is None or not nursery._spare.alive, "it has died")
    nursery.close()
    assert len([line for line in told if line.startswith("started")]) == 1
