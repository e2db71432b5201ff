"""Signals that come in an evaluation, which may take long: the workers break it off together, and hand over or save.

Whoever is asked tells the others through the coordinator, and who hears of it stops before its next batch. That it was broken
off all know from the evaluation's end, to which everybody comes in any case: nobody waits for a batch that nobody computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from manyhands.core.membership import fact_of
from manyhands.core.request import Gather

if TYPE_CHECKING:
    from manyhands.train.loop import Loop

FACT = "asked"


def heard(loop: Loop) -> bool:
    """Whether I am asked to end, or know of somebody who is. Workers that compute a batch together ask all at once."""
    asked, crew = loop.interrupts.requested is not None, loop.crew
    if crew is not None and crew.epoch is not None:
        # of this epoch, which ends with the evaluation then
        key = fact_of(crew.epoch.number, FACT)
        told = key in crew.membership.facts()
        if asked and not told:
            crew.membership.publish(key, crew.membership.me.id)
        asked = asked or told
    layer = getattr(loop.replica.method, "layer", None)
    if layer is not None:
        everyones = layer.begin(Gather(torch.tensor([asked]), even=True)).wait()
        asked = any(bool(each) for each in everyones)
    return asked


def heed(loop: Loop) -> None:
    """The evaluation was broken off: who is asked leaves before it is done again, or all stop. Collective."""
    asked = loop.interrupts.requested or 0
    mine = loop.crew.wishes(asked) if loop.crew is not None else (asked, False)
    stop = max(signum for signum, _ in loop.world.gather(mine))
    if stop:
        loop.stop(stop)
        return
    method = loop.replica.method
    # between agreements a leaver's way goes along with the others'; where nothing has moved they go back, and add up the same
    goes_back = method.at_rest or getattr(method, "still", False)
    loop.do_first(["change"] if goes_back else ["meet", "change"])
