"""Every worker holds the whole model: the placement of most methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from manyhands.core.checked import checked


@dataclass(frozen=True)
@checked
class Replicated:
    """Every worker holds parameters, gradients and optimizer state as a whole."""

    method: ClassVar[str | None] = None  # chosen by cadence and inner optimizer
