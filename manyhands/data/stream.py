"""Bytes of a file in bounded parts: lines with their places, and fragments of one long text.

Where a long text is cut, its tokens should be those of the whole. GPT-2's words never reach over the place before white space
that follows something else, so `cut_near` cuts there: before a line end behind a letter or digit where there is one.
"""

from __future__ import annotations

import contextlib
import io
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from manyhands.data.row import Bad
from manyhands.data.source import DataSpec, SourceFile, Span

BLOCK_BYTES = 512 << 10  # of one fragment of a long document
LINE_BYTES = 64 << 20  # longest line of JSON or CSV
WINDOW_BYTES = 64 << 10  # in which a good place to cut a text is looked for
PACKED_BYTES = 16 << 10  # fed to zstd at a time; a thousandfold of it may come out
BOM = b"\xef\xbb\xbf"
_CANDIDATES = re.compile(rb"[^ \t\r\n\v\f](?=[ \n])")


@contextlib.contextmanager
def opened(file: SourceFile) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed. Raises `OSError` or `EOFError` where they cannot be had whole."""
    import fsspec

    # fsspec's own local files are wrapped in Python, line by line
    local = "://" not in file.url and "::" not in file.url
    with open(file.url, "rb") if local else fsspec.open(file.url, "rb") as raw:
        if file.compression == "gzip":
            import gzip

            try:
                with gzip.open(raw) as plain:
                    yield plain  # type: ignore[misc]
            except zlib.error as error:
                raise OSError(str(error)) from error
        elif file.compression == "zstd":
            with io.BufferedReader(_Zstd(raw), 1 << 20) as stream:
                if file.format in ("parquet", "arrow"):  # read by position, which a packed stream cannot be
                    yield io.BytesIO(stream.read())
                else:
                    yield stream
        else:
            yield raw


class _Zstd(io.RawIOBase):
    """Frames of zstandard one after the other; unlike the package's own reader it notices that the last is cut off."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw, self._error = raw, zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._held = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            packed = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            packed = packed or self._raw.read(PACKED_BYTES)
            if not packed:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the zstd file ends in the middle")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._new()
            try:
                self._held = memoryview(self._frame.decompress(packed))
            except self._error as error:
                raise OSError(str(error)) from error
        size = min(len(buffer), len(self._held))
        buffer[:size] = self._held[:size]
        self._held = self._held[size:]
        return size


def lines(file: SourceFile, span: Span) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line with its end) of the lines that begin inside the span.

    Of a line longer than `LINE_BYTES` only that much is kept (`decoded` refuses it). A byte order mark is left out.
    """
    with opened(file) as handle:
        offset = span.begin
        if offset > 0:
            handle.seek(offset - 1)
            offset += len(handle.readline()) - 1
        while span.end < 0 or offset < span.end:
            line = handle.readline(LINE_BYTES)
            if not line:
                return
            yield offset, line.removeprefix(BOM) if offset == 0 else line
            offset += len(line)
            if len(line) >= LINE_BYTES:
                while not line.endswith(b"\n") and (line := handle.readline(LINE_BYTES)):
                    offset += len(line)


class Place:
    """file:line; the lines before a part of a file are counted only when somebody asks.

    Attributes:
        line: how many lines further than the line ends before `begin`.
    """

    def __init__(self, file: SourceFile, begin: int, line: int) -> None:
        self._file, self._begin, self._before = file, begin, -1
        self.line = line

    @staticmethod
    def before(file: SourceFile, span: Span) -> Place:
        """Ahead of the first line of `lines`."""
        return Place(file, span.begin - 1, 1) if span.begin else Place(file, 0, 0)

    def __str__(self) -> str:
        if self._before < 0:
            self._before = 0
            if self._begin:
                with opened(self._file) as handle:
                    left = self._begin
                    while left > 0 and (chunk := handle.read(min(left, 1 << 20))):
                        self._before += chunk.count(b"\n")
                        left -= len(chunk)
        return f"{self._file.url}:{self._before + self.line}"


def decoded(raw: bytes, spec: DataSpec, place: Place) -> str | Bad:
    """The line as text."""
    if len(raw) >= LINE_BYTES:
        return Bad(str(place), "length", f"the line is longer than {LINE_BYTES >> 20} MiB")
    try:
        return raw.decode(spec.encoding)
    except UnicodeDecodeError as error:
        wrong = f"byte {raw[error.start]:#04x} at column {error.start + 1} is not {spec.encoding}"
        return Bad(str(place), "encoding", wrong)


def fragments(file: SourceFile, span: Span, spec: DataSpec) -> Iterator[str | Bad]:
    """The text of a span in fragments of about `BLOCK_BYTES`; what cannot be decoded is left out by lines."""
    with opened(file) as handle:
        begin = _edge(handle, span.begin, file, spec)
        left: int | None = None
        if span.end >= 0:
            left = _edge(handle, span.end, file, spec) - begin
            handle.seek(begin)
        place = Place(file, begin, 1)
        held = b""
        first = begin == 0
        while more := handle.read(BLOCK_BYTES if left is None else min(BLOCK_BYTES, left)):
            left = left - len(more) if left is not None else None
            held += more.removeprefix(BOM) if first else more
            first = False
            if len(held) > WINDOW_BYTES:
                cut = cut_near(held, len(held) - WINDOW_BYTES, spec)
                yield from _text_of(held[:cut], spec, place)
                held = held[cut:]
        if held:
            yield from _text_of(held, spec, place)


def _text_of(raw: bytes, spec: DataSpec, place: Place) -> Iterator[str | Bad]:
    """The fragment's text; line by line only if there is something wrong with it. Moves the place on."""
    try:
        text = raw.decode(spec.encoding)
    except UnicodeDecodeError:
        good = []
        for line in _split(raw):
            one = decoded(line, spec, place)
            place.line += line.endswith(b"\n")
            if isinstance(one, Bad):
                yield one
            else:
                good.append(one)
        text = "".join(good)
    else:
        place.line += raw.count(b"\n")
    if text:
        yield text


def _split(raw: bytes) -> list[bytes]:
    """Lines that end with a line feed alone."""
    parts = raw.split(b"\n")
    return [part + b"\n" for part in parts[:-1]] + [part for part in parts[-1:] if part]


def _edge(handle: BinaryIO, at: int, file: SourceFile, spec: DataSpec) -> int:
    """Where the part of a text that a span's edge means begins: the same for the spans on both sides of it."""
    if at <= 0 or at >= file.size_bytes:
        return max(0, at)
    handle.seek(at - 4)
    raw = handle.read(WINDOW_BYTES + 4)
    return at - 4 + cut_near(raw, 4, spec)


def cut_near(raw: bytes, at: int, spec: DataSpec) -> int:
    """The best place from `at` on to cut a text in two, so that each part decodes and has the tokens it has in the whole.

    >>> cut_near(b"Many hands\\nmake light work.", 6, DataSpec(data=("x",)))
    10
    """
    found: dict[int, int] = {}
    for match in _CANDIDATES.finditer(raw, max(0, at - 1)):
        place = match.end()
        before = raw[max(0, place - 4) : place].decode(spec.encoding, "ignore")[-1:]
        if not before.isspace():
            rank = (raw[place] != 0x0A) * 2 + (not before.isalnum())
            found.setdefault(rank, place)
            if rank == 0:
                break
    if found:
        return found[min(found)]
    line = raw.find(b"\n", at)
    if line >= 0:
        return line + 1
    if spec.encoding.lower().replace("_", "-") in ("utf-8", "utf8"):
        while at < len(raw) and raw[at] & 0xC0 == 0x80:
            at += 1
        return at
    return len(raw)
