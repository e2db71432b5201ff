"""Elastic launches with real processes and signals: who is lost is named and replaced, and the job goes on."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from manyhands.core import hardware
from manyhands.launch.chaos import cut
from manyhands.launch.control import CONTACT
from manyhands.launch.verdict import End, cause, final, judge

TIMEOUT_S = 60.0
DRIVER = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
given = json.loads(sys.argv[1])
sys.path.insert(0, given["tests"])
from pathlib import Path
from manyhands.launch.control import Elastic, Remote
from manyhands.launch.local import launch
remote = Remote(**given["remote"]) if given["remote"] else None
elastic = Elastic(**{**given["elastic"], "warm": tuple(given["elastic"].get("warm", ()))})
code = launch("elastic_entries:" + given["entry"], given["argument"], workers=given["workers"],
              output=Path(given["output"]), threads=1, elastic=elastic, remote=remote)
assert "torch" not in sys.modules
sys.exit(code)
"""


class Job:
    """A launcher in a process of its own, and the FIFO its workers speak through."""

    def __init__(
        self,
        tmp_path: Path,
        *,
        workers: int = 2,
        entry: str = "train",
        steps: int = 10**9,
        step_s: float = 0.01,
        joins: Job | None = None,
        elastic: dict[str, Any] | None = None,
        terminal: bool = False,
        env: dict[str, str] | None = None,
        **wrong: Any,
    ) -> None:
        self.output, self.scratch = tmp_path / "out", tmp_path / "tmp"
        self.scratch.mkdir()
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        self._fifo = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        self._kept = os.open(fifo, os.O_WRONLY)  # no end of file before the first worker has come
        self._text = b""
        self.heard: list[dict[str, Any]] = []
        remote = None
        if joins is not None:
            contact = json.loads((joins.output / CONTACT).read_text())
            remote = {
                "address": contact["address"],
                "token_file": contact["token_file"],
                "name": f"guest{tmp_path.name}",
            }
        self._enough = tmp_path / "enough"
        given = {
            "tests": str(Path(__file__).parent),
            "entry": entry,
            "argument": json.dumps(
                {"fifo": str(fifo), "steps": steps, "step_s": step_s, "enough": str(self._enough), **wrong}
            ),
            "workers": workers,
            "output": str(self.output),
            "elastic": elastic or {},
            "remote": remote,
        }
        master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, json.dumps(given)],
            stdout=slave if terminal else subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(self.scratch), **(env or {})},
            text=True,
        )
        os.close(slave)
        self._terminal = master

    def await_(
        self, what: str, condition: Callable[[dict[str, Any]], bool] = lambda _: True
    ) -> dict[str, Any]:
        """The first thing said of this kind that fulfils the condition."""
        while True:
            for record in self.heard:
                if record["what"] == what and condition(record):
                    return record
            assert self._read(), "all workers are gone"

    def enough(self) -> None:
        """Its next step is its last one."""
        self._enough.touch()

    def stepping(self, *ids: str) -> dict[str, int]:
        """Wait until these workers make steps; their process ids."""
        return {id: self.await_("stepped", lambda r, id=id: r["seat"] == id)["pid"] for id in ids}  # type: ignore[misc]

    def everybody_gone(self) -> bool:
        """Wait until no process holds the FIFO any more."""
        os.close(self._kept)
        while self._read():
            pass
        return True

    def _read(self) -> bool:
        assert select.select([self._fifo], [], [], TIMEOUT_S)[0], f"nothing is said after {self.heard}"
        piece = os.read(self._fifo, 65536)
        *lines, self._text = (self._text + piece).split(b"\n")
        self.heard += [json.loads(line) for line in lines]
        return bool(piece)

    def end(self) -> tuple[int, str]:
        """Exit code and what was written on stderr."""
        _, errors = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, errors

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        os.close(self._terminal)
        with contextlib.suppress(OSError):
            os.close(self._fifo)
        with contextlib.suppress(OSError):
            os.close(self._kept)


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    made: list[Job] = []

    def start(**options: Any) -> Job:
        path = tmp_path / str(len(made))
        path.mkdir()
        made.append(Job(path, **options))
        return made[-1]

    yield start
    for job in made:
        job.close()


