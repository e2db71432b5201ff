"""Parameters chosen by the names of the modules on their way: embeddings, heads, norms, biases."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from manyhands.core.errors import UsageError


def is_named(name: str, patterns: Sequence[str]) -> bool:
    """Whether some part of a parameter's name, between its dots, matches one of the patterns of a shell.

    >>> is_named("transformer.h.0.ln_1.weight", ["ln_*"]), is_named("transformer.h.0.mlp.c_fc.weight", ["ln_*", "bias"])
    (True, False)
    """
    return any(fnmatchcase(part, pattern) for part in name.split(".") for pattern in patterns)


def check_patterns(option: str, patterns: Sequence[str]) -> None:
    """Raises `UsageError` where one of an option's patterns could match no part of any name."""
    for pattern in patterns:
        if "." in pattern or not pattern:
            raise UsageError(
                f"{option}: {pattern!r}",
                "a pattern is of one part of a parameter's name, between its dots",
                f"give {pattern.rpartition('.')[2]!r}"
                if pattern.strip(".")
                else "for example 'wte' or '*embed*'",
            )


def check_some_match(option: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raises `UsageError` where there are patterns, and no name matches any."""
    if patterns and not any(is_named(name, patterns) for name in names):
        parts = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit())
        raise UsageError(
            f"{option}: {list(patterns)} match no parameter of this model",
            "a parameter is chosen by a part of its name",
            f"its names have the parts {', '.join(list(parts)[:12])}{', …' if len(parts) > 12 else ''}",
        )
