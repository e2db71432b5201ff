"""Signals in a worker: real ones, sent to this process."""
# ruff: noqa: PT012  # the phase, and the signal within it, are what raises

from __future__ import annotations

import contextlib
import signal
import threading

import pytest

from manyhands.core.errors import Stopped
from manyhands.core.signals import PHASE, Interrupts


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
