"""The local launcher with real processes and real signals. Nothing sleeps to synchronise: workers say when they are ready."""

from __future__ import annotations

import errno
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from manyhands.core import hardware
from manyhands.core.errors import UsageError, WorkerFailed
from manyhands.launch import guard, served
from manyhands.launch.crew import Crew
from manyhands.launch.local import launch
from manyhands.placement.served import Served

TIMEOUT_S = 60.0
DRIVER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # the suite may run with SIGINT ignored
sys.path.insert(0, sys.argv[5])
from pathlib import Path
from manyhands.launch.local import launch
code = launch("launch_entries:" + sys.argv[1], sys.argv[2], workers=int(sys.argv[3]), output=Path(sys.argv[4]))
assert "torch" not in sys.modules
sys.exit(code)
"""


def _hear_hangups() -> None:
    """A suite started by nohup hands an ignored SIGHUP down, and an ignored signal stays ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Job:
    """A launcher in a process of its own, with its own temporary directory, and the FIFO its workers speak through."""

    def __init__(
        self, tmp_path: Path, entry: str, workers: int = 2, *, stdout: int = subprocess.PIPE
    ) -> None:
        self.output, self.scratch = tmp_path / "out", tmp_path / "tmp"
        self.scratch.mkdir()
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        self._fifo = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        self._kept = os.open(fifo, os.O_WRONLY)  # no end of file before the first worker has come
        self._text = b""
        tests = str(Path(__file__).parent)
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, entry, str(fifo), str(workers), str(self.output), tests],
            stdout=stdout,
            stderr=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(self.scratch)},
            text=True,
            preexec_fn=_hear_hangups,
        )

    def lines(self, count: int) -> list[str]:
        """The next `count` lines of the workers."""
        while self._text.count(b"\n") < count:
            self._read()
        *found, self._text = self._text.split(b"\n", count)
        return [line.decode() for line in found]

    def everybody_gone(self) -> bool:
        """Wait until no process holds the FIFO any more."""
        os.close(self._kept)
        while self._read():
            pass
        return True

    def _read(self) -> bool:
        assert select.select([self._fifo], [], [], TIMEOUT_S)[0], "the workers say nothing"
        piece = os.read(self._fifo, 4096)
        self._text += piece
        return bool(piece)

    def end(self) -> tuple[int, str]:
        """Exit code and what was written on stderr."""
        _, errors = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, errors

    def left_behind(self) -> list[str]:
        return [path.name for path in self.scratch.iterdir()]


def _reports(output: Path) -> list[dict[str, object]]:
    return [
        json.loads(log.read_text().splitlines()[0]) for log in sorted((output / "logs").glob("rank-*.log"))
    ]


def test_workers_know_their_place_and_share_the_cores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = launch(
        "launch_entries:report", "x" * 400_000, workers=2, output=tmp_path, env={"GIVEN": "yes"}
    )  # longer than one argument of a command line may be
    assert code == 0
    first, second = _reports(tmp_path)
    assert (first["RANK"], second["RANK"]) == ("0", "1")
    assert (second["LOCAL_RANK"], second["WORLD_SIZE"], second["LOCAL_WORLD_SIZE"]) == ("1", "2", "2")
    assert first["length"] == 400_000
    assert first["GIVEN"] == "yes"
    assert not first["torch"]
    assert first["path"] == sys.path
    seats = hardware.seats(2)
    assert first["OMP_NUM_THREADS"] == str(seats[0].threads)
    if seats[0].cpus:
        assert [first["affinity"], second["affinity"]] == [list(seat.cpus) for seat in seats]
        assert not set(seats[0].cpus) & set(seats[1].cpus)
    # here stdout is no file, as in a notebook: rank 0's display comes through a pipe; rank 1 has only its log
    assert capsys.readouterr().out == "rank 0 on a terminal: False\n"
    assert "rank 1 on a terminal" in (tmp_path / "logs" / "rank-1.log").read_text()


def test_more_workers_than_cores_are_not_pinned(tmp_path: Path) -> None:
    workers = hardware.core_count() + 1
    assert launch("launch_entries:report", "", workers=workers, output=tmp_path) == 0
    assert all(report["affinity"] == sorted(os.sched_getaffinity(0)) for report in _reports(tmp_path))
    assert all(report["OMP_NUM_THREADS"] == "1" for report in _reports(tmp_path))


