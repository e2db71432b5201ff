"""Parameters chosen by the names of the modules on their way: embeddings, heads, norms, biases."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase


def is_named(name: str, patterns: Sequence[str]) -> bool:
    """Whether some part of a parameter's name, between its dots, matches one of the patterns of a shell.

    >>> is_named("transformer.h.0.ln_1.weight", ["ln_*"]), is_named("transformer.h.0.mlp.c_fc.weight", ["ln_*", "bias"])
    (True, False)
    """
    return any(fnmatchcase(part, pattern) for part in name.split(".") for pattern in patterns)
