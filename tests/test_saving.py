"""Saving under kills, full disks and in the background: whole or absent, and training goes on."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_victims import hidden, names, saved, taken, whole

from manyhands.core.errors import CheckpointError
from manyhands.core.events import Event, Saved, Warned
from manyhands.train import checkpoint, durable

VICTIMS = Path(__file__).with_name("checkpoint_victims.py")


def run_victim(name: str, output: Path) -> Any:
    done = subprocess.run(
        [sys.executable, VICTIMS, name, output], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_kill_at_any_file_operation_loses_nothing(tmp_path: Path) -> None:
    report = run_victim("die_everywhere", tmp_path)
    for entry in report:
        assert entry["left"] in {2: ([1, 2],), 3: ([1, 2], [1, 2, 3], [2, 3])}[entry["step"]], entry
        assert entry["latest"] in ("checkpoint-2", f"checkpoint-{entry['step']}"), entry
        assert entry["names"][-1] == "checkpoint-9", entry
        assert len(entry["names"]) == 2, entry
        assert not [name for name in entry["names"] if name.startswith(".")], entry
    survived = [entry for entry in report if not entry["died"]]
    assert [entry["step"] for entry in survived] == [2, 3]
    assert [entry["latest"] for entry in survived] == ["checkpoint-2", "checkpoint-3"]
    assert min(entry["at"] for entry in survived) > 30  # the hook saw the operations


def test_a_kill_at_random_moments_loses_nothing(tmp_path: Path) -> None:
    rng = random.Random(time.time_ns())
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, VICTIMS, "save_for_ever", tmp_path], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(rng.randint(3, 6)):
            assert process.stdout.readline()
        time.sleep(rng.random() * 0.05)  # not to wait for anything: to hit anywhere in a save
        process.kill()
        process.wait()
        process.stdout.close()
        newest = checkpoint.latest(tmp_path)
        assert newest is not None
        assert [whole(path) for path in checkpoint.checkpoints(tmp_path)]
    saved(tmp_path, 9, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-9"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this root may not mount: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_loses_nothing_and_training_goes_on(small_disk: Path) -> None:
    events: list[Event] = []
    run = small_disk / "run"
    saver = checkpoint.AsyncSaver(run, keep=9, emit=events.append)
    for step in (1, 2, 3):
        saver.submit(taken(step, width=230))  # 3 × 212 kB of weights, optimizer and exchange
    saver.submit(taken(4, width=230))
    with pytest.raises(
        CheckpointError, match=r"checkpoint-4: No space left.*nothing that was saved before is lost"
    ):
        saver.wait()
    warned = [event for event in events if isinstance(event, Warned)]
    assert [event.where for event in warned] == ["checkpoint-4"]
    assert "free some space" in warned[0].message
    assert [whole(path) for path in checkpoint.checkpoints(run)] == [1, 2, 3]
    assert hidden(run) == []
    with pytest.raises(CheckpointError, match="No space left"):
        durable.write_text(run / "summary.json", "x" * 2_000_000)
    assert not (run / "summary.json").exists()
    assert hidden(run) == []
    shutil.rmtree(run / "checkpoint-1")
    saver.submit(taken(5, width=230))
    saver.wait()  # there is room again: nothing is left to complain of
    saver.close()
    assert [whole(path) for path in checkpoint.checkpoints(run)] == [2, 3, 5]


def test_a_limit_on_files_is_a_full_disk(tmp_path: Path) -> None:
    report = run_victim("outgrow_the_limit", tmp_path)
    assert os.strerror(errno.EFBIG) in report["error"]
    assert "nothing that was saved before is lost" in report["error"]
    assert report["left"] == ["checkpoint-1"]
    assert [whole(path) for path in checkpoint.checkpoints(tmp_path)] == [1, 3]


def test_where_nothing_can_be_written_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="it must be possible to write there"):
        saved(tmp_path / "file", 1)


def test_a_failed_replacement_of_a_text_keeps_the_old(tmp_path: Path) -> None:
    durable.write_text(tmp_path / "a", "old")
    (tmp_path / "b").mkdir()
    with pytest.raises(CheckpointError):
        durable.write_text(tmp_path / "b", "new")  # a directory is in the way
    assert (tmp_path / "a").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


# -------------------------------------------------------------------------------------------------- in background


class Gate:
    """A `write_config` that waits, so that a test decides when a save goes on."""

    def __init__(self, error: Exception | None = None) -> None:
        self.reached, self.opened, self.error = threading.Event(), threading.Event(), error

    def __call__(self, directory: Path) -> None:
        self.reached.set()
        assert self.opened.wait(60)
        if self.error is not None:
            raise self.error


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    gate, events = Gate(), []
    saver = checkpoint.AsyncSaver(tmp_path, keep=2, emit=events.append)
    saver.submit(dataclasses.replace(taken(1), write_config=gate))
    assert gate.reached.wait(60)
    assert names(tmp_path) == []  # submit returned; nothing that looks like a checkpoint is there
    second = threading.Thread(target=saver.submit, args=(taken(2),))
    second.start()
    second.join(0.05)
    assert second.is_alive()  # two copies in memory are enough
    gate.opened.set()
    second.join(60)
    saver.wait()
    saver.close()
    assert [whole(path) for path in checkpoint.checkpoints(tmp_path)] == [1, 2]
    steps = [event for event in events if isinstance(event, Saved)]
    assert [event.step for event in steps] == [1, 2]
    size = sum(p.stat().st_size for p in (tmp_path / "checkpoint-1").rglob("*") if p.is_file())
    assert steps[0].size_bytes == size - (tmp_path / "checkpoint-1/manifest.json").stat().st_size
    assert steps[1].blocked_s > taken(2).taken_s  # the wait for the first one counts


def test_a_defect_in_the_background_surfaces_at_the_next_call(tmp_path: Path) -> None:
    for call in ("submit", "wait"):
        gate = Gate(ZeroDivisionError("a defect"))
        gate.opened.set()
        saver = checkpoint.AsyncSaver(tmp_path, keep=2)
        saver.submit(dataclasses.replace(taken(1), write_config=gate))
        with pytest.raises(ZeroDivisionError, match="a defect"):
            saver.submit(taken(2)) if call == "submit" else saver.wait()
        saver.wait()
        saver.close()
        assert names(tmp_path) == []
        assert hidden(tmp_path) == []
