"""Where a parameter is in this worker's memory, for whoever tests faults (`manyhands chaos --flips`): told when asked to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.core.environment import chaos_directory

if TYPE_CHECKING:
    from manyhands.train.replica import Replica


def tell(replica: Replica, seat: str) -> None:
    """Write ``name address bytes`` of the largest parameter to ``$MANYHANDS_CHAOS/SEAT.PID``; nothing without the variable."""
    directory = chaos_directory()
    if directory is None or replica.device.type != "cpu":
        return
    name, param = max(replica.named, key=lambda each: each[1].numel())
    text = f"{name} {param.data_ptr()} {param.numel() * param.element_size()}\n"
    Path(directory, f"{seat}.{os.getpid()}").write_text(text)
