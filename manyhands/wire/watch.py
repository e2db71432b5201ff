"""How a wire of one membership epoch learns of the epoch's end, and tells of a failure that it met itself.

Wires without a membership (torchrun's, or a fixed job's) have no `Watch`: their waits end by their peers' death or a timeout.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from manyhands.core.errors import PeerLost
from manyhands.core.membership import Epoch, Membership

LOOK_S = 0.01  # how often a wait that nothing else interrupts looks whether the epoch is over

T = TypeVar("T")


@dataclass(frozen=True)
class Watch:
    """What a wire needs of a `Membership`.

    Attributes:
        over: set when the epoch is over; every wait of the wire then raises `PeerLost`.
        suspect: tells the others that a rank of the epoch (None: unknown) failed me, and how.
        ranks: the epoch's ranks of the wire's ranks, in their order.
    """

    over: threading.Event
    suspect: Callable[[int | None, str], None]
    ranks: tuple[int, ...]

    @staticmethod
    def of(membership: Membership, epoch: Epoch) -> Watch:
        return Watch(membership.over, membership.suspect, tuple(range(len(epoch.seats))))

    def among(self, ranks: Sequence[int]) -> Watch:
        """The same for a wire among some of this wire's ranks."""
        return replace(self, ranks=tuple(self.ranks[rank] for rank in ranks))

    def ended(self, phase: str, rank: int | None = None) -> PeerLost:
        """What to raise when the epoch is over; `rank` of the wire is known to be gone, if any."""
        lost = None if rank is None else self.ranks[rank]
        return PeerLost(lost, phase, "the membership epoch is over")

    def failed(self, phase: str, rank: int | None, detail: str) -> PeerLost:
        """What to raise when the wire itself met a failure; the others are told."""
        lost = None if rank is None else self.ranks[rank]
        if not self.over.is_set():
            self.suspect(lost, f"{phase}: {detail}")
        return PeerLost(lost, phase, detail)

    def call(self, what: Callable[[], T], phase: str) -> T:
        """`what()`, which cannot be interrupted, in a thread that is left behind when the epoch is over.

        Raises:
            PeerLost: the epoch is over. What `what` returns later is dropped.
        """
        replies: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        def work() -> None:
            try:
                reply = (what(), None)
            except BaseException as error:
                replies.put((None, error))
            else:
                replies.put(reply)

        if self.over.is_set():
            raise self.ended(phase)
        threading.Thread(target=work, name="wire-call", daemon=True).start()
        while True:
            try:
                value, error = replies.get(timeout=LOOK_S)
            except queue.Empty:
                if self.over.is_set():
                    raise self.ended(phase) from None
                continue
            if error is not None:
                raise error
            return value  # type: ignore[return-value]  # without an error it is what was returned
