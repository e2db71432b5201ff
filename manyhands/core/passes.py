"""The largest forward pass of a worker, told before it runs: the kernel's killing for memory leaves no time for last words.

The worker writes it into the launch's private directory; its launcher reads it when the worker was killed, and gives the
successor half as many rows (`manyhands.launch.verdict`).
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pass:
    """One forward and backward.

    Attributes:
        rows: in it.
        divisible: whether a successor may have smaller ones.
    """

    rows: int
    divisible: bool


def tell(store: str, seat: str, largest: Pass) -> None:
    """A worker's, from now on."""
    with contextlib.suppress(OSError):  # then its launcher knows nothing of it, as before
        _path(store, seat).write_text(json.dumps(asdict(largest)), encoding="utf-8")


def told(store: str, seat: str) -> Pass | None:
    """What a worker has told; None: nothing."""
    try:
        return Pass(**json.loads(_path(store, seat).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _path(store: str, seat: str) -> Path:
    return Path(store) / f"pass-{seat}.json"
