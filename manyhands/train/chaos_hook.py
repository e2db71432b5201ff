"""Where a parameter is in this worker's memory, for whoever tests faults (`manyhands chaos --flips`): told when asked to.

It is told of each replica anew, and withdrawn when the replica is closed: another set of workers may have the model made anew
(ZeRO), or its parameters in other memory (Hogwild).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.core.environment import chaos_directory

if TYPE_CHECKING:
    from manyhands.train.replica import Replica

_told: dict[int, Path] = {}  # by the replica's id: the last only


def tell(replica: Replica, seat: str) -> None:
    """Write ``name address bytes`` of the largest parameter to ``$MANYHANDS_CHAOS/SEAT.PID``; nothing without the variable."""
    directory = chaos_directory()
    if directory is None or replica.device.type != "cpu":
        return
    mine: list[tuple[str, Any]] = [(name, param.detach()) for name, param in replica.named]
    here = [
        (name, t.to_local() if hasattr(t, "to_local") else t) for name, t in mine
    ]  # my part of a divided one
    name, tensor = max(here, key=lambda each: each[1].numel())
    path = Path(directory, f"{seat}.{os.getpid()}")
    whole = path.with_suffix(".new")  # nobody reads half of it
    whole.write_text(f"{name} {tensor.data_ptr()} {tensor.numel() * tensor.element_size()}\n")
    whole.replace(path)
    _told.clear()
    _told[id(replica)] = path


def withdraw(replica: Replica) -> None:
    """Its parameters may be gone from where they were told to be."""
    path = _told.pop(id(replica), None)
    if path is not None:
        path.unlink(missing_ok=True)
