"""The ledger: laid over each other, and every loss and repetition found."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import warm
from ledgers import BATCHES, division, rows_of, run, told, write
from runs import environment

from manyhands.cli.ledger import main as verb
from manyhands.cli.ledger import step_story
from manyhands.cli.main import main
from manyhands.core.errors import DataError, UsageError
from manyhands.data.sample import Order
from manyhands.train.audit import load
from manyhands.train.ledger import Batches, Ledger, files, next_attempt, read
from manyhands.train.ledger_order import samples_of_pass


def test_every_sample_once_is_said_with_each_workers_share(tmp_path: Path) -> None:
    for seat in ("w0", "w1", "w2"):
        write(tmp_path, seat, range(1, 10), ["w0", "w1", "w2"])
    report = told(tmp_path)
    assert report.ok
    assert (report.steps, report.used) == (9, 2 * 50 + 16)
    assert report.passes == pytest.approx(2 + 16 / 50)
    assert {s: x.samples for s, x in report.shares.items()} == {"w0": 46, "w1": 42, "w2": 28}
    assert report.shares["w2"].steps == 7  # the passes' last steps have one place, w0's
    code, said = run(tmp_path)
    assert code == 0
    assert said.splitlines()[-1] == "every sample once: 116 samples in 9 steps, 2.32 passes over the data"
    assert "w1" in said
    assert "36.2%" in said
    code, said = run(tmp_path, "--json")
    assert json.loads(said)["ok"] is True


def test_equal_divisions_take_a_dozen_bytes_a_step(tmp_path: Path) -> None:
    batches = Batches(n=160_000, global_batch=16, seed=0, micro_batch=2)
    write(tmp_path, "w0", range(1, 5001), ["w0", "w1"], batches=batches)
    (path,) = files(tmp_path)
    assert path.stat().st_size < 5000 * 14 + 400
    (attempt,) = read(path).attempts
    assert [(r.first, r.last) for r in attempt.runs] == [(1, 5000)]


def test_any_survivors_file_tells_all(tmp_path: Path) -> None:
    write(tmp_path, "w1", range(1, 9), ["w0", "w1"])
    report = told(tmp_path)
    assert report.ok
    assert report.shares["w0"].samples + report.shares["w1"].samples == 100


def test_files_of_several_hosts_are_merged(tmp_path: Path) -> None:
    write(tmp_path / "a", "w0", range(1, 5), ["w0", "w1"])
    write(tmp_path / "b", "w1", range(1, 9), ["w0", "w1"])
    assert told(tmp_path / "a", tmp_path / "b").steps == 8


def test_a_step_finished_by_the_survivors_counts_once(tmp_path: Path) -> None:
    """w2 applied step 3 and died before it could hand it on: the others did it again, in the next epoch."""
    write(tmp_path, "w2", range(1, 4), ["w0", "w1", "w2"])
    for seat in ("w0", "w1"):
        write(tmp_path, seat, range(1, 3), ["w0", "w1", "w2"])
        write(tmp_path, seat, range(3, 9), ["w0", "w1"], epoch=2)
    report = told(tmp_path)
    assert report.ok
    assert report.void == 1
    assert [(c.step, c.epoch, c.seats) for c in report.changes] == [
        (1, 1, ("w0", "w1", "w2")),
        (3, 2, ("w0", "w1")),
    ]
    code, said = run(tmp_path)
    assert code == 0
    assert "from step 3 (epoch 2): without w2" in said


def test_samples_of_a_skipped_update_are_told_once(tmp_path: Path) -> None:
    """All tell of the update that nobody made, one of its own; a step that was done again tells for itself."""
    write(tmp_path, "w2", range(1, 4), ["w0", "w1", "w2"])
    _skip(tmp_path, "w2", 3, ["w0", "w1", "w2"])  # given up: the others did the step again, and its update
    for seat in ("w0", "w1"):
        write(tmp_path, seat, range(1, 3), ["w0", "w1", "w2"])
        _skip(tmp_path, seat, 2, ["w0", "w1", "w2"])
        write(tmp_path, seat, range(3, 9), ["w0", "w1"], epoch=2)
    _skip(tmp_path, "w1", 5, ["w0", "w1"], epoch=2, only="w1")
    report = told(tmp_path)
    assert report.ok
    assert (report.skipped, report.skipped_updates, report.skips) == (16 + 8, 2, {"NaN": 24})
    assert (report.used, report.shares["w1"].skipped) == (100 - 24, 6 + 8)
    said = run(tmp_path)[1]
    assert "24 samples of 2 skipped updates changed nothing, by rule:" in said
    assert said.splitlines()[-1].startswith("every sample once: 76 samples in 8 steps")
    assert "w1: places 4–7  update skipped: NaN" in run(tmp_path, "--step", 5)[1]


def _skip(
    output: Path, seat: str, step: int, seats: list[str], *, epoch: int = 1, only: str | None = None
) -> None:
    ledger = Ledger(output, seat, BATCHES, attempt=1, resumed_at=0)
    who = {s: spans for s, spans in division(step, seats).items() if only in (None, s)}
    rows, alone = rows_of(step), only is not None
    ledger.left_out(step, epoch=epoch, who=who, rows=rows, why="NaN", update=step, alone=alone)
    ledger.close()


def test_a_step_applied_twice_by_one_that_lived_is_found(tmp_path: Path) -> None:
    write(tmp_path, "w0", range(1, 4), ["w0", "w1"])
    write(tmp_path, "w0", range(3, 9), ["w0"], epoch=2)
    report = told(tmp_path)
    assert not report.ok
    assert report.doubled == 16
    assert {(p.kind, p.first) for p in report.problems} == {("doubled", 3)}
    code, said = run(tmp_path)
    assert code == 1
    assert said.splitlines()[-1] == "NOT every sample once: 16 used twice"
    assert "doubled: step 3, places 0–3 by w0" in said


def test_lost_places_are_named_with_their_samples(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "w0", BATCHES, attempt=1, resumed_at=0)
    ledger.commit(1, epoch=1, who={"w0": [(0, 8)]}, rows=16)
    ledger.commit(2, epoch=1, who={"w0": [(0, 3), (5, 8)], "w1": [(3, 4)]}, rows=16)
    ledger.commit(3, epoch=1, who={"w0": [(0, 8)], "w1": [(7, 8)]}, rows=16)
    ledger.close()
    report = told(tmp_path)
    assert (report.lost, report.doubled) == (2, 2)
    assert [(p.kind, p.first, p.places, p.who) for p in report.problems] == [
        ("lost", 2, (4, 5), ()),
        ("doubled", 3, (7, 8), ("w0", "w1")),
    ]
    ids = Order(50, 16, 3).ids(1)[8:10]
    code, said = run(tmp_path)
    assert code == 1
    assert f"lost: step 2, place 4: nobody computed it; 2 samples ({ids[0]}, {ids[1]})" in said


def test_a_missing_step_and_wrong_rows_are_found(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "w0", BATCHES, attempt=1, resumed_at=0)
    for step, rows in ((1, 16), (3, 16), (4, 16)):
        ledger.commit(step, epoch=1, who={"w0": [(0, 8)]}, rows=rows)
    ledger.close()
    report = told(tmp_path)
    assert [(p.kind, p.first, p.last) for p in report.problems] == [
        ("missing", 2, 2),
        ("impossible", 4, 4),  # a pass's last step has two rows, not sixteen,
        ("impossible", 4, 4),  # and so no places 1 … 7
    ]
    assert report.lost == 16


def test_workers_that_tell_different_things_are_found(tmp_path: Path) -> None:
    for seat, cut in (("w0", 4), ("w1", 5)):
        ledger = Ledger(tmp_path, seat, BATCHES, attempt=1, resumed_at=0)
        ledger.commit(1, epoch=1, who={"w0": [(0, cut)], "w1": [(cut, 8)]}, rows=16)
        ledger.close()
    report = told(tmp_path)
    assert {p.kind for p in report.problems} == {"disagree"}
    assert "0–3 and, says w1, 0–4" in run(tmp_path)[1]


def test_a_resume_voids_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    for seat in ("w0", "w1"):
        write(tmp_path, seat, range(1, 8), ["w0", "w1"])
    assert next_attempt(tmp_path) == 2
    for seat in ("w0", "w1", "w2"):
        write(tmp_path, seat, range(6, 13), ["w0", "w1", "w2"], attempt=2, at=5)
    report = told(tmp_path)
    assert report.ok
    assert (report.steps, report.used, report.void) == (12, 150, 2)
    code, said = run(tmp_path)
    assert code == 0
    assert "from step 6 (epoch 1): attempt 2, which goes on after step 5: w0, w1, w2" in said
    for seat in ("w0", "w1"):  # and begun anew, with other batches
        write(
            tmp_path,
            seat,
            range(1, 3),
            ["w0", "w1"],
            attempt=3,
            batches=Batches(n=40, global_batch=20, seed=1, micro_batch=2),
        )
    report = told(tmp_path)
    assert report.ok
    assert (report.steps, report.used) == (2, 40)


def test_a_resume_that_skips_steps_is_found(tmp_path: Path) -> None:
    write(tmp_path, "w0", range(1, 4), ["w0"])
    write(tmp_path, "w0", range(6, 8), ["w0"], attempt=2, at=5)
    (problem,) = told(tmp_path).problems
    assert (problem.kind, problem.first, problem.last, problem.samples) == ("missing", 4, 5, 18)


def test_what_another_outputs_run_has_used_is_told_there(tmp_path: Path) -> None:
    """A run that was continued into an output of its own."""
    write(tmp_path / "one", "w0", range(1, 4), ["w0"])
    write(tmp_path / "two", "w0", range(4, 8), ["w0"], attempt=1, at=3)
    report = told(tmp_path / "two")
    assert report.ok
    assert (report.steps, report.elsewhere, report.used) == (7, 3, 50)
    assert report.passes == pytest.approx(1.0)
    code, said = run(tmp_path / "two")
    assert code == 0
    assert "steps 1–3 are told in the output of the run that this one continues" in said
    assert "every sample once: 50 samples in 4 steps, 1 passes" in said
    for step in (4, 9):  # one went on for a while; then it is continued once more, from step 8
        write(
            tmp_path / "one", "w0", range(step, step + 2), ["w0"], attempt=2 if step == 4 else 3, at=step - 1
        )
    write(tmp_path / "two", "w0", range(8, 11), ["w0"], attempt=2, at=7)
    write(tmp_path / "host", "w1", range(4, 8), ["w0"], attempt=1, at=3)
    report = told(tmp_path / "one", tmp_path / "two", tmp_path / "host")
    assert report.ok, report.problems
    assert (report.steps, report.elsewhere, report.void) == (10, 0, 4)
    assert report.attempts == [(1, 0), (2, 3), (3, 8), (4, 3), (5, 7)]
    with pytest.raises(UsageError, match="one begins with the first step"):
        told(tmp_path / "two", tmp_path / "one")
    write(tmp_path / "three", "w0", range(4, 8), ["w0"], attempt=2, at=3)  # there was one before it here
    assert [problem.kind for problem in told(tmp_path / "three").problems] == ["missing"]


def test_attempts_with_other_batches_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "w0", range(1, 4), ["w0"])
    other = Batches(n=51, global_batch=16, seed=3, micro_batch=2)
    write(tmp_path, "w0", range(4, 8), ["w0"], attempt=2, at=3, batches=other)
    with pytest.raises(DataError, match="different batches"):
        told(tmp_path)


def test_dropped_rounds_are_counted_with_their_reason(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "w0", BATCHES, attempt=1, resumed_at=0)
    for step in range(1, 4):
        ledger.commit(step, epoch=1, who={"w0": [(0, 4)]}, rows=16)
        ledger.dropped(step, epoch=1, who={"w1": [(4, 8)]}, rows=16, why="round of w1, killed")
    ledger.close()
    report = told(tmp_path)
    assert report.ok
    assert (report.used, report.dropped) == (24, 24)
    code, said = run(tmp_path)
    assert code == 0
    assert "24 samples left out: round of w1, killed" in said
    assert "24 left out by rule" in said


def test_workers_at_their_own_pace_tell_for_themselves(tmp_path: Path) -> None:
    for seat, spans, last, epoch in (("w0", [(0, 4)], 3, 1), ("w1", [(4, 8)], 2, 2)):
        ledger = Ledger(tmp_path, seat, BATCHES, attempt=1, resumed_at=0)
        for step in range(1, last + 1):
            ledger.commit(step, epoch=epoch, who={seat: spans}, rows=16, alone=True)
        ledger.close()
    report = told(tmp_path)
    assert report.ok
    assert (report.used, report.unfinished) == (40, 8)
    ledger = Ledger(tmp_path, "w1", BATCHES, attempt=1, resumed_at=0)
    ledger.commit(
        4, epoch=1, who={"w1": [(0, 1)]}, rows=2, alone=True
    )  # step 4 is whole: step 3 cannot be open
    ledger.close()
    assert told(tmp_path).lost == 8


def test_the_last_batch_may_be_left_out(tmp_path: Path) -> None:
    batches = Batches(n=50, global_batch=16, seed=3, micro_batch=4, drop_last=True)
    write(tmp_path, "w0", range(1, 8), ["w0", "w1"], batches=batches)
    report = told(tmp_path)
    assert report.ok
    assert report.used == 7 * 16


@pytest.mark.parametrize(
    ("n", "global_batch", "drop_last"), [(50, 16, False), (50, 16, True), (48, 16, False), (7, 9, False)]
)
def test_samples_of_a_pass_are_those_of_its_steps(n: int, global_batch: int, drop_last: bool) -> None:
    order = Order(n, global_batch, 5, drop_last)
    batches = Batches(n=n, global_batch=global_batch, seed=5, micro_batch=1, drop_last=drop_last)
    for pass_ in range(3):
        first = pass_ * order.steps_per_epoch
        plain = np.concatenate([order.ids(first + i) for i in range(order.steps_per_epoch)])
        found = [ids for _, ids in samples_of_pass(batches, pass_, order.seen(order.steps_per_epoch))]
        assert np.concatenate(found).tolist() == plain.tolist()


def test_one_step_is_told_by_worker_and_sample(tmp_path: Path) -> None:
    write(tmp_path, "w2", range(1, 4), ["w0", "w1", "w2"])
    write(tmp_path, "w0", range(1, 3), ["w0", "w1", "w2"])
    write(tmp_path, "w0", range(3, 9), ["w0", "w1"], epoch=2)
    code, said = run(tmp_path, "--step", 3)
    ids = Order(50, 16, 3).ids(2)
    assert code == 0
    assert "w1: places 4–7\n    samples " + " ".join(map(str, ids[8:])) in said
    assert "told by w2 (attempt 1, epoch 1): void" in said
    code, said = run(tmp_path, "--step", 3, "--json")
    assert {i for share in json.loads(said)["shares"] for i in share["samples"]} == set(ids.tolist())
    with pytest.raises(UsageError, match="no worker has told of it"):
        verb([str(tmp_path), "--step", "99"])


def test_bad_input_is_one_clear_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["ledger", str(tmp_path)]) == 2
    assert "holds no ledger" in capfd.readouterr().err
    assert main(["ledger", str(tmp_path / "absent")]) == 2
    assert "does not exist" in capfd.readouterr().err
    (tmp_path / "ledger").mkdir()
    foreign = tmp_path / "ledger" / "w0.jsonl"
    for text in ('{"event": "stepped"}\n', "hello\n", "\x00\x00\n"):
        foreign.write_text(text)
        assert main(["ledger", str(tmp_path)]) == 1
        assert f"{foreign} is not a ledger" in capfd.readouterr().err
        with pytest.raises(DataError, match="is not a ledger"):
            Ledger(tmp_path, "w0", BATCHES, attempt=1, resumed_at=0)
        assert foreign.read_text() == text
    foreign.write_text('{"ledger":9}\n')
    assert main(["ledger", str(tmp_path)]) == 1
    assert "format 9" in capfd.readouterr().err
    foreign.write_text('{"led')
    assert main(["ledger", str(tmp_path)]) == 1
    assert "the ledger is empty" in capfd.readouterr().err


def test_damage_is_noted_and_another_file_stands_in(tmp_path: Path) -> None:
    for seat in ("w0", "w1"):
        write(tmp_path, seat, range(1, 9), ["w0", "w1"])
    path = tmp_path / "ledger" / "w0.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:3], b"\x00" * 9, *lines[4:-1]])[:-4])
    report = told(tmp_path)
    assert report.ok
    assert any("line 4: damaged" in note for note in report.notes)
    assert any("cut off" in note for note in report.notes)
    (tmp_path / "ledger" / "w1.jsonl").unlink()
    assert {p.kind for p in told(tmp_path).problems} == {"missing"}


def test_a_cut_line_is_gone_when_the_worker_starts_again(tmp_path: Path) -> None:
    write(tmp_path, "w0", range(1, 4), ["w0"])
    path = tmp_path / "ledger" / "w0.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    write(tmp_path, "w0", range(3, 9), ["w0"], attempt=2, at=2)
    report = told(tmp_path)
    assert report.ok
    assert not report.notes
    assert report.steps == 8


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    write(tmp_path, "w0", range(1, 9), ["w0"])
    code = (
        "import sys; from manyhands.cli.main import main; code = main(sys.argv[1:]);"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "ledger", tmp_path], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("every sample once")


@pytest.mark.parametrize("order", ["stratified", "by-length"])
def test_orders_by_class_and_length_are_counted_by_sample(tmp_path: Path, order: str) -> None:
    """Over a resume on more workers; without what the order goes by, places are counted."""
    rnd = random.Random(0)
    texts = [(" ".join(["good" if i % 3 else "bad"] * rnd.randint(1, 9)), i % 3) for i in range(90)]
    data, run = tmp_path / "data.csv", tmp_path / "run"
    data.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in texts))
    job = ["--task", "classify", "--data", data, "--order", order, "--global-batch", 16, "--prompt", ""]
    job += ["--eval-fraction", 0.1, "--cache", tmp_path / "cache", "--output", run]
    warm.manyhands("train", *job, "--steps", 8, "--workers", 2)
    warm.manyhands("train", *job, "--steps", 14, "--workers", 3, "--resume", run)
    report = told(run)
    assert report.ok
    assert report.counted
    ids = {i for share in step_story(load([run]), report, 9)["shares"] for i in share["samples"] or ()}
    assert len(ids) == 16
    (run / "ledger" / "order.npz").write_bytes(b"torn")
    report = told(run)
    assert report.ok
    assert not report.counted
