"""Randomness as a function of where we are, never of who we are.

`key(seed, step, place)` mixes integers into 64 bits with the finalizer of SplitMix64 (Steele, Lea, Flood 2014),
so that neighbouring steps and places give unrelated streams.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator

_MASK = (1 << 64) - 1


def mix(x: int) -> int:
    """SplitMix64's finalizer: a bijection of 64-bit integers.

    >>> mix(1) != mix(2)
    True
    """
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def key(*parts: int) -> int:
    """A 64-bit key of a path of integers, for example ``key(seed, step, place)``.

    >>> key(0, 1, 2) == key(0, 1, 2)
    True
    >>> key(0, 1, 2) == key(0, 2, 1)
    False
    """
    state = 0
    for part in parts:
        state = mix(state ^ (part & _MASK))
    return state


def seed_torch(*parts: int) -> None:
    """Seed torch's generators (CPU and every GPU that is in use) from `key(*parts)`.

    `torch.manual_seed` notes its caller's stack for a GPU that may be used later, which takes longer than a small layer: where
    none is in use only the CPU's generator is seeded.
    """
    import torch

    seed = key(*parts) >> 1
    if torch.cuda.is_initialized() or torch.backends.mps.is_available():  # type: ignore[no-untyped-call]
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def seed_everything(*parts: int) -> None:
    """Seed torch's generators, Python's and, where it is in use, NumPy's own one from `key(*parts)`."""
    random.seed(key(*parts))
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(key(*parts) & 0xFFFFFFFF)
    seed_torch(*parts)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever is drawn or seeded inside leaves the CPU's generators as they were."""
    import torch

    numpy = sys.modules.get("numpy")
    kept = torch.get_rng_state(), random.getstate(), numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        torch.set_rng_state(kept[0])
        random.setstate(kept[1])
        if numpy:
            numpy.random.set_state(kept[2])
