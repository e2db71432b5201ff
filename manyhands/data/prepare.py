"""Preparation: documents to token shards, once, by any number of processes, without a coordinator.

    CACHE/tokenizers/<name>/         trained tokenizers
    CACHE/data/<identity>/plan.json      files and pieces
                         /piece-K.json   what piece K became; written when its shards are durable
                         /<sha256>.arrow shards
                         /manifest.json  the whole; written last

Whoever calls `prepare` takes part: a process claims a piece by a file lock, so the claim of a killed process frees itself, and
the ranks of a job on one file system share the work without a barrier. Which process did what leaves no trace in the result.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from manyhands.core.errors import DataError
from manyhands.core.events import Emit, PreparedData, Preparing, Warned, ignore
from manyhands.data import formats, shards, source, tokenize
from manyhands.data.piece import SHOWN, prepare_piece
from manyhands.data.progress import Progress
from manyhands.data.row import BrokenFile
from manyhands.data.source import DataSpec, Piece, SourceFile, Span

VERSION = 6
TRAIN_BYTES = 128 << 20  # of text a tokenizer is trained on
POLL_S = 0.1


@dataclass(frozen=True)
class Prepared:
    """A finished preparation.

    Attributes:
        directory: of the shards, which `shards` names in order with their sizes (tokens, or rows of labelled data).
        labels: class names in order; None for text without labels.
        skipped: broken rows by kind.
        identity: changes with the content.
    """

    directory: Path
    tokenizer: Path
    vocab_size: int
    end_id: int
    documents: int
    tokens: int
    text_bytes: int
    rows: int
    shards: tuple[tuple[str, int], ...]
    labels: tuple[str, ...] | None
    skipped: dict[str, int]
    identity: str


def prepare(spec: DataSpec, *, cache: Path, processes: int = 1, emit: Emit = ignore) -> Prepared:
    """Prepare `spec` into `cache`, or find it there.

    Args:
        processes: 1: in this process; more: that many new ones, which import neither torch nor Transformers.

    Raises:
        DataError: input that cannot be read, or (with on_error = "fail") the first broken row.
    """
    start = time.monotonic()
    tokenize.parse(spec.tokenizer)
    try:
        files = source.find_files(spec, cache)
        tokenizer = _tokenizer(spec, files, cache, emit)
        encoder = tokenize.Encoder(tokenizer)
        identity = source.identity_of(spec, files, tokenize.identity(tokenizer, encoder), VERSION)
        directory = cache / "data" / identity[:24]
        reused = (directory / "manifest.json").exists()
        if not reused:
            _run(spec, files, tokenizer, directory, processes, emit)
        manifest = json.loads((directory / "manifest.json").read_text())
    except OSError as error:
        raise shards.failure(cache, error) from error
    prepared = _read(directory, tokenizer, encoder, manifest, identity)
    _report(prepared, manifest, files, reused, time.monotonic() - start, emit)
    if not prepared.documents:
        raise DataError(
            f"{', '.join(spec.data)} holds no text"
            + (f" ({sum(prepared.skipped.values())} broken rows)" if prepared.skipped else ""),
            "training needs some",
            "look at the files",
        )
    return prepared


def _report(
    prepared: Prepared,
    manifest: dict[str, Any],
    files: list[SourceFile],
    reused: bool,
    wall_s: float,
    emit: Emit,
) -> None:
    for number, where, _, message in manifest["bad"]:
        emit(Warned(message=message, where=files[number].url + where))
    for kind, count in prepared.skipped.items():
        if count > SHOWN:
            emit(
                Warned(
                    message=f"{count:,} broken {'files' if kind == 'file' else 'rows of this kind'} were skipped in all",
                    where=kind,
                )
            )
    emit(
        PreparedData(
            directory=str(prepared.directory),
            documents=prepared.documents,
            tokens=prepared.tokens,
            text_bytes=prepared.text_bytes,
            skipped=sum(prepared.skipped.values()),
            reused=reused,
            wall_s=wall_s,
        )
    )


# -- tokenizer


def _tokenizer(spec: DataSpec, files: list[SourceFile], cache: Path, emit: Emit) -> Path:
    """The tokenizer's directory; trained here, by one process while others wait, if need be."""
    kind, _ = tokenize.parse(spec.tokenizer)
    if kind == "directory":
        return Path(spec.tokenizer)
    if kind == "byte":
        name = "byte"
    else:
        name = f"{spec.tokenizer.replace(':', '-')}-{source.identity_of(spec, files, spec.tokenizer, VERSION)[:24]}"
    directory = cache / "tokenizers" / name
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _lock(cache / "tokenizers" / f".{name}.lock"):
            if not directory.exists():
                emit(
                    Preparing(
                        done_bytes=0, total_bytes=None, tokens=0, phase=f"train tokenizer {spec.tokenizer}"
                    )
                )
                texts = iter(()) if kind == "byte" else _sample(spec, files, everything=kind == "char")
                tokenize.train(spec.tokenizer, texts, directory)
    return directory


