"""Faults on real processes: schedules are pure, each injector does what it says, and a job under fire comes through."""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import xml.dom.minidom
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import TINY, manyhands

from manyhands.core.errors import UsageError
from manyhands.core.membership import Epoch, Seat
from manyhands.launch import chaos
from manyhands.launch.chaos import Chaos, Fault, Injected, schedule, workers_of
from manyhands.launch.chaos_report import recoveries, text, timeline, training_s
from manyhands.train import chaos_hook
from manyhands.train.loop import Loop
from manyhands.train.replica import Replica
from manyhands.train.standing import Standing

VICTIM = """
import ctypes, os, sys, time
from pathlib import Path
ledger = open(sys.argv[1], "ab", buffering=0)
ledger.write(b"{}\\n{}\\n")
buffer = (ctypes.c_float * 64)(*range(64))
Path(sys.argv[2], f"w0.{os.getpid()}").write_text(f"weight {ctypes.addressof(buffer)} {ctypes.sizeof(buffer)}")
print("ready", flush=True)
while True:
    try:
        ledger.write(b"x")
        said = "wrote"
    except OSError as error:
        said = f"error {error.errno}"
    print(said, sum(a != b for a, b in zip(buffer, range(64))), flush=True)
    time.sleep(0.005)
"""


class Victim:
    """A process that looks like a worker: it holds a ledger open, and says where a parameter is."""

    def __init__(self, output: Path) -> None:
        (output / "ledger").mkdir(parents=True)
        (output / "told").mkdir()
        self.output = output
        self.process = subprocess.Popen(
            [sys.executable, "-c", VICTIM, output / "ledger" / "w0.jsonl", output / "told"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.lines = self.process.stdout
        assert self.lines.readline() == "ready\n"

    def until(self, good: Callable[[str], bool]) -> str:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            line = self.lines.readline()
            if good(line):
                return line
        raise TimeoutError

    def state(self) -> str:
        return Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]

    def suffer(self, *faults: Fault) -> Chaos:
        under = Chaos(self.output, faults, lambda: True, self.output / "told")
        under.start()
        wait_for(lambda: len(under.injected) == len(faults))
        return under


def wait_for(condition: Callable[[], bool], deadline_s: float = 30.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Victim]:
    found = Victim(tmp_path / "run")
    yield found
    found.process.kill()
    found.process.wait()
    found.lines.close()


def test_a_schedule_is_a_function_of_its_seed() -> None:
    rates = {"kill": 5.0, "stop": 20.0}
    faults = schedule(7, rates, until_s=1000.0)
    assert faults == schedule(7, rates, until_s=1000.0)
    assert faults != schedule(8, rates, until_s=1000.0)
    assert [f.at_s for f in faults] == sorted(f.at_s for f in faults)
    assert all(f.at_s < 1000 and 0 <= f.victim < 1 for f in faults)
    kills = [f for f in faults if f.kind == "kill"]
    assert kills == [f for f in schedule(7, {"kill": 5.0, "flip": 3.0}, until_s=1000.0) if f.kind == "kill"]


def test_the_mean_time_between_faults_is_what_was_asked_for() -> None:
    counts = [len(schedule(seed, {"kill": 5.0}, until_s=1000.0)) for seed in range(50)]
    assert 190 < sum(counts) / len(counts) < 210  # 200 ± 2 (its standard error)
    with pytest.raises(UsageError, match="a mean of 0 s"):
        schedule(0, {"kill": 0}, until_s=1.0)


def test_about_half_of_the_stops_are_hangs() -> None:
    stops = schedule(3, {"stop": 5.0}, until_s=5000.0, hang_s=4.0)
    assert all(0.8 <= f.for_s <= 8.0 for f in stops)
    hangs = sum(f.for_s > 4.0 for f in stops) / len(stops)
    assert 0.45 < hangs < 0.65
    longer = schedule(3, {"kill": 5.0, "stop": 5.0}, until_s=5000.0, hang_s=8.0)
    as_long = [(f.at_s, f.victim, f.for_s / 2) for f in longer if f.kind == "stop"]
    assert as_long == [(f.at_s, f.victim, f.for_s) for f in stops]


def test_the_last_worker_does_not_hang(victim: Victim) -> None:
    under = Chaos(victim.output, (), lambda: True, hang_s=1.0)
    under._inject(Fault("stop", 0.0, 0.5, for_s=0.4))
    under._inject(Fault("stop", 0.0, 0.5, for_s=1.5))
    assert [each.outcome for each in under.injected] == ["done", "left out: it was the last one"]
    victim.process.send_signal(signal.SIGCONT)


def test_who_hangs_is_not_left_as_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ledger").mkdir()
    for seat in ("w0", "w1"):
        (tmp_path / "ledger" / f"{seat}.jsonl").write_text('{"ledger": 1}\n{"step": 7}\n')
    monkeypatch.setattr(chaos, "workers_of", lambda output: {"w0": 10, "w1": 11})
    for kind in ("_stop", "_kill"):
        monkeypatch.setattr(Chaos, kind, lambda *given: "done")
    for for_s, outcome in ((4.0, "done"), (15.0, "left out: it was the last one")):
        under = Chaos(tmp_path, (), lambda: True, hang_s=10.0)
        under._inject(Fault("stop", 0.0, 0.0, for_s=for_s))
        under._inject(Fault("kill", 0.0, 0.99))
        assert [(each.seat, each.outcome) for each in under.injected] == [("w0", "done"), ("w1", outcome)]


def test_workers_are_found_by_the_ledgers_they_hold(victim: Victim) -> None:
    assert workers_of(victim.output) == {"w0": victim.process.pid}
    assert workers_of(victim.output.parent) == {}


def test_a_stop_lasts_for_a_while(victim: Victim) -> None:
    under = victim.suffer(Fault("stop", 0.0, 0.5, for_s=0.3))
    wait_for(lambda: victim.state() == "T")
    wait_for(lambda: victim.state() != "T")
    under.stop()
    assert under.injected[0].outcome == "done"


def test_ending_takes_back_what_lasts(victim: Victim) -> None:
    under = victim.suffer(
        Fault("stop", 0.0, 0.5, for_s=600.0),
        Fault("full", 0.0, 0.5, for_s=600.0),
        Fault("slow", 0.0, 0.5, for_s=600.0),
    )
    wait_for(lambda: victim.state() == "T")
    under.stop()
    wait_for(lambda: victim.state() != "T")
    victim.until(lambda line: line.startswith("wrote"))


def test_a_slowed_worker_is_stopped_and_continued_in_turn(victim: Victim) -> None:
    under = victim.suffer(Fault("slow", 0.0, 0.5, for_s=600.0))
    for _ in range(2):
        wait_for(lambda: victim.state() == "T")
        wait_for(lambda: victim.state() != "T")
    under.stop()


def test_a_full_disk_refuses_what_is_written(victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos, "DEADLY", ())  # else the only worker is spared
    under = victim.suffer(Fault("full", 0.0, 0.5, for_s=0.5))
    assert victim.until(lambda line: line.startswith("error")).startswith("error 27")  # EFBIG
    victim.until(lambda line: line.startswith("wrote"))
    under.stop()


def test_of_two_faults_of_one_kind_the_last_to_end_takes_back_both(
    victim: Victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chaos, "DEADLY", ())
    limits = resource.prlimit(victim.process.pid, resource.RLIMIT_FSIZE)
    under = victim.suffer(Fault("full", 0.0, 0.5, for_s=0.3), Fault("full", 0.1, 0.5, for_s=0.4))
    wait_for(lambda: not under._undo)
    assert resource.prlimit(victim.process.pid, resource.RLIMIT_FSIZE) == limits
    under.stop()


def test_a_stopped_worker_that_is_slowed_stands_still(victim: Victim) -> None:
    under = victim.suffer(Fault("stop", 0.0, 0.5, for_s=1.0), Fault("slow", 0.0, 0.5, for_s=600.0))
    wait_for(lambda: victim.state() == "T")
    for _ in range(50):
        time.sleep(0.01)
        assert victim.state() == "T"
    wait_for(lambda: victim.state() != "T")
    under.stop()


def test_a_bit_flips_in_the_workers_memory(victim: Victim) -> None:
    under = victim.suffer(Fault("flip", 0.0, 0.3))
    (injected,) = under.injected
    if "not possible" in injected.outcome:
        pytest.skip(injected.outcome)  # no right to another process's memory
    assert injected.outcome.startswith("done: bit ")
    victim.until(lambda line: line.split()[-1] == "1")
    under.stop()


def test_no_bit_flips_where_the_parameters_have_just_moved() -> None:
    numbers = (ctypes.c_float * 4)(*range(4))
    said = iter(f"weight {address} {ctypes.sizeof(numbers)}" for address in (ctypes.addressof(numbers), 16))
    told: Any = SimpleNamespace(read_text=lambda: next(said))
    try:
        assert chaos.flip(told, os.getpid(), random.Random(1)) == "the worker's parameters have just moved"
    except OSError as error:
        pytest.skip(f"{error}")  # no right to write a process's memory
    assert list(numbers) == [0.0, 1.0, 2.0, 3.0]


def test_each_replica_tells_anew_where_its_parameters_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO makes the model anew when the workers are others, and Hogwild moves its parameters into other memory."""
    monkeypatch.setenv("MANYHANDS_CHAOS", str(tmp_path))
    models = [torch.nn.Linear(4, 4) for _ in range(2)]
    first, second = (
        SimpleNamespace(named=list(m.named_parameters()), device=torch.device("cpu")) for m in models
    )
    told = tmp_path / f"w3.{os.getpid()}"
    chaos_hook.tell(first, "w3")  # type: ignore[arg-type]
    assert told.read_text() == f"weight {models[0].weight.data_ptr()} 64\n"
    chaos_hook.withdraw(first)  # type: ignore[arg-type]
    assert not told.exists()
    seats = (Seat(id="w1", host="here"), Seat(id="w3", host="here"))
    world: Any = SimpleNamespace(rank=1, size=2)
    monkeypatch.setattr("manyhands.train.loop.regroup", lambda *given, **named: None)
    loop: Any = SimpleNamespace(
        replica=second,
        world=world,
        feed=SimpleNamespace(),
        schedule=SimpleNamespace(total_steps=9),
        division=SimpleNamespace(go_on=lambda standing: None),
        promote=lambda world: None,
        saver=None,
        balancer=None,
    )
    Loop.enter(loop, world, Standing(steps=3, leader=0), Epoch(number=2, seats=seats))
    assert told.read_text() == f"weight {models[1].weight.data_ptr()} 64\n"
    chaos_hook.withdraw(first)  # type: ignore[arg-type]
    assert told.exists()
    monkeypatch.setattr(Replica, "__init__", lambda self: None)
    replica = Replica()  # type: ignore[call-arg]
    replica.__dict__.update(second.__dict__, method=SimpleNamespace(close=lambda: None))
    chaos_hook.tell(replica, "w3")
    replica.close()
    assert not told.exists()


def test_a_connection_is_cut_from_outside() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket, time; s = socket.create_connection(('127.0.0.1', {server.getsockname()[1]})); time.sleep(60)"
        process = subprocess.Popen([sys.executable, "-c", program])
        try:
            ours, _ = server.accept()
            with ours:
                ours.settimeout(30)
                try:
                    said = chaos.cut(process.pid, random.Random(1))
                except OSError as error:
                    pytest.skip(f"pidfd_getfd: {error}")
                assert said.startswith("done: the connection with 127.0.0.1:")
                assert ours.recv(1) == b""  # the end of the stream
            assert process.poll() is None
        finally:
            process.kill()
            process.wait()


def test_a_kill_spares_the_last_worker(victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    under = victim.suffer(Fault("kill", 0.0, 0.5))
    under.stop()
    assert under.injected[0].outcome == "left out: it was the last one"
    program = "import sys, time; f = open(sys.argv[1], 'ab'); print('ready', flush=True); time.sleep(60)"
    ledger = victim.output / "ledger"
    second = subprocess.Popen([sys.executable, "-c", program, ledger / "w1.jsonl"], stdout=subprocess.PIPE)
    assert second.stdout is not None
    second.stdout.readline()
    pids = {"w0": victim.process.pid, "w1": second.pid}
    monkeypatch.setattr(chaos, "workers_of", lambda output: pids)  # a dying one may still be seen
    (ledger / "w0.jsonl").write_text('{"ledger": 1}\n')
    under = victim.suffer(Fault("kill", 0.0, 0.99))  # the other one has come, and holds nothing yet
    under.stop()
    assert [each.outcome for each in under.injected] == ["left out: it was the last one"]
    (ledger / "w0.jsonl").write_text('{"ledger": 1}\n{"step": 7}\n')
    under = victim.suffer(Fault("kill", 0.0, 0.99), Fault("kill", 0.0, 0.99))
    under.stop()
    assert [each.outcome for each in under.injected] == ["done", "left out: it was the last one"]
    assert second.wait(30) == -signal.SIGKILL
    second.stdout.close()


def test_recoveries_are_matched_by_the_clock_outside() -> None:
    events = [{"event": "reformed", "time_s": t} for t in (10.5, 20.25)]
    kills = [Injected(Fault("kill", 0, 0), at, "w0", 1, "done") for at in (10.0, 20.0, 30.0)]
    assert recoveries(events, kills) == [0.5, 0.25]
    steps = [{"event": "stepped", "time_s": t, "step": s} for t, s in ((1.0, 1), (3.0, 2), (9.0, 5))]
    assert training_s([*steps, {"event": "evaluated", "time_s": 4.0, "wall_s": 2.0}]) == (6.0, 4)
    assert training_s([]) == (0.0, 0)


def test_a_job_under_fire_comes_through(tmp_path: Path) -> None:
    """Two runs of the real thing; what was injected, what it cost, every sample once, and a picture."""
    output, data = tmp_path / "chaos", tmp_path / "data.txt"
    data.write_text("\n".join(f"line {i} says {i * i}" for i in range(2000)))
    done = manyhands(
        *(
            "chaos",
            *TINY,
            "--data",
            data,
            "--workers",
            2,
            "--device",
            "cpu",
            "--steps",
            40,
            "--eval-fraction",
            0,
        ),
        # the first fault of seed 5 comes 0.05 s after the first step, the second 5.4 s after it
        *("--kills", 4, "--chaos-seed", 5, "--output", output, "--reproducible"),
    )
    report = json.loads((output / "chaos.json").read_text())
    assert report["ledger"]["ok"]
    assert report["ledger"]["used"] == 40 * 12
    assert report["same_parameters"]
    assert report["faults"][0]["outcome"] == "done"
    assert "every sample once" in done.stdout
    assert "(the same bits)" in done.stdout
    assert text(report).splitlines()[0] == "faults (seed 5):"
    xml.dom.minidom.parse(str(output / "chaos.svg"))
    again = manyhands("chaos", *TINY, "--data", data, "--workers", 2, "--output", output, code=2)
    assert "each report is of fresh runs" in again.stderr


def test_the_command_refuses_what_cannot_be_meant(tmp_path: Path) -> None:
    found = manyhands("chaos", "--workers", 1, "--output", tmp_path, code=2)
    assert "somebody must be left to go on" in found.stderr
    found = manyhands("chaos", "--kils", 3, code=2)
    assert "--kils" in found.stderr
    found = manyhands(
        "chaos", "--workers", 2, "--output", tmp_path, "--baseline", tmp_path / "absent", code=2
    )
    assert "it is the output of a run" in found.stderr


def test_the_picture_of_nothing_is_empty() -> None:
    assert timeline([], {"faults": [], "goodput": None}) == ""
