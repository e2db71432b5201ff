"""The coordinator's policy, without sockets: who is in an epoch, when it ends, and who is lost."""

from __future__ import annotations

import pytest
from coordinators import Play, ids

from manyhands.coordinate import judge
from manyhands.coordinate.messages import Refused
from manyhands.coordinate.state import BACK_S, State
from manyhands.coordinate.words import Rules
from manyhands.core.membership import SUMS


def test_the_first_epoch_waits_for_all_and_keeps_their_order() -> None:
    play = Play()
    play.state.expect(["w0", "w1", "w2"], play.now)
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


@pytest.mark.parametrize("at", ["elsewhere cpu", "h cuda:0"])
def test_whom_shared_memory_cannot_join_is_turned_away_and_not_waited_for(at: str) -> None:
    play = Play("w0", "g", shared=False, begun=False)  # without the rule it is taken
    assert ids(play.epoch) == ["w0", "g"]
    play = Play(shared=True)
    play.state.expect(["w0", "g", "w1"], play.now)
    play.come("w0")
    play.state.ready("w0", epoch=0, step=0, now=0.0)
    with pytest.raises(Refused, match=r"worker g on (?s:.*)share the memory of one host, h") as refused:
        play.come("g", at=at)
    assert refused.value.status == "PERMISSION_DENIED"
    play.state.lose("g", how="failed", detail="was refused", final=True, now=play.now)  # so says its launcher
    play.come("w1")
    play.state.ready("w1", epoch=0, step=0, now=0.0)
    assert ids(play.epoch) == ["w0", "w1"]
    assert play.state.ended is None


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
    assert [happening.seat_id for happening in play.happenings("evict")] == ["w1"]  # should it run still


def test_who_comes_back_in_time_is_in_the_epoch_still() -> None:
    play = Play()
    play.state.expect(["w0", "w1"], play.now)
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
    assert play.state._suspicions.rounds == []
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


def test_who_ends_in_the_middle_without_a_word_is_missed_though_its_exit_code_is_0() -> None:
    play = Play("w0", "w1")
    play.state.lose("w1", how="left", detail="done", now=play.now)  # so says its launcher
    assert play.heard("w0", "over")
    play.ready("w0")
    assert ids(play.epoch) == ["w0"]
    play.step(9)
    play.state.leaving("w0", detail="done", now=play.now)
    play.state.cut("w0", play.now)
    assert play.state.ended == (0, "done")


def test_too_few_that_wait_for_others_end_the_job_though_somebody_has_ended_as_if_it_were_done() -> None:
    play = Play("w0", "w1", min_workers=2, patience_s=3.0)
    play.state.lose("w1", how="left", detail="done", now=play.now)
    for _ in range(2):
        play.wait(2.0)
        play.beat()
    assert play.state.ended is None  # it does what is left to do, for all that is known
    play.ready("w0")
    for _ in range(3):
        play.wait(2.0)
        play.beat()
    assert play.state.ended is not None
    assert "min_workers = 2" in play.state.ended[1]


@pytest.mark.parametrize("how", ["death", "failed", "hang"])
def test_the_end_of_a_job_whose_first_rank_is_lost_before_it_has_summed_up(how: str) -> None:
    """The others have nothing left to do, and say so; whether they are gone yet or not."""
    for last in ("w0", "w1"):
        play = Play("w0", "w1")
        play.state.leaving("w1", detail="done", now=play.now)
        for id in ("w1", "w0") if last == "w0" else ("w0", "w1"):
            assert play.state.ended is None
            if id == "w1":
                play.state.cut("w1", play.now)
            else:
                play.state.expect(["w0-1"], play.now)  # it is replaced, in vain
                play.state.lose("w0", how=how, detail="disk full", now=play.now)
        assert play.state.ended is not None
        assert play.state.ended[0] == 1
        assert "worker w0, which sums up the run, was lost at its end" in play.state.ended[1]


def test_who_is_on_its_way_when_the_job_is_done_is_ended() -> None:
    play = Play("w0")
    play.come("n")
    play.state.expect(["m"], play.now)
    play.state.leaving("w0", detail="done", now=play.now)
    play.state.cut("w0", play.now)
    assert [happening.seat_id for happening in play.happenings("evict")] == ["m", "n"]
    assert [happening.kind for happening in play.happened[-3:]] == ["done", "evict", "evict"]


@pytest.mark.parametrize(("came", "limit_s"), [((), 120.0), (("w0", 0.5), 20.0), (("w0", 8.0), 40.0)])
def test_a_worker_that_is_started_and_says_nothing_is_given_up(
    came: tuple[str, float] | tuple[()], limit_s: float
) -> None:
    play = Play(stuck_s=20.0, start_s=5.0)
    play.state.expect(["w0", "w1"], play.now)
    if came:
        play.wait(came[1])
        play.come(came[0])
        play.state.ready("w0", epoch=0, step=0, now=play.now)
    else:
        play.state.lose("w0", how="death", detail="SIGKILL", now=play.now)
    play.now += 3600.0
    play.state.shift(3600.0)  # a Ctrl-Z
    while play.now - 3600.0 < limit_s:
        assert not play.happenings("evict")
        play.beat(phase="start")
        play.wait(1.0)
    (evict,) = play.happenings("evict")
    assert evict.seat_id == "w1"
    assert "has not reached the coordinator" in evict.detail
    loss = play.state.gone["w1"]
    assert (loss.how, loss.phase, loss.rank) == ("hang", "start", -1)
    assert loss.silent_s >= limit_s
    with pytest.raises(Refused, match="given up"):
        play.come("w1")
    if came:
        play.state.expect(["w1-1"], play.now)
        play.state.lose("w1", how="death", detail="SIGKILL", now=play.now)
        play.come("w1-1")
        play.state.ready("w1-1", epoch=0, step=0, now=play.now)
        assert ids(play.epoch) == ["w0", "w1-1"]