def test_a_killed_worker_is_replaced_and_the_job_succeeds(launched: Callable[..., Job]) -> None:
    job = launched(workers=3, steps=400)
    pids = job.stepping("w0", "w1", "w2")
    contact = json.loads((job.output / CONTACT).read_text())
    assert set(contact) == {"address", "listen", "token_file", "fingerprint", "directory"}
    os.kill(pids["w1"], signal.SIGKILL)
    epoch = job.await_("epoch", lambda r: r["number"] == 2)
    assert epoch["ids"] == ["w0", "w2"]
    assert epoch["losses"][0][:2] == ["w1", "death"]
    assert job.await_("epoch", lambda r: "w1-1" in r["ids"])["ids"] == ["w0", "w2", "w1-1"]
    code, errors = job.end()
    assert code == 0, errors
    (line,) = [line for line in errors.splitlines() if "w1" in line]
    assert f"worker w1 (rank 1) on {hardware.hostname()} in " in line
    assert "was killed by SIGKILL" in line
    assert "w1-1 takes its place (1 of 3)" in line
    assert job.everybody_gone()
    assert {r["seat"] for r in job.heard if r["what"] == "done"} == {"w0", "w2", "w1-1"}
    assert "last known stack of w1" in (job.output / "logs" / "rank-1.log").read_text()
    assert "elastic_entries.py" in (job.output / "logs" / "rank-1.log").read_text()
    assert list(job.scratch.iterdir()) == []
    assert not (job.output / CONTACT).exists()


def test_a_cut_link_is_no_loss(launched: Callable[..., Job]) -> None:
    job = launched(steps=300)
    pids = job.stepping("w0", "w1")
    for id in ("w1", "w0"):
        assert cut(pids[id], random.Random(1)).startswith("done")
    shutil.rmtree(job.output / "logs")  # somebody tidies up: no reason to end
    os.kill(pids["w1"], signal.SIGKILL)  # noticed as ever, whether it is back or not
    assert job.await_("epoch", lambda r: r["number"] == 2)["ids"] == ["w0"]
    code, errors = job.end()
    assert code == 0, errors
    (line,) = errors.splitlines()
    assert "worker w1 (rank 1)" in line


def test_on_a_terminal_the_display_tells_of_losses_as_long_as_there_is_one(
    launched: Callable[..., Job],
) -> None:
    job = launched(steps=200, terminal=True, elastic={"restarts": 0})
    os.kill(job.stepping("w0", "w1")["w1"], signal.SIGKILL)
    code, errors = job.end()
    assert (code, errors) == (0, "")
    job = launched(terminal=True, elastic={"restarts": 0})
    pids = job.stepping("w0", "w1")
    for signum in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids.values():
            os.kill(pid, signum)
    code, errors = job.end()
    assert code == 1
    assert "worker w" in errors
    assert f"--resume {job.output}" in errors.splitlines()[-1]


def test_the_first_rank_may_die_and_nobody_need_come(launched: Callable[..., Job]) -> None:
    job = launched(steps=300, elastic={"restarts": 0})
    os.kill(job.stepping("w0", "w1")["w0"], signal.SIGKILL)
    assert job.await_("epoch", lambda r: r["number"] == 2)["ids"] == ["w1"]
    code, errors = job.end()
    assert code == 0, errors
    assert "it is not replaced (restarts = 0)" in errors


def test_a_stopped_worker_is_given_up_killed_and_replaced(launched: Callable[..., Job]) -> None:
    job = launched(steps=500, elastic={"hang_s": 1.0})
    os.kill(job.stepping("w0", "w1")["w1"], signal.SIGSTOP)
    epoch = job.await_("epoch", lambda r: r["number"] == 2)
    assert epoch["losses"][0][1] == "hang"
    job.await_("epoch", lambda r: "w1-1" in r["ids"])
    code, errors = job.end()
    assert code == 0, errors
    assert "was given up: no sign of life for 1." in errors
    assert job.everybody_gone()


