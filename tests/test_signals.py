"""Signals in a worker: real ones, sent to this process."""
# ruff: noqa: PT012  # the phase, and the signal within it, are what raises

from __future__ import annotations

import contextlib
import signal
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from manyhands.core.errors import Stopped
from manyhands.core.membership import Epoch
from manyhands.core.signals import PHASE, Interrupts
from manyhands.train import asked
from manyhands.train.crew import Crew
from manyhands.train.loop import Loop


def send(signum: int) -> None:
    signal.raise_signal(signum)  # to this thread: the process may have others


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_at_once_where_nothing_is_lost(signum: signal.Signals) -> None:
    reached = False
    with Interrupts() as interrupts, pytest.raises(Stopped) as caught, interrupts.phase("prepare"):
        send(signum)
        reached = True
    assert not reached
    assert caught.value.exit_code == 128 + signum
    assert getattr(caught.value, PHASE) == "prepare"


def test_only_noted_within_a_step() -> None:
    with Interrupts() as interrupts:
        with interrupts.phase("step", interruptible=False):
            send(signal.SIGTERM)
            send(signal.SIGINT)
        assert interrupts.requested == signal.SIGTERM  # the first
        with pytest.raises(Stopped), interrupts.phase("evaluate"):
            raise AssertionError("an interruptible phase does not begin after a request")


def test_one_that_was_swallowed_is_raised_again() -> None:
    swallow = contextlib.suppress(BaseException)  # as some libraries do
    with Interrupts() as interrupts, pytest.raises(Stopped), interrupts.phase("compile"), swallow:
        send(signal.SIGTERM)


class Set:
    """What a worker knows of the others: facts that are told to all at once."""

    def __init__(self, facts: dict[str, str], *, stopping: bool = False) -> None:
        self._facts, self.stopping, self.change_wanted = facts, stopping, False
        self.me = SimpleNamespace(id="w1")

    def facts(self) -> dict[str, str]:
        return self._facts

    def publish(self, key: str, text: str) -> None:
        assert key not in self._facts, "said twice"
        self._facts[key] = text


def loop_of(signum: int | None, membership: Any = None, *, others: Any = (), **method: Any) -> Any:
    """A loop in an evaluation, one chore before the end; `others`: what they answer when asked for their wishes."""
    loop = Loop.__new__(Loop)
    loop.interrupts, loop.crew = SimpleNamespace(requested=signum), None  # type: ignore[assignment]
    if membership is not None:
        none: Any = None
        loop.crew = Crew(membership, none, none, fetch=none, replica=none, rebuild=none)
        loop.crew.epoch = Epoch(number=3, seats=())
    loop.replica = SimpleNamespace(steps=7, method=SimpleNamespace(**{"at_rest": True, **method}))  # type: ignore[assignment]
    loop.world = SimpleNamespace(gather=lambda mine: [mine, *others])  # type: ignore[assignment]
    loop._chores = ["evaluate", "wait"]
    return loop


def test_who_is_asked_in_an_evaluation_tells_the_others() -> None:
    facts: dict[str, str] = {}
    mine, other = loop_of(signal.SIGTERM, Set(facts)), loop_of(None, Set(facts))
    assert not asked.heard(other)
    assert asked.heard(mine)
    assert asked.heard(mine)  # and has told it once
    assert asked.heard(other)
    other.crew.epoch = Epoch(number=4, seats=())
    assert not asked.heard(other)
    assert asked.heard(loop_of(signal.SIGTERM))  # without a coordinator it is heard at the end


@pytest.mark.parametrize("who", [(0, 0), (0, 1), (1, 0)])
def test_workers_that_compute_a_layer_together_break_off_at_the_same_batch(who: tuple[int, int]) -> None:
    others = torch.tensor([bool(who[1])])
    layer = SimpleNamespace(begin=lambda said: SimpleNamespace(wait=lambda: [said.tensor, others]))
    assert asked.heard(loop_of(signal.SIGTERM if who[0] else None, layer=layer)) is any(who)


def test_what_becomes_of_an_evaluation_that_was_broken_off() -> None:
    stop = ["meet", "save", "wait", f"stop:{signal.SIGTERM}"]
    leaves, stays = (0, True), (0, False)
    for loop, chores in (
        (loop_of(signal.SIGTERM, Set({}), others=[stays]), ["change", "evaluate", "wait"]),
        (loop_of(None, Set({}), others=[leaves]), ["change", "evaluate", "wait"]),
        (loop_of(None, Set({}), others=[leaves], at_rest=False), ["meet", "change", "evaluate", "wait"]),
        (loop_of(None, Set({}), others=[leaves], at_rest=False, still=True), ["change", "evaluate", "wait"]),
        (loop_of(signal.SIGTERM, Set({}, stopping=True), others=[stays]), stop),
        (loop_of(None, Set({}), others=[leaves, (signal.SIGTERM, False)]), stop),
        (loop_of(signal.SIGTERM, others=[stays]), stop),  # a fixed set ends as one
    ):
        asked.heed(loop)
        assert loop.chores_at(7) == chores


def test_phases_nest_and_name_their_errors() -> None:
    with Interrupts() as interrupts:
        assert interrupts.current_phase == "start"
        with (
            pytest.raises(KeyError) as caught,
            interrupts.phase("build"),
            interrupts.phase("step", interruptible=False),
        ):
            assert interrupts.current_phase == "step"
            raise KeyError
        assert getattr(caught.value, PHASE) == "step"
        assert interrupts.current_phase == "start"


def test_handlers_are_restored_and_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        term = signal.getsignal(signal.SIGTERM)
        with Interrupts() as interrupts, interrupts.phase("prepare"):
            send(signal.SIGINT)
            assert signal.getsignal(signal.SIGTERM) != term
        assert interrupts.requested is None
        assert signal.getsignal(signal.SIGTERM) is term
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_is_installed() -> None:
    seen = []

    def run() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with Interrupts() as interrupts, interrupts.phase("prepare"):
            seen.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [True]
