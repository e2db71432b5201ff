"""Verifies ledgers: that every sample of every epoch was used exactly once, and by whom; says what was not.

Independent of the writers: it reads the files of all workers, lays them over each other, and recomputes from the order's
definition which samples the steps stand for.

Which line counts where several tell of a step is decided in `manyhands.train.ledger_merge`. The cost goes with the changes
of words, not with the steps; counting samples goes with their number (numpy).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.core.errors import DataError, UsageError
from manyhands.train.ledger import Batches, File, Spans, files, read
from manyhands.train.ledger_merge import Interval, Told, claims_of, counted_through, cover, intervals, parts
from manyhands.train.ledger_order import order_of, plain_order, samples_of_pass

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from manyhands.data.sample import Order

LISTED = 1000  # problems kept; all are counted


@dataclass(frozen=True)
class Problem:
    """What is wrong with the steps `first` … `last`.

    Attributes:
        kind: "lost" (nobody computed the places), "doubled", "disagree" (workers tell different things), "missing"
            (no line tells of the step), "impossible" (places or rows that the step does not have).
        places: half-open, of each of the steps.
        who: seats concerned.
    """

    kind: str
    first: int
    last: int
    places: tuple[int, int] | None
    who: tuple[str, ...]
    samples: int
    detail: str


@dataclass
class Share:
    """What one worker did."""

    seat: str
    steps: int = 0
    samples: int = 0
    first: int = 0
    last: int = 0
    dropped: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Change:
    """A membership epoch: who took part from `step` on."""

    step: int
    attempt: int
    epoch: int
    seats: tuple[str, ...]


@dataclass
class Report:
    """What the ledgers tell.

    Attributes:
        steps: the last step that counts.
        elsewhere: the steps before the first that is told: those of another output, whose run this one continues.
        used: samples used, with repetitions. `lost`, `doubled`: samples that were not used, used again.
        dropped: samples left out by rule, with the reason recorded.
        skipped: samples, each computed once, of the `skipped_updates` that were left out because something was not finite;
            `skips` counts them by reason. They are not among `used`.
        unfinished: samples of the last steps that workers that do not wait for each other had not come to.
        void: steps that were committed and given up (resumed before them, or lost with all who had applied them).
        passes: over the data, so far. `counted`: sample numbers were counted, not places alone.
        order: of the samples, where it can be found again.
    """

    batches: Batches
    order: Order | None = None
    steps: int = 0
    elsewhere: int = 0
    used: int = 0
    lost: int = 0
    doubled: int = 0
    dropped: int = 0
    skipped: int = 0
    skipped_updates: int = 0
    unfinished: int = 0
    void: int = 0
    passes: float = 0.0
    counted: bool = True
    shares: dict[str, Share] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    attempts: list[tuple[int, int]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    problem_count: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    skips: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problem_count


def load(outputs: Sequence[Path]) -> list[File]:
    """All ledger files of the directories, their attempts counted through where one continues another.

    Raises:
        UsageError: there is no ledger, or directories that continue each other are not in that order.
        DataError: damaged beyond use, or foreign.
    """
    each: list[list[File]] = []
    for output in outputs:
        paths = files(output)
        if not paths:
            raise UsageError(
                f"{output} holds no ledger" if output.exists() else f"{output} does not exist",
                "a run writes OUTPUT/ledger/*.jsonl from its first step on",
                "give the --output directory of a run",
            )
        each.append([read(path) for path in paths])
    found = counted_through(each)
    if not any(file.attempts for file in found):
        raise DataError(
            f"{', '.join(str(o) for o in outputs)}: the ledger is empty",
            "its files begin with a whole line",
            "the run ended before its first step; start it again",
        )
    return found


def audit(found: Sequence[File]) -> Report:
    """Lay the files over each other and verify. Raises `DataError` where they are not of one job."""
    batches = _batches(found)
    report = Report(batches, notes=[note for file in found for note in file.notes])
    report.order = order_of(batches, {file.path.parent for file in found})
    report.attempts = sorted({(a.number, a.resumed_at) for f in found for a in f.attempts})
    goes_on = {a.number for file in found for a in file.attempts if a.goes_on}
    state = _State(report, list(intervals(found)), goes_on)
    state.go()
    return report


def _batches(found: Sequence[File]) -> Batches:
    """What all attempts that count have in common. Raises `DataError`."""
    heads = sorted(
        ((a.number, a.resumed_at, a.batches, f.path) for f in found for a in f.attempts), key=lambda h: -h[0]
    )
    _, _, newest, path = heads[0]
    since = min((resumed for number, resumed, _, _ in heads if number == heads[0][0]), default=0)
    for number, resumed, batches, other in heads:
        if since == 0 and number != heads[0][0]:
            break  # begun anew: nothing before counts
        if batches != newest:
            raise DataError(
                f"{other} (attempt {number}) and {path} (attempt {heads[0][0]}) tell of different batches: "
                f"{batches} and {newest}",
                "the workers and attempts of one job take the same samples in the same order",
                "give directories of one job",
            )
        since = min(since, resumed)
    return newest


class _State:
    """The sweep over the intervals."""

    def __init__(self, report: Report, found: Sequence[Interval], goes_on: set[int]) -> None:
        self.report, self.found, self.batches = report, found, report.batches
        self.goes_on = goes_on
        self.order = plain_order(report.batches)
        self.per_epoch = self.order.steps_per_epoch
        self.kept = self.order.seen(self.per_epoch)  # samples of one pass
        self.times: NDArray[np.uint8] | None = None
        self.pass_ = 0
        self.skipped_updates: set[tuple[int, str]] = set()  # (last step, whose own)

    def go(self) -> None:
        import numpy as np

        self.times = np.zeros(self.kept, dtype=np.uint8)
        report = self.report
        # no attempt was before the first one in its output: what it goes on from another output's ledger tells
        report.elsewhere = min((at for number, at in report.attempts if number == 1), default=0)
        expected = report.elsewhere + 1
        valid = [each for each in self.found if each.valid]
        whole = [i.last for i in valid if not self._open(i)]
        end_of_whole = max(whole, default=0)
        for interval in self.found:
            if any(self._given_up(t, interval.first) for t in interval.void):
                report.void += interval.last - interval.first + 1
            if not interval.valid:
                continue
            if interval.first > expected:
                self._missing(expected, interval.first - 1)
            expected = interval.last + 1
            for first, last in self._pieces(interval.first, interval.last):
                self._steps(interval, first, last, open_=interval.first > end_of_whole)
        report.steps = expected - 1
        self._turn(None)
        report.passes = self.order.epoch(report.steps) - self.order.epoch(report.elsewhere)
        report.skipped_updates = len(self.skipped_updates)
        self._membership(valid)

    def _given_up(self, told: Told, step: int) -> bool:
        """Whether words that are void were not only told again by an attempt that went on."""
        later = [
            number
            for number, resumed_at in self.report.attempts
            if number > told.attempt and resumed_at < step
        ]
        return not later or not self.goes_on.issuperset(later)

    def _pieces(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Parts of first … last whose steps have equally many rows and lie in one pass over the data."""
        while first <= last:
            in_pass = (first - 1) % self.per_epoch
            end = first + self.per_epoch - in_pass - 1  # the pass's last step
            if self.order.rows(end - 1) != self.order.rows(first - 1):
                end -= 1
            yield first, min(end, last)
            first = min(end, last) + 1

    def _open(self, interval: Interval) -> bool:
        """Whether workers that go their own pace are not through with it."""
        if any(not t.run.alone for t in interval.valid):
            return False
        n_places = -(-self.order.rows(interval.first - 1) // self.batches.micro_batch)
        return any(n != 1 for _, n, _ in cover(claims_of(interval.valid)[0], n_places))

    def _steps(self, interval: Interval, first: int, last: int, *, open_: bool) -> None:
        report, count = self.report, last - first + 1
        rows = self.order.rows(first - 1)
        n_places = -(-rows // self.batches.micro_batch)
        claims, unequal = claims_of(interval.valid)
        for seat, words in unequal:
            self._problem("disagree", first, last, None, (seat,), 0, f"what {seat} computed: {words}")
        wrong = [t for t in interval.valid if t.run.rows != rows]
        if wrong:
            who = tuple(sorted({t.seat for t in wrong}))
            self._problem(
                "impossible", first, last, None, who, 0, f"{wrong[0].run.rows} rows told, the step has {rows}"
            )
        for t in interval.again:
            for seat, spans in t.run.who.items():
                for span in spans:
                    n = self._rows_in(span, rows)
                    detail = (
                        f"{t.seat} applied it in membership epoch {t.run.epoch}, and lived to apply it again"
                    )
                    self._problem("doubled", first, last, span, (seat,), n * count, detail)
                    report.doubled += n * count
        pieces = cover(claims, n_places)
        plain = all(n == 1 for _, n, _ in pieces) and not interval.again
        base = self._turn(first)
        if plain:
            self.times[base : base + rows + (count - 1) * self.batches.global_batch] += 1  # type: ignore[index]
        for span, n, seats in pieces:
            here = self._rows_in(span, rows)
            if span[0] >= n_places:
                self._problem("impossible", first, last, span, seats, 0, f"the step has {n_places} places")
                continue
            if n == 0 and open_:
                report.unfinished += here * count
            elif n == 0:
                report.lost += here * count
                self._problem("lost", first, last, span, (), here * count, "nobody computed it")
            elif n > 1:
                report.doubled += here * count * (n - 1)
                self._problem("doubled", first, last, span, seats, here * count, "computed more than once")
            if not plain:
                self._mark(base, count, span, n + (1 if interval.again else 0))
        self._give(interval, first, last, rows)

    def _give(self, interval: Interval, first: int, last: int, rows: int) -> None:
        """Credit the workers."""
        count = last - first + 1
        for (seat, dropped, why), spans in parts(interval.valid).items():
            share = self.report.shares.setdefault(seat, Share(seat))
            n = sum(self._rows_in(span, rows) for span in spans)
            if dropped:
                share.dropped += n * count
                self.report.dropped += n * count
                self.report.reasons[why] = self.report.reasons.get(why, 0) + n * count
            elif n:
                skipped = self._skipped(interval, seat, spans, rows, count)
                share.skipped += skipped * count
                self.report.skipped += skipped * count
                self.report.used += (n - skipped) * count
                share.samples += (n - skipped) * count
                share.steps += count
                share.first = min(first, share.first or first)
                share.last = max(last, share.last)

    def _skipped(self, interval: Interval, seat: str, spans: Spans, rows: int, count: int) -> int:
        """How many rows of these places of each of `count` steps, which `seat` has computed, were in an update left out."""
        places = {place for span in spans for place in range(*span)}
        total = 0
        for t in sorted(interval.skipped, key=lambda t: not t.run.alone):
            here = places.intersection(p for span in t.run.who.get(seat, ()) for p in range(*span))
            if not here:
                continue
            places -= here  # several tell of it; of a round that is thrown away own updates may have been left out before
            n = sum(self._rows_in((place, place + 1), rows) for place in here)
            self.report.skips[t.run.why] = self.report.skips.get(t.run.why, 0) + n * count
            self.skipped_updates.add((t.run.update, seat if t.run.alone else ""))
            total += n
        return total

    def _rows_in(self, span: tuple[int, int], rows: int) -> int:
        size = self.batches.micro_batch
        return max(0, min(span[1] * size, rows) - min(span[0] * size, rows))

    def _mark(self, base: int, count: int, span: tuple[int, int], n: int) -> None:
        size, step = self.batches.micro_batch, self.batches.global_batch
        assert self.times is not None
        for i in range(count):
            begin = base + i * step
            end = min(begin + step, self.kept)
            self.times[min(begin + span[0] * size, end) : min(begin + span[1] * size, end)] += min(n, 200)

    def _missing(self, first: int, last: int) -> None:
        lost = self.order.seen(last) - self.order.seen(first - 1)
        self.report.lost += lost
        self._problem("missing", first, last, None, (), lost, "no worker's file tells of it")
        for begin, _ in self._pieces(first, last):
            self._turn(begin)

    def _turn(self, step: int | None) -> int:
        """Go to the pass over the data that `step` is in (None: the end); its first sample's position there."""
        pass_ = self.pass_ + 1 if step is None else (step - 1) // self.per_epoch
        if pass_ != self.pass_:
            self._count()
            self.pass_ = pass_
        return 0 if step is None else self.order.seen(step - 1) - pass_ * self.kept

    def _count(self) -> None:
        """Close a pass: count its samples by their numbers."""
        import numpy as np

        assert self.times is not None
        if self.report.order is None:
            self.report.counted = False
        elif self.times.any():
            used = np.zeros(self.batches.n, dtype=np.uint8)
            for begin, ids in samples_of_pass(self.batches, self.pass_, self.kept, self.report.order):
                np.add.at(used, ids, self.times[begin : begin + len(ids)])
            twice = int((used > 1).sum())
            if int((used > 0).sum()) != int((self.times > 0).sum()) or twice != int((self.times > 1).sum()):
                first = self.pass_ * self.per_epoch + 1
                detail = f"{twice} sample numbers occur more than once in pass {self.pass_ + 1} over the data"
                self._problem("doubled", first, first + self.per_epoch - 1, None, (), twice, detail)
        self.times[:] = 0

    def _membership(self, valid: Sequence[Interval]) -> None:
        seen: tuple[int, int] | None = None
        for interval in valid:
            words = [t for t in interval.valid if not t.run.dropped]
            if not words:
                continue
            key = max((t.attempt, t.run.epoch) for t in words)
            if key != seen and (seen is None or key > seen):
                self.report.changes.append(Change(interval.first, *key, ()))
                seen = key
            if (
                key == seen
            ):  # an epoch's first steps also have places of those who were lost in them: the last tell
                seats = sorted(
                    {s for t in interval.valid if (t.attempt, t.run.epoch) == key for s in t.run.who}
                )
                self.report.changes[-1] = dataclasses.replace(self.report.changes[-1], seats=tuple(seats))

    def _problem(
        self,
        kind: str,
        first: int,
        last: int,
        places: tuple[int, int] | None,
        who: tuple[str, ...],
        samples: int,
        detail: str,
    ) -> None:
        self.report.problem_count += 1
        if len(self.report.problems) < LISTED:
            self.report.problems.append(Problem(kind, first, last, places, who, samples, detail))