def test_a_step_that_kills_whoever_computes_it_ends_the_job(launched: Callable[..., Job]) -> None:
    job = launched(poison=30)
    code, errors = job.end()
    assert code == 1
    assert errors.count("ValueError: poison") >= 3
    assert "has ended 3 workers" in errors.splitlines()[-1]
    assert job.everybody_gone()


def test_one_that_fails_before_the_first_step_is_replaced(launched: Callable[..., Job]) -> None:
    job = launched(fail_start="w1", fails=1, steps=20)
    code, errors = job.end()
    assert code == 0, errors
    (line,) = errors.splitlines()
    assert "worker w1 (rank 1) on" in line
    assert "OSError: no such device" in line
    assert "w1-1 takes its place (1 of 3)" in line


@pytest.mark.parametrize(("whom", "told"), [("w1", 1), ("w", 0)])
def test_what_fails_again_in_the_same_way_is_not_tried_on(
    launched: Callable[..., Job], whom: str, told: int
) -> None:
    """One worker and its replacement, or all at about the same time."""
    job = launched(fail_start=whom)
    code, errors = job.end()
    assert code == 1
    *losses, failure, log = errors.strip().splitlines()
    assert len(losses) == told
    assert f"worker {'1' if told else ''}" in failure
    assert "OSError: no such device" in failure
    assert "/logs/rank-" in log
    assert job.everybody_gone()


def test_a_usage_error_on_all_is_told_once(launched: Callable[..., Job]) -> None:
    job = launched(workers=3, misuse=True)
    code, errors = job.end()
    assert code == 2
    failure, _ = errors.strip().splitlines()
    assert "lr = -1. a rate is positive" in failure


def test_losses_in_the_first_meeting(launched: Callable[..., Job], tmp_path: Path) -> None:
    """Rank 0, which waits for the others, and one that is still on its way; a third is asked to leave."""
    job = launched(workers=4, steps=20, held=["w1", "w2"], gate=str(tmp_path / "gate"))
    pids = {
        id: job.await_("started", lambda r, id=id: r["seat"] == id)["pid"] for id in ("w0", "w1", "w2", "w3")
    }  # type: ignore[misc]
    job.await_("meeting", lambda r: r["seat"] == "w0")
    os.kill(pids["w0"], signal.SIGKILL)
    os.kill(pids["w1"], signal.SIGKILL)
    os.kill(pids["w2"], signal.SIGTERM)
    job.await_("meeting", lambda r: r["seat"] == "w0-1")
    assert set(job.await_("epoch")["ids"]) == {"w0-1", "w1-1", "w3"}
    code, errors = job.end()
    assert code == 0, errors
    assert sorted(line.split()[2] for line in errors.splitlines()) == ["w0", "w1", "w2"]
    assert errors.count("takes its place") == 2


def test_one_that_hangs_in_the_first_meeting_is_replaced(
    launched: Callable[..., Job], tmp_path: Path
) -> None:
    """One has said hello; the other one never does."""
    elastic = {"hang_s": 1.0, "start_s": 2.0, "stuck_s": 2.0}
    job = launched(steps=20, held=["w1"], gate=str(tmp_path / "gate"), elastic=elastic)
    os.kill(job.await_("meeting", lambda r: r["seat"] == "w0")["pid"], signal.SIGSTOP)
    job.await_("meeting", lambda r: r["seat"] == "w0-1")
    code, errors = job.end()
    assert code == 0, errors
    hung, mute = sorted(errors.splitlines())
    assert "worker w0 (rank 0) on" in hung
    assert "was given up: no sign of life for 1." in hung
    assert "w0-1 takes its place" in hung
    log = job.output / "logs" / "rank-1.log"
    assert (
        f"worker w1 (rank 1) on {hardware.hostname()} while starting was given up: it has not reached" in mute
    )
    assert f"(log: {log}); w1-1 takes its place" in mute
    assert re.search(r"elastic_entries.py\", line \d+ in train", log.read_text())  # where it stood


