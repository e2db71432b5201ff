"""What one worker tells the ledger, over all attempts: which steps were committed, and what of them no update has used."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.train.division import Division, spans_of
from manyhands.train.ledger import Ledger, next_attempt
from manyhands.train.ledger_order import keep_sizes
from manyhands.train.leftout import LeftOut

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from manyhands.core.events import Emit
    from manyhands.core.membership import Seat
    from manyhands.train.ledger import Batches
    from manyhands.train.leftout import Note
    from manyhands.train.method import Method
    from manyhands.train.standing import Standing
    from manyhands.wire.world import World

DROPPED = "its worker was lost before the round's end (--lost-round drop)"
UNUSED = "its push was staler than the servers take (discard)"
LATE = 3  # commits until it is known of a step on a GPU whether its update was left out

_Told = dict[int, tuple[int, Mapping[str, Sequence[tuple[int, int]]], int]]  # by step: epoch, who, rows


class Books:
    """The ledger of a worker.

    Args:
        output: where the run writes.
        me: this worker's seat.
        batches: of the job.
        emit: hears of a disk that does not take lines.
        sizes: what the order of samples goes by, for whoever verifies it: rank 0 keeps them beside the ledger.

    Attributes:
        attempt: its number, the step that it continues from, and whether nothing is given up.
    """

    def __init__(
        self,
        output: Path,
        me: str,
        batches: Batches,
        emit: Emit,
        sizes: Mapping[str, NDArray[np.int64]] | None = None,
    ) -> None:
        self._sizes = sizes or {}
        self._output, self._me, self._batches, self._emit = output, me, batches, emit
        self.attempt = (0, 0, False)
        self._ledger: Ledger | None = None
        self._left: list[
            tuple[LeftOut, str]
        ] = []  # updates that were left out, of steps not told of yet, and why
        self._recent: deque[tuple[LeftOut, str]] = deque(maxlen=4)
        self._told: deque[_Told] = deque([{}], maxlen=LATE)  # steps of the last commits

    def begin_attempt(self, world: World, steps: int, *, goes_on: bool = False) -> None:
        """From here on it counts anew: what was committed after this step before is void. Collective."""
        number = next_attempt(self._output) if world.rank == 0 else 0
        if self._sizes and world.rank == 0:
            keep_sizes(self._output, self._sizes)
        self.attempt = (int(world.gather(number)[0]), steps, goes_on)
        again = [each for each in self._recent if goes_on and each[0].places is not None]
        self._told = deque([{}], maxlen=LATE)
        if not goes_on:
            self._recent.clear()
        self._left = [each for each in again if each[0].step >= steps]  # it is told once more
        self.close()
        self._open()

    def take_part(self, attempt: Sequence[int]) -> None:
        """The others are in the middle of this one."""
        number, resumed_at, goes_on = attempt
        self.attempt = (number, resumed_at, bool(goes_on))
        if self._ledger is None:
            self._open()

    def leave_out(self, notes: Sequence[Note], seats: Sequence[Seat]) -> None:
        """Updates were left out: that is told with their steps."""
        self._left += [
            (note, note.why(seats)) for note in notes if isinstance(note, LeftOut) and not note.part
        ]

    def commit(self, division: Division, method: Method, seats: Sequence[Seat]) -> None:
        """Steps whose work is in the agreed parameters by now."""
        alone, me = bool(getattr(method, "alone", False)), self._me
        silent = {seat.id for seat in seats} - {me} if alone else set()  # each of them tells for itself
        told: _Told = {}
        for step, epoch, who, rows in division.committed(method.committed):
            if self._ledger is None:
                continue
            said = {seat: spans for seat, spans in who.items() if seat not in silent}
            if places := set(getattr(method, "unused", ())):
                mine = [place for span in said[me] for place in range(*span)]
                said[me] = spans_of([place for place in mine if place not in places])
                unused = {me: spans_of(sorted(places))}
                self._ledger.dropped(step + 1, epoch=epoch, who=unused, rows=rows, why=UNUSED)
            self._ledger.commit(step + 1, epoch=epoch, who=said, rows=rows, alone=alone)
            if left_out := division.take_dropped(step):
                self._ledger.dropped(step + 1, epoch=epoch, who=left_out, rows=rows, why=DROPPED)
            told[step] = epoch, said, rows
        if told:
            self._told.append(told)
        self._tell_left_out()

    def left_out(
        self, division: Division, standing: Standing, settled: int, here: Collection[str], why: str
    ) -> None:
        """Who goes on has no use for what was computed since the last agreement, and is told by all of them alike.

        Of the steps up to `settled`, where pairs have agreed and not yet heard of the others, it is what those computed
        that are not among `here`: the seats that go on from their own state.
        """
        told: _Told = {}
        for step, epoch, who, rows in division.committed(standing.steps):
            if self._ledger is None:
                continue
            whole, some = step < standing.committed, step < settled
            used = {seat: spans for seat, spans in who.items() if whole or (some and seat in here)}
            unused = {seat: spans for seat, spans in who.items() if seat not in used}
            if used:
                self._ledger.commit(step + 1, epoch=epoch, who=used, rows=rows)
                told[step] = epoch, used, rows
            if unused:
                self._ledger.dropped(step + 1, epoch=epoch, who=unused, rows=rows, why=why)
        if told:
            self._told.append(told)
        self._tell_left_out()
        self._left = [each for each in self._left if each[0].step >= standing.steps]

    def tell_of_last(
        self, standing: Standing, method: Method, seats: Sequence[Seat], *, epoch: int, rows: int
    ) -> None:
        """Where each tells for itself: the last step that all have done, which those who are gone, or I, may not have told."""
        here = {seat.id for seat in seats} - {self._me}
        done = standing.held.get(standing.steps - 1, {})
        said = {seat: spans_of(sorted(places)) for seat, places in done.items() if seat not in here}
        if said and self._ledger is not None and getattr(method, "alone", False):
            self._ledger.commit(standing.steps, epoch=epoch, who=said, rows=rows, alone=True)

    def _tell_left_out(self) -> None:
        """After the steps themselves: of a GPU it is known when the next step has ended."""
        waiting = []
        for left, why in self._left:
            known = {step: told[step] for step in left.steps for told in self._told if step in told}
            if not set(left.steps) <= known.keys():
                waiting.append((left, why))
                continue
            for step, (epoch, who, rows) in sorted(known.items()):
                if left.places is not None and step not in left.places:
                    continue
                whose = who if left.places is None else {self._me: spans_of(sorted(left.places[step]))}
                assert self._ledger is not None
                self._ledger.left_out(
                    step + 1,
                    epoch=epoch,
                    who=whose,
                    rows=rows,
                    why=why,
                    update=left.step + 1,
                    alone=left.places is not None,
                )
            self._recent.append((left, why))
        self._left = [each for each in waiting if each[0].step >= min(self._told[0], default=0)]

    def _open(self) -> None:
        number, resumed_at, goes_on = self.attempt
        self._ledger = Ledger(
            self._output,
            self._me,
            self._batches,
            attempt=number,
            resumed_at=resumed_at,
            goes_on=goes_on,
            emit=self._emit,
        )

    def sync(self) -> None:
        """To disk, before a checkpoint becomes durable."""
        if self._ledger is not None:
            self._ledger.sync()

    def close(self) -> None:
        if self._ledger is not None:
            self._ledger.close()
