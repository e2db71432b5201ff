"""The global batch of each step, as a pure function of (seed, step).

Who computes which part of it is another matter (`manyhands.data.partition`); nothing here knows of workers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from manyhands.core import rng
from manyhands.core.errors import DataError, UsageError
from manyhands.data.permute import Permutation

if TYPE_CHECKING:
    from numpy.typing import NDArray

STRATA = 0x57  # stream of random numbers that spreads classes


@dataclass(frozen=True)
class Order:
    """Which samples each step takes, epoch after epoch; each sample once per epoch.

    Any step is found in constant time: resuming skips nothing.

    Attributes:
        n: samples in the data.
        global_batch: samples in one step, over all workers.
        seed: of the job.
        drop_last: leave out an epoch's last batch where it is partial; by default it is kept.
        classes: of each sample, [n] int64: every batch then has each class in proportion, to one or two samples.
        lengths: of each sample, [n]: a batch's samples are then in the order of their lengths, so that neighbours need
            little padding. Which batch a sample is in does not depend on it.

    Raises:
        DataError: there is no sample, or (with `drop_last`) no full batch.
        UsageError: global_batch < 1.

    >>> [len(Order(n=10, global_batch=4, seed=0).ids(step)) for step in range(4)]
    [4, 4, 2, 4]
    """

    n: int
    global_batch: int
    seed: int
    drop_last: bool = False
    classes: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)
    lengths: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)
    _epochs: dict[int, NDArray[np.int64]] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise UsageError(
                f"global_batch = {self.global_batch}",
                "a step takes at least one sample",
                "give --global-batch >= 1",
            )
        if self.n < 1:
            raise DataError(
                f"n = {self.n} samples",
                "training needs at least one sample",
                "check that the data is not empty",
            )
        if self.drop_last and self.n < self.global_batch:
            raise DataError(
                f"{self.n} samples with global_batch = {self.global_batch} and drop_last",
                "the only batch of an epoch is partial and would be dropped",
                f"give global_batch <= {self.n}, or keep the last batch",
            )

    @property
    def steps_per_epoch(self) -> int:
        full, rest = divmod(self.n, self.global_batch)
        return full + (1 if rest and not self.drop_last else 0)

    def rows(self, step: int) -> int:
        """How many samples step `step` takes."""
        _, first = self._place(step)
        return min(self.global_batch, self.n - first)

    def ids(self, step: int) -> NDArray[np.int64]:
        """The samples of step `step` (from 0; it runs over epochs), in order: [rows] int64."""
        epoch, first = self._place(step)
        last = min(first + self.global_batch, self.n)
        if self.classes is None:
            found = _permutation(self.n, self.seed, epoch).take(np.arange(first, last, dtype=np.int64))
        else:
            found = self._mixed(epoch)[first:last]
        if self.lengths is not None:
            found = found[np.argsort(self.lengths[found], kind="stable")]
        return found

    def _mixed(self, epoch: int) -> NDArray[np.int64]:
        """An epoch's samples, each class spread evenly over it, [n].

        The k-th of a class's n꜀ samples, which are shuffled among themselves, stands at (k + u)/n꜀ of the epoch, u drawn for
        the class: so between any two places there are n꜀ times their distance of it, to one.
        """
        if epoch not in self._epochs:
            assert self.classes is not None
            members: list[NDArray[np.int64]] = []
            at: list[NDArray[np.float64]] = []
            for label in np.unique(self.classes):
                of_class = np.flatnonzero(self.classes == label)
                n, seed = len(of_class), rng.key(STRATA, self.seed, int(label))
                shuffled = Permutation(n, seed, epoch).take(np.arange(n, dtype=np.int64))
                offset = (rng.key(STRATA, self.seed, int(label), epoch) % (1 << 53)) / (1 << 53)
                members.append(of_class[shuffled])
                at.append((np.arange(n) + offset) / n)
            order = np.argsort(np.concatenate(at), kind="stable")
            self._epochs.clear()  # the loop asks for one epoch after the other
            self._epochs[epoch] = np.concatenate(members)[order]
        return self._epochs[epoch]

    def seen(self, step: int) -> int:
        """How many samples all steps before `step` took together."""
        epoch, first = self._place(step)
        return epoch * self._per_epoch + first

    def epoch(self, step: int) -> float:
        """Epochs passed before `step`; a whole number at the start of each.

        >>> Order(n=10, global_batch=4, seed=0).epoch(4)
        1.4
        """
        epoch, first = self._place(step)
        return epoch + first / self._per_epoch

    @property
    def _per_epoch(self) -> int:
        return self.steps_per_epoch * self.global_batch if self.drop_last else self.n

    def _place(self, step: int) -> tuple[int, int]:
        """(epoch, position of the step's first sample in it)."""
        if step < 0:
            raise UsageError(f"step = {step}", "steps are counted from 0", "give step >= 0")
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch, within * self.global_batch


def places(n_rows: int, micro_batch: int) -> list[range]:
    """Cut a global batch of `n_rows` rows into micro-batches of `micro_batch` rows, the last maybe shorter.

    Returns:
        the rows of each place; a micro-batch's place is its index here.

    Raises:
        UsageError: n_rows < 0 or micro_batch < 1.

    >>> places(5, 2)
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    if n_rows < 0:
        raise UsageError(f"n_rows = {n_rows}", "a batch has no negative number of rows", "give n_rows >= 0")
    if micro_batch < 1:
        raise UsageError(
            f"micro_batch = {micro_batch}", "a micro-batch has at least one row", "give --micro-batch >= 1"
        )
    return [range(first, min(first + micro_batch, n_rows)) for first in range(0, n_rows, micro_batch)]


@lru_cache(maxsize=8)
def _permutation(n: int, seed: int, epoch: int) -> Permutation:
    return Permutation(n, seed, epoch)