def test_when_nobody_is_left_before_the_first_step(launched: Callable[..., Job]) -> None:
    job = launched(entry="ignore_membership", elastic={"restarts": 0})
    for id in ("w0", "w1"):
        os.kill(job.await_("started", lambda r, id=id: r["seat"] == id)["pid"], signal.SIGKILL)  # type: ignore[misc]
    code, errors = job.end()
    assert code == 1
    assert errors.count("it is not replaced (restarts = 0)") == 2
    assert errors.splitlines()[-2].startswith("manyhands: worker ")
    assert "SIGKILL" in errors.splitlines()[-2]


def test_when_all_die_the_job_says_how_to_resume(launched: Callable[..., Job]) -> None:
    job = launched()
    pids = job.stepping("w0", "w1")
    for pid in pids.values():
        os.kill(pid, signal.SIGSTOP)  # so that no survivor finishes first
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    code, errors = job.end()
    assert code == 1
    assert f"--resume {job.output}" in errors.splitlines()[-1]
    assert job.everybody_gone()


def test_fewer_than_min_workers(launched: Callable[..., Job]) -> None:
    job = launched(elastic={"restarts": 0, "min_workers": 2})
    os.kill(job.stepping("w0", "w1")["w1"], signal.SIGKILL)
    code, errors = job.end()
    assert code == 1
    assert "min_workers = 2" in errors


