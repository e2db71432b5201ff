"""Rows out of files, with file and line for each that is broken. Streams: memory is bounded by a line, row group or block."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from typing import Any, BinaryIO

from manyhands.core.errors import DataError
from manyhands.data import delimited
from manyhands.data.row import Bad, BrokenFile, Row, Rows, pick
from manyhands.data.source import DataSpec, SourceFile, Span
from manyhands.data.stream import LINE_BYTES, Place, decoded, fragments, lines, opened

__all__ = ["Bad", "Row", "Rows", "read", "unit_count"]
BLOCK_CHARS = 1 << 20  # of a JSON array read at a time
_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are no text


def read(file: SourceFile, span: Span, spec: DataSpec) -> Rows:
    """The rows of a span. Raises `BrokenFile` where it cannot be read for what it holds, else `DataError`."""
    try:
        yield from READERS[file.format](file, span, spec)
    except (OSError, EOFError, ValueError, NotImplementedError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        # a disk or a network that fails says nothing of the file
        fails = isinstance(error, OSError) and (error.errno is not None or "://" in file.url)
        raise (DataError if fails else BrokenFile)(
            f"{file.url}: {first}", f"it must be readable as {file.format}", "check the file"
        ) from error


def _text(file: SourceFile, span: Span, spec: DataSpec) -> Rows:
    if spec.label is not None:
        raise BrokenFile(
            f"{file.url} is plain text",
            f"it has no column {spec.label!r}",
            "labels come from CSV, TSV, JSON, Parquet or Arrow; give --format if it is one of these",
        )
    if spec.document == "line":
        place = Place.before(file, span)
        for _, raw in lines(file, span):
            place.line += 1
            line = decoded(raw, spec, place)
            if isinstance(line, Bad):
                yield line
            elif line.strip():
                yield Row(line.rstrip("\r\n"))
        return
    held: str | None = None  # the last fragment says that the document ends
    for part in fragments(file, span, spec):
        if isinstance(part, Bad):
            yield part
            continue
        if held is not None:
            yield Row(held, last=False)
        held = part
    ends = span.end < 0 or span.end >= file.size_bytes
    if held is not None or (ends and span.begin > 0):
        yield Row(held or "", last=ends)


def _jsonl(file: SourceFile, span: Span, spec: DataSpec) -> Rows:
    place = Place.before(file, span)
    for _, raw in lines(file, span):
        place.line += 1
        line = decoded(raw, spec, place)
        if isinstance(line, Bad):
            yield line
            continue
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            yield Bad(str(place), "json", f"not JSON: {error.msg} at column {error.pos + 1}")
            continue
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits; brackets in brackets
            yield Bad(str(place), "json", f"not JSON that can be read: {str(error).partition(';')[0]}")
            continue
        yield _whole(pick(value, spec, place), raw, place)


def _whole(row: Row | Bad, raw: bytes | str, where: object) -> Row | Bad:
    """The row, unless it holds half of an escaped pair, which is no text: "\\ud83d" alone."""
    escape: Any = b"\\u" if isinstance(raw, bytes) else "\\u"
    if isinstance(row, Row) and escape in raw:
        try:
            f"{row.text}{row.label or ''}".encode()
        except UnicodeEncodeError as error:
            half = ord(error.object[error.start])
            return Bad(str(where), "encoding", f"\\u{half:04x} alone is no character")
    return row


def _json(file: SourceFile, span: Span, spec: DataSpec) -> Rows:
    """The items of an array, one after the other: memory is bounded by the largest."""
    import codecs

    decode = json.JSONDecoder().raw_decode
    with opened(file) as handle:
        # an item's bytes spoil only that item
        text = codecs.getreader(spec.encoding)(handle, "surrogateescape")
        held = text.read(BLOCK_CHARS).removeprefix("\ufeff").lstrip()
        if not held.startswith("["):
            found = "nothing" if not held else "an object" if held[0] == "{" else f"{held[:20]!r}"
            raise BrokenFile(
                f"{file.url} holds {found}",
                "a .json file is an array of objects",
                "objects line by line: --format jsonl",
            )
        at, number, after = 1, 0, False
        while True:
            while at < len(held) and held[at] in " \t\r\n":
                at += 1
            if at < len(held) and held[at] == "]":
                return
            if at < len(held) and held[at] == "," and after:
                at, after = at + 1, False
                continue
            try:
                if after and at < len(held):
                    raise ValueError("no comma")
                value, end = decode(held, at)
                if end == len(held) and not isinstance(value, (dict, list, str)):
                    raise ValueError("a number may go on")
            except ValueError as error:
                more = text.read(max(BLOCK_CHARS, len(held)))
                if not more or len(held) - at > LINE_BYTES or (after and at < len(held)):
                    raise BrokenFile(
                        f"{file.url}: item {number + 1} is not JSON ({error})",
                        "a .json file is an array of objects",
                        "mend it, or use JSON lines (.jsonl), whose broken lines can be skipped",
                    ) from error
                held, at = held[at:] + more, 0
                continue
            number += 1
            where = f"{file.url}: item {number}"
            wrong = _ESCAPED.search(held, at, end)
            if wrong is not None:
                byte = ord(wrong[0]) - 0xDC00
                yield Bad(where, "encoding", f"byte {byte:#04x} is not {spec.encoding}")
            else:
                yield _whole(pick(value, spec, where), held[at:end], where)
            at, after = end, True


def _parquet(file: SourceFile, span: Span, spec: DataSpec) -> Rows:
    import pyarrow.parquet as pq

    with opened(file) as handle:
        table = pq.ParquetFile(handle)
        groups = range(table.num_row_groups)[span.begin : span.end if span.end >= 0 else None]
        metadata = table.metadata
        yield from _batches(
            table.iter_batches(
                1024, row_groups=list(groups), columns=_columns(table.schema_arrow.names, spec, file)
            ),
            lambda: sum(metadata.row_group(i).num_rows for i in range(groups.start)),
            spec,
            file,
        )


def _arrow(file: SourceFile, span: Span, spec: DataSpec) -> Rows:
    with opened(file) as handle:
        reader = _arrow_reader(handle)
        _columns(reader.schema.names, spec, file)
        if hasattr(reader, "num_record_batches"):
            numbers = range(reader.num_record_batches)[span.begin : span.end if span.end >= 0 else None]
            yield from _batches(
                (reader.get_batch(i) for i in numbers),
                lambda: sum(reader.get_batch(i).num_rows for i in range(numbers.start)),
                spec,
                file,
            )
        else:
            yield from _batches(reader, lambda: 0, spec, file)


def _arrow_reader(handle: BinaryIO) -> Any:
    import pyarrow as pa

    try:
        return pa.ipc.open_file(handle)
    except pa.ArrowInvalid:
        handle.seek(0)
        return pa.ipc.open_stream(handle)


def _columns(names: list[str], spec: DataSpec, file: SourceFile) -> list[str]:
    wanted = [*spec.columns, *([spec.label] if spec.label is not None else [])]
    for name in wanted:
        if name not in names:
            raise BrokenFile(
                f"{file.url}: no column {name!r}", f"it has {', '.join(names)}", "name its columns in --task"
            )
        if names.count(name) > 1:
            raise BrokenFile(
                f"{file.url}: {names.count(name)} columns {name!r}",
                "which is meant cannot be known",
                "rename one",
            )
    return wanted


def _batches(batches: Any, before: Callable[[], int], spec: DataSpec, file: SourceFile) -> Rows:
    place = _RowPlace(file, before)
    for batch in batches:
        for value in batch.to_pylist():
            place.row += 1
            yield pick(value, spec, place)


class _RowPlace:
    """file: row; the rows of the pieces before are counted only when somebody asks."""

    def __init__(self, file: SourceFile, before: Callable[[], int]) -> None:
        self._file, self._before = file, functools.cache(before)
        self.row = 0

    def __str__(self) -> str:
        return f"{self._file.url}: row {self._before() + self.row}"


def _hf(file: SourceFile, span: Span, spec: DataSpec) -> Rows:
    from manyhands.data.hub import load

    data = load(file.url)
    _columns(list(data.column_names), spec, file)
    label = data.features.get(spec.label) if spec.label is not None else None
    names = getattr(label, "names", None)
    for i in range(len(data))[span.begin : span.end if span.end >= 0 else None]:
        value = data[i]
        if names is not None and isinstance(value[spec.label], int):
            known = 0 <= value[spec.label] < len(names)  # −1 says of a row that nobody has labelled it
            value = {**value, spec.label: names[value[spec.label]] if known else None}
        yield pick(value, spec, f"{file.url}: row {i + 1}")


def unit_count(file: SourceFile) -> int:
    """How many units a span of this file counts: row groups, record batches or rows; 1 for a stream."""
    if file.format == "hf":
        from manyhands.data.hub import load

        return len(load(file.url))
    with opened(file) as handle:
        if file.format == "parquet":
            import pyarrow.parquet as pq

            return int(pq.ParquetFile(handle).num_row_groups)
        return int(getattr(_arrow_reader(handle), "num_record_batches", 1))


READERS: dict[str, Callable[[SourceFile, Span, DataSpec], Rows]] = {
    "text": _text,
    "jsonl": _jsonl,
    "json": _json,
    "csv": delimited.read,
    "tsv": delimited.read,
    "parquet": _parquet,
    "arrow": _arrow,
    "hf": _hf,
}
