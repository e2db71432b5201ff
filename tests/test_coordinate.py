"""The coordinator: its policy without sockets, then with real processes that are killed, stopped, join and leave."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from manyhands.coordinate import judge, messages
from manyhands.coordinate.client import Member
from manyhands.coordinate.journal import Journal, restore
from manyhands.coordinate.line import Line
from manyhands.coordinate.messages import Refused
from manyhands.coordinate.server import Coordinator
from manyhands.coordinate.state import BACK_S, State
from manyhands.coordinate.words import Happening, Note, Rules, Say
from manyhands.core import tls
from manyhands.core.errors import CheckpointError, ManyhandsError, PeerLost, UsageError
from manyhands.core.membership import SUMS, Epoch, Seat
from manyhands.launch.chaos import cut

WAIT_S = 30.0
TOKEN = "a token of the tests, long enough"


def until(condition: Callable[[], Any], what: str = "it") -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.005)
    return found


# ------------------------------------------------------------------------------------- policy, without sockets


class Play:
    """A state, and what it said."""

    def __init__(self, *ids: str, begun: bool = True, **rules: Any) -> None:
        self.state, self.now, self.said = State(Rules(**rules)), 0.0, dict[str, list[dict[str, Any]]]()
        self.happened: list[Happening] = []
        self.notes: list[dict[str, Any]] = []
        if ids:
            self.state.expect(ids)
            for id in reversed(ids):  # as they come; ranks are as expected
                self.come(id)
            for id in ids:
                self.state.ready(id, epoch=0, step=0, now=self.now)
            if begun:
                self.now = 0.5
                self.step(1)

    def come(self, id: str, *, holding: Epoch | None = None, step: int = 0, pid: int = 0) -> None:
        seat = Seat(id=id, host="h", pid=pid)
        self.state.hello(seat, holding=holding, step=step, version=messages.VERSION, now=self.now)

    def step(self, step: int, *ids: str, phase: str = "step") -> None:
        self.beat(*ids, step=step, phase=phase, moved=True)

    def beat(self, *ids: str, step: int | None = None, phase: str = "step", moved: bool = False) -> None:
        for id in ids or tuple(self.state.members):
            member = self.state.members[id]
            calls, at = member.calls + moved, member.step if step is None else step
            self.state.beat(id, phase=phase, step=at, calls=calls, stack="f", now=self.now)

    def ready(self, *ids: str) -> None:
        for id in ids:
            self.state.ready(id, epoch=self.epoch.number, step=self.state.members[id].step, now=self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.state.tick(self.now)

    @property
    def epoch(self) -> Epoch:
        assert self.state.epoch is not None
        return self.state.epoch

    def drain(self) -> None:
        for item in self.state.out:
            if isinstance(item, Say):
                self.said.setdefault(item.to, []).append(dict(item.message))
            elif isinstance(item, Note):
                json.dumps(item.record)
                self.notes.append(dict(item.record))
            else:
                self.happened.append(item)
        self.state.out.clear()

    def heard(self, id: str, op: str) -> list[dict[str, Any]]:
        self.drain()
        return [message for message in self.said.get(id, []) if message["op"] == op]

    def happenings(self, kind: str) -> list[Happening]:
        self.drain()
        return [happening for happening in self.happened if happening.kind == kind]


def ids(epoch: Epoch) -> list[str]:
    return [seat.id for seat in epoch.seats]


def test_the_first_epoch_waits_for_all_and_keeps_their_order() -> None:
    play = Play()
    play.state.expect(["w0", "w1", "w2"])
    for id in ("w2", "w0", "x"):
        play.come(id)
        play.state.ready(id, epoch=0, step=0, now=0.0)
    assert play.state.epoch is None
    play.come("w1")
    assert play.state.epoch is None
    play.state.ready("w1", epoch=0, step=0, now=0.0)
    assert ids(play.epoch) == ["w0", "w1", "w2", "x"]
    assert play.epoch.fresh == {"w0", "w1", "w2", "x"}
    assert [len(play.heard(id, "epoch")) for id in ids(play.epoch)] == [1, 1, 1, 1]


def test_a_job_without_expected_workers_waits_for_a_number() -> None:
    play = Play(awaited=2)
    play.come("a")
    play.state.ready("a", epoch=0, step=0, now=0.0)
    assert play.state.epoch is None
    play.come("b")
    play.state.ready("b", epoch=0, step=0, now=0.0)
    assert ids(play.epoch) == ["a", "b"]


def test_a_death_ends_the_epoch_at_once_and_the_next_one_begins_without_it() -> None:
    play = Play("w0", "w1", "w2")
    play.step(7)
    play.state.cut("w1", play.now)
    assert play.heard("w0", "over") == []  # it may come back
    play.state.lose("w1", how="death", detail="SIGKILL", now=play.now)  # its launcher says: it does not
    for id in ("w0", "w2"):
        (over,) = play.heard(id, "over")
        assert over["epoch"] == 1
        assert [loss["seat"]["id"] for loss in over["losses"]] == ["w1"]
    play.ready("w2")
    assert play.epoch.number == 1
    play.ready("w0")
    assert (play.epoch.number, ids(play.epoch), play.epoch.fresh) == (2, ["w0", "w2"], frozenset())
    (loss,) = play.epoch.losses
    assert (loss.rank, loss.how, loss.step, loss.phase, loss.stack) == (1, "death", 7, "step", "f")


def test_the_better_reason_is_kept_and_the_loss_told_once() -> None:
    play = Play("w0", "w1")
    play.state.cut("w1", play.now)
    play.wait(BACK_S + 0.1)
    assert play.heard("w0", "over")
    assert play.happenings("lost") == []
    play.wait(0.1)
    play.state.lose("w1", how="failed", detail="ValueError: boom", now=play.now)
    play.state.lose("w1", how="death", detail="exit code 1", now=play.now)
    play.wait(1.0)
    (lost,) = play.happenings("lost")
    assert lost.loss is not None
    assert (lost.loss.how, lost.loss.detail, lost.loss.rank) == ("failed", "ValueError: boom", 1)
    play.ready("w0")
    assert [loss.detail for loss in play.epoch.losses] == ["ValueError: boom"]


def test_a_reason_that_does_not_come_is_not_awaited() -> None:
    play = Play("w0", "w1")
    play.state.cut("w1", play.now)
    play.wait(BACK_S + 0.1)
    play.wait(0.31)
    (lost,) = play.happenings("lost")
    assert lost.loss is not None
    assert "it has not come back" in lost.loss.detail


def test_who_comes_back_in_time_is_in_the_epoch_still() -> None:
    play = Play()
    play.state.expect(["w0", "w1"])
    for id, pid in (("w0", 7), ("w1", 8)):
        play.come(id, pid=pid)
        play.state.ready(id, epoch=0, step=0, now=play.now)
    play.step(3)
    for _ in range(2):  # the end of the last connection is known before, or not yet
        play.state.cut("w1", play.now)
        play.wait(BACK_S / 2)
        play.beat("w0")
        play.come("w1", pid=8, holding=play.epoch, step=3)
        play.come("w1", pid=8, holding=play.epoch, step=3)
    play.wait(2 * BACK_S)
    play.beat("w0", "w1")
    assert (play.heard("w0", "over"), play.happenings("lost"), play.epoch.number) == ([], [], 1)
    with pytest.raises(Refused, match="takes part already"):
        play.come("w1", pid=9)
    play.state.cut("w1", play.now)
    play.ready("w0")  # an epoch that ends meanwhile waits for it
    play.state.suspect("w0", epoch=1, rank=1, detail="", now=play.now)
    assert play.epoch.number == 1
    play.come("w1", pid=8, holding=play.epoch, step=3)
    assert play.heard("w1", "over")
    play.ready("w1")
    assert ids(play.epoch) == ["w0", "w1"]


def test_a_newcomer_is_announced_and_comes_last() -> None:
    play = Play("w0", "w1")
    play.step(5)
    play.come("n")
    assert play.heard("w0", "wanted") == []  # it prepares itself first
    play.state.ready("n", epoch=0, step=0, now=play.now)
    assert play.heard("w0", "wanted")[-1]["on"]
    play.ready("w0")
    play.ready("w1")
    assert ids(play.epoch) == ["w0", "w1", "n"]
    assert play.epoch.fresh == {"n"}
    play.state.lose("w1", how="death", detail="", now=play.now)  # while the newcomer still fetches its state
    play.ready("w0")
    play.state.ready("n", epoch=2, step=0, now=play.now)
    assert play.epoch.fresh == {"n"}
    play.step(6)
    play.state.suspect("n", epoch=3, rank=None, detail="", now=play.now)
    play.ready("w0", "n")
    assert play.epoch.fresh == frozenset()


def test_a_newcomer_that_waits_ends_a_long_step_where_that_costs_nobodys_work() -> None:
    play = Play("w0", "w1")
    play.step(5)
    play.come("n")
    play.state.ready("n", epoch=0, step=0, now=play.now)
    play.step(5, "w0", phase=SUMS)
    play.wait(2 * judge.ENTER_S)
    play.beat("w1", "n")
    assert play.heard("w0", "over") == []  # the other one's sums are on their way
    play.step(5, "w1", phase=SUMS)
    play.wait(0.1)
    (over,) = play.heard("w0", "over")
    assert over["losses"] == []
    play.ready("w1", "w0")
    assert ids(play.epoch) == ["w0", "w1", "n"]
    assert play.state._suspicions == []
    play.step(5, "w0", "w1", phase=SUMS)
    play.wait(2 * judge.ENTER_S)
    play.beat()
    assert len(play.heard("w0", "over")) == 1  # nobody waits now


def test_a_newcomer_waits_for_a_while() -> None:
    play = Play("w0", "w1")
    play.step(5, phase=SUMS)
    play.come("n")
    play.state.ready("n", epoch=0, step=0, now=play.now)
    play.wait(judge.ENTER_S - 0.1)
    play.beat("w0", "w1", phase=SUMS)
    assert play.heard("w0", "over") == []
    play.wait(0.2)
    assert len(play.heard("w0", "over")) == 1


def test_a_newcomer_that_dies_is_no_longer_announced() -> None:
    play = Play("w0", "w1")
    play.come("n")
    play.state.ready("n", epoch=0, step=0, now=play.now)
    play.state.lose("n", how="death", detail="", now=play.now)
    assert [message["on"] for message in play.heard("w0", "wanted")] == [True, False]
    assert play.heard("w0", "over") == []
    assert play.state.ended is None


def test_who_leaves_is_not_waited_for() -> None:
    play = Play("w0", "w1", "w2")
    play.step(3)
    play.state.leaving("w0", detail="SIGTERM", now=play.now)
    assert play.heard("w1", "wanted")[-1]["on"]
    assert play.heard("w0", "left")
    play.ready("w1")
    play.state.cut("w0", play.now)
    play.wait(0.1)
    assert play.heard("w2", "over") == []  # it reaches the same boundary
    play.ready("w2")
    assert ids(play.epoch) == ["w1", "w2"]
    assert [loss.how for loss in play.epoch.losses] == ["left"]


def test_who_leaves_without_waiting_for_the_boundary_ends_the_epoch_a_little_later() -> None:
    play = Play("w0", "w1", "w2")
    play.state.leaving("w0", detail="SIGTERM", now=play.now)
    play.state.cut("w0", play.now)
    play.wait(1.1)
    assert play.heard("w1", "over")


def test_the_end_of_a_job() -> None:
    play = Play("w0", "w1")
    play.state.leaving("w1", detail="done", now=play.now)
    play.state.cut("w1", play.now)
    play.beat("w0")
    play.wait(5.0)
    assert play.heard("w0", "over") == []
    assert play.state.ended is None
    play.state.leaving("w0", detail="done", now=play.now)
    play.state.cut("w0", play.now)
    play.wait(0.5)
    assert play.state.ended == (0, "done")


def test_silence_is_a_hang_and_its_time_is_told() -> None:
    play = Play("w0", "w1")
    play.wait(6.0)
    play.beat("w0")
    play.wait(5.0)
    (evict,) = play.happenings("evict")
    assert evict.seat_id == "w1"
    assert play.heard("w1", "evicted")
    assert play.heard("w0", "over")
    assert play.state.gone["w1"].how == "hang"
    assert play.state.gone["w1"].silent_s == 11.0
    with pytest.raises(Refused, match="given up"):
        play.come("w1")


def test_sleep_of_the_whole_machine_is_no_silence() -> None:
    play = Play("w0", "w1")
    play.state.shift(3600.0)
    play.wait(3601.0)
    assert play.happenings("evict") == []


def test_a_thread_that_stands_still_while_the_others_pass_is_stuck() -> None:
    play = Play("w0", "w1", stuck_s=20.0)
    for step in range(2, 6):
        play.wait(4.0)
        play.beat("w1")
        play.step(step, "w0")
    play.wait(4.0)
    assert [happening.seat_id for happening in play.happenings("evict")] == ["w1"]
    assert "stood still in step 2" in play.state.gone["w1"].detail


def test_where_all_stand_still_the_first_is_stuck_and_slow_phases_are_not() -> None:
    for phase, stuck in (("step", ["w1"]), ("evaluate", [])):
        play = Play("w0", "w1", stuck_s=20.0)
        play.wait(1.0)
        play.step(2, "w1", phase=phase)
        play.wait(1.0)
        play.step(2, "w0")
        while play.now < 27.0 and "w1" in play.state.members:
            play.beat("w0")
            play.beat("w1", phase=phase)
            play.wait(5.0)
        assert [happening.seat_id for happening in play.happenings("evict")] == stuck


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
        play.state.expect(["w0-1"])
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
    play.state.expect(["w1-1"])
    play.state.lose("w1", how="death", detail="SIGKILL", now=play.now)
    play.state.ready("w0", epoch=1, step=0, phase="re-forming", now=play.now)
    assert ids(play.epoch) == ["w0"]


def test_a_loss_in_the_first_meeting() -> None:
    play = Play()
    play.state.expect(["w0", "w1"])
    play.come("w1")
    play.state.ready("w1", epoch=0, step=0, now=play.now)
    play.state.expect(["w0-1"])
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
        play.state.expect([f"{id}-1"])
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


def test_a_newcomer_that_has_to_get_ready_first_is_not_wanted() -> None:
    play = Play("w0")
    play.come("n")
    play.state.ready("n", epoch=0, step=0, now=play.now)
    play.state.ready("n", epoch=0, step=0, waits=False, now=play.now)
    assert [message["on"] for message in play.heard("w0", "wanted")] == [True, False]
    play.ready("w0")
    assert play.epoch.number == 2
    assert ids(play.epoch) == ["w0"]


def replaced(play: Play, lost: str, name: str, how: str) -> None:
    play.state.lose(lost, how=how, detail="boom", now=play.now)
    if play.state.ended is not None:
        return
    play.state.expect([name])
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


def test_kills_from_outside_are_borne_for_longer() -> None:
    play = Play("w0", "w1", kills=5)
    play.step(41)
    for count in range(4):
        replaced(play, f"w1-{count}" if count else "w1", f"w1-{count + 1}", "death")
        play.step(41)
    assert play.state.ended is None
    replaced(play, "w1-4", "w1-5", "death")
    assert play.state.ended is not None


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


def test_a_step_in_between_clears_suspicion() -> None:
    play = Play("w0", "w1")
    for step in range(2, 8):
        play.state.suspect("w0", epoch=play.epoch.number, rank=1, detail="", now=play.now)
        play.ready("w0", "w1")
        play.step(step)
    assert play.happenings("evict") == []


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
    play.state.expect(["w1-1"])
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


def test_losses_while_stopping_are_no_failure() -> None:
    play = Play("w0", "w1")
    play.state.stop()
    assert play.heard("w1", "stop")
    play.state.lose("w0", how="death", detail="SIGTERM", now=play.now)
    play.state.lose("w1", how="death", detail="SIGTERM", now=play.now)
    play.wait(9.0)
    assert play.state.ended is None


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


# ------------------------------------------------------------------------------------- real processes and sockets


@contextlib.contextmanager
def serving(**options: Any) -> Iterator[Coordinator]:
    coordinator = Coordinator(token=TOKEN, **options)
    coordinator.start()
    try:
        yield coordinator
    finally:
        coordinator.stop()


class Worker:
    """A process that holds a membership and does as it is told: see tests/coordinate_worker.py."""

    def __init__(self, address: str, id: str, *, token: str = TOKEN, fingerprint: str = "") -> None:
        script = Path(__file__).parent / "coordinate_worker.py"
        self.id = id
        self.process = subprocess.Popen(
            [sys.executable, str(script), address, token, id, fingerprint],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.heard: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.heard.append({**json.loads(line), "heard_s": time.monotonic()})

    def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def await_(self, what: str, count: int = 1) -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            all_ = [line for line in self.heard if line["what"] == what]
            return all_[count - 1] if len(all_) >= count else None

        result: dict[str, Any] = until(found, f"{self.id}: {what} ({self.heard})")
        return result

    def epoch(self, number: int) -> dict[str, Any]:
        return until(
            lambda: next((x for x in self.heard if x["what"] == "epoch" and x["number"] == number), None),
            f"{self.id}: epoch {number}",
        )

    def kill(self, signum: signal.Signals = signal.SIGKILL) -> float:
        now = time.monotonic()
        os.kill(self.process.pid, signum)
        return now

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


@contextlib.contextmanager
def working(address: str, *ids: str, begun: bool = True, **options: Any) -> Iterator[list[Worker]]:
    """These workers, in the first epoch, and past the first step."""
    workers = [Worker(address, id, **options) for id in ids]
    try:
        for worker in workers:
            worker.tell("next")
        for worker in workers:
            worker.epoch(1)
            if begun:
                worker.tell("at", "step", 1)
        yield workers
    finally:
        for worker in workers:
            worker.end()


def test_a_killed_worker_is_known_at_once_and_the_others_form_the_next_epoch() -> None:
    with serving() as coordinator:
        coordinator.expect(["w0", "w1", "w2"])
        with working(coordinator.address, "w0", "w1", "w2") as (zero, one, two):
            assert zero.epoch(1)["ids"] == ["w0", "w1", "w2"]
            until(lambda: coordinator.began, "the first step")
            killed = one.kill()
            one.process.wait()
            coordinator.lost("w1", how="death", detail="killed by SIGKILL")  # as its launcher does at once
            delays = [worker.await_("over")["heard_s"] - killed for worker in (zero, two)]
            assert max(delays) < 2.0  # measured: a few milliseconds
            for worker in (zero, two):
                worker.tell("next")
            for rank, worker in enumerate((zero, two)):
                epoch = worker.epoch(2)
                assert (epoch["ids"], epoch["rank"]) == (["w0", "w2"], rank)
                assert epoch["losses"][0][:3] == ["w1", 1, "death"]
                assert not epoch["over"]
            found = []
            while not any(happening.kind == "lost" for happening in found):
                found.append(coordinator.happenings.get(timeout=WAIT_S))
            assert found[-1].loss is not None
            assert found[-1].loss.detail == "killed by SIGKILL"


def test_a_worker_whose_link_is_cut_comes_back_and_one_without_a_launcher_is_missed_soon() -> None:
    with serving() as coordinator:
        coordinator.expect(["w0", "w1"])
        with working(coordinator.address, "w0", "w1") as (zero, one):
            until(lambda: coordinator.began, "the first step")
            for count in range(3):
                before = coordinator._lines["w1"]
                assert cut(one.process.pid).startswith("done")
                until(lambda before=before: coordinator._lines.get("w1") not in (None, before), "its return")
                one.tell("publish", f"fact{count}", "x")
                zero.tell("lookup", f"fact{count}")
                zero.await_("fact", count + 1)
            assert coordinator.alive() == ["w0", "w1"]
            assert not [line for line in zero.heard if line["what"] == "over"]
            killed = one.kill()
            assert (
                zero.await_("over")["heard_s"] - killed < 2.0 + BACK_S
            )  # measured: 1.5 s, for so long it is awaited
            zero.tell("next")
            assert "it has not come back" in zero.epoch(2)["losses"][0][3]


def test_a_stopped_worker_is_a_hang_named_with_its_stack() -> None:
    with serving(rules=Rules(hang_s=1.5)) as coordinator:
        coordinator.expect(["w0", "w1"])
        with working(coordinator.address, "w0", "w1") as (zero, one):
            one.tell("at", "backward", 5)
            one.tell("linger")
            member = coordinator._state.members["w1"]
            until(lambda: "in linger" in member.stack and member.phase == "backward", "its heartbeat")
            one.kill(signal.SIGSTOP)
            zero.await_("over")
            zero.tell("next")
            seat, rank, how, detail, phase, step, stack = zero.epoch(2)["losses"][0]
            assert (seat, rank, how, phase, step) == ("w1", 1, "hang", "backward", 5)
            assert "no sign of life" in detail
            assert "in linger" in stack
            one.kill(signal.SIGCONT)  # it learns that it was given up
            one.await_("over")
            one.tell("return")
            one.tell("next")
            assert "given up" in one.await_("error")["message"]


def test_joining_leaving_and_facts() -> None:
    with serving() as coordinator:
        coordinator.expect(["w0", "w1"])
        with working(coordinator.address, "w0", "w1") as (zero, one):
            zero.tell("publish", "job", "all-of-it")
            one.tell("lookup", "job")
            assert one.await_("fact")["text"] == "all-of-it"
            newcomer = Worker(coordinator.address, "n")
            try:
                newcomer.tell("lookup", "job")
                assert newcomer.await_("fact")["text"] == "all-of-it"
                newcomer.tell("next")
                zero.tell("wanted")
                zero.await_("wanted")
                for worker in (zero, one):
                    worker.tell("next")
                assert newcomer.epoch(2)["ids"] == ["w0", "w1", "n"]
                assert newcomer.epoch(2)["fresh"] == ["n"]
                one.tell("leave", "SIGTERM")
                one.await_("left")
                zero.tell("wanted")
                zero.await_("wanted", 2)
                for worker in (zero, newcomer):
                    worker.tell("next")
                assert zero.epoch(3)["ids"] == ["w0", "n"]
                one.tell("close")
                assert one.process.wait(WAIT_S) == 0
                assert not [line for line in zero.heard if line["what"] == "over"]
            finally:
                newcomer.end()


def test_the_whole_job_is_told_to_stop_before_anybody_gets_a_signal() -> None:
    with serving() as coordinator:
        coordinator.expect(["w0", "w1"])
        with working(coordinator.address, "w0", "w1") as workers:
            assert coordinator.tell_stop(WAIT_S)
            for worker in workers:
                worker.tell("stopping")
                assert worker.await_("stopping")["value"]


def test_a_killed_coordinator_goes_on_from_its_journal_while_members_go_on(tmp_path: Path) -> None:
    port = free_port()
    script = Path(__file__).parent / "coordinate_worker.py"
    command = [sys.executable, str(script), "serve", str(port), TOKEN, str(tmp_path / "coordinator.jsonl")]
    first = subprocess.Popen(command)
    second = None
    try:
        with working(f"127.0.0.1:{port}", "w0", "w1", "w2") as (zero, one, two):
            zero.tell("publish", "job", "x")
            one.tell("lookup", "job")
            one.await_("fact")
            first.kill()
            first.wait()
            for worker in (zero, two):
                worker.tell("at", "step", 4)  # training goes on meanwhile
            one.kill()
            zero.tell("suspect", 1)  # their wire has noticed; nobody hears it now
            for worker in (zero, two):
                worker.tell("next")
            second = subprocess.Popen(command)
            for worker in (zero, two):
                epoch = worker.epoch(2)
                assert epoch["ids"] == [id for id in zero.epoch(1)["ids"] if id != "w1"]
                assert "has not come back" in epoch["losses"][0][3]
            zero.tell("lookup", "job")
            assert zero.await_("fact")["text"] == "x"
    finally:
        for process in (first, second):
            if process is not None:
                process.kill()
                process.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def seat(id: str) -> Seat:
    return Seat(id=id, host="h")


def test_who_is_refused_and_what_it_hears(capfd: pytest.CaptureFixture[str]) -> None:
    log: list[str] = []
    with serving(log=log.append) as coordinator:
        member = Member.connect(coordinator.address, TOKEN, seat("w0"))
        with pytest.raises(UsageError, match="refused the token"):
            Member.connect(coordinator.address, "another token", seat("w1"))
        with pytest.raises(ManyhandsError, match="w0 takes part already"):
            Member.connect(coordinator.address, TOKEN, seat("w0"))
        assert [line.split(": ", 1)[1].split(" (")[0] for line in log] == [
            "wrong token",
            "worker w0 takes part already",
        ]
        with socket.create_connection(("127.0.0.1", int(coordinator.address.split(":")[1]))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            stranger.settimeout(WAIT_S)
            while stranger.recv(4096):
                pass
        assert coordinator.alive() == ["w0"]
        member.publish("still", "here")
        until(lambda: coordinator.facts.get("still") == "here")
        member.close()


GARBAGE = {
    "nothing": [],
    "noise": [b"\x00\xff" * 40],
    "nested": [b"[" * 100_000],
    "no object": [b"[]"],
    "no hello": [b'{"op":"beat"}'],
    "no seat": [b'{"op":"hello","version":1,"seat":{}}'],
    "types": [b'{"op":"hello","version":1,"seat":{"id":"x","host":7}}'],
    "holding": [b'{"op":"hello","version":1,"seat":{"id":"x"},"holding":{"number":1}}'],
    "version": [b'{"op":"hello","version":99,"seat":{"id":"x"}}'],
    "then noise": [b'{"op":"hello","version":1,"seat":{"id":"x"}}', b"noise"],
    "then steps": [b'{"op":"hello","version":1,"seat":{"id":"x"}}', b'{"op":"beat","step":-1}'],
    "then shutdown": [b'{"op":"hello","version":1,"seat":{"id":"x"}}', b'{"op":"shutdown"}'],
    "launcher": [b'{"op":"hello"}', b'{"op":"lost","id":"w0","how":"death"}'],
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_refused_and_harms_nobody(name: str) -> None:
    import grpc

    from manyhands.core import rpc

    log: list[str] = []
    with serving(log=log.append) as coordinator:
        member = Member.connect(coordinator.address, TOKEN, seat("w0"))
        with grpc.insecure_channel(coordinator.address) as channel:
            call = channel.stream_stream(messages.METHOD)(
                iter(GARBAGE[name]), metadata=rpc.bearer(TOKEN), timeout=WAIT_S
            )
            with contextlib.suppress(grpc.RpcError):
                list(call)
        until(lambda: len(log) == 1, "a line in the log")
        assert coordinator.alive() == ["w0"]
        assert not member.over.is_set()
        member.close()


def test_an_unreachable_coordinator() -> None:
    with pytest.raises(ManyhandsError, match="cannot be reached"):
        Member.connect(f"127.0.0.1:{free_port()}", TOKEN, seat("w0"), first_s=0.5)


def test_a_coordinator_that_does_not_come_back_is_given_up() -> None:
    with serving() as coordinator:
        member = Member.connect(coordinator.address, TOKEN, seat("w0"), patience_s=0.3)
        assert ids(member.next()) == ["w0"]
    assert not member.over.is_set()  # training goes on
    with pytest.raises(ManyhandsError, match="has not been reached"):
        member.next()
    with pytest.raises(PeerLost, match="nobody said it"):
        member.lookup("x", timeout_s=0.1)
    member.close()


def test_a_taken_port() -> None:
    with serving() as coordinator, pytest.raises(UsageError, match="free HOST:PORT"):
        Coordinator(token=TOKEN, listen=coordinator.address)


def test_tls_knows_the_coordinator_by_its_fingerprint() -> None:
    identity = tls.self_signed()
    with serving(identity=identity) as coordinator:
        assert coordinator.fingerprint == identity.fingerprint
        member = Member.connect(coordinator.address, TOKEN, seat("w0"), fingerprint=identity.fingerprint)
        assert ids(member.next()) == ["w0"]
        member.close()
        with pytest.raises(UsageError, match="fingerprint"):
            Member.connect(coordinator.address, TOKEN, seat("w1"), fingerprint="sha256:" + "0" * 64)


def test_a_launcher_that_joins_tells_of_its_workers_and_hears_of_theirs() -> None:
    heard: list[dict[str, Any]] = []
    with serving(rules=Rules(hang_s=1.0)) as coordinator:
        launcher = Line(
            coordinator.address,
            TOKEN,
            greeting=lambda: {"op": "hello"},
            hear=lambda message: heard.append(dict(message)),
            fatal=lambda error: heard.append({"op": str(error)}),
        )
        launcher.start()
        until(lambda: heard, "welcome")
        coordinator.publish("job", "x")
        launcher.say("expect", id="n0")
        launcher.say("expect", id="n1")
        until(lambda: coordinator._state.coming == {"n0", "n1"})
        launcher.say("lost", id="n1", how="failed", detail="ImportError: x", final=True)
        until(lambda: any(message["op"] == "failed" for message in heard), "the news")
        assert "ImportError" in coordinator.ended[1] if coordinator.ended else False
        launcher.close()
        until(lambda: not coordinator._launchers, "its leaving")
        assert coordinator._state.coming == set()


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
