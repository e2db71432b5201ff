"""CSV and TSV: rows with their lines, and where a big file may be cut.

A line end inside quotes ends no row, so only reading from the beginning tells where rows begin. `edges` does that with the
reader of Python's `csv`, over the parts of a file that have quotes; it is some ten times as fast as tokenizing. TSV has no
quotes unless `quoting` says so: each line is a row.

A quote that nobody meant opens a row that swallows the rows after it, up to the next quote. `_Split` takes such a row back: its
first line is the broken one, and the lines after it are read again.
"""

from __future__ import annotations

import csv
import functools
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from manyhands.data.row import Bad, BrokenFile, Rows, pick
from manyhands.data.source import DataSpec, SourceFile, Span
from manyhands.data.stream import LINE_BYTES, Place, decoded, lines, opened

BLOCK_BYTES = 1 << 20
AGAIN_LINES = 8  # of a row within lines that are read again: else each of them might be read as often as there are lines


def read(file: SourceFile, span: Span, spec: DataSpec) -> Rows:
    """The rows of a span, whose edges are those of `edges`."""
    header: list[str] | None = None
    if span.begin:
        rows = _Split(_text_lines(file, Span(0), spec, []), file, spec)
        first = next((found.fields for found in rows if found.fields), None)
        if first is None:
            return
        header, _ = _header(first, spec, file)
    bad: list[Bad] = []
    place = Place.before(file, span)
    before = place.line
    for found in _Split(_text_lines(file, span, spec, bad), file, spec):
        yield from bad
        bad.clear()
        fields, place.line = found.fields, before + found.line
        if found.wrong:
            yield Bad(str(place), "csv", found.wrong)
            continue
        if not fields:
            continue
        if header is None:
            header, is_data = _header(fields, spec, file)
            if not is_data:
                continue
        if len(fields) != len(header):
            wrong = f"{len(fields)} fields where the first row has {len(header)}"
            if found.lines > 1:
                wrong += f"; its quotes go over {found.lines} lines"
            yield Bad(str(place), "ragged", wrong)
            continue
        yield pick(dict(zip(header, fields, strict=True)), spec, place)
    yield from bad


class _Found(NamedTuple):
    """A row: its fields, the number of its first line (from 1), how many it has and their length; or what is wrong with it."""

    fields: list[str]
    line: int
    lines: int
    size: int
    wrong: str = ""


class _Split(Iterator[_Found]):
    """Rows out of numbered lines."""

    def __init__(self, text: Iterator[tuple[int, str]], file: SourceFile, spec: DataSpec) -> None:
        self._text, self._file, self._spec = text, file, spec
        self._again: deque[tuple[int, str]] = deque()
        self._row: list[tuple[int, str]] = []  # lines of the row that is being read
        self._size, self._most, self._open = 0, 0, False
        self._rows = self._reader(self._lines())

    def _lines(self) -> Iterator[str]:
        """Lines for csv's reader, which asks for more than one where a quote is open."""
        again = self._again
        while True:
            self._open = True
            if (row := self._row) and (self._size > LINE_BYTES or len(row) >= self._most > 0):
                return
            line = again.popleft() if again else next(self._text, None)
            if line is None:
                return
            self._open = False
            row.append(line)
            self._size += len(line[1])
            yield line[1]

    def __next__(self) -> _Found:
        self._row, self._size = [], 0
        self._most = AGAIN_LINES if len(self._again) > 1 else 0
        wrong = ""
        fields: list[str] = []
        try:
            fields = next(self._rows)
        except csv.Error as error:
            fields, wrong = self._lenient(str(error))
        row = self._row
        if not wrong:
            return _Found(fields, row[0][0], len(row), self._size)
        self._again.extendleft(reversed(row[1:]))
        self._rows = self._reader(self._lines())  # what has ended does not go on
        return _Found([], row[0][0], 1, len(row[0][1]), wrong)

    def _lenient(self, error: str) -> tuple[list[str], str]:
        """The fields of a row that is not written by the rules, or what is wrong with it.

        Text behind a closing quote is let pass within a line; over several it says that the quotes are not a pair.
        """
        row = self._row
        if self._open:
            return [], "a quote in this line is never closed"
        if len(row) > 1:
            if self._size > LINE_BYTES:
                return [], error
            below = row[-1][0] - row[0][0]
            far = f"{below} line{'s' if below > 1 else ''}"
            return [], f"a quote in this line is closed {far} below, with text behind it"
        try:
            # the second line is asked for where a quote is open at the end of the first
            lenient = self._reader(iter((row[0][1], "")), strict=False)
            fields: list[str] = next(lenient)
            return fields, "" if lenient.line_num == 1 else "a quote in this line is never closed"
        except csv.Error as again:
            return [], str(again)

    def _reader(self, text: Iterator[str], *, strict: bool = True) -> Any:
        csv.field_size_limit(LINE_BYTES)
        quoting: Any = csv.QUOTE_MINIMAL if _quoted(self._file, self._spec) else csv.QUOTE_NONE
        delimiter = "\t" if self._file.format == "tsv" else ","
        return csv.reader(text, delimiter=delimiter, quoting=quoting, strict=strict)


