"""The coordinator's policy: who is silent, or stands still, and is given up."""

from __future__ import annotations

import pytest
from coordinators import Play, ids

from manyhands.coordinate.messages import Refused
from manyhands.coordinate.state import State
from manyhands.coordinate.words import Rules


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
                play.beat(id, phase="step" if id == "w0" else phase, moved=id == "w0")
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


def passed(play: Play, steps: range) -> None:
    """w0 makes these steps, four seconds each, and w1, whose heart beats on, none: it is given up."""
    for step in steps:
        play.wait(4.0)
        play.beat("w1")
        play.step(step, "w0")
    play.wait(4.0)
    assert [happening.seat_id for happening in play.happenings("evict")] == ["w1"]


def test_a_pause_is_no_step_that_took_so_long_and_no_time_to_come_back() -> None:
    play = Play("w0", "w1", stuck_s=20.0)
    play.wait(1.0)
    play.step(2)
    play.state.shift(3600.0)  # Ctrl-Z, and on the next day fg
    play.now += 3600.0
    passed(play, range(3, 7))
    state = State(Rules(hang_s=10.0))
    state.adopt(play.epoch, 0.0)  # of before a restart: nobody's connection has ended
    state.shift(5.0)
    state.tick(8.0)
    assert not state.gone


def test_a_thread_that_stands_still_while_the_others_pass_is_stuck() -> None:
    play = Play("w0", "w1", stuck_s=20.0)
    passed(play, range(2, 6))
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


@pytest.mark.parametrize("begun", [False, True], ids=["in its first step", "later"])
def test_the_only_worker_that_stands_still_ends_the_job_after_a_long_while(begun: bool) -> None:
    play = Play("w0", stuck_s=20.0, begun=begun)
    start = play.now
    if begun:
        play.step(2)
    while play.now - start < 150.0 and "w0" in play.state.members:
        play.beat(phase="step")
        play.wait(5.0)
    assert 120.0 <= play.now - start <= 126.0
    for _ in range(8):  # a replacement might come
        play.wait(0.5)
    assert play.state.ended is not None
    assert ("no worker is left" if begun else "had not made its first step") in play.state.ended[1]


def test_the_first_rank_that_stands_still_in_its_last_words_is_given_up() -> None:
    play = Play("w0", "w1", stuck_s=20.0)
    play.step(2, phase="finish")
    play.state.leaving("w1", detail="done", now=play.now)
    play.state.cut("w1", play.now)
    start = play.now
    while play.now - start < 150.0 and "w0" in play.state.members:
        play.beat("w0", phase="finish")
        play.wait(5.0)
    assert 120.0 <= play.now - start <= 126.0
    play.wait(0.5)
    assert play.state.ended is not None
    assert (
        "worker w0, which sums up the run, was lost at its end (hang: its main thread" in play.state.ended[1]
    )


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


def stands_still(play: Play, id: str, most_s: float) -> float:
    """How long `id` may stand still, which the others wait for, until it is given up; at most `most_s`."""
    others = [other for other in play.state.members if other != id]
    play.beat(id, moved=True)
    play.wait(0.5)
    play.beat(*others, moved=True)
    begun = play.now
    while play.now - begun < most_s and id in play.state.members:
        play.beat()
        play.wait(0.5)
    assert [happening.seat_id for happening in play.happenings("evict")] in ([], [id])
    return play.now - begun + 0.5


@pytest.mark.parametrize(("step_s", "limit_s"), [(2.0, 20.0), (10.0, 50.0)])
def test_the_longest_step_is_nothing_but_a_step(step_s: float, limit_s: float) -> None:
    """Not what comes before the first, beside it or between two."""
    play = Play("w0", "w1", stuck_s=20.0, hang_s=1e9, begun=False)
    for phase, seconds in (("prepare", 1200.0), ("build", 60.0), ("compile", 90.0)):
        play.step(0, phase=phase)
        play.wait(seconds)
    play.step(1)
    for step in (1, 2, 3):
        for phase in ("evaluate", "save", "wait", "re-forming") if step == 2 else ():
            play.step(step, phase=phase)
            play.wait(90.0)
        play.step(step)
        play.wait(step_s)
    play.step(4)
    assert limit_s <= stands_still(play, "w1", 1000.0) < limit_s + 2.0


def test_steps_are_measured_where_each_is_followed_by_something_else() -> None:
    play = Play("w0", "w1", stuck_s=20.0, hang_s=1e9)
    for step, step_s in ((1, 1.0), (2, 10.0), (3, 10.0)):
        play.step(step)
        play.wait(step_s)
        play.step(step + 1, phase="evaluate")
        play.wait(60.0)
    play.step(4)
    assert 50.0 <= stands_still(play, "w1", 1000.0) < 52.0


