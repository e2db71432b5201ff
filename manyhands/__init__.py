"""manyhands: data-parallel training and inference of language models on the machines you have."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported on first use, so that `manyhands --help` needs no torch.
_LAZY = {
    "join": "manyhands.api:join",
    "Hands": "manyhands.api:Hands",
    "run": "manyhands.launch.job:run",
    "load": "manyhands.api:load",
    "Job": "manyhands.train.job:Job",
    "Strategy": "manyhands.strategy.base:Strategy",
    "presets": "manyhands.strategy.presets",
}

__all__ = ["Hands", "Job", "Strategy", "__version__", "join", "load", "presets", "run"]

if TYPE_CHECKING:
    from manyhands.api import Hands, join, load
    from manyhands.launch.job import run
    from manyhands.strategy import presets
    from manyhands.strategy.base import Strategy
    from manyhands.train.job import Job


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'manyhands' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    thing = importlib.import_module(module)
    return getattr(thing, attribute) if attribute else thing
