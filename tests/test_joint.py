"""Checkpoints that several workers write together: the same bytes, whatever becomes of the writers."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from checkpoint_victims import taken
from fleet import Fleet
from hypothesis import given
from hypothesis import strategies as st
from runs import events, summary
from test_exchange_state import _strategy
from test_sharded import BASE, begin
from trapped import OPTIONS, Job

from manyhands.core.config import from_text
from manyhands.core.errors import CheckpointError
from manyhands.core.events import Event, Saved, Warned
from manyhands.core.types import Summed
from manyhands.placement.replicated import Replicated
from manyhands.placement.sharded import Sharded
from manyhands.strategy.optimizers import AdamW
from manyhands.train import checkpoint, joint, joint_division, manifest, session
from manyhands.train.joint_division import Holdings, Run, divide, told, understood
from manyhands.train.replica import Part, Replica
from manyhands.train.sharded_pieces import Piece
from manyhands.train.standing import Position, conclude

FILES = joint_division.FILES


# ------------------------------------------------------------------------------------------------ who writes what


@given(
    commons=st.lists(st.integers(0, 900_000), max_size=6),
    owns=st.lists(st.integers(0, 900_000), min_size=1, max_size=5),
    first=st.booleans(),
)
def test_everything_is_written_once_and_the_work_is_even(
    commons: list[int], owns: list[int], first: bool
) -> None:
    common = {checkpoint.WEIGHTS: {f"c{i}": torch.empty(n, dtype=torch.uint8) for i, n in enumerate(commons)}}
    everyones = []
    for rank, n in enumerate(owns):
        tensor = torch.empty(n, dtype=torch.uint8)
        name = f"0.residual.0@{rank}"
        own = {checkpoint.EXCHANGE: {name: (Piece.all_of(name, tensor), tensor)}}
        everyones.append(json.loads(json.dumps(told(Holdings(common, own), first=rank == 0))))
    table = understood(everyones)
    assert table is not None
    writers = [r for r in range(len(owns)) if first or r == 0 or table.own[r]]
    runs = divide(table, writers)
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for file, name, a, b in (run for each in runs.values() for run in each):
        found.setdefault((file, name), []).append((a, b))
    sizes = {(checkpoint.WEIGHTS, f"c{i}"): n for i, n in enumerate(commons)}
    sizes |= {(checkpoint.EXCHANGE, f"0.residual.0@{r}"): n for r, n in enumerate(owns) if n}
    assert all(joint_division.covers(found.get(key, []), n) for key, n in sizes.items())
    loads = [sum(b - a for *_, a, b in runs[rank]) for rank in writers]
    fair = sum(loads) / len(loads)
    assert max(loads) <= max(fair, *owns) + joint_division.GRAIN_BYTES


def test_what_does_not_make_whole_tensors_is_left_to_rank_0() -> None:
    def table(*pieces: tuple[int, tuple[int, ...], tuple[int, ...]]) -> Any:
        everyones: list[Any] = [{"own": [], "common": []} for _ in range(2)]
        for rank, offset, extent in pieces:
            piece, tensor = Piece("w", (4, 6), offset, extent), torch.zeros(extent)
            mine = Holdings({}, {checkpoint.WEIGHTS: {"w": (piece, tensor)}})
            everyones[rank] = json.loads(json.dumps(told(mine, first=rank == 0)))
        return understood(everyones)

    rows = table((0, (0, 0), (3, 6)), (1, (3, 0), (1, 6)))
    assert rows.own == [
        [Run(checkpoint.WEIGHTS, "w", 0, 72)],
        [Run(checkpoint.WEIGHTS, "w", 72, 96)],
    ]
    assert table((0, (0, 0), (3, 6))) is None  # a row that nobody has
    assert table((0, (0, 0), (3, 6)), (1, (2, 0), (2, 6))) is None  # and one that two have
    assert table((0, (0, 0), (4, 3)), (1, (0, 3), (4, 3))) is None  # columns: their bytes lie apart
    twice = table((0, (0, 0), (4, 6)), (1, (0, 0), (4, 6)))
    assert [len(own) for own in twice.own] == [1, 0]  # who has the same as another


# ------------------------------------------------------------------------------------------------ the same bytes


CASES: dict[str, dict[str, Any]] = {
    "ddp": {"placement": Replicated()},
    "ddp, feedback": {"placement": Replicated(), "exchange": from_text("exchanges", "error-feedback(int8)")},
    "ddp, half": {"placement": Replicated(), "dtype": torch.float32},
    "zero1": {"placement": Sharded(stage=1)},
    "zero2": {"placement": Sharded(stage=2)},
    "zero3": {"placement": Sharded(stage=3)},
    "zero3 twice, feedback": {
        "placement": Sharded(stage=3, shard=2),
        "exchange": from_text("exchanges", "error-feedback(int8)"),
    },
    "diloco": {},
    "eager": {"text": "eager(lr=0.01)"},
    "forecast": {"text": "forecast(lr=0.01, every=2, exchange='error-feedback(int4)')"},
    "gossip": {"text": "gossip(lr=0.01, every=2)"},
}


def _replica(world: Any, name: str) -> Replica:
    case = CASES[name]
    if "placement" in case:
        replica, feed = begin(world, {**BASE, "optimizer": AdamW(0.01), **case})
        from test_exactness import summed

        for step in range(3):
            replica.step(feed.part(step), summed)
        return replica
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    strategy = from_text("strategies", case["text"]) if "text" in case else _strategy("diloco")
    replica = Replica(model, strategy, world.wire)
    for step in range(4):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + world.rank))
        batches = [(world.rank, {"x": x, "y": x.sum(1, keepdim=True).sin()})]
        part = Part(step, batches, world.size, 4 * world.size, 0)
        replica.step(part, lambda m, b: Summed((m(b["x"]) - b["y"]).square().sum(), len(b["x"])))
    replica.meet()
    return replica


def _both_ways(world: Any, name: str, output: str) -> str:
    """Rank 0 alone, and all together. What this worker had to do with the latter."""
    replica, grain = _replica(world, name), joint_division.GRAIN_BYTES
    state = {"job": {"steps": 3}} if world.rank == 0 else {}
    taken = session.snapshot_of(replica, state, None)
    if taken is not None:
        checkpoint.save(taken, Path(output, "alone"), keep=1)
    joint_division.GRAIN_BYTES = 16
    try:
        mine = session.joint_of(
            world, replica, state, None, Path(output, "joint"), seats=[f"w{r}" for r in range(world.size)]
        )
    finally:
        joint_division.GRAIN_BYTES = grain
    if isinstance(mine, joint.Share):
        mine.tell()
    elif mine is not None:
        checkpoint.save(mine, Path(output, "joint"), keep=1)
    world.gather(None)
    replica.close()
    return f"{type(mine).__name__} of {len(getattr(mine, 'pieces', ()))} files"


@pytest.mark.parametrize("name", CASES)
def test_many_hands_write_what_one_would(
    fleets: Callable[[int, str], Fleet], tmp_path: Path, name: str
) -> None:
    size, transport = (2, "group") if name.startswith("zero") else (3, "shared")
    size = 4 if "twice" in name else size
    did = fleets(size, transport).run(_both_ways, name, str(tmp_path))
    (alone,) = checkpoint.checkpoints(tmp_path / "alone")
    if name == "gossip":  # its replicas differ
        assert did == ["NoneType of 0 files"] * size
        assert checkpoint.checkpoints(tmp_path / "joint") == []
        return
    (together,) = checkpoint.checkpoints(tmp_path / "joint")
    assert did[0].startswith("JointSnapshot")
    assert all(
        each.startswith("Share of") and "of 0" not in each for each in did[1 : size if size < 4 else 2]
    )
    names = sorted(p.relative_to(alone).as_posix() for p in alone.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(together).as_posix() for p in together.rglob("*") if p.is_file())
    for each in names:
        if each != manifest.MANIFEST:
            assert (alone / each).read_bytes() == (together / each).read_bytes(), each
    facts = checkpoint.verify(together)["files"]
    assert all(facts[file]["parts"] for file in FILES[:2])
    assert [p.name for p in (tmp_path / "joint").iterdir()] == [together.name]  # nothing is left beside it


def test_a_changed_or_missing_part_is_noticed(fleets: Callable[[int, str], Fleet], tmp_path: Path) -> None:
    fleets(3, "shared").run(_both_ways, "ddp", str(tmp_path))
    (path,) = checkpoint.checkpoints(tmp_path / "joint")
    weights = path / checkpoint.WEIGHTS
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"model.safetensors was changed \(sha256"):
        checkpoint.verify(path)
    weights.write_bytes(data)
    checkpoint.verify(path)
    content = json.loads((path / manifest.MANIFEST).read_text())
    del content["files"][checkpoint.WEIGHTS]["parts"][1]
    (path / manifest.MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="is missing or not a manifest"):
        checkpoint.verify(path)


def _apart(world: Any, output: str) -> str:
    """Each sees a directory of its own."""
    replica = _replica(world, "ddp")
    seats = [f"w{r}" for r in range(world.size)]
    mine = session.joint_of(world, replica, {}, None, Path(output, str(world.rank)), seats=seats)
    named = [dataclasses.replace(m, host=f"box{m.rank}") for m in world.members]
    hosts = dataclasses.replace(world, members=tuple(named))  # with a file system in common
    beside = session.joint_of(hosts, replica, {}, None, Path(output, "all"), seats=seats)
    replica.close()
    return f"{mine} {beside}"


def test_other_hosts_leave_it_to_rank_0(fleets: Callable[[int, str], Fleet], tmp_path: Path) -> None:
    assert fleets(2, "shared").run(_apart, str(tmp_path)) == ["None None", "None None"]
    assert [list(p.iterdir()) for p in tmp_path.iterdir()] == [[], []]


# --------------------------------------------------------------------------------------------- writers that fail


def _pair(output: Path, *, pid: int = 0) -> tuple[joint.JointSnapshot, joint.Share]:
    """A checkpoint of rank 0 and "w1", as `begin` makes them."""
    directory = joint._prepared(output, 5, 2)
    assert directory is not None
    tensor = torch.arange(64.0)
    planned = {
        file: joint.tensors.layout({"w": ("float32", [64])})
        for file in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER)
    }
    head = {f: [(0, torch.frombuffer(bytearray(p.head), dtype=torch.uint8))] for f, p in planned.items()}
    data = {f: [(p.places["w"], tensor.view(torch.uint8).clone())] for f, p in planned.items()}
    shares = [joint.Share(step=5, rank=r, directory=directory, pieces=[head, data][r]) for r in range(2)]
    facts = {"step": 5, "write_config": lambda d: None, "state": {}, "tokenizer_dir": None, "taken_s": 0.0}
    writer = joint.Writer(1, "w1", pid or os.getpid())
    return joint.JointSnapshot(**facts, share=shares[0], layouts=planned, others=[writer]), shares[1]


def full(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _saved(output: Path, whole: joint.JointSnapshot) -> tuple[checkpoint.AsyncSaver, list[Event]]:
    said: list[Event] = []
    saver = checkpoint.AsyncSaver(output, keep=2, emit=said.append)
    saver.submit(whole)
    return saver, said


def test_a_part_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    whole, part = _pair(tmp_path)
    saver, said = _saved(tmp_path, whole)
    assert checkpoint.checkpoints(tmp_path) == []
    assert whole.lost({"w7"}) is False
    part.tell()
    saver.wait()
    saver.close()
    assert isinstance(said[0], Saved)
    assert not saver.incomplete
    assert not whole.lost({"w1"})  # afterwards: it does not matter any more
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-5"


def test_a_writer_that_dies_is_noticed_and_the_checkpoint_is_asked_for_again(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    whole, _ = _pair(tmp_path, pid=dead.pid)
    saver, said = _saved(tmp_path, whole)
    saver.wait()  # raises nothing: that is no fault of this disk
    saver.close()
    (warned,) = said
    assert isinstance(warned, Warned)
    assert "worker 1 (w1) was lost while it wrote its part" in warned.message
    assert saver.incomplete
    assert not saver.alone
    assert list(tmp_path.iterdir()) == []


def test_a_writer_is_given_up_when_its_loss_is_known(tmp_path: Path) -> None:
    whole, part = _pair(tmp_path)
    saver, said = _saved(tmp_path, whole)
    saver.lost({"w7"})
    assert not saver.incomplete
    saver.lost({"w1"})
    assert saver.incomplete  # at once, for whoever decides what is to be done again
    saver.wait()
    assert saver.incomplete
    part.tell()  # too late: its directory is gone, and nobody minds
    again, rest = _pair(tmp_path)
    threading.Thread(target=rest.tell).start()
    saver.submit(again)
    assert not saver.incomplete
    saver.wait()
    saver.close()
    assert [type(e).__name__ for e in said] == ["Warned", "Saved"]


def test_who_cannot_write_says_so_and_rank_0_writes_the_next_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, part = _pair(tmp_path)
    saver, said = _saved(tmp_path, whole)
    theirs: list[Event] = []
    other = checkpoint.AsyncSaver(tmp_path, keep=2, emit=theirs.append)

    with monkeypatch.context() as patch:
        patch.setattr(joint, "_write_at", full)
        with pytest.raises(OSError, match="No space"):
            part.tell()
    saver.wait()
    assert (saver.incomplete, saver.alone) == (True, True)
    assert isinstance(said[0], Warned)
    assert "could not write its part" in said[0].message
    whole, part = _pair(tmp_path)
    monkeypatch.setattr(joint, "_write_at", full)
    other.submit(part)
    other.wait()  # nor is it an error there
    other.close()
    saver.close()
    assert isinstance(theirs[0], Warned)
    assert "No space left" in theirs[0].message
    assert "worker 1's part of checkpoint-5" in theirs[0].where


def test_a_disk_that_was_full_does_not_part_the_workers_for_ever(tmp_path: Path) -> None:
    """One try, one save by rank 0 alone, and the next together again; what failed before is forgotten."""
    whole, _ = _pair(tmp_path)
    (whole.directory / joint.PARTS / "1.waiting").rename(whole.directory / joint.PARTS / "1.failed")
    saver, said = _saved(tmp_path, whole)
    saver.wait()
    assert (saver.incomplete, saver.alone) == (True, True)
    saver.submit(taken(6))
    saver.wait()
    assert (saver.incomplete, saver.alone) == (False, False)
    saver.close()
    saver.submit(taken(7))  # a run that goes on after all
    saver.wait()
    saver.close()
    assert [type(e).__name__ for e in said] == ["Warned", "Saved", "Saved"]


@pytest.mark.parametrize("how", ["written", "lost", "full"])
def test_the_copy_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Else two lie in memory when the next is taken."""
    whole, part = _pair(tmp_path)
    held = weakref.ref(whole.share.pieces[checkpoint.WEIGHTS][0][1])
    if how == "full":
        monkeypatch.setattr(joint, "_write_at", full)
    saver, _ = _saved(tmp_path, whole)
    if how == "written":
        part.tell()
    if how == "lost":
        saver.lost({"w1"})
    saver.settle()
    del whole
    assert held() is None
    saver.close()