def test_a_second_run_adds_to_the_logs(tmp_path: Path) -> None:
    for _ in range(2):
        assert launch("launch_entries:report", "", workers=1, output=tmp_path) == 0
    assert (tmp_path / "logs" / "rank-0.log").read_text().count('"RANK": "0"') == 2


def test_rank_0_keeps_the_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    job = Job(tmp_path, "report", stdout=theirs)
    os.close(theirs)
    assert job.end() == (0, "")
    assert b"rank 0 on a terminal: True" in os.read(ours, 1000)
    os.close(ours)


def test_the_first_failure_is_printed_last_and_ends_the_others(tmp_path: Path) -> None:
    job = Job(tmp_path, "fail_second")
    code, errors = job.end()
    assert code == 1
    *_, cause, log = errors.strip().splitlines()
    assert "worker 1" in cause
    assert hardware.hostname() in cause
    assert "during build: ValueError: boom (" in cause
    assert "launch_entries.py" in cause
    assert log == f"  log: {job.output}/logs/rank-1.log"
    record = json.loads((job.output / "logs" / "rank-1.error.json").read_text())
    assert (record["type"], record["message"], record["phase"]) == ("ValueError", "boom", "build")
    assert "Traceback" in record["traceback"]
    assert "Traceback" in (job.output / "logs" / "rank-1.log").read_text()
    assert job.left_behind() == []


def test_a_usage_error_keeps_its_code_and_only_its_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch("launch_entries:misuse", "", workers=2, output=tmp_path) == 2
    errors = capfd.readouterr().err
    assert ": lr = -1. a rate is positive. give --lr 3e-4.\n" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_is_named_with_the_signal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], signum: signal.Signals
) -> None:
    assert launch("launch_entries:kill_itself", str(int(signum)), workers=2, output=tmp_path) == 1
    errors = capfd.readouterr().err
    assert f"worker 1 on {hardware.hostname()} was killed by {signum.name}" in errors
    assert "about to go" in errors