def _sample(spec: DataSpec, files: list[SourceFile], *, everything: bool) -> Iterator[str]:
    """Texts to train on: everything, or evenly spaced pieces of at most `TRAIN_BYTES` in all.

    How much text is in files that are no plain text, their size does not say: of each piece of them the beginning is taken,
    as much as its part of the bytes allows with what the pieces before it have left.
    """
    pieces = source.cut(files, spec)
    total = sum(f.size_bytes for f in files)
    stride = 1 if everything else max(1, -(-total // TRAIN_BYTES))
    taken = pieces[::stride]
    plain = all(f.compression is None and f.format == "text" for f in files)
    unlimited = everything or plain
    sizes = [1 + sum(source.span_bytes(span, files[span.file]) for span in piece) for piece in taken]
    used = 0
    for k, piece in enumerate(taken):
        allowed = TRAIN_BYTES * sum(sizes[: k + 1]) // sum(sizes)
        for text in _texts(spec, files, piece):
            yield text
            used += len(text.encode("utf-8", "surrogatepass"))
            if used >= allowed and not unlimited:
                break


def _texts(spec: DataSpec, files: list[SourceFile], piece: Piece) -> Iterator[str]:
    for span in piece:
        try:
            for row in formats.read(files[span.file], span, spec):
                if isinstance(row, formats.Row):
                    yield row.text
        except BrokenFile:  # whoever prepares it says so
            if spec.on_error == "fail":
                raise


# -- work


def _run(
    spec: DataSpec, files: list[SourceFile], tokenizer: Path, directory: Path, processes: int, emit: Emit
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    plan = {
        "spec": asdict(spec),
        "files": [asdict(f) for f in files],
        "pieces": [[asdict(s) for s in piece] for piece in source.cut(files, spec)],
        "tokenizer": str(tokenizer.resolve()),
    }
    _write_json(directory / "plan.json", plan)
    progress = Progress(directory, files, emit)
    if processes > 1 and len(plan["pieces"]) > 1:
        _spawn(directory, min(processes, len(plan["pieces"])), progress)
    work(directory, progress)
    _finish(directory, spec, files, len(plan["pieces"]))


def work(directory: Path, progress: Progress | None = None, first: int = 0) -> None:
    """Take part until every piece of the plan is done. Raises `DataError`."""
    plan = json.loads((directory / "plan.json").read_text())
    data = dict(plan["spec"])
    data["data"] = tuple(data["data"])
    spec = DataSpec(**data)
    files = [SourceFile(**f) for f in plan["files"]]
    pieces: list[Piece] = [tuple(Span(**s) for s in piece) for piece in plan["pieces"]]
    encoder: tokenize.Encoder | None = None
    missing = set(range(len(pieces)))
    order = [(first + i) % len(pieces) for i in range(len(pieces))]
    while missing:
        before = len(missing)
        for k in order:
            if k in missing:
                if (directory / f"piece-{k}.json").exists():
                    missing.discard(k)
                    continue
                encoder = encoder or tokenize.Encoder(Path(plan["tokenizer"]))
                if _claim(directory, k, spec, files, pieces[k], encoder):
                    missing.discard(k)
                    if progress is not None:
                        progress.show()
        if len(missing) == before:  # all of them are claimed by others
            time.sleep(POLL_S)
            if progress is not None:
                progress.show()


def _claim(
    directory: Path, k: int, spec: DataSpec, files: list[SourceFile], piece: Piece, encoder: tokenize.Encoder
) -> bool:
    """Do piece `k` unless somebody else is at it; returns whether it is done."""
    from filelock import FileLock, Timeout

    lock = FileLock(str(directory / f".piece-{k}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    try:
        if not (directory / f"piece-{k}.json").exists():
            _write_json(directory / f"piece-{k}.json", prepare_piece(directory, spec, files, piece, encoder))
        return True
    finally:
        lock.release()


def _spawn(directory: Path, processes: int, progress: Progress) -> None:
    """Start that many processes at different pieces and wait; this one then does what is left, if anything."""
    command = [sys.executable, "-m", "manyhands.data.prepare", str(directory)]
    env = {**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    pieces = len(json.loads((directory / "plan.json").read_text())["pieces"])
    children: list[subprocess.Popen[str]] = []
    try:
        for i in range(processes):
            first = str(i * pieces // processes)
            children.append(
                subprocess.Popen(
                    [*command, first], env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
                )
            )
        while any(child.poll() is None for child in children):
            time.sleep(POLL_S)
            progress.show()
            failed = next((c for c in children if c.poll() not in (None, 0)), None)
            if failed is not None:
                break
        failed = next((c for c in children if c.poll() not in (None, 0)), None)
        if failed is not None and failed.returncode == 3 and failed.stderr is not None:
            raise DataError(failed.stderr.read().strip().removesuffix("."))
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
            if child.stderr is not None:
                child.stderr.close()


def _finish(directory: Path, spec: DataSpec, files: list[SourceFile], pieces: int) -> None:
    """The manifest, from all pieces in order. Raises `DataError` where every file is broken."""
    with _lock(directory / ".manifest.lock"):
        if (directory / "manifest.json").exists():
            return
        each = [json.loads((directory / f"piece-{k}.json").read_text()) for k in range(pieces)]
        skipped: Counter[str] = Counter()
        for facts in each:
            skipped.update(facts["skipped"])
        # a file in several pieces is one file, whose first row, for example, each of them has found wanting
        broken = [list(b) for b in dict.fromkeys(tuple(b) for facts in each for b in facts["broken"])]
        if broken and len({number for number, _ in broken}) == len(files):
            number, message = broken[0]
            every = f"all {len(files)} files are broken; " if len(files) > 1 else ""
            raise DataError(f"{every}{files[number].url}: {message}")
        if broken:
            skipped["file"] = len({number for number, _ in broken})
        labels = sorted({name for facts in each for name in facts["labels"]}, key=_label_order)
        sizes = [(name, size) for facts in each for name, size in facts["shards"]]
        manifest = {
            "version": VERSION,
            "documents": sum(f["documents"] for f in each),
            "tokens": sum(f["tokens"] for f in each),
            "text_bytes": sum(f["text_bytes"] for f in each),
            "shards": sizes,
            "stamps": {name: shards.stamp(directory / name) for name, _ in sizes},
            "labels": labels if spec.label is not None else None,
            "skipped": dict(skipped),
            "bad": _shown(
                [
                    *(bad for facts in each for bad in facts["bad"]),
                    *([number, "", "file", f"left out from there on: {why}"] for number, why in broken),
                ]
            ),
        }
        _write_json(directory / "manifest.json", manifest)
        for lock in directory.glob(".piece-*.lock"):
            lock.unlink(missing_ok=True)


def _shown(bad: list[list[Any]]) -> list[list[Any]]:
    seen: Counter[str] = Counter()
    kept = []
    for one in bad:
        seen[one[2]] += 1
        if seen[one[2]] <= SHOWN:
            kept.append(one)
    return kept


def _label_order(name: str) -> tuple[bool, float, str]:
    """Numbers by value, then words: the classes 2 and 10 are in that order."""
    try:
        number = float(name)
    except ValueError:
        number = math.nan
    # the word "nan", too, is a word: as a number it would stand anywhere
    return (True, 0.0, name) if math.isnan(number) else (False, number, name)


def _read(
    directory: Path, tokenizer: Path, encoder: tokenize.Encoder, manifest: dict[str, Any], identity: str
) -> Prepared:
    stamps = shards.verified(directory, [name for name, _ in manifest["shards"]], manifest["stamps"])
    if stamps != manifest["stamps"]:  # a copy of the cache, or a touched file: read once, not at every start
        with contextlib.suppress(OSError):
            _write_json(directory / "manifest.json", {**manifest, "stamps": stamps})
    labelled = manifest["labels"] is not None
    return Prepared(
        directory=directory,
        tokenizer=tokenizer,
        vocab_size=encoder.vocab_size,
        end_id=encoder.end_id,
        documents=manifest["documents"],
        tokens=manifest["tokens"],
        text_bytes=manifest["text_bytes"],
        rows=sum(size for _, size in manifest["shards"]) if labelled else 0,
        shards=tuple((name, size) for name, size in manifest["shards"]),
        labels=tuple(manifest["labels"]) if labelled else None,
        skipped=manifest["skipped"],
        identity=identity,
    )


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            json.dump(value, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _lock(path: Path) -> Any:
    from filelock import FileLock

    return FileLock(str(path), poll_interval=POLL_S)


def _main() -> int:
    """A process of `_spawn`; exit code 3 and the message on stderr for a `DataError`."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the parent
    try:
        work(Path(sys.argv[1]), first=int(sys.argv[2]))
    except DataError as error:
        print(error, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(_main())
