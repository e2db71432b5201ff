"""The ledger: which worker computed which part of each committed step (promise 3: every sample once).

Every worker process appends to a file of its own, ``OUTPUT/ledger/SEAT.jsonl``, what the *whole group* did, so the file
of any survivor tells all. Lines::

    {"ledger": 1, "seat": "w0", "attempt": 1, "resumed_at": 0, "n": 5000, "global_batch": 16, "seed": 0,
     "drop_last": false, "order": "shuffled", "micro_batch": 2}                      at the start of each attempt
    {"step": 1, "epoch": 1, "rows": 16, "who": {"w0": [[0, 5]], "w1": [[5, 8]]}}     after the update of step 1
    {"step": 2}                                                                      all else as in the line before
    {"step": 64, "epoch": 2, "rows": 16, "dropped": {"w1": [[5, 8]]}, "why": "…"}    work that no update has used
    {"step": 64, "epoch": 2, "rows": 16, "skipped": {"w0": [[0, 5]]}, "why": "…", "update": 64}   the update was left out

Steps are counted from 1, as in checkpoints' names and the log: step s takes the batch ``Order.ids(s - 1)``. ``epoch`` is
the membership epoch; ``who`` maps seats to half-open ranges of places (micro-batches). An attempt that continues from
checkpoint N voids what earlier attempts committed after step N; with ``"goes_on": true`` in its head it tells again what
stays. ``"skipped"`` says of work that ``who`` tells of that its update, of which ``update`` would have been the last step, was
left out because something was not finite; with ``"alone"`` it was one worker's own. In other lines ``"alone": true`` marks what
a worker says of itself (and of those who are gone) only, where workers do not wait for each other.

A line is one `write`, after the update: SIGKILL leaves it whole or cuts it off at the end of the file, where readers
ignore it. Files are synced when a checkpoint is taken (`Ledger.sync`, *before* the checkpoint becomes durable), so a
resumed job finds all steps up to it. A full disk does not end training: lines are kept and written later.

In train/loop.py::

    who = {seat: [(places.start, places.stop)] for each member, [] where it had nothing to compute}
    ledger.commit(replica.steps, epoch=epoch.number, who=who, rows=part.rows)   # after the update of the step
    ledger.sync()                                                               # in _save, before _submit

Local steps are committed at the agreement that used them, one call a step; what a dead worker had computed since the
last agreement is told by `Ledger.dropped`, unless others redo it.

`manyhands.train.audit` verifies; `manyhands ledger` shows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from manyhands.core.errors import DataError, UsageError
from manyhands.core.events import Emit, Warned, ignore

FORMAT = 1
DIRECTORY = "ledger"
HEAD = b'{"ledger":'

Spans = tuple[tuple[int, int], ...]
Who = Mapping[str, Sequence[tuple[int, int]]]


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Which samples each step takes: what `manyhands.data.sample.Order` needs, and the cut into places.

    Attributes:
        n: samples in the data.
        global_batch: of one step.
        micro_batch: samples of one place.
        order: "shuffled": `Order`'s; of any other the sample numbers are recomputed with what `manyhands.train.ledger_order` keeps.
    """

    n: int
    global_batch: int
    seed: int
    micro_batch: int
    drop_last: bool = False
    order: str = "shuffled"


