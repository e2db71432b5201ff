"""Agree after each step: the cadence of all synchronous methods."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EveryStep:
    """Agree after each step."""

    def due(self, step: int) -> bool:
        return True
