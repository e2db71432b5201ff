"""Rows out of files, with file and line for each that is broken. Streams: memory is bounded by a line, row group or block."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from manyhands.core.errors import DataError
from manyhands.data.source import DataSpec, SourceFile, Span

BLOCK_BYTES = 256 << 10  # of one fragment of a long document
LINE_BYTES = 64 << 20  # longest line of JSON or CSV


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


def read(file: SourceFile, span: Span, spec: DataSpec) -> Rows:
    """The rows of a span. Raises `DataError` where the file as a whole cannot be read."""
    try:
        yield from READERS[file.format](file, span, spec)
    except (OSError, EOFError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{file.url}: {first}", f"it must be readable as {file.format}", "check the file"
        ) from error


@contextlib.contextmanager
def opened(file: SourceFile) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed."""
    import fsspec

    with fsspec.open(file.url, "rb") as raw:
        if file.compression == "gzip":
            import gzip

            with gzip.open(raw) as plain:
                yield plain  # type: ignore[misc]
        elif file.compression == "zstd":
            import zstandard

            with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as plain:
                if file.format in (
                    "parquet",
                    "arrow",
                ):  # they are read by position, which a zstd stream cannot
                    yield io.BytesIO(plain.read())
                else:
                    yield io.BufferedReader(plain, 1 << 20)
        else:
            yield raw


