"""Local steps whose ways are averaged in pairs (gossip, after NoLoCo, arXiv:2506.10911): nothing is said by all at once.

Workers' anchors differ, and so do their outer optimizers. The sums of losses travel beside and are read one round later,
so that a round waits for the partner alone. To be evaluated, saved and ended the anchors are averaged over everybody.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import torch

from manyhands.core.request import Sum
from manyhands.train.header import Header
from manyhands.train.local import LocalSteps

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.train.fragments import Flight, Fragment, Told
    from manyhands.train.replica import Replica

OUTER = "outer/"


class PairSteps(LocalSteps):
    """See the module."""

    agrees: ClassVar[bool] = False
    joint: ClassVar[bool] = False
    at_rest: ClassVar[bool] = False

    def __init__(self, replica: Replica) -> None:
        super().__init__(replica)
        self._unread: list[Flight] = []  # rounds whose sums of everybody were not waited for

    def meet(self) -> None:
        super().meet()
        while self._unread:
            self._read(self._unread.pop(0), lost=False)
        self._average_anchors()
        self._adopt()

    @contextmanager
    def agreed(self, *, collective: bool = True) -> Iterator[None]:
        anchors = [a.detach().clone() for f in self._fragments for a in f.anchors]
        if collective:
            self._average_anchors()
        try:
            with super().agreed(collective=collective):
                yield
        finally:
            with torch.no_grad():
                for a, value in zip((a for f in self._fragments for a in f.anchors), anchors, strict=True):
                    a.copy_(value)

    def local_state(self) -> dict[str, Tensor]:
        """The inner optimizer's and, as they differ here, the outer one's."""
        outer = {OUTER + name: tensor for name, tensor in self.outer.state_by_name().items()}
        return super().local_state() | outer

    def load_local_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_local_state({n: t for n, t in state.items() if not n.startswith(OUTER)})
        outer = {n.removeprefix(OUTER): t for n, t in state.items() if n.startswith(OUTER)}
        if outer:
            self.outer.load_state_by_name(outer)

    def restart(self) -> None:
        super().restart()
        self._unread = []

    def rewind(self) -> dict[int, list[int]]:
        self._unread = []
        return super().rewind()

    # -- agreements

    def _contribution(self, fragment: Fragment) -> list[Tensor]:
        """My way, my anchors, and how many targets weigh them."""
        seen = torch.tensor(fragment.targets, dtype=torch.float64)
        return [*fragment.flats, *fragment.anchor_flats(), seen]

    def _measure(self, i: int) -> Sequence[float]:
        self._fragments[i].measure(1.0)
        return ()

    def _heard(self, flight: Flight) -> Header | None:
        del flight
        return None

    def _told(self, flight: Flight, told: Header | None, *, lost: bool) -> Told | None:
        del told
        self._unread.append(flight)
        return self._read(self._unread.pop(0), lost=lost) if len(self._unread) > 1 else None

    def _read(self, flight: Flight, *, lost: bool) -> Told:
        """The header of an exchange, which may still be under way."""
        told = Header.of(torch.stack(flight.header.wait()))
        return self._take_in(flight, told, told.unsound.gradients or (), lost=lost)

    def _average_anchors(self) -> None:
        wire = self._replica.wire
        with torch.no_grad():
            anchors = [anchor for fragment in self._fragments for anchor in fragment.anchors]
            totals = [wire.begin(Sum(anchor.detach().clone().reshape(-1))).wait() for anchor in anchors]
            # all of them, or none where a peer is lost
            for anchor, total in zip(anchors, totals, strict=True):
                anchor.copy_((total / wire.size).reshape(anchor.shape))
