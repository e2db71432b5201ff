"""What a reader yields: documents, and rows that cannot be read, each with its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from manyhands.core.errors import DataError
from manyhands.data.source import DataSpec


class BrokenFile(DataError):
    """A file that cannot be read (on) as what it is said to be: left out, with --on-error skip, where others can."""


class Row(NamedTuple):
    """One document, or a fragment of one: `last` says whether the document ends here."""

    text: str
    label: str | None = None
    last: bool = True


class Bad(NamedTuple):
    """A row that cannot be read: where (file:line), of which kind, and what is wrong."""

    where: str
    kind: str
    message: str


Rows = Iterator[Row | Bad]


def pick(value: Any, spec: DataSpec, where: object) -> Row | Bad:
    """The columns of one object; `where` becomes a string only for a broken one."""
    if isinstance(value, str) and spec.label is None:
        return Row(value)
    if not isinstance(value, dict):
        return Bad(str(where), "type", f"a {type(value).__name__} is not an object")
    parts = []
    for name in spec.columns:
        if name not in value:
            return Bad(
                str(where), "column", f"no column {name!r}; it has {', '.join(map(str, list(value)[:8]))}"
            )
        part = value[name]
        if isinstance(part, list) and all(isinstance(item, str) for item in part):
            part = "\n".join(part)
        if not isinstance(part, str):
            return Bad(str(where), "type", f"column {name!r} holds a {type(part).__name__}, not text")
        parts.append(part)
    if spec.label is None:
        return Row(" ".join(parts))
    label = value.get(spec.label)
    if label is None or label == "" or isinstance(label, (list, dict)) or label != label:  # NaN is none, too
        return Bad(str(where), "label", f"column {spec.label!r} holds no label")
    return Row(" ".join(parts), str(label))
