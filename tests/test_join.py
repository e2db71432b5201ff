"""`manyhands coordinate` and `manyhands join`, as people use them, with real training."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import TINY, command, environment, events

from manyhands.cli.main import main
from manyhands.coordinate.server import Coordinator
from manyhands.core import tls
from manyhands.core.errors import ManyhandsError
from manyhands.launch import control, local
from manyhands.launch.chaos import workers_of
from manyhands.launch.control import CONTACT
from manyhands.train.job import Job
from manyhands.train.order import Order

WAIT_S = 240.0
CORPUS = "".join(f"The quick brown fox number {i} jumps over the lazy dog.\n" for i in range(400))

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: object, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command(*arguments),
            stdout=subprocess.DEVNULL,  # a pipe that nobody reads would stop the job
            stderr=subprocess.PIPE,
            text=True,
            env={**environment(), **variables},
            cwd=cwd,
        )
        started.append(process)
        return process

    (tmp_path / "corpus.txt").write_text(CORPUS)
    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def contact(output: Path, *, other_than: str = "") -> dict[str, str]:
    """Where the coordinator is, once it is there."""
    deadline = time.monotonic() + WAIT_S
    while True:
        assert time.monotonic() < deadline
        try:
            found: dict[str, str] = json.loads((output / CONTACT).read_text())
        except (OSError, ValueError):
            found = {}
        if found and found["address"] != other_than:
            return found
        time.sleep(0.02)


def contact_of(coordinator: subprocess.Popen[str], output: Path) -> tuple[str, ...]:
    """What `join` must be given to find it."""
    there = contact(output)
    assert coordinator.poll() is None
    return there["address"], "--token-file", there["token_file"], "--fingerprint", there["fingerprint"]


def steps_made(output: Path) -> int:
    try:
        lines = (
            (output / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
        )  # the last may be half there
    except OSError:
        return 0
    return max((r["step"] for r in map(json.loads, lines) if r["event"] == "stepped"), default=0)


def until_steps(output: Path, count: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while steps_made(output) < count:
        assert time.monotonic() < deadline, f"step {steps_made(output)} of {count}"
        time.sleep(0.05)


def job(tmp_path: Path, output: Path, *more: object) -> list[object]:
    data = ("--data", tmp_path / "corpus.txt", "--eval-fraction", "0", "--device", "cpu", "--output", output)
    return [*TINY, *data, "--elastic", "auto", *more]


def test_a_coordinator_and_workers_that_join_it_and_its_restart(tmp_path: Path, start: Start) -> None:
    output = tmp_path / "out"
    waiting = [*job(tmp_path, output, "--workers", 1, "--steps", 400)]
    first = start("coordinate", *waiting, "--listen", "0.0.0.0:0", "--resume", "auto", "--save-every", 50)
    there = contact(output)
    assert not there["address"].startswith("0.0.0.0")  # nobody elsewhere reaches it there
    assert there["fingerprint"].startswith("sha256:")
    assert (output / "coordinator.token").stat().st_mode & 0o077 == 0
    to = (there["address"], "--token-file", there["token_file"], "--fingerprint", there["fingerprint"])
    srun = {"SLURM_PROCID": "1", "SLURM_NTASKS": "3", "SLURM_STEP_ID": "0"}  # on three machines, on each once
    joined = start("join", *to, "--workers", 1, "--threads", 1, **srun)
    until_steps(output, 51)
    deadline = time.monotonic() + WAIT_S
    while not (output / "checkpoint-50").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.kill()
    first.wait()
    before = steps_made(output)
    until_steps(output, before + 5)  # nobody needs it while nothing changes
    again = ("--data", tmp_path / "corpus.txt", "--output", output)  # all else is known
    second = start("coordinate", *again, "--resume", "auto")  # there is a checkpoint; but the workers live
    _, errors = joined.communicate(timeout=WAIT_S)
    assert joined.returncode == 0, errors
    _, errors = second.communicate(timeout=WAIT_S)
    assert second.returncode == 0, errors
    assert "the job is done" in errors
    assert steps_made(output) == 400
    assert not (output / CONTACT).exists()


def test_all_die_and_one_command_goes_on(tmp_path: Path, start: Start) -> None:
    """Coordinator and workers at once, as when the power fails; somebody else has the port by then."""
    output = tmp_path / "out"
    first = start("coordinate", *job(tmp_path, output, "--workers", 1, "--steps", 10**6, "--save-every", 5))
    there = contact(output)
    to = ("--token-file", there["token_file"], "--fingerprint", there["fingerprint"])
    joined = start("join", there["address"], *to, "--workers", 1, "--threads", 1)
    until_steps(output, 12)
    for process in (first, joined):
        process.kill()
        process.wait()
    done = steps_made(output) + 5
    with socket.create_server(("127.0.0.1", int(there["address"].rpartition(":")[2]))):
        again = start("coordinate", "--resume", output, "--steps", done)
        address = contact(output, other_than=there["address"])["address"]
    joined = start("join", address, *to, "--workers", 1, "--threads", 1)
    _, errors = joined.communicate(timeout=WAIT_S)
    assert joined.returncode == 0, errors
    _, errors = again.communicate(timeout=WAIT_S)
    assert again.returncode == 0, errors
    assert "begins anew from its checkpoint" in errors
    assert f"{there['address']}, where the job was, is taken" in errors
    assert json.loads((output / "summary.json").read_text())["steps"] == done
    assert '"resumed"' in (output / "metrics.jsonl").read_text()


def test_joining_a_local_job_by_its_output_and_leaving_it(tmp_path: Path, start: Start) -> None:
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    strategy = "gossip(lr=0.003, every=3)"
    given = ("--workers", 2, "--threads", 1, "--steps", 10**6, "--strategy", strategy)
    local = start("train", *job(Path(), Path("out"), *given), cwd=tmp_path)
    until_steps(output, 2)
    joined = start("join", "../out", "--workers", 1, "--threads", 1, "--output", "guest", cwd=elsewhere)
    deadline = time.monotonic() + WAIT_S
    while '"joined"' not in (output / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline
        assert joined.poll() is None, joined.communicate()
        time.sleep(0.05)
    joined.send_signal(signal.SIGINT)
    _, errors = joined.communicate(timeout=WAIT_S)
    assert joined.returncode == 130, errors
    assert (elsewhere / "guest" / "logs").is_dir()
    before = steps_made(output)
    until_steps(output, before + 3)
    local.send_signal(signal.SIGTERM)
    _, errors = local.communicate(timeout=WAIT_S)
    assert local.returncode == 143, errors
    assert main(["ledger", str(output)]) == 0


def test_a_loss_that_leaves_hosts_unequal(tmp_path: Path, start: Start) -> None:
    """Two hosts of two workers add within and across; when one is lost the others go on as one level."""
    output = tmp_path / "out"
    given = ("--workers", 4, "--min-workers", 3, "--steps", 40, "--strategy", "hierarchical(across=int8)")
    there = contact_of(start("coordinate", *job(tmp_path, output, *given)), output)
    guests = [
        start(
            "join",
            *there,
            *("--workers", 2, "--threads", 1, "--restarts", 0, "--output", tmp_path / host),
            MANYHANDS_HOST=host,
        )
        for host in ("a", "b")
    ]
    until_steps(output, 5)
    os.kill(max(workers_of(output).items())[1], signal.SIGKILL)
    for guest in guests:
        _, errors = guest.communicate(timeout=WAIT_S)
        assert guest.returncode == 0, errors
    found = json.loads((output / "summary.json").read_text())
    assert (found["steps"], found["world_sizes"]) == (40, [4, 3])
    (warned,) = [e for e in events(output, "warned") if e["where"] == "exchange"]
    assert "workers: exchanges within and across hosts need equally many on each" in warned["message"]
    assert main(["ledger", str(output)]) == 0


def test_a_guest_of_another_host_is_refused_where_memory_is_shared(tmp_path: Path, start: Start) -> None:
    output = tmp_path / "out"
    given = ("--workers", 1, "--steps", 10**6, "--strategy", "hogwild(every=5)")
    first = start("coordinate", *job(tmp_path, output, *given))
    there = contact_of(first, output)
    ours = start("join", *there, "--workers", 1, "--threads", 1)
    until_steps(output, 5)
    foreign = start(
        "join", *there, "--workers", 1, "--output", tmp_path / "guest", MANYHANDS_HOST="elsewhere"
    )
    _, errors = foreign.communicate(timeout=WAIT_S)
    assert foreign.returncode == 2, errors
    assert "on elsewhere (cpu)" in errors
    assert "share the memory of one host" in errors
    assert "take part from" in errors
    until_steps(output, steps_made(output) + 20)
    first.send_signal(signal.SIGTERM)
    _, errors = ours.communicate(timeout=WAIT_S)
    assert ours.returncode == 143, errors
    assert main(["ledger", str(output)]) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["join", "nowhere"], "is no job"),
        (["join", "127.0.0.1:1"], "no --token-file"),
        (["join", "127.0.0.1:1", "--token-file", "absent"], "token file absent"),
        (["join", "127.0.0.1:1", "--workers", "0"], "--workers 0"),
        (["join"], "required"),
        (["coordinate", "--plain", "--listen", "0.0.0.0:0"], "without TLS only this machine"),
        (["coordinate", "--listen", "127.0.0.1:99999", "--output", "{}"], "free HOST:PORT"),
        (["coordinate", "--min-workers", "3", "--workers", "2", "--output", "{}"], "min_workers = 3"),
        (["coordinate", "--hang-s", "0", "--output", "{}"], "hang_s = 0"),
        (["coordinate", "--strategy", "parameter-server", "--output", "{}"], "serve-parameters"),
        (["coordinate", "--elastic", "off", "--output", "{}"], "elastic = 'off'"),
        (["train", "--elastic", "off", "--restarts", "5"], "elastic = 'off'"),
        (["train", "--restarts", "-1"], "restarts = -1"),
    ],
)
def test_what_cannot_be_meant(
    arguments: list[str], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(tmp_path) for word in arguments]) == 2
    assert says in capfd.readouterr().err


@pytest.mark.parametrize(("given", "restarts"), [([], 7), (["--restarts", "1"], 1)])
def test_who_joins_replaces_as_often_as_the_job_says(
    given: list[str], restarts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = Order(Job(restarts=7, output=str(tmp_path)), {}).to_json()
    there = SimpleNamespace(fact=lambda *names: order, close=lambda: None)
    monkeypatch.setattr(control, "Joined", lambda remote: there)
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(local, "launch", lambda *args, **options: asked.append(options) or 0)
    assert main(["join", "127.0.0.1:1", "--token-file", "any", "--workers", "2", *given]) == 0
    assert [each["elastic"].restarts for each in asked] == [restarts]


def test_who_comes_when_the_job_is_done_has_nothing_to_do(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    coordinator = Coordinator(token="a token of the tests, long enough")
    coordinator.start()
    tls.private(tmp_path / "token", b"a token of the tests, long enough")
    coordinator.publish("order", "never read")
    coordinator.fail("done", 0)
    assert main(["join", coordinator.address, "--token-file", str(tmp_path / "token")]) == 0
    assert "the job is done" in capfd.readouterr().err
    coordinator.stop()


def test_a_job_whose_coordinator_goes_before_it_has_begun_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = Coordinator(token="a token of the tests, long enough")
    coordinator.start()
    tls.private(tmp_path / "token", b"a token of the tests, long enough")
    told = control.Joined(control.Remote(address=coordinator.address, token_file=str(tmp_path / "token")))
    coordinator.stop()  # killed: it says nothing
    monkeypatch.setattr(control, "REACH_S", 0.1)
    with pytest.raises(ManyhandsError, match="cannot be reached"):
        told.fact("job", "order")
    told.close()


def test_a_coordinator_that_nobody_joins_ends_at_once(tmp_path: Path, start: Start) -> None:
    output = tmp_path / "out"
    process = start("coordinate", *job(tmp_path, output, "--plain"))
    there = contact(output)
    assert there["fingerprint"] == ""
    (tmp_path / "token").write_text("not the token of that job")
    stranger = start("join", there["address"], "--token-file", tmp_path / "token")
    _, errors = stranger.communicate(timeout=WAIT_S)
    assert stranger.returncode == 2
    assert "refused the token" in errors
    second = start("coordinate", *job(tmp_path, output, "--plain"))
    _, errors = second.communicate(timeout=WAIT_S)
    assert second.returncode == 2
    assert "in use" in errors
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 143
    assert "wrong token" in errors
