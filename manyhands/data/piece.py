"""One piece of a preparation: rows read, encoded in batches, written as shards."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from manyhands.core.errors import DataError
from manyhands.data import formats, shards, tokenize
from manyhands.data.source import DataSpec, Piece, SourceFile

BATCH_BYTES = 1 << 20  # of text given to the tokenizer at a time
SHOWN = 5  # broken rows of a kind that are shown one by one


def prepare_piece(
    directory: Path, spec: DataSpec, files: list[SourceFile], piece: Piece, encoder: tokenize.Encoder
) -> dict[str, Any]:
    made = _Maker(directory, encoder, labelled=spec.label is not None)
    skipped: Counter[str] = Counter()
    bad: list[formats.Bad] = []
    for span in piece:
        for row in formats.read(files[span.file], span, spec):
            if isinstance(row, formats.Row):
                made.add(row)
                continue
            if spec.on_error == "fail":
                raise DataError(
                    f"{row.where}: {row.message}",
                    "on_error = 'fail' stops at the first broken row",
                    "mend it, or use --on-error skip",
                )
            skipped[row.kind] += 1
            if skipped[row.kind] <= SHOWN:
                bad.append(row)
    made.flush(last=True)
    return {**made.facts, "skipped": dict(skipped), "bad": [list(b) for b in bad]}


class _Maker:
    """Collects rows, encodes them in batches, writes full shards."""

    def __init__(self, directory: Path, encoder: tokenize.Encoder, *, labelled: bool) -> None:
        self._directory, self._encoder, self._labelled = directory, encoder, labelled
        self._rows: list[formats.Row] = []
        self._size = 0
        self._tokens: list[Any] = []
        self._labels: list[str] = []
        self._seen: set[str] = set()
        self._held = 0
        self._shards: list[tuple[str, int]] = []
        self._counts: Counter[str] = Counter(documents=0, tokens=0, text_bytes=0)
        self._end = np.array([encoder.end_id], dtype=encoder.dtype)

    def add(self, row: formats.Row) -> None:
        self._rows.append(row)
        self._size += len(row.text)
        if self._size >= BATCH_BYTES or len(self._rows) >= 4096:
            self.flush()

    def flush(self, *, last: bool = False) -> None:
        for row, ids in zip(self._rows, self._encoder([r.text for r in self._rows]), strict=True):
            self._counts["text_bytes"] += len(row.text.encode("utf-8", "surrogatepass"))
            self._counts["documents"] += row.last
            self._tokens.append(ids)
            self._held += len(ids)
            if self._labelled:
                self._labels.append(row.label or "")
            elif row.last:
                self._tokens.append(self._end)
                self._held += 1
        self._rows, self._size = [], 0
        if self._tokens and (last or self._held >= shards.SHARD_TOKENS):
            self._counts["tokens"] += self._held
            if self._labelled:
                name = shards.write_labelled(self._directory, self._tokens, self._labels, self._encoder.dtype)
                self._shards.append((name, len(self._tokens)))
            else:
                name = shards.write_tokens(self._directory, np.concatenate(self._tokens))
                self._shards.append((name, self._held))
            self._seen.update(self._labels)
            self._tokens, self._labels, self._held = [], [], 0

    @property
    def facts(self) -> dict[str, Any]:
        return {**self._counts, "shards": self._shards, "labels": sorted(self._seen)}