def _lines(file: SourceFile, span: Span) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line with its end) of the lines that begin inside the span."""
    with opened(file) as handle:
        offset = span.begin
        if offset > 0:
            handle.seek(offset - 1)
            offset += len(handle.readline()) - 1
        while span.end < 0 or offset < span.end:
            line = handle.readline(LINE_BYTES)
            if not line:
                return
            yield offset, line
            offset += len(line)


class _Place:
    """file:line of a byte offset; lines before a span are counted only when somebody asks."""

    def __init__(self, file: SourceFile, span: Span) -> None:
        self._file, self._begin, self._before = file, span.begin, -1
        self.line = 0  # within the span

    def __str__(self) -> str:
        if self._before < 0:
            self._before = 0
            if self._begin:
                with opened(self._file) as handle:
                    left = self._begin - 1
                    while left > 0 and (chunk := handle.read(min(left, 1 << 20))):
                        self._before += chunk.count(b"\n")
                        left -= len(chunk)
                    self._before += 1
        return f"{self._file.url}:{self._before + self.line}"


def _decode(raw: bytes, spec: DataSpec, place: _Place) -> str | Bad:
    try:
        return raw.decode(spec.encoding)
    except UnicodeDecodeError as error:
        return Bad(
            str(place),
            "encoding",
            f"byte {raw[error.start]:#04x} at column {error.start + 1} is not {spec.encoding}",
        )


def _text(file: SourceFile, span: Span, spec: DataSpec) -> Rows:
    place = _Place(file, span)
    held: list[str] = []
    size = 0
    seen = False
    for _, raw in _lines(file, span):
        place.line += 1
        line = _decode(raw, spec, place)
        if isinstance(line, Bad):
            yield line
        elif spec.document == "line":
            if line.strip():
                yield Row(line.rstrip("\r\n"))
        else:
            held.append(line)
            size += len(raw)
            if size >= BLOCK_BYTES:
                yield Row("".join(held), last=False)
                held, size, seen = [], 0, True
    ends = span.end < 0 or span.end >= file.size_bytes
    if spec.document == "file" and (held or seen or (ends and span.begin > 0)):
        yield Row("".join(held), last=ends)


def _jsonl(file: SourceFile, span: Span, spec: DataSpec) -> Rows:
    place = _Place(file, span)
    for _, raw in _lines(file, span):
        place.line += 1
        line = _decode(raw, spec, place)
        if isinstance(line, Bad):
            yield line
            continue
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            yield Bad(str(place), "json", f"not JSON: {error}")
            continue
        yield _pick(value, spec, str(place))


def _json(file: SourceFile, span: Span, spec: DataSpec) -> Rows:
    with opened(file) as handle:
        values = json.loads(handle.read().decode(spec.encoding))
    if not isinstance(values, list):
        raise DataError(
            f"{file.url} holds a {type(values).__name__}",
            "a .json file is an array of objects",
            "use JSON lines (.jsonl)",
        )
    for i, value in enumerate(values):
        yield _pick(value, spec, f"{file.url}: item {i + 1}")


def _pick(value: Any, spec: DataSpec, where: str) -> Row | Bad:
    """The columns of one object."""
    if isinstance(value, str) and spec.label is None:
        return Row(value)
    if not isinstance(value, dict):
        return Bad(where, "type", f"a {type(value).__name__} is not an object")
    parts = []
    for name in spec.columns:
        if name not in value:
            return Bad(where, "column", f"no column {name!r}; it has {', '.join(map(str, list(value)[:8]))}")
        part = value[name]
        if isinstance(part, list) and all(isinstance(item, str) for item in part):
            part = "\n".join(part)
        if not isinstance(part, str):
            return Bad(where, "type", f"column {name!r} holds a {type(part).__name__}, not text")
        parts.append(part)
    if spec.label is None:
        return Row(" ".join(parts))
    label = value.get(spec.label)
    if label is None or isinstance(label, (list, dict)):
        return Bad(where, "label", f"column {spec.label!r} holds no label")
    return Row(" ".join(parts), str(label))


def _csv(file: SourceFile, span: Span, spec: DataSpec) -> Rows:
    csv.field_size_limit(LINE_BYTES)
    bad: list[Bad] = []
    place = _Place(file, span)

    def decoded() -> Iterator[str]:
        for _, raw in _lines(file, span):
            place.line += 1
            line = _decode(raw.removeprefix(b"\xef\xbb\xbf") if place.line == 1 else raw, spec, place)
            if isinstance(line, Bad):
                bad.append(line)
            else:
                yield line

    dialect = {"delimiter": "\t"} if file.format == "tsv" else {}
    rows = csv.reader(decoded(), **dialect)  # type: ignore[arg-type]
    header: list[str] | None = None
    while True:
        try:
            fields = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            yield Bad(f"{file.url}:{place.line}", "csv", str(error))
            continue
        finally:
            yield from bad
            bad.clear()
        if not fields:
            continue
        if header is None:
            header, is_data = _header(fields, spec, file)
            if not is_data:
                continue
        if len(fields) != len(header):
            yield Bad(
                f"{file.url}:{place.line}",
                "ragged",
                f"{len(fields)} fields where the first row has {len(header)}",
            )
            continue
        yield _pick(dict(zip(header, fields, strict=True)), spec, f"{file.url}:{place.line}")


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


def _parquet(file: SourceFile, span: Span, spec: DataSpec) -> Rows:
    import pyarrow.parquet as pq

    with opened(file) as handle:
        table = pq.ParquetFile(handle)
        groups = range(table.num_row_groups)[span.begin : span.end if span.end >= 0 else None]
        row = sum(table.metadata.row_group(i).num_rows for i in range(groups.start))
        yield from _batches(
            table.iter_batches(
                1024, row_groups=list(groups), columns=_columns(table.schema_arrow.names, spec, file)
            ),
            row,
            spec,
            file,
        )


def _arrow(file: SourceFile, span: Span, spec: DataSpec) -> Rows:
    with opened(file) as handle:
        reader = _arrow_reader(handle)
        _columns(reader.schema.names, spec, file)
        if hasattr(reader, "num_record_batches"):
            numbers = range(reader.num_record_batches)[span.begin : span.end if span.end >= 0 else None]
            yield from _batches((reader.get_batch(i) for i in numbers), 0, spec, file)
        else:
            yield from _batches(reader, 0, spec, file)


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
            raise DataError(
                f"{file.url}: no column {name!r}", f"it has {', '.join(names)}", "name its columns in --task"
            )
    return wanted


def _batches(batches: Any, row: int, spec: DataSpec, file: SourceFile) -> Rows:
    for batch in batches:
        for value in batch.to_pylist():
            row += 1
            yield _pick(value, spec, f"{file.url}: row {row}")


def _hf(file: SourceFile, span: Span, spec: DataSpec) -> Rows:
    from manyhands.data.hub import load

    data = load(file.url)
    _columns(list(data.column_names), spec, file)
    label = data.features.get(spec.label) if spec.label is not None else None
    names = getattr(label, "names", None)
    for i in range(len(data))[span.begin : span.end if span.end >= 0 else None]:
        value = data[i]
        if names is not None and isinstance(value[spec.label], int) and 0 <= value[spec.label] < len(names):
            value = {**value, spec.label: names[value[spec.label]]}
        yield _pick(value, spec, f"{file.url}: row {i + 1}")


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
    "csv": _csv,
    "tsv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
    "hf": _hf,
}
