"""Values given from Python obey the rules that those of the command line and of files obey (`manyhands.core.config`).

``@checked`` under ``@dataclass`` holds what a field is given against its type before ``__post_init__`` sees it: one of the words
of a `Literal`, a number that is one, a value of the registry that a `choice` names (its call form will do). On a function it
does so with keywords: unknown ones are named, too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from manyhands.core.callform import Call
from manyhands.core.config import called, coerce, from_choice, hints_of
from manyhands.core.errors import UsageError, nearest
from manyhands.core.registry import entries

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def checked(cls: type[T]) -> type[T]:
    """A class whose values raise `UsageError` at construction where a field is given what its type forbids."""
    rules: Any = getattr(cls, "__post_init__", None)

    def __post_init__(self: Any) -> None:
        hints: dict[str, Any] = hints_of(cls)  # type: ignore[arg-type]
        # a subclass's own fields are its own matter
        for field in (f for f in dataclasses.fields(self) if f.init and f.name in hints):
            value, hint = getattr(self, field.name), hints[field.name]
            where = f"{cls.__name__}.{field.name}"
            kind = field.metadata.get("choice")
            meant = _chosen(kind, hint, value, where) if kind else coerce(hint, value, where)
            if meant is not value:
                object.__setattr__(self, field.name, meant)
        if rules is not None:
            rules(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return cls


def checked_call(preset: F) -> F:
    """A function of keywords, of a strategy, that raises `UsageError` where one is unknown or what its type forbids."""
    name = preset.__name__.replace("_", "-")

    @functools.wraps(preset)
    def call(*args: Any, **given: Any) -> Any:
        return called("strategies", preset, Call(name, args, given), name)

    return call  # type: ignore[return-value]


def _chosen(kind: str, hint: Any, value: Any, where: str) -> Any:
    """A value of registry `kind`; None is left to the class."""
    if isinstance(value, (str, Call, dict)):
        return from_choice(kind, value, where)
    if value is None or isinstance(value, hint):
        return value
    raise UsageError(f"{where}: {value!r} is not one of the {kind}", "", nearest("", entries(kind)))