def test_a_worker_that_is_asked_alone_leaves_alone(launched: Callable[..., Job]) -> None:
    job = launched(steps=200)
    os.kill(job.stepping("w0", "w1")["w1"], signal.SIGTERM)
    assert not job.await_("signal")["stopping"]
    code, errors = job.end()
    assert code == 0, errors
    assert job.everybody_gone()
    assert "has left, as a signal asked it to; the others go on" in errors
    assert [r["seat"] for r in job.heard if r["what"] == "done"] == ["w0"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_when_the_launcher_is_asked_all_know_it(
    launched: Callable[..., Job], signum: signal.Signals, code: int
) -> None:
    job = launched(workers=3)
    job.stepping("w0", "w1", "w2")
    job.process.send_signal(signum)
    ended, errors = job.end()
    assert ended == code
    assert job.everybody_gone()
    assert [r["stopping"] for r in job.heard if r["what"] == "signal"] == [True] * 3
    assert "takes its place" not in errors


WARM = {"warm": ["elastic_warm"], "spare_after_s": 0.0}


@pytest.mark.parametrize("forks", [True, False])
def test_a_waiting_process_takes_the_place(launched: Callable[..., Job], forks: bool) -> None:
    job = launched(elastic=WARM, env={"MANYHANDS_FORK": "1"} if forks else {})
    pids = job.stepping("w0", "w1")
    assert job.await_("started")["warm"] == forks
    for generation in (1, 2):
        waiting(job.process.pid)
        victim = f"w1-{generation - 1}" if generation > 1 else "w1"
        os.kill(pids[victim], signal.SIGKILL)
        name = f"w1-{generation}"
        started = job.await_("started", lambda r, name=name: r["seat"] == name)  # type: ignore[misc]
        assert started["warm"]
        assert started["threads"] == "1"
        pids |= job.stepping(name)
    waiting(job.process.pid)
    job.process.send_signal(signal.SIGTERM)
    code, errors = job.end()
    assert code == 143, errors
    assert "w1 (rank 1)" in errors
    assert errors.count("was killed by SIGKILL") == 2
    assert job.everybody_gone()
    assert list(job.scratch.iterdir()) == []


def test_workers_outlive_the_process_that_they_were_forked_from(launched: Callable[..., Job]) -> None:
    """It is killed, later a worker that it had made: both are replaced; how its workers end is known all the same."""
    job = launched(steps=150, elastic=WARM, env={"MANYHANDS_FORK": "1"})
    pids = job.stepping("w0", "w1")
    first = waiting(job.process.pid)
    os.kill(first, signal.SIGKILL)
    assert waiting(job.process.pid, other_than=first) != first
    os.kill(pids["w1"], signal.SIGKILL)
    assert job.await_("started", lambda r: r["seat"] == "w1-1")["warm"]
    code, errors = job.end()
    assert code == 0, errors
    assert errors.count("manyhands: worker") == 1
    assert "w1 (rank 1)" in errors
    assert "was killed by SIGKILL" in errors
    assert job.everybody_gone()
    assert "w0" in {r["seat"] for r in job.heard if r["what"] == "done"}


def test_a_waiting_process_that_does_not_answer_is_given_up(launched: Callable[..., Job]) -> None:
    """It is stopped, then a worker is killed: that is noticed, and replaced, all the same; its other workers go on."""
    job = launched(elastic=WARM, env={"MANYHANDS_FORK": "1"})
    pids = job.stepping("w0", "w1")
    first = waiting(job.process.pid)
    os.kill(first, signal.SIGSTOP)
    os.kill(pids["w1"], signal.SIGKILL)
    assert not job.await_("started", lambda r: r["seat"] == "w1-1")["warm"]  # a fresh interpreter
    assert waiting(job.process.pid, other_than=first) != first
    job.stepping("w1-1")
    job.process.send_signal(signal.SIGTERM)
    code, errors = job.end()
    assert code == 143, errors
    assert errors.count("manyhands: worker") == 1
    assert job.everybody_gone()


def waiting(launcher: int, *, other_than: int = 0) -> int:
    """Wait until a process of this launcher waits, with everything imported; its number."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        assert time.monotonic() < deadline, "no process waits"
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                command = (process / "cmdline").read_bytes()
                parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                threads = len(list((process / "task").iterdir()))
                ours = parent == launcher and b"manyhands.launch.waiting" in command
                state = (process / "stat").read_text().rpartition(")")[2].split()[0]
                if ours and threads == 1 and state == "S" and int(process.name) != other_than:
                    time.sleep(0.1)  # the launcher looks fifty times a second
                    return int(process.name)
        time.sleep(0.01)


@pytest.mark.parametrize("alone", [True, False])
def test_nobody_outlives_a_killed_launcher(launched: Callable[..., Job], alone: bool) -> None:
    """Nor where the process that clears up after it was killed before."""
    job = launched(elastic=WARM)
    job.stepping("w0", "w1")
    waiting(job.process.pid)
    if alone:
        guards = [p for p in children(job.process.pid) if b"guard.py" in (p / "cmdline").read_bytes()]
        os.kill(int(guards[0].name), signal.SIGKILL)
    job.process.kill()
    assert job.end()[0] == -signal.SIGKILL
    assert job.everybody_gone()
    deadline = time.monotonic() + TIMEOUT_S
    while not alone and list(job.scratch.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(of: int) -> list[Path]:
    """Where the kernel tells of them."""
    numbers = Path(f"/proc/{of}/task/{of}/children").read_text().split()
    return [Path(f"/proc/{number}") for number in numbers]


def test_a_paused_launch_is_no_hang(launched: Callable[..., Job]) -> None:
    job = launched(steps=300, elastic={"hang_s": 1.0})
    job.stepping("w0", "w1")
    job.process.send_signal(signal.SIGTSTP)
    deadline = time.monotonic() + TIMEOUT_S
    while Path(f"/proc/{job.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(1.6)  # longer than hang_s: this is what is tested
    job.process.send_signal(signal.SIGCONT)
    code, errors = job.end()
    assert code == 0, errors
    assert errors == ""


def test_workers_of_another_launch_join_die_are_replaced_and_leave(launched: Callable[..., Job]) -> None:
    job = launched()
    job.stepping("w0", "w1")
    guest = launched(joins=job, workers=1)
    assert job.await_("epoch", lambda r: "guest1-0" in r["ids"])["ids"] == ["w0", "w1", "guest1-0"]
    os.kill(guest.stepping("guest1-0")["guest1-0"], signal.SIGKILL)
    guest.stepping("guest1-0-1")
    guest.process.send_signal(signal.SIGINT)  # its workers leave, the job goes on
    code, errors = guest.end()
    assert code == 130, errors
    assert "worker guest1-0 (rank 2)" in errors
    assert guest.everybody_gone()
    assert not next(r for r in guest.heard if r["what"] == "signal")["stopping"]
    last = max(r["number"] for r in job.heard if r["what"] == "epoch")
    assert job.await_("epoch", lambda r: r["number"] > last and r["ids"] == ["w0", "w1"])
    again = launched(joins=job, workers=1)
    again.stepping("guest2-0")
    job.process.send_signal(signal.SIGTERM)  # the whole job stops, guests as well
    assert job.end()[0] == 143
    assert again.end()[0] == 143
    assert again.everybody_gone()
    # it may have ended before its own launcher's signal came, since the others had left
    assert all(r["stopping"] for r in again.heard if r["what"] == "signal")


def test_one_that_comes_when_the_job_is_done_has_nothing_to_do(
    launched: Callable[..., Job], tmp_path: Path
) -> None:
    job = launched(workers=2, steps=10**9)
    job.stepping("w0", "w1")
    guest = launched(joins=job, workers=1, held=["guest1-0"], gate=str(tmp_path / "gate"))
    guest.await_("started")
    job.enough()
    assert job.end()[0] == 0
    code, errors = guest.end()
    assert (code, errors) == (0, "manyhands: the job was done already\n")
    assert guest.everybody_gone()


def end(rank: int, code: int, *, survived: bool = False, kind: str | None = None) -> End:
    record = None
    if kind is not None:
        record = {"time_s": 1.0, "type": "E", "message": "m", "ours": True, "kind": kind, "where": ""}
    return End(rank=rank, host="h", code=code, time_s=1.0, record=record, log=Path("x"), survived=survived)


def test_the_verdict_knows_what_was_survived() -> None:
    quiet: dict[str, Any] = {"stopped_by": None, "told_s": None}
    assert judge([end(0, 0), end(1, -9, survived=True), end(1, 0)], **quiet).exit_code == 0
    assert judge([end(0, 143, survived=True, kind="stopped")], **quiet).exit_code == 143
    verdict = judge([end(0, -9, survived=True), end(1, -15)], ended=(1, "nobody is left"), **quiet)
    assert (verdict.exit_code, verdict.words) == (1, "manyhands: nobody is left")
    assert judge([end(0, 0), end(1, -9)], **quiet).exit_code == 1
    first = end(0, -15, kind="failed")  # ended with the others, when it had said what was wrong
    assert first.record is not None
    first.record["code"] = 2
    assert judge([first, end(1, 2, kind="failed")], stopped_by=None, told_s=0.5).exit_code == 2


def test_which_ends_would_meet_a_successor_too() -> None:
    marked = end(1, 2, kind="failed")
    assert marked.record is not None
    marked.record["final"] = True
    assert final(marked)
    assert not final(end(1, 1, kind="failed"))
    assert final(end(1, 1, kind="failed"), [end(0, 1, kind="failed")])
    assert not final(end(1, 1, kind="peer-lost"), [end(0, 1, kind="peer-lost")])
    assert not final(end(1, -9), [end(0, -9), end(2, -9)])
    assert final(end(1, -11), [end(0, -9), end(2, -11)])
    assert final(end(1, 7), [end(0, 7)])


def test_how_an_end_is_told_to_the_coordinator() -> None:
    assert cause(end(0, -9))[0] == "death"
    assert cause(end(0, -11))[0] == "failed"
    assert cause(end(0, 7))[0] == "failed"
    assert cause(end(0, 1, kind="failed"))[0] == "failed"
    assert cause(end(0, 1, kind="peer-lost"))[0] == "death"
    assert cause(end(0, 143, kind="stopped"))[0] == "left"
    assert cause(end(0, -15))[0] == "left"
