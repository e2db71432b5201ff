"""Updates that are left out because one worker's numbers are not finite: it is named, and the ledger tells of their samples."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import TINY, events, losses, summary
from trapped import Job

from manyhands.cli.ledger import step_story, text
from manyhands.core.hardware import hostname
from manyhands.core.membership import Seat
from manyhands.train.audit import Report, audit, load
from manyhands.train.books import Books
from manyhands.train.header import Unsound
from manyhands.train.ledger import Batches
from manyhands.train.leftout import LeftOut

W1 = re.escape(f"w1 (rank 1, {hostname()})")
LOSS = f"update skipped: the loss of {W1} was not finite, in forward"
GRADIENT = f"update skipped: the gradient of {W1} was not finite, in backward"
BY_LOSS, BY_GRADIENT = "the loss of w1 was not finite", "the gradient of w1 was not finite"
OWN = f"step 4: {W1} has skipped 1 own update since the workers last spoke"


@pytest.mark.parametrize(
    ("strategy", "act", "words", "left", "why"),
    [
        ("accumulate(every=2)", "nan-gradient", f"steps 3 to 4: .*{GRADIENT}", (24, 1), BY_GRADIENT),
        ("zero3", "nan", f"step 4: loss nan, gradient norm nan: {LOSS}", (12, 1), BY_LOSS),
        ("diloco(every=2)", "nan", OWN, (6, 1), BY_LOSS),
        ("parameter-server", "nan-gradient", GRADIENT, (12, 1), BY_GRADIENT),
        # whoever skips tells the others with its next push, and they may have ended by then
        ("parameter-server(consistency=async)", "nan", "", (6, 1), BY_LOSS),
    ],
)
def test_the_worker_whose_numbers_are_not_finite_is_named(
    corpus: Path, tmp_path: Path, strategy: str, act: str, words: str, left: tuple[int, int], why: str
) -> None:
    run = tmp_path / "run"
    said = train(run, corpus, act, "--strategy", strategy)
    assert re.search(words, said)
    warned = [bool(re.search(words, e["message"])) for e in events(run, "warned")]
    assert warned == [True] or not words
    report, shown = ledger(run)
    samples, updates = left
    assert (report.skipped, report.skipped_updates, report.skips) == (samples, updates, {why: samples})
    assert report.used + samples == 12 * 8
    assert (
        f"{samples} samples of {updates} skipped update changed nothing, by rule:\n    {samples}: {why}"
        in shown
    )
    assert "every sample once: " in shown
    story = step_story(load([run]), report, 4)
    assert [s["worker"] for s in story["shares"] if s["skipped"] == why][-1] == "w1"
    assert all(loss == loss for step, loss in losses(run).items() if step > 4)


def test_a_round_that_is_thrown_away_is_told(corpus: Path, tmp_path: Path) -> None:
    """A worker's parameters become NaN: what all have done since the last agreement goes with its change."""
    run = tmp_path / "run"
    said = train(run, corpus, "nan-parameter", "--strategy", "diloco(every=2)")
    change = f"steps 3 to 4: loss .*: update skipped: the change of {W1} was not finite, in its own steps"
    assert re.search(change, said)
    assert re.search(OWN, said)
    report, shown = ledger(run)
    assert (report.skipped, report.skipped_updates) == (24, 2)  # one of w1's own is among them
    assert report.used == 12 * 6
    assert "every sample once: 72 samples in 8 steps" in shown
    assert summary(run)["skipped_steps"] == 1


def test_with_the_fixed_order_too(corpus: Path, tmp_path: Path) -> None:
    assert re.search(GRADIENT, train(tmp_path / "run", corpus, "nan-gradient", "--reproducible"))
    assert ledger(tmp_path / "run")[0].skipped == 12


def train(run: Path, corpus: Path, act: str, *options: object) -> str:
    """Eight steps of two workers; in the fourth something becomes NaN on the second."""
    traps = [{"seat": "w1", "place": "forward", "step": 3, "act": act}]
    given = [*TINY, "--steps", 8, *options]
    with Job(run, corpus, *given, traps=traps, workers=2, base=()) as job:
        return job.end()


def ledger(run: Path) -> tuple[Report, str]:
    report = audit(load([run]))
    assert report.ok
    return report, text(report)


class Steps:
    """A division of which every step was computed by w0 alone."""

    def __init__(self) -> None:
        self.done: dict[int, tuple[int, dict[str, list[tuple[int, int]]], int]] = {}

    def committed(self, steps: int) -> Iterator[tuple[int, int, dict[str, list[tuple[int, int]]], int]]:
        for step in sorted(step for step in self.done if step < steps):
            yield (step, *self.done.pop(step))

    def take_dropped(self, step: int) -> dict[str, list[tuple[int, int]]]:
        return {}


def kept(output: Path, notes_after: dict[int, LeftOut], *, steps: int, again_at: int | None = None) -> Report:
    """The report of a ledger whose writer hears of notes after steps; `again_at`: begun anew there, once."""
    world: Any = SimpleNamespace(rank=0, gather=lambda value: [value])
    books = Books(output, "w0", Batches(n=1000, global_batch=8, seed=0, micro_batch=2), lambda event: None)
    books.begin_attempt(world, 0)
    division: Any = Steps()
    seats, step = [Seat(id="w0", host="a")], 0
    while step < steps:
        division.done[step] = (1, {"w0": [(0, 4)]}, 8)
        step += 1
        if note := notes_after.get(step):
            books.leave_out([note], seats)
        method: Any = SimpleNamespace(committed=step)
        books.commit(division, method, seats)
        if again_at is not None and step == steps - 1:
            books.begin_attempt(world, again_at)
            step, again_at = again_at, None
    books.sync()
    return audit(load([output]))


def test_what_is_known_two_steps_later_is_told_all_the_same(tmp_path: Path) -> None:
    """On a GPU the norm of a step is read when the next one has ended, and its note is there at the end of the one after."""
    note = LeftOut(step=3, loss=1.0, norm=math.nan, whose=Unsound((0,)), steps=(3,))
    report = kept(tmp_path, {6: note}, steps=8)
    assert (report.skipped, report.skipped_updates) == (8, 1)
    assert report.ok


def test_a_note_waits_for_its_steps_in_a_later_attempt(tmp_path: Path) -> None:
    """What was told before is of steps that do not count any more."""
    note = LeftOut(step=4, loss=1.0, norm=math.nan, whose=Unsound((0,)), steps=(2, 3, 4))
    report = kept(tmp_path, {3: note}, steps=9, again_at=2)
    assert (report.skipped, report.skipped_updates) == (24, 1)
    assert report.ok
