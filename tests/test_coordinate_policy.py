"""The coordinator's policy, without sockets: who is in an epoch, when it ends, and who is lost."""

from __future__ import annotations

import pytest
from coordinators import Play, ids

from manyhands.coordinate import judge
from manyhands.coordinate.journal import restore
from manyhands.coordinate.messages import Refused
from manyhands.coordinate.state import BACK_S
from manyhands.coordinate.words import Rules
from manyhands.core.membership import SUMS, fact_of


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


def test_what_is_left_to_do_when_all_steps_are_done_needs_no_min_workers() -> None:
    play = Play("w0", "w1", "w2", min_workers=2, patience_s=3.0)
    play.state.leaving("w1", detail="done", now=play.now)
    play.state.cut("w1", play.now)
    play.state.lose("w2", how="death", detail="was killed", now=play.now)
    play.ready("w0")
    play.wait(0.5)
    assert ids(play.epoch) == ["w0"]
    for _ in range(3):
        play.wait(2.0)
        play.beat()
    play.state.leaving("w0", detail="done", now=play.now)
    play.state.cut("w0", play.now)
    play.wait(0.5)
    assert play.state.ended == (0, "done")


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


def test_facts_of_an_epoch_are_forgotten_with_it() -> None:
    play = Play("w0", "w1")
    play.state.publish("job", "what it is")
    play.state.publish(fact_of(1, "address"), "here:1")
    play.state.suspect("w0", epoch=1, rank=None, detail="timed out", now=play.now)
    play.ready("w0", "w1")
    assert play.epoch.number == 2
    assert play.state.facts == {"job": "what it is"}
    play.state.publish(fact_of(1, "address"), "too late")
    play.state.publish(fact_of(2, "address"), "here:2")
    assert play.state.facts == {"job": "what it is", fact_of(2, "address"): "here:2"}
    play.drain()
    again = restore(play.notes, Rules(), 0.0)
    assert again.facts == play.state.facts


def test_a_newcomer_that_has_to_get_ready_first_is_not_wanted() -> None:
    play = Play("w0")
    play.come("n")
    play.state.ready("n", epoch=0, step=0, now=play.now)
    play.state.ready("n", epoch=0, step=0, waits=False, now=play.now)
    assert [message["on"] for message in play.heard("w0", "wanted")] == [True, False]
    play.ready("w0")
    assert play.epoch.number == 2
    assert ids(play.epoch) == ["w0"]
