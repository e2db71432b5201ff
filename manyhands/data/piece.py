"""One piece of a preparation: rows read, encoded in batches, written as shards."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from manyhands.core.errors import DataError
from manyhands.data import formats, shards, tokenize
from manyhands.data.row import BrokenFile
from manyhands.data.source import DataSpec, Piece, SourceFile

BATCH_CHARS = 1 << 20  # of text given to the tokenizer at a time
SHOWN = 5  # broken rows of a kind that are shown one by one


def prepare_piece(
    directory: Path, spec: DataSpec, files: list[SourceFile], piece: Piece, encoder: tokenize.Encoder
) -> dict[str, Any]:
    made = _Maker(directory, encoder, labelled=spec.label is not None)
    skipped: Counter[str] = Counter()
    bad: list[
        list[Any]
    ] = []  # (file's number, where in it, kind, message): other jobs know the files by other names
    broken: list[list[Any]] = []  # (file's number, message)
    for span in piece:
        name, ended = files[span.file].url, True
        try:
            for row in formats.read(files[span.file], span, spec):
                if isinstance(row, formats.Row):
                    made.add(row)
                    ended = row.last
                    continue
                if spec.on_error == "fail":
                    raise DataError(
                        f"{row.where}: {row.message}",
                        "on_error = 'fail' stops at the first broken row",
                        "mend it, or use --on-error skip",
                    )
                skipped[row.kind] += 1
                if skipped[row.kind] <= SHOWN:
                    bad.append([span.file, row.where.removeprefix(name), row.kind, row.message])
        except BrokenFile as error:
            if spec.on_error == "fail":
                raise
            if not ended:  # what there is of a document is one: the next one is not its end
                made.add(formats.Row(""))
            broken.append([span.file, str(error).removeprefix(name).removeprefix(":").strip()])
    made.flush(last=True)
    return {**made.facts, "skipped": dict(skipped), "bad": bad, "broken": broken}


class _Maker:
    """Collects rows, encodes them in batches, writes full shards."""

    def __init__(self, directory: Path, encoder: tokenize.Encoder, *, labelled: bool) -> None:
        self._directory, self._encoder, self._labelled = directory, encoder, labelled
        self._rows: list[formats.Row] = []
        self._size = 0
        self._tokens: list[Any] = []  # blocks of tokens
        self._lengths: list[Any] = []  # of labelled rows, by block
        self._labels: list[str] = []
        self._seen: set[str] = set()
        self._held = 0
        self._shards: list[tuple[str, int]] = []
        self._counts: Counter[str] = Counter(documents=0, tokens=0, text_bytes=0)

    def add(self, row: formats.Row) -> None:
        self._rows.append(row)
        self._size += len(row.text)
        if self._size >= BATCH_CHARS or len(self._rows) >= 4096:
            self.flush()

    def flush(self, *, last: bool = False) -> None:
        if self._rows:
            self._encode(self._rows)
        self._rows, self._size = [], 0
        if self._tokens and (last or self._held >= shards.SHARD_TOKENS):
            self._counts["tokens"] += self._held
            tokens = np.concatenate(self._tokens)
            if self._labelled:
                lengths = np.concatenate(self._lengths)
                name = shards.write_labelled(self._directory, tokens, lengths, self._labels)
                self._shards.append((name, len(lengths)))
            else:
                name = shards.write_tokens(self._directory, tokens)
                self._shards.append((name, self._held))
            self._seen.update(self._labels)
            self._tokens, self._lengths, self._labels, self._held = [], [], [], 0

    def _encode(self, rows: list[formats.Row]) -> None:
        tokens, lengths = self._encoder([row.text for row in rows])
        self._counts["text_bytes"] += sum(len(row.text.encode("utf-8", "surrogatepass")) for row in rows)
        self._counts["documents"] += sum(row.last for row in rows)
        if self._labelled:
            self._labels.extend(row.label or "" for row in rows)
            self._lengths.append(lengths)
        else:
            ends = np.cumsum(lengths)[np.fromiter((row.last for row in rows), dtype=bool, count=len(rows))]
            tokens = np.insert(tokens, ends, self._encoder.end_id)
        self._tokens.append(tokens)
        self._held += len(tokens)

    @property
    def facts(self) -> dict[str, Any]:
        return {**self._counts, "shards": self._shards, "labels": sorted(self._seen)}
