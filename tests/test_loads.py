"""Who waits for whom: sums over steps, and the blame."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import Job

from manyhands.core.events import Load
from manyhands.core.membership import Seat
from manyhands.launch import chaos
from manyhands.train.loads import Loads, Totals, blame

SEATS = [Seat(id="w0", host="a"), Seat(id="w1", host="b")]


def load(
    seat: str, compute_s: float, *, data_s: float = 0.0, wait_s: float = 0.0, network_s: float = 0.0
) -> Load:
    return Load(
        seat=seat,
        rank=0,
        host="",
        rows=1,
        compute_s=compute_s,
        data_s=data_s,
        wait_s=wait_s,
        network_s=network_s,
    )


def test_steps_are_added_up_by_worker() -> None:
    loads = Loads()
    for _ in range(3):
        loads.add([(1.0, 8), (2.0, 4)], [(0.1, 0.9, 0.1), (0.0, 0.0, 0.1)], wall_s=2.1)
    loads.add([], wall_s=0.1)  # between agreements nobody tells
    balance = loads.take(7, SEATS)
    assert balance is not None
    assert [w.rows for w in balance.workers] == [24, 12]
    assert round(balance.workers[0].wait_s, 6) == 2.7
    assert round(balance.wall_s, 6) == 6.4
    assert (balance.slowest, balance.reason) == ("w1", "compute")
    assert loads.take(8, SEATS) is None


def test_what_is_told_a_step_late_is_no_more_than_there_was() -> None:
    """The first step was long, and is told in the second."""
    loads = Loads()
    loads.add([(0.3, 8), (1.5, 4)], [(0.1, 0.9, 0.1), (0.0, 0.2, 0.1)], wall_s=1.0)
    balance = loads.take(2, SEATS)
    assert balance is not None
    told = [(w.compute_s, w.data_s, w.network_s, round(w.wait_s, 6)) for w in balance.workers]
    assert told == [(0.3, 0.1, 0.1, 0.5), (1.0, 0.0, 0.0, 0.0)]


def test_a_changed_group_begins_anew() -> None:
    loads = Loads()
    loads.add([(1.0, 4), (1.0, 4), (1.0, 4)], wall_s=1.0)
    assert loads.take(1, SEATS) is None
    loads.add([(1.0, 4), (1.0, 4), (1.0, 4)], wall_s=1.0)
    loads.add([(1.0, 6), (0.5, 6)], wall_s=1.0)
    balance = loads.take(2, SEATS)
    assert balance is not None
    assert [(w.rows, w.wait_s) for w in balance.workers] == [(6, 0.0), (6, 0.5)]
    assert balance.slowest == "w0"


def test_the_blame_goes_to_data_compute_or_network() -> None:
    assert blame([load("a", 1.0, data_s=1.0), load("b", 1.1, wait_s=0.9)], 2.0) == ("a", "data")
    assert blame([load("a", 2.0), load("b", 1.1, wait_s=0.9)], 2.0) == ("a", "compute")
    assert blame([load("a", 1.0, network_s=1.0), load("b", 1.0, network_s=1.0)], 2.0) == ("", "network")
    assert blame([load("a", 1.0, network_s=1.0), load("b", 1.1, wait_s=0.8, network_s=0.1)], 2.0) == (
        "a",
        "network",
    )
    assert blame([load("a", 2.0), load("b", 1.99, wait_s=0.01)], 2.0) == ("", "")
    assert blame([], 1.0) == ("", "")


def test_totals_that_are_heard_late_or_twice_are_counted_once() -> None:
    totals = Totals()
    assert totals.add([1.0, 4, 0.1, 0.2, 0.3]) == [1.0, 4, 0.1, 0.2, 0.3]
    assert totals.add([1.0, 4, 0.1, 0.2, 0.3]) == [2.0, 8, 0.2, 0.4, 0.6]
    told = {"a": [1.0, 4, 0.0, 0.0, 0.0], "b": [9.0, 12, 0.0, 0.0, 0.0]}
    assert [rows for _, rows in totals.new(told, ["a", "b"])[0]] == [4, 12]
    assert [rows for _, rows in totals.new(told, ["a", "b"])[0]] == [0, 0]
    assert [rows for _, rows in totals.new({}, ["a", "b"])[0]] == [0, 0]  # the server was started again
    assert [rows for _, rows in totals.new({**told, "a": [4.0, 16, 0, 0, 0]}, ["a", "b"])[0]] == [12, 0]


def test_a_slowed_worker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process of three is stopped for three quarters of the time; the line is what a log without a terminal gets."""
    monkeypatch.setattr(chaos, "DUTY", 0.25)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("many hands make light work\n" * 2000)
    options = ["--strategy", "zero3(lr=1e-3)", "--seq-len", 128, "--steps", 40, "--log-every", 8]
    with Job(tmp_path / "run", corpus, *options) as job:
        slow = chaos.Fault("slow", at_s=0.0, victim=0.5, for_s=1e6)
        fault = chaos.Chaos(job.output, [slow], begun=lambda: job.step >= 1)
        fault.start()
        try:
            said = job.end()
        finally:
            fault.stop()
    assert [each.seat for each in fault.injected] == ["w1"]
    blamed = [(event["slowest"], event["reason"]) for event in job.seen("balance")[1:]]
    assert [seat for seat, _ in blamed].count("w1") >= 4, blamed
    assert blamed.count(("w1", "compute")) >= 2, (
        blamed
    )  # a stop may fall into a push, too: then it is the network's
    assert "the others wait for w1 (its computing)" in said
