"""What to read: names of data to files, and files to pieces of bounded size.

A *piece* is the unit of preparation: a few small files, or a part of a big one. Pieces follow from the files alone, never from
the number of processes, so the prepared stream is the same for any number of them.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import itertools
import json
import os
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from manyhands.core.errors import DataError, UsageError, nearest

PIECE_BYTES = 32 << 20
SUFFIXES = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
FORMATS = ("auto", "text", "jsonl", "json", "csv", "tsv", "parquet", "arrow")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Which text, read how, as which tokens.

    Attributes:
        data: each a path, glob, directory, fsspec URL, ``stdlib`` (the Python library's sources) or ``hf:PATH[:SPLIT]``.
        format: one of `FORMATS`; auto goes by the file's name.
        encoding: of text files.
        document: whether one document of a plain text file is the file or a line.
        text: column of the text; several, joined by a space: "title,body". Numbers (from 0): a CSV without header.
        label: column of the label; None: causal language modelling.
        tokenizer: byte, char, word:N, bpe:N or a tokenizer directory.
        quoting: whether quotes in CSV and TSV hold line ends and delimiters; auto: in CSV.
        on_error: broken rows (and files, where not all are) are counted and skipped, or fatal.
    """

    data: tuple[str, ...]
    format: str = "auto"
    encoding: str = "utf-8"
    document: Literal["file", "line"] = "file"
    quoting: Literal["auto", "csv", "none"] = "auto"
    text: str = "text"
    label: str | None = None
    tokenizer: str = "byte"
    on_error: Literal["skip", "fail"] = "skip"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"format = {self.format!r}", "", nearest(self.format, FORMATS))
        try:
            line_end = "\n".encode(self.encoding)
        except (LookupError, UnicodeError):
            raise UsageError(
                f"encoding = {self.encoding!r}",
                "Python knows no such encoding",
                "utf-8 and latin-1 are usual",
            ) from None
        if line_end != b"\n":
            raise UsageError(
                f"encoding = {self.encoding!r}",
                "lines are found by the single byte of a line feed",
                "use utf-8 (a byte order mark is left out)"
                if "8" in self.encoding
                else f"convert: iconv -f {self.encoding} -t utf-8",
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """The text columns."""
        return tuple(name.strip() for name in self.text.split(","))


@dataclass(frozen=True)
class SourceFile:
    """One file, or one Hugging Face data set (format "hf").

    Attributes:
        url: a path or fsspec URL; for "hf" PATH:SPLIT.
        identity: changes when the content does.
    """

    url: str
    format: str
    compression: str | None
    size_bytes: int
    identity: str


@dataclass(frozen=True)
class Span:
    """Part of a file, [begin, end); all if end < 0.

    Bytes of text, JSON lines, CSV and TSV; else units: row groups, batches or rows.
    """

    file: int
    begin: int = 0
    end: int = -1


Piece = tuple[Span, ...]


# option -> the formats that it says nothing of, and why
_COLUMNS = {"jsonl", "json", "parquet", "arrow", "hf"}
_SILENT: dict[str, tuple[set[str], str]] = {
    "format": ({"hf"}, "a Hugging Face data set knows its own form"),
    "encoding": ({"parquet", "arrow", "hf"}, "they say themselves how their text is encoded"),
    "document": ({*_COLUMNS, "csv", "tsv"}, "only of plain text it is a question what a document is"),
    "quoting": ({*_COLUMNS, "text"}, "only CSV and TSV have quotes that may hold a delimiter"),
    "text": ({"text"}, "plain text has no columns"),
}
_USUAL = {"format": "auto", "encoding": "utf-8", "document": "file", "quoting": "auto", "text": "text"}


def check_used(data: Sequence[str], given: Mapping[str, str | None]) -> None:
    """Options that would be read and do nothing: of these data none has what they speak of.

    Args:
        given: values of "format", "encoding", "document", "quoting" or "text" (column); None, and the default, says nothing.

    Raises:
        UsageError: such an option. DataError: a name matches nothing.
    """
    said = {name: value for name, value in given.items() if value is not None and value != _USUAL[name]}
    with contextlib.suppress(LookupError):
        if codecs.lookup(said.get("encoding", "")).name == "utf-8":
            del said["encoding"]
    if not said:
        return
    kinds = _kinds(data, said.get("format", "auto"))
    for name, value in said.items():
        silent, rule = _SILENT[name]
        if kinds <= silent:
            what = f"{name} = {value!r} with data of {', '.join(sorted(kinds))} alone"
            raise UsageError(what, rule, f"leave out {name}")


def _kinds(data: Sequence[str], given: str) -> set[str]:
    """The formats of data, by their names alone."""
    found: set[str] = set()
    for name in data:
        if name.startswith("hf:"):
            found.add("hf")
        elif given != "auto":
            found.add(given)
        else:
            found.update(SUFFIXES.get(_suffixes(path)[0], "text") for path in _expand(name)[1])
    return found


def find_files(spec: DataSpec, cache: Path) -> list[SourceFile]:
    """All files of `spec`, in the order of its names and sorted within each.

    Raises:
        DataError: a name matches nothing, or a file cannot be read.
    """
    index = _Identities(cache / "files.json")
    found: list[SourceFile] = []
    for name in spec.data:
        if name.startswith("hf:"):
            from manyhands.data.hub import describe

            found.append(describe(name[3:]))
            continue
        fs, paths = _expand(name)
        for path in paths:
            found.append(_describe(fs, path, spec, index, explicit=len(paths) == 1))
    index.save()
    if not found:
        raise DataError("data names nothing", "training needs text", "give --data")
    return found


def _expand(name: str) -> tuple[Any, list[str]]:
    import fsspec

    if name == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        # tables of characters and tests are hardly text
        skip = {
            "site-packages",
            "dist-packages",
            "test",
            "tests",
            "idle_test",
            "__pycache__",
            "encodings",
            "pydoc_data",
        }
        paths = sorted(str(p) for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
        return fsspec.filesystem("file"), paths
    try:
        fs, path = fsspec.core.url_to_fs(os.path.expanduser(name))
        if any(c in path for c in "*?[") and not fs.exists(path):  # else that is its name
            fixed = path[: min(i for i in map(path.find, "*?[") if i >= 0)].rpartition("/")[0]
            show = "/." in path[len(fixed) :]
            paths = sorted(p for p in fs.glob(path) if not fs.isdir(p) and (show or not _hidden(p, fixed)))
        elif fs.isdir(path):
            paths = sorted(p for p in fs.find(path) if _known(p) and not _hidden(p, path))
        elif fs.exists(path):
            paths = [path]
        else:
            raise DataError(
                f"{name} does not exist", "data names files, directories, globs or URLs", "check the path"
            )
    except (OSError, ImportError, ValueError) as error:
        raise DataError(
            f"{name}: {str(error).splitlines()[0]}", "it must be readable", "check the address"
        ) from error
    # a link that leads nowhere is named by its owner or not meant: in a directory or by a pattern it holds nothing
    paths = [p for p in paths if len(paths) == 1 or not os.path.islink(p) or os.path.exists(p)]
    if not paths:
        raise DataError(
            f"{name} matches no file",
            "training needs text",
            f"known suffixes: {', '.join(SUFFIXES)}, also with .gz, .zst",
        )
    return fs, paths


def _known(path: str) -> bool:
    return _suffixes(path)[0] in SUFFIXES


def _hidden(path: str, root: str) -> bool:
    return any(part.startswith(".") for part in path[len(root) :].split("/"))


def _suffixes(path: str) -> tuple[str, str | None]:
    stem, last = os.path.splitext(path)
    compression = COMPRESSIONS.get(last.lower())
    suffix = os.path.splitext(stem)[1] if compression else last
    return suffix.lower(), compression


def _describe(fs: Any, path: str, spec: DataSpec, index: _Identities, *, explicit: bool) -> SourceFile:
    suffix, compression = _suffixes(path)
    kind = spec.format if spec.format != "auto" else SUFFIXES.get(suffix, "text")
    try:
        info = fs.info(path)
        local = "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))
        if local:
            identity = index.of(path)
            url = path
            if spec.format == "auto" and suffix not in SUFFIXES and compression is None:
                _refuse_binary(path)
        else:
            identity = hashlib.sha256(_remote_identity(fs, path, info).encode()).hexdigest()
            url = fs.unstrip_protocol(path)
        return SourceFile(url, kind, compression, int(info.get("size") or 0), identity)
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror or error}", "it must be readable", "check its rights"
        ) from error