def test_a_lost_peer_gives_way_to_the_cause(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert launch("launch_entries:lose_then_fail", str(tmp_path / "fifo"), workers=2, output=tmp_path) == 1
    errors = capfd.readouterr().err
    assert "worker 1 on" in errors
    assert "OSError: the disk is full" in errors
    assert json.loads((tmp_path / "logs" / "rank-0.error.json").read_text())["kind"] == "peer-lost"


def test_a_full_disk_under_the_logs_ends_nobody_and_hides_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = tmp_path / "told"
    assert launch("launch_entries:fail_on_a_full_disk", str(told), workers=1, output=tmp_path) == 1
    assert told.read_text() == "it goes on"
    assert "ValueError: but not for long" in capfd.readouterr().err
    assert (tmp_path / "logs" / "rank-0.log").stat().st_size == 5000


READY = "import sys; open(sys.argv[sys.argv.index('--ready') + 1], 'w').close(); "


@pytest.mark.parametrize(("ready", "starts"), [("", 2), (READY, 4)], ids=["never", "for a while"])
def test_a_server_that_does_not_stay_up_ends_the_job_with_its_last_words(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    ready: str,
    starts: int,
) -> None:
    monkeypatch.setattr(served, "BOOT", ready + "raise SystemExit('there is no room left')")
    monkeypatch.setattr(served, "FUTILE", 2)
    monkeypatch.setattr(served, "RESTARTS", 3)
    os.mkfifo(tmp_path / "fifo")
    heard = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    servers = served.ServerProcesses(Served(), tmp_path)
    entry, fifo = "launch_entries:wait_for_end", str(tmp_path / "fifo")
    assert launch(entry, fifo, workers=1, output=tmp_path, servers=servers) == 1
    os.close(heard)
    said = capfd.readouterr().err
    assert said.count("parameter server 0 ended (exit code 1); starting it again") == starts - 1
    assert said.endswith(
        f"manyhands: parameter server 0 ended (exit code 1); it was started {starts} times, and is not started again\n"
        "  its last words:\n    there is no room left\n"
        f"  log: {tmp_path}/logs/server-0.log\n"
    )


def test_an_entry_that_does_not_exist(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch("launch_entries:nothing", "", workers=1, output=tmp_path) == 1
    assert "AttributeError" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)]
)
def test_a_signal_is_forwarded_once_and_the_workers_save(
    tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    job = Job(tmp_path, "save_and_stop")
    assert {line.split()[1] for line in job.lines(2)} == {"ready"}
    job.process.send_signal(signum)
    seen = signal.SIGTERM if signum == signal.SIGHUP else signum
    assert sorted(job.lines(2)) == [f"0 saved {seen.name}", f"1 saved {seen.name}"]
    ended, errors = job.end()
    assert ended == code
    assert "stopping the workers" in errors
    assert "worker 0 on" not in errors
    assert job.everybody_gone()
    assert job.left_behind() == []


def test_a_worker_without_handlers_stops_too(tmp_path: Path) -> None:
    job = Job(tmp_path, "wait_for_end")
    job.lines(2)
    job.process.send_signal(signal.SIGINT)
    assert job.end()[0] == 130


def test_a_second_signal_kills(tmp_path: Path) -> None:
    job = Job(tmp_path, "never_stop")
    job.lines(2)
    job.process.send_signal(signal.SIGTERM)
    assert sorted(job.lines(2)) == ["0 noticed", "1 noticed"]
    job.process.send_signal(signal.SIGTERM)
    code, errors = job.end()
    assert code == 143
    assert "killing the workers" in errors
    assert job.everybody_gone()
    assert job.left_behind() == []


def test_a_worker_stopped_from_outside_stops_the_job(tmp_path: Path) -> None:
    job = Job(tmp_path, "save_and_stop")
    ready = dict(line.split()[::2] for line in job.lines(2))
    os.kill(int(ready["1"]), signal.SIGTERM)
    code, errors = job.end()
    assert code == 143
    assert "worker" not in errors


def test_nobody_outlives_a_killed_launcher(tmp_path: Path) -> None:
    job = Job(tmp_path, "with_grandchild")
    said = job.lines(6)
    workers = [line.split()[2] for line in said if " ready " in line]
    assert len([line for line in said if "grandchild" in line]) == 2
    job.process.kill()
    assert job.end()[0] == -signal.SIGKILL
    assert job.everybody_gone()  # workers and what they had started
    deadline = time.monotonic() + TIMEOUT_S
    segments = [Path(f"/dev/shm/manyhands-{pid}-test") for pid in workers]
    while job.left_behind() or any(path.exists() for path in segments):
        assert time.monotonic() < deadline, (job.left_behind(), segments)
        time.sleep(0.01)


def test_a_failed_worker_leaves_nothing_behind(tmp_path: Path) -> None:
    job = Job(tmp_path, "with_grandchild")
    said = job.lines(6)
    workers = [line.split()[2] for line in said if " ready " in line]
    os.kill(int(workers[0]), signal.SIGKILL)
    assert job.end()[0] == 1
    assert job.everybody_gone()
    assert job.left_behind() == []
    assert not any(Path(f"/dev/shm/manyhands-{pid}-test").exists() for pid in workers)


def test_outside_the_main_thread(tmp_path: Path) -> None:
    codes: list[int] = []

    def run() -> None:
        codes.append(launch("launch_entries:report", "", workers=1, output=tmp_path))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join(TIMEOUT_S)
    assert codes == [0]
    assert signal.getsignal(signal.SIGTERM) is before


def test_handlers_are_restored(tmp_path: Path) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGTSTP)]
    launch("launch_entries:report", "", workers=1, output=tmp_path)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGTSTP)] == before


def test_no_file_number_leaks(tmp_path: Path) -> None:
    launch("launch_entries:report", "", workers=1, output=tmp_path)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    launch("launch_entries:report", "", workers=2, output=tmp_path)
    assert before == (len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0)


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UsageError, match="--output"):
        launch("launch_entries:report", "", workers=1, output=tmp_path / "out")


def test_no_workers(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="workers = 0"):
        launch("launch_entries:report", "", workers=0, output=tmp_path)


def test_a_process_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(Crew, "start", start)
    with pytest.raises(WorkerFailed, match=r"worker 0 cannot be started: Resource temporarily.*--workers"):
        launch("launch_entries:nothing", "", workers=2, output=tmp_path)


def test_the_guard_kills_what_ignores_requests() -> None:
    code = "import signal; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); signal.pause()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    guard.end_group(process.pid, linger_s=0.1)
    assert process.wait(TIMEOUT_S) == -signal.SIGKILL
    process.stdout.close()
    guard.end_group(process.pid)  # nobody is left: no error
