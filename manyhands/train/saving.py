"""When the loop saves, and how: together with the other workers where they can, else rank 0 alone."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from manyhands.train import session

if TYPE_CHECKING:
    from manyhands.train.checkpoint import Facts
    from manyhands.train.joint import Share
    from manyhands.train.loop import Loop

SAVE_S = 600.0


def wished(loop: Loop) -> bool:
    """Whether I ask all to save: by the clock, or because the last checkpoint may not have come to be."""
    late = time.monotonic() - loop.saved_at > SAVE_S
    by_clock = loop.schedule.save_every is None and loop.world.rank == 0 and loop.saver is not None and late
    return by_clock or loop.save_again or lacks_a_part(loop)


def save(loop: Loop, *, collective: bool = True) -> None:
    """Copy what goes into a checkpoint, and begin to write it. At rest."""
    saver = loop.saver
    taken: Facts | Share | None = None
    state = loop.state() if saver is not None and loop.world.rank == 0 else {}
    if collective:
        taken = session.joint_of(
            loop.world,
            loop.replica,
            state,
            loop.tokenizer,
            saver.output if saver is not None and not saver.alone else None,
            seats=[seat.id for seat in loop.seats],
        )
    if taken is None:
        taken = session.snapshot_of(loop.replica, state, loop.tokenizer, collective=collective)
    if saver is not None and taken is not None:
        saver.submit(taken)
    loop.saved_step = loop.replica.steps


def save_now(loop: Loop, *, whole: bool) -> None:
    """Whatever can be saved without the others, durably; `whole`: I hold the agreed parameters, or can."""
    if loop.saver is None:
        return
    first = whole and loop.world.rank == 0
    if first and loop.saved_step != loop.replica.steps:
        save(loop, collective=False)
    loop.saver.wait()
    if first and lacks_a_part(loop):
        save(loop, collective=False)
        loop.saver.wait()


def wait(loop: Loop) -> bool:
    """Return when all is durable, on every worker; False: a part is missing, save again. Collective."""
    if loop.saver is not None:
        loop.saver.wait()
    # nobody goes before it is durable: rank 0 may be lost while it writes, or another with its part
    return not any(loop.world.gather(lacks_a_part(loop)))


def finish_part(loop: Loop) -> None:
    """Before I leave: rank 0 waits for my part of a checkpoint."""
    if loop.world.rank != 0 and loop.saver is not None:
        loop.saver.settle()


def lacks_a_part(loop: Loop) -> bool:
    """Of the checkpoint that I write for all."""
    return loop.world.rank == 0 and loop.saver is not None and loop.saver.incomplete


def lost(loop: Loop, seats: Collection[str]) -> bool:
    """These are gone; whether what I save for all lacks a part now."""
    if loop.saver is not None:
        loop.saver.lost(seats)
    return lacks_a_part(loop)