@pytest.mark.parametrize(("phase", "given_up"), [("start", True), ("build", False)])
def test_one_that_came_and_stands_still_before_it_is_ready_is_given_up(phase: str, given_up: bool) -> None:
    for begun in (True, False):
        play = Play(*(("w0",) if begun else ()), stuck_s=20.0)
        play.state.expect(["n"], play.now)
        play.come("n")
        while play.now < 150.0:
            for id in play.state.members:
                play.beat(id, phase="step" if id == "w0" else phase)
            play.wait(5.0)
        assert [happening.seat_id for happening in play.happenings("evict")] == (["n"] if given_up else [])


def test_who_has_come_may_take_as_long_to_import_as_who_has_not() -> None:
    play = Play(stuck_s=2.0, start_s=60.0)
    play.state.expect(["n"], play.now)
    play.come("n")
    while play.now < 60.0:
        assert not play.happenings("evict")
        play.beat("n", phase="start")
        play.wait(5.0)
    assert play.happenings("evict")


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


def test_a_pause_is_no_step_that_took_so_long_and_no_time_to_come_back() -> None:
    play = Play("w0", "w1", stuck_s=20.0)
    play.wait(1.0)
    play.step(2)
    play.state.shift(3600.0)  # Ctrl-Z, and on the next day fg
    play.now += 3600.0
    for step in range(3, 7):
        play.wait(4.0)
        play.beat("w1")
        play.step(step, "w0")
    play.wait(4.0)
    assert [happening.seat_id for happening in play.happenings("evict")] == ["w1"]
    state = State(Rules(hang_s=10.0))
    state.adopt(play.epoch, 0.0)  # of before a restart: nobody's connection has ended
    state.shift(5.0)
    state.tick(8.0)
    assert not state.gone


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


def test_in_the_first_step_who_came_least_far_is_given_up_and_preparing_may_take_any_time() -> None:
    for phase, stuck in (("compile", ["w1"]), ("prepare", [])):
        play = Play("w0", "w1", "w2", stuck_s=20.0, begun=False)
        for id in ("w0", "w1", "w2"):
            play.step(0, id, phase=phase)
        play.wait(1.0)
        for id in ("w0", "w2"):  # their passes are done
            play.step(0, id, phase=phase)
        begun = play.now
        while play.now - begun < 140.0 and "w1" in play.state.members:
            for id in ("w0", "w1", "w2"):
                play.beat(id, phase=phase)
            play.wait(5.0)
        assert [happening.seat_id for happening in play.happenings("evict")] == stuck
        if stuck:
            assert 114.0 <= play.now - begun <= 125.0


def test_before_the_first_step_whoever_the_others_wait_for_is_given_up_and_they_are_not() -> None:
    """It stands still in its first pass; so do the others, who wait for it; one of them dies, or is given up in its place."""
    play = Play("w0", "w1", "w2", "w3", stuck_s=20.0, begun=False)
    play.step(0, phase="compile")
    begun = play.now
    while play.now - begun < 130.0 and len(play.state.members) == 4:
        play.beat(phase="compile")
        play.wait(0.5)
    (first,) = play.happenings("evict")
    play.wait(0.05)  # the others have not noticed yet
    assert len(play.state.members) == 3
    for id in sorted(set(play.state.members) - {"w3"}):
        play.state.ready(id, epoch=1, step=0, phase="re-forming", now=play.now)
    assert first.seat_id == "w0"
    begun = play.now
    while play.now - begun < 130.0 and "w3" in play.state.members:
        play.beat("w1", "w2", phase="re-forming")
        play.beat("w3", phase="compile")
        play.wait(0.5)
    assert [happening.seat_id for happening in play.happenings("evict")] == ["w0", "w3"]
    assert ids(play.epoch) == ["w1", "w2"]


@pytest.mark.parametrize(("phase", "limit_s"), [("step", 20.0), ("evaluate", 120.0)])
def test_whoever_the_others_wait_for_in_vain_is_given_up(phase: str, limit_s: float) -> None:
    """Its heart beats on, its epoch is over, and it never becomes ready for the next: in a slow phase, too."""
    play = Play("w0", "w1", "w2", stuck_s=20.0)
    play.wait(1.0)
    for id in ("w0", "w1", "w2"):
        play.step(2, id)
    play.beat("w1", phase=phase)
    begun = play.now
    play.state.suspect("w0", epoch=1, rank=None, detail="timed out", now=play.now)
    for id in ("w0", "w2"):
        play.state.ready(id, epoch=1, step=2, now=play.now)
    while play.now - begun < limit_s + 20.0 and "w1" in play.state.members:
        for id in ("w0", "w2"):
            play.beat(id)
        play.beat("w1", phase=phase)
        play.wait(2.0)
    assert [happening.seat_id for happening in play.happenings("evict")] == ["w1"]
    assert limit_s <= play.now - begun <= limit_s + 6.0


def test_a_newcomer_that_has_to_get_ready_first_is_not_wanted() -> None:
    play = Play("w0")
    play.come("n")
    play.state.ready("n", epoch=0, step=0, now=play.now)
    play.state.ready("n", epoch=0, step=0, waits=False, now=play.now)
    assert [message["on"] for message in play.heard("w0", "wanted")] == [True, False]
    play.ready("w0")
    assert play.epoch.number == 2
    assert ids(play.epoch) == ["w0"]
