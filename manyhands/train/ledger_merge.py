"""Lays the ledger files of all workers over each other: which line counts for which steps.

The files are cut at the steps where any of them changes its words.

*Which line counts.* What an attempt committed after the step that a later attempt resumed at is void. Of several lines for
one step the one of the last membership epoch counts, and an earlier one is void, where all who wrote it had ended
before they handed on the step's result: then the step was done again from the state before it. An earlier line of a
worker that lived on means that the step was applied twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from manyhands.core.errors import UsageError
from manyhands.train.ledger import File, Run, Spans

Claims = list[tuple[int, int, str]]


@dataclass(frozen=True)
class Told:
    """A line's words on some step, with where they stand."""

    seat: str
    attempt: int
    run: Run


@dataclass(frozen=True)
class Interval:
    """Steps for which no file changes its words: what counts of them, and what does not."""

    first: int
    last: int
    valid: tuple[Told, ...]
    void: tuple[Told, ...]
    again: tuple[Told, ...]
    skipped: tuple[Told, ...] = ()  # of what counts: its update was left out


def counted_through(outputs: Sequence[Sequence[File]]) -> list[File]:
    """The files of several directories. Where a run was continued in another one, attempts are counted from 1 again there: they
    get numbers after those before. Hosts of one job tell of the same attempts, and keep theirs.

    Raises:
        UsageError: a directory after another one begins with the first step.
    """
    stories: list[
        tuple[dict[int, int], int]
    ] = []  # where each attempt went on, by its number there; what is added to that
    for files in outputs:
        begun = {attempt.number: attempt.resumed_at for file in files for attempt in file.attempts}
        if not begun:
            continue
        same = [s for s in stories if all(s[0].get(number, at) == at for number, at in begun.items())]
        if not same:
            if stories and begun[min(begun)] == 0:
                raise UsageError(
                    f"{files[0].path.parent.parent} begins with the first step, and those before it are another run's",
                    "a run's directory comes before those that it was continued in",
                    "give them in that order; runs that do not continue each other, one by one",
                )
            same = [({}, max((max(known) + more for known, more in stories), default=0))]
            stories += same
        known, more = same[0]
        known |= begun
        for file in files:
            for attempt in file.attempts:
                attempt.number += more
    return [file for files in outputs for file in files]


def intervals(found: Sequence[File]) -> Iterator[Interval]:
    """Cut all steps where any file changes its words, in order; steps that nobody tells of are left out."""
    limits = _limits(found)
    told: list[tuple[int, int, Told]] = []
    for file in found:
        for attempt in file.attempts:
            told += [(r.first, r.last, Told(file.seat, attempt.number, r)) for r in attempt.runs]
    newest = _newest_epochs(found)
    edges = sorted(
        {first for first, _, _ in told}
        | {last + 1 for _, last, _ in told}
        | {limit + 1 for limit in limits.values() if limit is not None}
    )
    told.sort(key=lambda each: each[0])
    active: list[tuple[int, int, Told]] = []
    at = 0
    for begin, end in itertools.pairwise(edges):
        active = [each for each in active if each[1] >= begin]
        while at < len(told) and told[at][0] <= begin:
            active.append(told[at])
            at += 1
        if not active:
            continue
        here = [each[2] for each in active]
        kept = [t for t in here if (limit := limits[t.attempt]) is None or begin <= limit]
        void = [t for t in here if t not in kept]
        words = [t for t in kept if not t.run.skipped]
        valid, given_up, again = _last_word(words, newest)
        # a word and what is said of its update stand in the same file
        count = {(t.seat, t.attempt, t.run.epoch) for t in valid}
        skipped = [t for t in kept if t.run.skipped and (t.seat, t.attempt, t.run.epoch) in count]
        void = [t for t in void if not t.run.skipped]
        yield Interval(begin, end - 1, tuple(valid), tuple(void + given_up), tuple(again), tuple(skipped))


def _limits(found: Sequence[File]) -> dict[int, int | None]:
    """Up to which step an attempt counts."""
    resumed: dict[int, int] = {}
    for file in found:
        for attempt in file.attempts:
            resumed[attempt.number] = min(attempt.resumed_at, resumed.get(attempt.number, attempt.resumed_at))
    limits: dict[int, int | None] = {}
    limit: int | None = None
    for number in sorted(resumed, reverse=True):
        limits[number] = limit
        limit = resumed[number] if limit is None else min(limit, resumed[number])
    return limits


def _newest_epochs(found: Sequence[File]) -> dict[tuple[str, int], int]:
    """The last membership epoch that a worker lived to tell of, by (seat, attempt)."""
    newest: dict[tuple[str, int], int] = {}
    for file in found:
        for attempt in file.attempts:
            key = file.seat, attempt.number
            newest[key] = max([newest.get(key, 0), *(run.epoch for run in attempt.runs)])
    return newest


def _last_word(
    told: Sequence[Told], newest: Mapping[tuple[str, int], int]
) -> tuple[list[Told], list[Told], list[Told]]:
    """(what counts, what was lost with its writers, what was applied a second time)."""
    words = [t for t in told if not t.run.dropped and not t.run.alone]
    rest = [t for t in told if t.run.dropped or t.run.alone]
    if not words:
        return rest, [], []
    last = max((t.attempt, t.run.epoch) for t in words)
    valid = [t for t in words if (t.attempt, t.run.epoch) == last]
    earlier = [t for t in words if (t.attempt, t.run.epoch) != last]
    gone = [t for t in earlier if t.attempt == last[0] and newest[t.seat, t.attempt] < last[1]]
    return valid + rest, gone, [t for t in earlier if t not in gone]


def cover(claims: Claims, n_places: int) -> list[tuple[tuple[int, int], int, tuple[str, ...]]]:
    """Cut ``range(n_places)``, and what is claimed beyond, into (places, how often claimed, by whom).

    >>> cover([(0, 2, "a"), (1, 3, "b")], 4)
    [((0, 1), 1, ('a',)), ((1, 2), 2, ('a', 'b')), ((2, 3), 1, ('b',)), ((3, 4), 0, ())]
    """
    edges = sorted({0, n_places} | {c[0] for c in claims} | {c[1] for c in claims})
    found = []
    for begin, end in itertools.pairwise(edges):
        seats = tuple(seat for first, last, seat in claims if first <= begin and end <= last)
        if seats or begin < n_places:
            found.append(((begin, end), len(seats), seats))
    return found


def parts(told: Sequence[Told]) -> dict[tuple[str, bool, str], Spans]:
    """Each seat's places, told by anybody: (seat, dropped, why) -> spans."""
    found: dict[tuple[str, bool, str], Spans] = {}
    for t in told:
        for seat, spans in t.run.who.items():
            found.setdefault((seat, t.run.dropped, t.run.why), spans)
    return found


def claims_of(told: Sequence[Told]) -> tuple[Claims, list[tuple[str, str]]]:
    """All claims of places; and the seats of which different things are told."""
    found = parts(told)
    unequal = {}
    for t in told:
        for seat, spans in t.run.who.items():
            if found[seat, t.run.dropped, t.run.why] != spans:
                unequal[seat] = (
                    f"{_text(found[seat, t.run.dropped, t.run.why])} and, says {t.seat}, {_text(spans)}"
                )
    claims = [(first, end, seat) for (seat, _, _), spans in found.items() for first, end in spans]
    return claims, sorted(unequal.items())


def _text(spans: Spans) -> str:
    return ", ".join(f"{a}–{b - 1}" if b > a + 1 else str(a) for a, b in spans) or "nothing"
