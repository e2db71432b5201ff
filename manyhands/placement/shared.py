"""One copy of the parameters for all workers of a machine, updated without locks.

Hogwild! (Recht, Ré, Wright, Niu 2011, arXiv:1106.5730, algorithm 1): each worker computes a gradient at whatever the
parameters are just then and writes its update over them; nobody waits, and updates may overwrite each other in part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from manyhands.core.checked import checked


@dataclass(frozen=True)
@checked
class SharedMemory:
    """The workers of one machine update one copy of the parameters in shared memory, lock-free."""

    method: ClassVar[str | None] = "manyhands.train.hogwild:Hogwild"
    needs_shared_memory: ClassVar[bool] = True
    exchanges: ClassVar[bool] = False
