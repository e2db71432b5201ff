"""Who takes part in a job, and since when: words shared by the coordinator, the wires and the training loop.

A job passes through *epochs*. An epoch is a fixed set of workers with ranks; any change (a death, a hang, a worker that joins
or leaves) ends it and begins the next. A wire belongs to one epoch: what an evicted or late worker still says is heard by nobody.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

SUMS = "sums"  # a phase of a step: micro-batches are added up, and what was added is kept whatever happens
REFORM = "re-forming"  # the phase between two sets of workers


@dataclass(frozen=True, kw_only=True)
class Seat:
    """One worker process.

    Attributes:
        id: unique within the job, for the life of the process ("w0", "w3-2": the third start of seat 3).
        host: its host's name; workers of equal names share memory.
        device: "cpu", "cuda:1".
        pid: on its host.
        address: ``host:port`` at which it hands its state to newcomers; empty: nowhere.
    """

    id: str
    host: str
    device: str = "cpu"
    pid: int = 0
    address: str = ""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A worker that is no longer there, and what is known of its end.

    Attributes:
        seat: who; `rank` is its rank in the epoch that it was lost from.
        how: "death", "hang", "left" (as it was asked to) or "failed" (an exception).
        detail: the cause in words.
        phase, step: what it was doing when it was last heard of.
        stack: its main thread's last known stack, innermost call last; empty where unknown.
        silent_s: seconds between its last sign and the verdict.
        then: what its launcher does about it, in words.
    """

    seat: Seat
    rank: int
    how: str
    detail: str
    phase: str = ""
    step: int = 0
    stack: str = ""
    silent_s: float = 0.0
    then: str = ""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """A set of workers.

    Attributes:
        number: counts from 1; never used twice in a job, also after a coordinator's restart.
        seats: in rank order. Survivors keep their order, newcomers come last.
        fresh: ids of those that hold no state of the job yet.
        losses: who was lost since the previous epoch.
    """

    number: int
    seats: tuple[Seat, ...]
    fresh: frozenset[str] = frozenset()
    losses: tuple[Loss, ...] = ()

    def rank_of(self, seat_id: str) -> int:
        """Raises `ValueError` where it does not take part."""
        return [seat.id for seat in self.seats].index(seat_id)


def fact_of(epoch: int, key: str) -> str:
    """The name of a fact that concerns one epoch alone."""
    return f"epoch/{epoch}/{key}"


def outlived(key: str, epoch: int) -> bool:
    """Whether the fact `key` is one of an epoch before this: nobody asks for it any more."""
    kind, number, *_ = (*key.split("/", 2), "")
    return kind == "epoch" and number.isdecimal() and int(number) < epoch


def current(facts: Mapping[str, str], epoch: int) -> dict[str, str]:
    """The facts without those of earlier epochs."""
    return {key: text for key, text in facts.items() if not outlived(key, epoch)}


class Membership(Protocol):
    """A worker's connection to the coordinator. Thread-safe.

    Attributes:
        me: this worker's seat.
        over: set as soon as the current epoch is known to be over because somebody was lost; whoever waits for a peer
            watches it and raises `PeerLost`.
    """

    me: Seat
    over: threading.Event

    @property
    def change_wanted(self) -> bool:
        """Somebody waits to join, or wants to leave: end the epoch at the next step boundary, all together."""
        ...

    @property
    def stopping(self) -> bool:
        """The whole job was asked to stop (by its launcher), not this worker alone."""
        ...

    def next(self) -> Epoch:
        """Wait for the next epoch that I take part in. Clears `over`.

        Raises:
            ManyhandsError: I was evicted, the job ended or failed, or nobody answers.
            Stopped: nobody answers since all were asked to stop.
        """
        ...

    def next_or(self, fact: str) -> Epoch | None:
        """As `next`, but None as soon as this fact is known and no epoch has come."""
        ...

    def at(self, phase: str, step: int) -> None:
        """I am alive and do this now. Costs nothing (it is told with the next heartbeat).

        `SUMS` says that an interruption would cost nothing: newcomers that have waited may then end the epoch.
        """
        ...

    def suspect(self, rank: int | None, detail: str) -> None:
        """A collective of this epoch failed, by `rank` as it seems: end the epoch for everybody.

        My own rank says that I have no memory for my part, and begin anew with smaller passes.
        """
        ...

    def fail(self, detail: str) -> None:
        """The job cannot go on, whoever computes: it ends for everybody, with these words."""
        ...

    def leave(self, detail: str) -> None:
        """I am about to end in an orderly way: nobody is to wait for me."""
        ...

    def publish(self, key: str, text: str) -> None:
        """Tell the job a small fact; the last one stays."""
        ...

    def lookup(self, key: str, timeout_s: float = 30.0) -> str:
        """A published fact, awaited. Raises `PeerLost` when `over` is set meanwhile, or after `timeout_s`."""
        ...

    def facts(self) -> Mapping[str, str]:
        """All published facts."""
        ...