class Ledger:
    """Writes one worker's file.

    Args:
        output: the job's output directory.
        seat: this worker's id, unique among all that write into `output` in one attempt.
        batches: of the job.
        attempt: the same for all workers of one attempt (also those that join later), higher than any before: rank 0's
            `next_attempt`, told to the others.
        resumed_at: the step that the attempt continues from; 0: from the start.
        goes_on: nothing is given up: what was done beyond that step will be told again.
        emit: hears of a disk that does not take lines.

    Raises:
        DataError: the file is there and is not a ledger.
        OSError: it cannot be opened.
    """

    def __init__(
        self,
        output: Path,
        seat: str,
        batches: Batches,
        *,
        attempt: int,
        resumed_at: int,
        goes_on: bool = False,
        emit: Emit = ignore,
    ) -> None:
        if not seat or "/" in seat or seat.startswith("."):
            raise UsageError(f"seat = {seat!r}", "it names a file", "use letters, digits and hyphens")
        directory = output / DIRECTORY
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"{seat}.jsonl"
        self._emit = emit
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._end = self._whole()
        self._waiting = b""
        self._failing = False
        self._last: tuple[Any, ...] = ()
        head: dict[str, Any] = {"ledger": FORMAT, "seat": seat, "attempt": attempt, "resumed_at": resumed_at}
        head |= {"goes_on": True} if goes_on else {}
        self._append({**head, **asdict(batches)})

    def commit(self, step: int, *, epoch: int, who: Who, rows: int, alone: bool = False) -> None:
        """Step `step` (from 1) was applied: `who` computed which places of its `rows` rows.

        Args:
            who: half-open ranges of places by seat, of every member of the epoch; with `alone` only this worker's.
            alone: the others tell for themselves (asynchronous strategies).
        """
        self._tell(
            step, {"epoch": epoch, "rows": rows, "who": _plain(who), **({"alone": True} if alone else {})}
        )

    def dropped(self, step: int, *, epoch: int, who: Who, rows: int, why: str) -> None:
        """These places of step `step` were computed, or were to be, and no update has used or will use them."""
        self._tell(step, {"epoch": epoch, "rows": rows, "dropped": _plain(who), "why": why})

    def left_out(
        self, step: int, *, epoch: int, who: Who, rows: int, why: str, update: int, alone: bool = False
    ) -> None:
        """These places of step `step`, of which `commit` tells, were to be in an update that was left out by rule.

        Args:
            update: the last step in it.
            alone: the update was one worker's own.
        """
        rest = {"epoch": epoch, "rows": rows, "skipped": _plain(who), "why": why, "update": update}
        self._tell(step, {**rest, **({"alone": True} if alone else {})})

    def sync(self) -> None:
        """Force what was committed to disk, as far as the disk takes it."""
        self._write()
        try:
            os.fsync(self._file)
        except OSError as error:
            self._failed(error)

    def close(self) -> None:
        if self._file >= 0:
            self._write()
            os.close(self._file)
            self._file = -1

    # -- how

    def _tell(self, step: int, rest: dict[str, Any]) -> None:
        same = (step - 1, rest) == self._last
        self._last = (step, rest)
        self._append({"step": step} if same else {"step": step, **rest})

    def _append(self, line: dict[str, Any]) -> None:
        self._waiting += json.dumps(line, separators=(",", ":")).encode() + b"\n"
        self._write()

    def _write(self) -> None:
        if not self._waiting:
            return
        try:
            written = os.write(self._file, self._waiting)
            if written < len(self._waiting):
                os.ftruncate(self._file, self._end)
                raise OSError(0, "no room for a line")
        except OSError as error:
            self._failed(error)
            return
        self._end += written
        self._waiting, self._failing = b"", False

    def _failed(self, error: OSError) -> None:
        if not self._failing:
            self._emit(
                Warned(
                    message=f"lines wait in memory until it can be written: {error.strerror}; the training goes on",
                    where=str(self.path),
                )
            )
        self._failing = True

    def _whole(self) -> int:
        """Cut off what a killed writer or a full disk left of a last line; returns the length."""
        found = self.path.read_bytes()
        end = found.rfind(b"\n") + 1
        if found and not found.startswith(HEAD) and not HEAD.startswith(found):
            raise _foreign(self.path)
        os.ftruncate(self._file, end)
        return end


def next_attempt(output: Path) -> int:
    """The number of the attempt that is about to begin, from 1: one more than the highest in the ledger of `output`."""
    return 1 + max((a.number for path in files(output) for a in read(path).attempts), default=0)


def files(output: Path) -> list[Path]:
    """The ledger's files; empty where there is none."""
    return sorted((output / DIRECTORY).glob("*.jsonl"))


