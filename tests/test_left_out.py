"""Updates that are left out because one worker's numbers are not finite: it is named, and the ledger tells of their samples."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import TINY, events, losses, summary
from test_exactness import SEQ, make, summed
from test_methods import feed_of
from trapped import Job

from manyhands.cli.ledger import step_story, text
from manyhands.core.config import from_text
from manyhands.core.errors import ManyhandsError
from manyhands.core.hardware import hostname
from manyhands.core.membership import Seat
from manyhands.train.audit import Report, audit, load
from manyhands.train.books import Books
from manyhands.train.header import Unsound
from manyhands.train.ledger import Batches
from manyhands.train.leftout import ALONE, Heard, LeftOut, Spoilt
from manyhands.train.replica import Replica

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


def test_whoever_alone_is_not_finite_is_given_up_and_the_others_go_on(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    traps = [{"seat": "w1", "place": "forward", "step": step, "act": "nan"} for step in (2, 3, 4, 5)]
    given = [*TINY, "--steps", 8, "--restarts", 0]
    with Job(run, corpus, *given, traps=traps, workers=2, base=()) as job:
        said = job.end()
    (lost,) = events(run, "lost")
    assert (lost["seat"], lost["how"]) == ("w1", "failed")
    assert re.search(f"{W1} is given up after step 5: its losses were not finite in 3 updates in a row", said)
    report, _ = ledger(run)
    assert (report.skipped, report.skipped_updates) == (36, 3)
    assert report.used == 12 * 5


@pytest.mark.parametrize(
    ("strategy", "steps", "given"),
    [("ddp", 3, "losses"), ("eager", 4, "losses"), ("diloco(every=2)", 6, "changes")],
)
def test_each_concludes_alike_who_alone_was_not_finite(
    fleets: Any, strategy: str, steps: int, given: str
) -> None:
    first, second = fleets(2, "shared").run(spoilt_run, {"strategy": strategy, "steps": steps})
    assert first == (0, "")
    assert second == (ALONE, given)


def spoilt_run(world: Any, case: dict[str, Any]) -> tuple[int, str]:
    """The second worker's loss is never finite; in local steps its parameters are not. What each has counted of itself."""
    replica = Replica(make(), from_text("strategies", case["strategy"]), world.wire, targets_per_row=SEQ)
    feed, spoilt = feed_of(world, {}), Spoilt()

    def poisoned(model: Any, batch: Any) -> Any:
        if world.rank == 1 and "diloco" in case["strategy"]:
            next(iter(model.parameters())).data.fill_(math.nan)
        loss, count = summed(model, batch)
        return loss * (math.nan if world.rank == 1 else 1.0), count

    for step in range(case["steps"]):
        replica.step(feed.part(step), poisoned)
        spoilt.hear(replica.take_notes(), world.rank, SEATS)
    replica.close()
    return spoilt.times, spoilt.given


SEATS = [Seat(id=f"w{rank}", host="here") for rank in range(3)]
NAN = math.nan


def left(step: int, *ranks: int, first: int | None = None, **more: Any) -> LeftOut:
    steps = range(step if first is None else first, step + 1)
    return LeftOut(step=step, loss=NAN, norm=NAN, whose=Unsound(ranks), steps=steps, **more)


def counted(*notes: LeftOut | Heard, rank: int = 1, seats: Sequence[Seat] = SEATS) -> int:
    spoilt = Spoilt()
    for note in notes:
        spoilt.hear([note], rank, seats)
    return spoilt.times


def test_only_updates_in_a_row_that_nobody_else_has_spoilt_count() -> None:
    assert counted(left(4, 1), left(5, 1), left(6, 1)) == 3
    assert counted(left(4, 1), left(5, 1), left(7, 1)) == 1  # the one between was made
    assert counted(left(4, 1), left(5, 0, 1), left(6, 1)) == 1
    assert counted(left(4, 1), left(5, 2), left(6, 1)) == 1
    assert counted(left(4, 1), left(5, 1), rank=0) == 0
    assert counted(left(4, 0), left(5, 0), rank=0, seats=SEATS[:1]) == 0  # there is nobody else
    assert counted(left(4, 1), left(5), left(6, 1)) == 1  # nobody was named
    assert counted(left(4, 1), left(5, 1, places={5: [0]})) == 1  # an own update: others know nothing of it
    assert counted(left(3, 1, first=0), left(7, 1, first=4)) == 2  # rounds
    # fragments that agree in turn: what they have in common is counted once
    assert counted(left(3, 1, first=0), left(5, 1, first=2), left(7, 1, first=4)) == 2
    # known a step later, on a GPU, and then that the update was left out
    late = [
        note for s in (4, 5, 6) for note in (Heard(step=s + 1, gradients=[1], at=s), left(s - 1), left(s))
    ]
    assert counted(*late) == 3
    assert counted(Heard(step=5, left_out={1: 3})) == 0


def test_who_is_given_up_says_so_unless_nobody_would_go_on() -> None:
    spoilt = Spoilt()
    spoilt.hear([left(step, 1) for step in (4, 5)], 1, SEATS)
    spoilt.leave(1, SEATS)  # not yet
    spoilt.hear([left(6, 1)], 1, SEATS)
    said = r"w1 \(rank 1, here\) is given up after step 7: its losses were not finite in 3 updates in a row, while the others'"
    with pytest.raises(ManyhandsError, match=said):
        spoilt.leave(1, SEATS)
    newcomer = Seat(id="w9", host="here")  # it may not hold the job's state yet
    spoilt.leave(0, [SEATS[1], newcomer])
    with pytest.raises(ManyhandsError, match="is given up"):
        spoilt.leave(1, [SEATS[0], SEATS[1], newcomer])
    spoilt.forget()  # mended
    spoilt.leave(1, SEATS)
    spoilt.hear([left(7, 1)], 1, SEATS)
    assert spoilt.times == 1


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