def test_a_lost_part_makes_the_survivors_save_again() -> None:
    stand = {"fresh": False, "steps": 7, "first": "w0", "saved": 7}
    whole = [Position(seat="w0", **stand), Position(seat="w1", **stand)]
    assert conclude(whole).saved == 7
    torn = [Position(seat="w0", **stand, incomplete=True, chores=("wait",)), Position(seat="w1", **stand)]
    assert conclude(torn).saved == -1
    assert conclude(torn).chores == ("meet", "save", "wait")


# ------------------------------------------------------------------------------------------------- whole jobs


def test_a_job_whose_writers_are_killed_while_they_write(corpus: Path, tmp_path: Path) -> None:
    """One in mid-run, one at the end: each time the survivors save again, and what is saved is whole."""
    traps = [{"seat": "w1", "place": "part", "step": 4}, {"seat": "w2", "place": "part", "step": 12}]
    run = tmp_path / "run"
    with Job(run, corpus, "--save-every", 4, "--keep", 9, "--restarts", 0, traps=traps) as job:
        job.kill("w1")
        job.kill("w2")
        job.end()
    saved, warned = [e["step"] for e in events(run, "saved")], [e["message"] for e in events(run, "warned")]
    assert 4 < saved[0] < 12  # the next agreement after the loss was known
    assert saved[-1] == 12
    assert [step for step in saved if step in (4, 12)] == [12]
    for seat in ("w1", "w2"):
        assert any(f"({seat}) was lost while it wrote its part" in m for m in warned)
    assert [checkpoint.verify(path)["step"] for path in checkpoint.checkpoints(run)] == saved
    assert "every sample once" in warm.manyhands("ledger", run)
    assert summary(run)["world_sizes"] == [3, 2, 1]


def test_a_whole_job_is_stopped_and_goes_on_from_what_many_wrote(corpus: Path, tmp_path: Path) -> None:
    """Three write, two continue, to the bits of a run that nobody stopped."""
    quiet, other = tmp_path / "quiet", tmp_path / "other"
    job = ("train", "--data", corpus, *OPTIONS, "--save-every", 5)
    warm.manyhands(*job, "--workers", 3, "--output", quiet)
    found = quiet / "checkpoint-5"
    facts = checkpoint.verify(found)["files"]
    assert len(facts[checkpoint.WEIGHTS]["parts"]) + len(facts[checkpoint.OPTIMIZER]["parts"]) > 3
    warm.manyhands(*job, "--workers", 2, "--output", other, "--resume", found)
    assert summary(other)["resumed_from"] == 5
    assert summary(other)["parameters_sha256"] == summary(quiet)["parameters_sha256"]