# -- reading


@dataclass
class Run:
    """Successive steps told in the same words."""

    first: int
    last: int
    epoch: int
    rows: int
    who: Mapping[str, Spans]
    dropped: bool
    alone: bool
    why: str
    skipped: bool = False
    update: int = 0


@dataclass
class Attempt:
    """What one worker's file tells of one attempt."""

    number: int
    resumed_at: int
    batches: Batches
    goes_on: bool = False
    runs: list[Run] = field(default_factory=list)


@dataclass
class File:
    """One worker's file. `notes`: what is wrong with it and does no harm."""

    path: Path
    seat: str = ""
    attempts: list[Attempt] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(path: Path) -> File:
    """Read a worker's file.

    A last line without its end is ignored (its writer was killed). After a damaged line nothing is used up to the next
    complete one; both are told in `File.notes`. Raises `DataError`: it is not a ledger, or cannot be read.
    """
    found = File(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}", "a ledger is a readable file", "check the path"
        ) from None
    *lines, rest = data.split(b"\n")
    if rest:
        found.notes.append(f"{path.name}: the last line is cut off and not used")
    if not lines:  # killed before the header was out
        found.seat = path.stem
        return found
    run: Run | None = None
    for number, line in enumerate(lines, 1):
        try:
            record = _record(line)
            if "ledger" in record:
                run = None
                _head(found, record)
                continue
            if not found.attempts:
                raise _foreign(path)
            if len(record) > 1:
                run = _told(record)
                found.attempts[-1].runs.append(run)
            elif run is not None and record["step"] == run.last + 1:
                run.last += 1
            else:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            if not found.attempts:
                raise _foreign(path) from None
            found.notes.append(f"{path.name}, line {number}: damaged, and not used")
            run = None
    return found


def _record(line: bytes) -> dict[str, Any]:
    if line.startswith(b'{"step":') and line[8:-1].isdigit():  # most lines by far
        return {"step": int(line[8:-1])}
    record = json.loads(line)
    if not isinstance(record, dict) or not ("ledger" in record or isinstance(record["step"], int)):
        raise ValueError
    return record


def _head(found: File, record: Mapping[str, Any]) -> None:
    if record["ledger"] != FORMAT:
        raise DataError(
            f"{found.path} is a ledger of format {record['ledger']}",
            f"this version reads format {FORMAT}",
            "use the version that wrote it",
        )
    batches = Batches(**{f.name: record[f.name] for f in fields(Batches)})
    if not (batches.n >= 1 and batches.global_batch >= 1 and batches.micro_batch >= 1):
        raise ValueError
    found.seat = str(record["seat"])
    number, resumed_at, goes_on = record["attempt"], record["resumed_at"], record.get("goes_on", False)
    found.attempts.append(Attempt(int(number), int(resumed_at), batches, bool(goes_on)))


def _told(record: Mapping[str, Any]) -> Run:
    dropped, skipped = "dropped" in record, "skipped" in record
    who = record["dropped" if dropped else "skipped" if skipped else "who"]
    spans = {str(seat): tuple((int(a), int(b)) for a, b in each) for seat, each in who.items()}
    if any(a < 0 or b < a for each in spans.values() for a, b in each):
        raise ValueError
    return Run(
        first=record["step"],
        last=record["step"],
        epoch=int(record["epoch"]),
        rows=int(record["rows"]),
        who={seat: tuple(sorted(span for span in each if span[1] > span[0])) for seat, each in spans.items()},
        dropped=dropped,
        alone=bool(record.get("alone", False)),
        why=str(record.get("why", "")),
        skipped=skipped,
        update=int(record["update"]) if skipped else 0,
    )


def _plain(who: Who) -> dict[str, list[list[int]]]:
    return {seat: [[first, end] for first, end in spans if end > first] for seat, spans in who.items()}


def _foreign(path: Path) -> DataError:
    return DataError(
        f"{path} is not a ledger",
        "its first line tells format, seat and order of the samples",
        "give the --output directory of a run",
    )
