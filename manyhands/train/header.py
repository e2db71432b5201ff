"""What the workers tell each other beside gradients: exact sums, wishes, how long they took, whose numbers are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from manyhands.train.reading import Stopwatch

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Counters


@dataclass(frozen=True)
class Wishes:
    """What one worker asks of all, who hear it at the next agreement.

    Attributes:
        stop: the number of the signal that asks for an orderly end; 0: none.
        save: take a checkpoint.
        change: end this set of workers.
        check: compare the replicas; workers learn at different times that an update was left out.
    """

    stop: int = 0
    save: bool = False
    change: bool = False
    check: bool = False


@dataclass(frozen=True)
class Unsound:
    """Whose contributions were not finite, by rank.

    Attributes:
        losses: whose sum of losses was not: forward made it.
        gradients: whose gradients (of local steps: whose way) were not, though the loss was: backward made it; None where
            they are added up on their way, so that nobody knows.
    """

    losses: tuple[int, ...] = ()
    gradients: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Header:
    """The exact sums of one step over all workers.

    Attributes:
        unsound: who told sums that are not finite.
        left_out: of each rank, how many own updates it has left out since it last told.
    """

    loss_sum: float
    count: int
    stop: int
    save: bool
    change: bool
    check: bool
    work: tuple[tuple[float, float], ...]
    spent: tuple[tuple[float, float, float], ...]
    unsound: Unsound
    left_out: tuple[int, ...]
    more: Tensor

    @staticmethod
    def row(
        loss_sum: float,
        count: float,
        wishes: Wishes,
        work: Work,
        more: Sequence[float] = (),
        *,
        finite: bool = True,
    ) -> Tensor:
        """What one worker tells: float64 [13 + len(more)], exact for counts below 2⁵³. Takes what `work` has measured.

        finite: whether my gradients are.
        """
        said = [float(wish) for wish in (wishes.stop, wishes.save, wishes.change, wishes.check)]
        own = [float(not finite), float(work.take_left_out())]
        return torch.tensor([loss_sum, count, *said, *work.take(), *own, *more], dtype=torch.float64)

    @staticmethod
    def of(table: Tensor) -> Header:
        """From everybody's rows [workers, 13 + more]; `more` is [workers, more]."""
        losses = (~table[:, 0].isfinite()).nonzero().flatten().tolist()
        gradients = table[:, 11].nonzero().flatten().tolist()
        return Header(
            loss_sum=float(table[:, 0].sum()),
            count=int(table[:, 1].sum()),
            stop=int(table[:, 2].max()),
            save=bool(table[:, 3].max()),
            change=bool(table[:, 4].max()),
            check=bool(table[:, 5].max()),
            work=tuple((seconds, rows) for seconds, rows in table[:, 6:8].tolist()),
            spent=_apart(table[:, 8:11].tolist()),
            unsound=Unsound(tuple(losses), tuple(rank for rank in gradients if rank not in losses)),
            left_out=tuple(int(n) for n in table[:, 12].tolist()),
            more=table[:, 13:],
        )

    @property
    def used(self) -> list[bool]:
        """Which of the parameters that `more` has flags of anybody used."""
        return (self.more.sum(0) > 0).tolist()


def _apart(told: Sequence[Sequence[float]]) -> tuple[tuple[float, float, float], ...]:
    """Everybody's (data_s, waiting, moving), where a process group cannot tell waiting from moving and calls both moving.

    A collective ends for all at once, and whoever came last has not waited: nobody has moved bytes for longer than the one
    that spent the least on others in all.

    >>> _apart([(0.0, 0.0, 5.0), (0.5, 0.0, 1.0)])
    ((0.0, 4.0, 1.0), (0.5, 0.0, 1.0))
    """
    most = min(wait_s + move_s for _, wait_s, move_s in told)
    return tuple(
        (data_s, wait_s + max(0.0, move_s - most), min(move_s, most)) for data_s, wait_s, move_s in told
    )


@dataclass
class Work:
    """What this worker did since it last told the others.

    Attributes:
        seconds: in forward and backward, of `rows` rows.
        data_s: until its rows were there.
        traffic: the wire's counters, of which the increase is told.
        left_out: updates of its own that this worker left out, because something was not finite.
    """

    traffic: Counters
    seconds: float = 0.0
    rows: float = 0.0
    data_s: float = 0.0
    left_out: int = 0
    _before: tuple[float, float] = (0.0, 0.0)
    _running: list[tuple[Stopwatch, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._before = (
            self.traffic.idle_s,
            self.traffic.communicate_s,
        )  # counters may go on from an earlier wire

    def add(self, seconds: float, rows: int) -> None:
        self.seconds += seconds
        self.rows += rows

    def stop(self, stopwatch: Stopwatch, rows: int) -> None:
        """Add what it measures up to now, as soon as the device is done with it: a GPU works on for a while."""
        stopwatch.stop()
        self._running.append((stopwatch, rows))

    def take(self) -> tuple[float, float, float, float, float]:
        """(seconds, rows, data_s, waiting, moving) that have come together; counting begins anew."""
        running, self._running = self._running, []
        for stopwatch, rows in running:
            if stopwatch.done:
                self.add(stopwatch.seconds(), rows)
            else:
                self._running.append((stopwatch, rows))
        now = self.traffic.idle_s, self.traffic.communicate_s
        waited, moved = now[0] - self._before[0], now[1] - self._before[1]
        found = self.seconds, self.rows, self.data_s, waited, moved
        self.seconds = self.rows = self.data_s = 0.0
        self._before = now
        return found

    def take_left_out(self) -> int:
        """How many updates of its own this worker has left out; counting begins anew."""
        found, self.left_out = self.left_out, 0
        return found
