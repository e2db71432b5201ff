"""The coordinator's policy, without sockets: what a job bears, what fails it, and what its journal brings back."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
from coordinators import Play, ids

from manyhands.coordinate.journal import Journal, restore, unfinished
from manyhands.coordinate.messages import VERSION, Refused, epoch_to
from manyhands.coordinate.words import Rules
from manyhands.core.errors import CheckpointError, UsageError
from manyhands.core.membership import REFORM, Epoch, Seat


def test_a_loss_before_the_first_step_that_nobody_can_mend_fails_the_job() -> None:
    play = Play("w0", "w1", begun=False)
    play.state.lose("w1", how="failed", detail="no such data", final=True, now=play.now)
    assert play.state.ended is not None
    assert "no such data" in play.state.ended[1]
    assert play.heard("w0", "ended")[0]["code"] == 1
    play = Play("w0", "w1")
    play.state.lose("w1", how="failed", detail="no such data", final=True, now=play.now)
    assert play.state.ended is None  # the others have the job's state


def test_a_job_that_begins_waits_for_a_replacement() -> None:
    for phase in ("prepare", "build"):
        play = Play("w0", "w1", "w2", begun=False)
        play.step(0, phase=phase)
        play.state.cut("w0", play.now)
        play.ready("w1", "w2")
        play.state.expect(["w0-1"], play.now)
        play.state.lose("w0", how="death", detail="SIGKILL", now=play.now)
        assert [message["epoch"] for message in play.heard("w1", "over")] == [1]
        play.wait(1.0)
        assert play.epoch.number == 1
        play.come("w0-1")
        play.wait(1.0)
        play.state.ready("w0-1", epoch=0, step=0, now=play.now)
        assert (play.epoch.number, ids(play.epoch)) == (2, ["w1", "w2", "w0-1"])
        assert play.epoch.fresh == {"w1", "w2", "w0-1"}
        assert [(loss.how, loss.phase) for loss in play.epoch.losses] == [("death", phase)]


def test_a_job_that_computes_its_first_step_does_not() -> None:
    play = Play("w0", "w1", begun=False)
    play.step(0, phase="compile")
    play.state.expect(["w1-1"], play.now)
    play.state.lose("w1", how="death", detail="SIGKILL", now=play.now)
    play.state.ready("w0", epoch=1, step=0, phase="re-forming", now=play.now)
    assert ids(play.epoch) == ["w0"]


def test_a_loss_in_the_first_meeting() -> None:
    play = Play()
    play.state.expect(["w0", "w1"], play.now)
    play.come("w1")
    play.state.ready("w1", epoch=0, step=0, now=play.now)
    play.state.expect(["w0-1"], play.now)
    play.state.lose("w0", how="death", detail="SIGKILL", now=play.now)  # before it came
    assert (play.state.ended, play.state.epoch) == (None, None)
    play.come("w0-1")
    play.state.ready("w0-1", epoch=0, step=0, now=play.now)
    assert ids(play.epoch) == ["w1", "w0-1"]


def test_one_that_leaves_while_the_job_begins_is_not_waited_for() -> None:
    play = Play("w0", "w1", begun=False)
    play.step(0, phase="prepare")
    play.state.lose("w1", how="left", detail="SIGTERM", now=play.now)
    assert play.heard("w0", "over")
    play.ready("w0")
    assert ids(play.epoch) == ["w0"]


def test_all_may_be_lost_while_the_job_begins_if_all_are_replaced() -> None:
    play = Play("w0", "w1", begun=False)
    play.step(0, phase="prepare")
    for id in ("w0", "w1"):
        play.state.expect([f"{id}-1"], play.now)
        play.state.lose(id, how="death", detail="SIGKILL", now=play.now)
    for id in ("w1-1", "w0-1"):
        play.come(id)
        play.state.ready(id, epoch=0, step=0, now=play.now)
    assert ids(play.epoch) == ["w1-1", "w0-1"]
    for id in ("w0-1", "w1-1"):
        play.state.lose(id, how="death", detail="SIGKILL", now=play.now)
    play.wait(0.1)
    play.wait(3.0)
    assert play.state.ended is not None
    assert "see the logs" in play.state.ended[1]


def replaced(play: Play, lost: str, name: str, how: str) -> None:
    play.state.lose(lost, how=how, detail="boom", now=play.now)
    if play.state.ended is not None:
        return
    play.state.expect([name], play.now)
    play.come(name)
    play.state.ready(name, epoch=0, step=0, now=play.now)
    play.ready("w0")


def test_a_step_that_ends_three_workers_by_themselves_fails_the_job() -> None:
    play = Play("w0", "w1")
    play.step(41)
    replaced(play, "w1", "w1-1", "failed")
    play.step(42)  # it was no other's fault
    for count in range(3):
        assert play.state.ended is None
        replaced(play, f"w1-{count + 1}", f"w1-{count + 2}", "failed")
        play.step(42)
    assert play.state.ended is not None
    assert "step 43 has ended 3 workers" in play.state.ended[1]


def test_steps_that_are_done_again_after_going_back_count_by_themselves() -> None:
    """Each death, and each collective that fails, leads back to a checkpoint; the last beat may be some steps old."""
    play = Play("w0", "w1")
    for step, count in ((70, 1), (60, 2), (50, 3), (50, 4)):
        play.step(10)
        play.step(step - count)
        play.state.lose(f"w1-{count - 1}" if count > 1 else "w1", how="failed", detail="boom", now=play.now)
        play.state.expect([f"w1-{count}"], play.now)
        play.come(f"w1-{count}")
        play.state.ready(f"w1-{count}", epoch=0, step=0, now=play.now)
        play.state.ready("w0", epoch=play.epoch.number, step=step, phase=REFORM, now=play.now)
        assert play.state.ended is None
        assert "w1" not in ids(play.epoch)
    play.step(10)
    play.step(50)
    play.state.lose("w1-4", how="failed", detail="boom", now=play.now)
    assert play.state.ended is not None
    assert "step 51 has ended 3 workers" in play.state.ended[1]


def test_kills_from_outside_are_borne_for_longer() -> None:
    play = Play("w0", "w1", kills=5)
    play.step(41)
    for count in range(4):
        replaced(play, f"w1-{count}" if count else "w1", f"w1-{count + 1}", "death")
        play.step(41)
    assert play.state.ended is None
    replaced(play, "w1-4", "w1-5", "death")
    assert play.state.ended is not None


def test_many_workers_may_be_killed_as_often_as_their_passes_can_be_halved() -> None:
    """Eight of them from 256 rows down to one: 64 ends at the same step, which is more than two workers have."""
    names = [f"w{rank}" for rank in range(8)]
    play = Play(*names)
    play.step(41)
    for halving in range(8):
        for rank in range(8):
            names[rank], gone = f"w{rank}-{halving + 1}", names[rank]
            play.state.expect([names[rank]], play.now)
            play.state.lose(gone, how="death", detail="boom", now=play.now)
            play.come(names[rank])
            play.state.ready(names[rank], epoch=0, step=0, now=play.now)
            play.ready(*(id for id in names if id != names[rank]))
            play.step(41)
    assert play.state.ended is None


def test_who_is_suspected_again_and_again_is_evicted() -> None:
    play = Play("w0", "w1", "w2")
    play.step(4)
    for _ in range(3):
        number = play.epoch.number
        play.state.suspect("w0", epoch=number, rank=2, detail="reset by peer", now=play.now)
        assert play.heard("w1", "over")[-1]["epoch"] == number
        play.state.suspect("w1", epoch=number, rank=2, detail="reset by peer", now=play.now)
        if "w2" in play.state.members:
            play.state.suspect("w2", epoch=number, rank=0, detail="reset by peer", now=play.now)
            play.ready("w2")
        play.ready("w0", "w1")
    assert [happening.seat_id for happening in play.happenings("evict")] == ["w2"]
    assert ids(play.epoch) == ["w0", "w1"]


def test_who_begins_anew_with_smaller_passes_is_suspected_of_nothing() -> None:
    """Whatever the others make of the connections that it closes; but not for ever."""
    play = Play("w0", "w1")
    play.step(4)
    for count in range(40):
        assert play.state.ended is None, count
        number = play.epoch.number
        play.state.suspect("w0", epoch=number, rank=1, detail="reset by peer", now=play.now)
        play.state.suspect("w1", epoch=number, rank=1, detail="no memory for 8 rows", now=play.now)
        play.ready("w0", "w1")
    assert play.happenings("evict") == []
    assert play.state.ended is not None


def test_a_step_in_between_clears_suspicion() -> None:
    play = Play("w0", "w1")
    for step in range(2, 8):
        play.state.suspect("w0", epoch=play.epoch.number, rank=1, detail="", now=play.now)
        play.ready("w0", "w1")
        play.step(step)
    assert play.happenings("evict") == []


def test_suspicion_in_steps_that_are_done_again_counts_by_the_step() -> None:
    play = Play("w0", "w1", "w2")
    for step in (70, 60, 50, 50, 50):
        assert play.happenings("evict") == []
        play.step(10)  # from the checkpoint, or steps of one's own that nobody agreed upon
        play.step(step - 1)
        number = play.epoch.number
        play.state.suspect("w0", epoch=number, rank=2, detail="", now=play.now, step=step)
        for id in [id for id in ("w0", "w1", "w2") if id in play.state.members]:
            play.state.ready(id, epoch=number, step=step + 1, phase=REFORM, now=play.now)
    assert [happening.seat_id for happening in play.happenings("evict")] == ["w2"]


def test_collectives_that_fail_without_a_suspect_fail_the_job() -> None:
    play = Play("w0", "w1")
    for _ in range(6):
        play.state.suspect("w0", epoch=play.epoch.number, rank=None, detail="no route", now=play.now)
        play.ready("w0", "w1")
    assert play.state.ended is not None
    assert "no route" in play.state.ended[1]


def test_too_few_workers_fail_the_job_unless_one_comes() -> None:
    play = Play("w0", "w1", min_workers=2, patience_s=3.0)
    play.state.lose("w1", how="death", detail="SIGKILL", now=play.now)
    play.state.expect(["w1-1"], play.now)
    play.ready("w0")
    for _ in range(10):
        play.wait(4.0)
        play.beat()
    assert play.state.ended is None
    assert play.epoch.number == 1
    play.state.lose("w1-1", how="failed", detail="ImportError", now=play.now)
    play.wait(1.0)
    play.wait(3.0)
    assert play.state.ended is not None
    assert "min_workers = 2" in play.state.ended[1]
    assert "--resume" in play.state.ended[1]


def test_a_job_whose_state_nobody_holds_has_ended() -> None:
    play = Play("w0")
    play.step(9)
    play.come("n")
    play.state.lose("w0", how="death", detail="SIGKILL", now=play.now)
    assert play.state.ended is not None
    assert "holds the job's state" in play.state.ended[1]


def test_whoever_waits_for_others_when_the_job_is_to_stop_goes_on_alone_and_saves() -> None:
    play = Play("w0", "w1", min_workers=2)
    play.state.expect(["w1-1"], play.now)
    play.state.lose("w1", how="death", detail="SIGKILL", now=play.now)
    play.ready("w0")
    assert play.epoch.number == 1
    play.state.stop(play.now)
    assert ids(play.epoch) == ["w0"]


def test_losses_while_stopping_are_no_failure() -> None:
    play = Play("w0", "w1")
    play.state.stop(play.now)
    assert play.heard("w1", "stop")
    play.state.lose("w0", how="death", detail="SIGTERM", now=play.now)
    play.state.lose("w1", how="death", detail="SIGTERM", now=play.now)
    play.wait(9.0)
    assert play.state.ended is None


# ------------------------------------------------------------------------- what the journal brings back


def restarted(play: Play, **rules: Any) -> Play:
    """What the journal brings back."""
    play.drain()
    records = [json.loads(json.dumps(note)) for note in play.notes]
    again = Play()
    again.now = play.now
    again.state = restore(records, Rules(**rules), play.now)
    return again


def test_a_restarted_coordinator_goes_on_and_never_repeats_a_number() -> None:
    play = Play("w0", "w1", "w2")
    play.state.publish("job", "x")
    held = play.epoch
    play.state.lose("w2", how="death", detail="", now=play.now)
    again = restarted(play)
    assert again.state.facts == {"job": "x"}
    assert again.state.began
    again.come("w0", holding=held, step=5)
    assert again.heard("w0", "over")  # told again: the message may have been lost
    again.ready("w0")
    assert again.epoch.number == 1
    with pytest.raises(Refused, match="given up"):
        again.come("w2", holding=held)
    again.come("w1", holding=held, step=5)
    again.ready("w1")
    assert (again.epoch.number, ids(again.epoch), again.epoch.fresh) == (2, ["w0", "w1"], frozenset())


def test_who_does_not_come_back_is_lost() -> None:
    play = Play("w0", "w1")
    held = play.epoch
    again = restarted(play, hang_s=4.0)
    again.come("w0", holding=held, step=5)
    again.ready("w0")
    again.wait(3.0)
    again.beat("w0")
    assert again.epoch.number == 1
    again.wait(2.0)
    assert "has not come back" in again.state.gone["w1"].detail
    assert ids(again.epoch) == ["w0"]


def test_an_epoch_that_was_written_but_not_told_is_told_again() -> None:
    play = Play("w0", "w1")
    held = play.epoch
    play.state.suspect("w0", epoch=1, rank=None, detail="", now=play.now)
    play.ready("w0", "w1")
    again = restarted(play)
    again.come("w1", holding=held, step=1)
    assert again.heard("w1", "epoch")[0]["number"] == 2
    again.state.ready("w1", epoch=1, step=1, now=again.now)  # said before it had heard
    assert len(again.heard("w1", "epoch")) == 2
    assert not again.state.members["w1"].ready


def test_without_its_journal_a_coordinator_learns_the_epoch_from_the_workers() -> None:
    held = Play("w0", "w1").epoch
    late = Play(awaited=1)
    late.come("n")
    late.come("w1", holding=Epoch(number=7, seats=held.seats), step=5)
    late.state.ready("n", epoch=0, step=0, now=late.now)
    late.come("w0", holding=Epoch(number=7, seats=held.seats), step=5)
    assert late.heard("w0", "wanted") == []
    assert late.heard("w1", "wanted")[-1]["on"]
    late.ready("w0", "w1")
    assert (late.epoch.number, ids(late.epoch), late.epoch.fresh) == (8, ["w0", "w1", "n"], {"n"})


def test_after_a_jobs_end_the_next_one_begins_anew() -> None:
    play = Play("w0")
    play.state.publish("job", "x")
    play.state.lose("w0", how="death", detail="SIGKILL", now=play.now)
    again = restarted(play)
    assert (again.state.ended, again.state.facts, again.state.number) == (None, {}, 1)


def test_a_job_that_was_ended_to_begin_anew_turns_its_workers_away(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.jsonl"
    assert unfinished(path) is None
    play = Play("w0")
    play.state.publish("order", "x")
    journal = Journal(path, lambda line: None)
    for note in [{"kind": "epoch", **epoch_to(play.epoch)}, {"kind": "fact", "key": "order", "text": "x"}]:
        journal.append(note)
    journal.close()
    assert unfinished(path) == {"order": "x"}
    assert unfinished(path, end=True) == {"order": "x"}
    assert unfinished(path) is None
    state = restore(Journal(path, lambda line: None).records, Rules(), 0.0)
    assert (state.number, state.epoch, state.facts) == (1, None, {})
    with pytest.raises(Refused, match="begun anew"):
        state.hello(play.epoch.seats[0], holding=play.epoch, step=3, version=VERSION, now=0.0)
    state.expect(["w0"], 0.0)  # its launcher is there, too
    state.lose("w0", how="failed", detail="the job has begun anew", final=True, now=0.0)
    state.tick(1.0)
    assert (state.ended, len(state.coming)) == (None, 0)
    state.hello(Seat(id="w1", host="h"), holding=None, step=0, version=VERSION, now=0.0)
    state.ready("w1", epoch=0, step=0, now=0.0)
    assert state.epoch is not None
    with pytest.raises(Refused, match="begun anew"):  # nor does it lead the others to where it stands, later
        state.hello(Seat(id="w2", host="h"), holding=play.epoch, step=3, version=VERSION, now=0.0)
    assert (state.epoch.number, list(state.members), state.began) == (2, ["w1"], False)


def test_a_journal_with_a_torn_line_and_one_that_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.jsonl"
    log: list[str] = []
    journal = Journal(path, log.append)
    journal.append({"kind": "fact", "key": "a", "text": "b"})
    with pytest.raises(UsageError, match="in use"):
        Journal(path, log.append)
    journal.close()
    with path.open("ab") as file:
        file.write(b'{"kind": "epo')
    journal = Journal(path, log.append)
    assert [record["key"] for record in journal.records] == ["a"]
    journal.append({"kind": "began"})
    journal.close()
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == ["fact", "began"]
    path.write_text("noise\n")
    with pytest.raises(CheckpointError, match="line 1"):
        Journal(path, log.append)
    with pytest.raises(CheckpointError, match="lacks"):
        restore([{"kind": "epoch"}], Rules(), 0.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="journal"):
        Journal(tmp_path / "file" / "x.jsonl", log.append)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_does_not_end_the_job() -> None:
    log: list[str] = []
    journal = Journal.__new__(Journal)
    journal._log, journal._told = log.append, False
    journal._file = os.open("/dev/full", os.O_WRONLY)
    journal.append({"kind": "began"})
    journal.append({"kind": "began"})
    os.close(journal._file)
    assert len(log) == 1
    assert "No space left" in log[0]


def test_a_disk_that_takes_a_part_of_a_line_leaves_whole_ones(tmp_path: Path) -> None:
    path, log = tmp_path / "coordinator.jsonl", list[str]()
    journal = Journal(path, log.append)
    journal.append({"kind": "began"})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
    try:
        journal.append({"kind": "fact", "key": "a", "text": "b"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    journal.append({"kind": "fact", "key": "c", "text": "d"})
    journal.close()
    assert len(log) == 1
    journal = Journal(path, log.append)
    assert [record.get("key") for record in journal.records] == [None, "c"]
    journal.close()
