"""CSV and TSV: rows with their lines, and where a big file may be cut.

A line end inside quotes ends no row, so only reading from the beginning tells where rows begin. `edges` does that with the
reader of Python's `csv`, over the parts of a file that have quotes; it is some ten times as fast as tokenizing.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator
from typing import Any

from manyhands.core.errors import DataError
from manyhands.data.row import Bad, Rows, pick
from manyhands.data.source import DataSpec, SourceFile, Span
from manyhands.data.stream import LINE_BYTES, Place, decoded, lines, opened

BLOCK_BYTES = 1 << 20


def read(file: SourceFile, span: Span, spec: DataSpec) -> Rows:
    """The rows of a span, whose edges are those of `edges`."""
    header: list[str] | None = None
    if span.begin:
        first = next(fields for fields in _reader(file, _text_lines(file, Span(0), spec, [])) if fields)
        header, _ = _header(first, spec, file)
    bad: list[Bad] = []
    place = Place.before(file, span)
    ended = False

    def text() -> Iterator[str]:
        nonlocal ended
        yield from _text_lines(file, span, spec, bad, place)
        ended = True

    rows = _reader(file, text())
    while True:
        begins = place.line + 1
        try:
            fields = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            yield Bad(str(place), "csv", str(error))
            continue
        finally:
            yield from bad
            bad.clear()
        if not fields:
            continue
        if ended:  # it asked for a line more: csv's reader gives what it has and says nothing
            wrong = f"a quote in the row that begins in line {begins} is never closed"
            yield Bad(str(place), "csv", wrong)
            break
        if header is None:
            header, is_data = _header(fields, spec, file)
            if not is_data:
                continue
        if len(fields) != len(header):
            wrong = f"{len(fields)} fields where the first row has {len(header)}"
            yield Bad(str(place), "ragged", wrong)
            continue
        yield pick(dict(zip(header, fields, strict=True)), spec, place)


def _reader(file: SourceFile, text: Iterator[str]) -> Any:
    csv.field_size_limit(LINE_BYTES)
    return csv.reader(text, delimiter="\t" if file.format == "tsv" else ",")


def _text_lines(
    file: SourceFile, span: Span, spec: DataSpec, bad: list[Bad], place: Place | None = None
) -> Iterator[str]:
    """Lines as text; those that are not go to `bad`."""
    place = place or Place.before(file, span)
    for _, raw in lines(file, span):
        place.line += 1
        line = decoded(raw, spec, place)
        if isinstance(line, Bad):
            bad.append(line)
        else:
            yield line


def _header(fields: list[str], spec: DataSpec, file: SourceFile) -> tuple[list[str], bool]:
    """Column names, and whether the first row is data already (columns given by number: no header)."""
    wanted = [*spec.columns, *([spec.label] if spec.label is not None else [])]
    if all(name.isdigit() for name in wanted):
        numbers = [str(i) for i in range(len(fields))]
        missing = [name for name in wanted if name not in numbers]
        names, is_data = numbers, True
    else:
        missing = [name for name in wanted if name not in fields]
        names, is_data = fields, False
    if missing:
        raise DataError(
            f"{file.url}: no column {missing[0]!r}",
            f"its first row is {', '.join(fields)[:200]}",
            'name columns in --task, as in "classify(text=review, label=stars)"; numbers from 0 for a file without header',
        )
    return names, is_data


@functools.lru_cache(maxsize=64)
def edges(file: SourceFile, size: int) -> tuple[int, ...]:
    """Byte places where rows begin, about `size` apart: the first is 0, the last the end of the file."""
    found = [0]
    with opened(file) as handle:
        place = 0  # a row begins here
        while file.size_bytes - found[-1] > size * 3 // 2:
            place = _next_row(handle, file, place, found[-1] + size)
            if place >= file.size_bytes:
                break
            found.append(place)
    return (*found, file.size_bytes)


def _next_row(handle: Any, file: SourceFile, place: int, wanted: int) -> int:
    """The first row that begins at `wanted` or later, given one that begins at `place`."""
    handle.seek(place)
    while place < wanted:
        block = handle.read(min(BLOCK_BYTES, wanted - place))
        block += handle.readline()
        if not block:
            return place
        if b'"' not in block:
            place += len(block)
            continue
        handle.seek(place)
        place = _after_rows(handle, file, place, place + len(block))
        handle.seek(place)
    return place


def _after_rows(handle: Any, file: SourceFile, place: int, wanted: int) -> int:
    """As `_next_row`, row by row."""
    reached = place

    def text() -> Iterator[str]:
        nonlocal reached
        while line := handle.readline():
            reached += len(line)
            yield line.decode("latin-1")  # quotes, delimiters and line ends are ASCII in all encodings we cut

    rows = _reader(file, text())
    while reached < wanted:
        try:
            next(rows)
        except StopIteration:
            break
        except csv.Error:
            continue
    return reached