def _quoted(file: SourceFile, spec: DataSpec) -> bool:
    return spec.quoting == "csv" or (spec.quoting == "auto" and file.format == "csv")


def _text_lines(file: SourceFile, span: Span, spec: DataSpec, bad: list[Bad]) -> Iterator[tuple[int, str]]:
    """Lines as text, numbered from 1 in the span; those that are not go to `bad`."""
    place = Place.before(file, span)
    for number, (_, raw) in enumerate(lines(file, span), start=1):
        place.line += 1
        line = decoded(raw, spec, place)
        if isinstance(line, Bad):
            bad.append(line)
        else:
            yield number, line


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
        raise BrokenFile(
            f"{file.url}: no column {missing[0]!r}",
            f"its first row is {', '.join(fields)[:200]}",
            'name columns in --task, as in "classify(text=review, label=stars)"; numbers from 0 for a file without header',
        )
    twice = [name for name in wanted if names.count(name) > 1]
    if twice:
        raise BrokenFile(
            f"{file.url}: {names.count(twice[0])} columns {twice[0]!r}",
            "which is meant cannot be known",
            "rename one in its first row",
        )
    return names, is_data


@functools.lru_cache(maxsize=64)
def edges(file: SourceFile, size: int, spec: DataSpec) -> tuple[int, ...]:
    """Byte places where rows begin, about `size` apart: the first is 0, the last the end of the file."""
    found = [0]
    with opened(file) as handle:
        place = 0  # a row begins here
        while file.size_bytes - found[-1] > size * 3 // 2:
            place = _next_row(handle, file, spec, place, found[-1] + size)
            if place >= file.size_bytes:
                break
            found.append(place)
    return (*found, file.size_bytes)


def _next_row(handle: Any, file: SourceFile, spec: DataSpec, place: int, wanted: int) -> int:
    """The first row that begins at `wanted` or later, given one that begins at `place`."""
    handle.seek(place)
    while place < wanted:
        block = handle.read(min(BLOCK_BYTES, wanted - place))
        block += handle.readline()
        if not block:
            return place
        if b'"' not in block or not _quoted(file, spec):
            place += len(block)
            continue
        handle.seek(place)
        place = _after_rows(handle, file, spec, place, place + len(block))
        handle.seek(place)
    return place


def _after_rows(handle: Any, file: SourceFile, spec: DataSpec, place: int, wanted: int) -> int:
    """As `_next_row`, row by row."""
    # quotes, delimiters and line ends are ASCII in all encodings we cut
    text = enumerate((line.decode("latin-1") for line in iter(handle.readline, b"")), start=1)
    for row in _Split(text, file, spec):
        place += row.size
        if place >= wanted:
            break
    return place