@pytest.mark.parametrize("interrupted", [False, True])
def test_before_a_step_was_seen_as_a_whole_one_may_take_six_times_as_long(interrupted: bool) -> None:
    play = Play("w0", "w1", stuck_s=20.0, hang_s=1e9, begun=False)
    play.step(0, phase="compile")
    play.wait(1.0)
    play.step(1)
    if interrupted:  # what was added up is kept: what is left of the step is short
        play.wait(60.0)
        play.state.suspect("w0", epoch=1, rank=None, detail="timed out", now=play.now)
        for id in ("w0", "w1"):
            play.state.ready(id, epoch=1, step=1, phase="re-forming", now=play.now)
        play.step(1)
        play.wait(1.0)
        play.step(2)
    for _ in range(100):
        play.wait(1.0)
        play.beat()
    play.step(3)
    for _ in range(300):  # it is known now
        play.wait(1.0)
        play.beat()
    assert not play.happenings("evict")


def test_steps_that_are_done_again_are_not_one_long_step() -> None:
    play = Play("w0", "w1", stuck_s=20.0, hang_s=1e9)
    for step in range(2, 51):
        play.wait(1.0)
        play.step(step)
    play.state.suspect("w0", epoch=1, rank=None, detail="timed out", now=play.now)
    for id in ("w0", "w1"):
        play.state.ready(id, epoch=1, step=50, phase="re-forming", now=play.now)
    for step in range(10, 52):  # from the checkpoint
        play.step(step)
        play.wait(1.0)
    assert 20.0 <= stands_still(play, "w1", 1000.0) < 22.0


def test_who_goes_back_to_the_beginning_is_no_newcomer_and_the_job_goes_on() -> None:
    play = Play("w0", "w1", "w2")
    play.step(5)
    play.state.lose("w2", how="death", detail="SIGKILL", now=play.now)
    play.ready("w0", "w1")
    play.step(0)  # there was no checkpoint yet
    play.state.lose("w1", how="death", detail="SIGKILL", now=play.now)
    assert play.state.gone["w1"].step == 0
    play.ready("w0")
    assert (play.state.ended, ids(play.epoch), play.epoch.fresh) == (None, ["w0"], frozenset())


def fetching(play: Play) -> None:
    """`n` comes in, has the state to fetch, and the others wait for it."""
    play.step(5)
    play.come("n")
    play.state.ready("n", epoch=0, step=0, now=play.now)
    play.ready("w0", "w1")
    play.step(5, "w0", "w1", phase="re-forming")
    play.step(0, "n", phase="fetch")


def test_who_waits_for_a_long_transfer_is_not_stuck_and_who_lets_it_hang_is() -> None:
    play = Play("w0", "w1", stuck_s=20.0)
    fetching(play)
    for _ in range(400):
        play.wait(1.0)
        play.beat("w0", "w1", phase="re-forming")
        play.step(0, "n", phase="fetch")  # bytes arrive
    assert not play.happenings("evict")
    begun = play.now
    while play.now - begun < 200.0 and "n" in play.state.members:
        play.beat("w0", "w1", phase="re-forming")
        play.beat("n", phase="fetch")
        play.wait(1.0)
    assert 120.0 <= play.now - begun <= 122.0
    for _ in range(10):
        play.beat("w0", "w1", phase="re-forming")
        play.wait(1.0)
    assert [happening.seat_id for happening in play.happenings("evict")] == ["n"]


def test_who_has_waited_for_a_long_transfer_is_given_time_anew_when_it_has_ended() -> None:
    play = Play("w0", "w1", stuck_s=20.0)
    fetching(play)
    for _ in range(400):
        play.wait(1.0)
        play.beat("w0", "w1", phase="re-forming")
        play.step(0, "n", phase="fetch")
    play.step(5, "n", phase="re-forming")  # the others have not heard of it yet
    play.wait(0.05)
    assert not play.happenings("evict")


def test_a_step_in_which_another_fetches_the_state_is_no_long_step() -> None:
    play = Play("w0", "w1", stuck_s=20.0)
    fetching(play)
    play.step(5, "w0", "w1")
    play.wait(1.0)
    play.step(6, "w0", "w1")
    for _ in range(200):
        play.wait(1.0)
        play.beat("w0", "w1")
        play.step(0, "n", phase="fetch")
    play.step(6, "n")
    play.wait(0.5)
    play.step(7)
    assert 20.0 <= stands_still(play, "w1", 1000.0) < 22.0


@pytest.mark.parametrize("phase", ["re-forming", "check", "change"])
def test_where_state_may_travel_all_may_stand_still_for_longer(phase: str) -> None:
    play = Play("w0", "w1", stuck_s=20.0)
    play.wait(1.0)
    play.step(2, phase=phase)
    play.wait(1.0)
    play.step(2, "w0", phase=phase)
    begun = play.now
    while play.now - begun < 200.0 and len(play.state.members) == 2:
        play.beat(phase=phase)
        play.wait(1.0)
    assert [happening.seat_id for happening in play.happenings("evict")] == ["w1"]
    assert 119.0 <= play.now - begun <= 121.0