def _remote_identity(fs: Any, path: str, info: Mapping[str, Any]) -> str:
    """What fsspec knows a file's content by; of the web that is the address alone, whatever has come to be there."""
    known = str(fs.ukey(path))
    if "http" not in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
        return known
    told = {key.lower(): value for key, value in info.items()}
    return str(
        [known, *(told.get(key) for key in ("size", "etag", "content-md5", "digest", "last-modified"))]
    )


def _refuse_binary(path: str) -> None:
    """A file of no known suffix is read as text, unless its beginning says that it is none."""
    with open(path, "rb") as file:
        begin = file.read(8192)
    if b"\0" in begin or begin.startswith(b"%PDF-"):
        raise DataError(
            f"{path} is no text",
            f"known suffixes: {', '.join(SUFFIXES)}, also with .gz, .zst",
            "convert it, or say what it is with --format",
        )


class _Identities:
    """sha256 of local files, remembered by (path, size, mtime) so that a second run reads nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._known: dict[str, list[Any]] = json.loads(path.read_text())
        except (OSError, ValueError):
            self._known = {}
        self._changed = False

    def of(self, path: str) -> str:
        stat = os.stat(path)
        facts = [stat.st_size, stat.st_mtime_ns]
        known = self._known.get(path)
        if known is None or known[:2] != facts:
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
            known = self._known[path] = [*facts, digest.hexdigest()]
            self._changed = True
        return str(known[2])

    def save(self) -> None:
        if not self._changed:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self._known))
        temporary.replace(self._path)


def cut(files: Sequence[SourceFile], spec: DataSpec) -> list[Piece]:
    """Pieces of all files: at least a sixteenth of the whole or 1 MiB, at most `PIECE_BYTES` where a file can be cut."""
    total = sum(f.size_bytes for f in files)
    size = min(PIECE_BYTES, max(1 << 20, total // 16))
    pieces: list[Piece] = []
    open_spans: list[Span] = []
    filled = 0
    for i, file in enumerate(files):
        spans = _spans(i, file, size, spec)
        if len(spans) > 1:
            if open_spans:
                pieces.append(tuple(open_spans))
                open_spans, filled = [], 0
            pieces.extend((span,) for span in spans)
            continue
        if open_spans and filled + file.size_bytes > size:
            pieces.append(tuple(open_spans))
            open_spans, filled = [], 0
        open_spans.extend(spans)
        filled += file.size_bytes
    if open_spans:
        pieces.append(tuple(open_spans))
    return pieces


def _spans(i: int, file: SourceFile, size: int, spec: DataSpec) -> list[Span]:
    try:
        return _cut_one(i, file, size, spec)
    except (EOFError, ValueError):  # whoever reads it says what is wrong
        return [Span(i)]


def _cut_one(i: int, file: SourceFile, size: int, spec: DataSpec) -> list[Span]:
    if file.format in ("text", "jsonl") and file.compression is None and file.size_bytes > size:
        count = -(-file.size_bytes // size)
        edges = [file.size_bytes * k // count for k in range(count + 1)]
        return [Span(i, a, b) for a, b in itertools.pairwise(edges)]
    if file.format in ("csv", "tsv") and file.compression is None and file.size_bytes > size:
        from manyhands.data import delimited

        return [Span(i, a, b) for a, b in itertools.pairwise(delimited.edges(file, size, spec))]
    if file.format in ("parquet", "arrow", "hf") and file.compression is None and file.size_bytes > size:
        from manyhands.data.formats import unit_count

        units = unit_count(file)
        count = max(1, min(units, file.size_bytes // size))
        edges = [units * k // count for k in range(count + 1)]
        return [Span(i, a, b) for a, b in itertools.pairwise(edges)]
    return [Span(i)]


def span_bytes(span: Span, file: SourceFile) -> int:
    """How many bytes of the file a span has; those of the whole file where it counts something else."""
    counted = file.format in ("text", "jsonl", "csv", "tsv") and span.end >= 0
    return span.end - span.begin if counted else file.size_bytes


def identity_of(spec: DataSpec, files: Sequence[SourceFile], tokenizer: str, version: int) -> str:
    """A name for the prepared form: the same for the same content, options and tokenizer."""
    facts = asdict(spec)
    del facts["data"], facts["tokenizer"]
    content = [[f.format, f.compression, f.identity] for f in files]
    return hashlib.sha256(
        json.dumps([version, facts, content, tokenizer], sort_keys=True).encode()
    ).hexdigest()
