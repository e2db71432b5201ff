"""Rows to train on, out of memory-mapped shards: any row in O(log shards), nothing read ahead.

Text rows are windows over the concatenation of all shards: row i is tokens [i·L, i·L + L], inputs the first L of them, targets the
last L. The last row is padded and its missing targets are ignored (−100): every token but the first is a target exactly once,
and every full row is full (packing at 100%).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from manyhands.core.errors import DataError
from manyhands.data import shards, tokenize

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from manyhands.data.prepare import Prepared

IGNORED = -100
EXACT_TOKENS = 50_000_000  # parts up to this size have their bytes counted exactly


class TokenRows:
    """Rows of `seq_len` tokens.

    Args:
        prepared: from `manyhands.data.prepare`.
        part: which rows; default: all.
    """

    def __init__(self, prepared: Prepared, seq_len: int, part: range | None = None) -> None:
        self._prepared, self._length = prepared, seq_len
        sizes = [size for _, size in prepared.shards]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._total = int(self._starts[-1])
        whole = max(0, -(-(self._total - 1) // seq_len))
        self._part = part if part is not None else range(whole)
        self._open: dict[int, NDArray[Any]] = {}

    def __len__(self) -> int:
        return len(self._part)

    def take(self, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        """Rows `ids`: ``input_ids`` and ``targets``, each [len(ids), seq_len] int64."""
        length = self._length
        block = np.full((len(ids), length + 1), IGNORED, dtype=np.int64)
        for row, i in enumerate(ids):
            first = self._part[int(i)] * length
            self._copy(first, min(first + length + 1, self._total), block[row])
        inputs, targets = block[:, :-1].copy(), block[:, 1:].copy()
        # past the end, and the very last token, whose target does not exist
        inputs[inputs == IGNORED] = self._prepared.end_id
        return {"input_ids": torch.from_numpy(inputs), "targets": torch.from_numpy(targets)}

    @property
    def lacking(self) -> int:
        """How many targets the last row has less than the others."""
        return max(0, self._part.stop * self._length - (self._total - 1)) if len(self) else 0

    @functools.cached_property
    def bytes_per_target(self) -> float:
        """UTF-8 bytes of text per target of this part; exact for byte-level and character tokens, else the data's mean.

        An unknown character counts as many bytes as those of the data do on average.
        """
        first, last = (
            self._part.start * self._length + 1,
            min(self._part.stop * self._length + 1, self._total),
        )
        if 0 < last - first <= EXACT_TOKENS:
            encoder = tokenize.Encoder(self._prepared.tokenizer)
            lengths = encoder.byte_lengths()
            if lengths is not None:
                counts = self._counts(first, last, len(lengths))
                unknown = encoder.unknown_id
                if unknown is None or not counts[unknown]:
                    return float(counts @ lengths) / (last - first)
                if self._total <= EXACT_TOKENS:
                    whole = self._counts(0, self._total, len(lengths))
                    each = (self._prepared.text_bytes - int(whole @ lengths)) / int(whole[unknown])
                    return (float(counts @ lengths) + each * int(counts[unknown])) / (last - first)
        return self._prepared.text_bytes / max(1, self._prepared.tokens)

    def _counts(self, first: int, last: int, size: int) -> NDArray[np.int64]:
        """How often each token occurs in [first, last)."""
        counts = np.zeros(size, dtype=np.int64)
        for begin in range(first, last, 1 << 20):
            block = np.empty(min(1 << 20, last - begin), dtype=np.int64)
            self._copy(begin, begin + len(block), block)
            counts += np.bincount(block, minlength=size)
        return counts

    def _copy(self, first: int, last: int, into: NDArray[np.int64]) -> None:
        """Tokens [first, last) to the beginning of `into`."""
        shard = int(np.searchsorted(self._starts, first, side="right")) - 1
        done = 0
        while first + done < last:
            offset = first + done - int(self._starts[shard])
            tokens = self._shard(shard)
            n = min(last - first - done, len(tokens) - offset)
            into[done : done + n] = tokens[offset : offset + n]
            done += n
            shard += 1

    def _shard(self, i: int) -> NDArray[Any]:
        if i not in self._open:
            self._open[i] = shards.open_tokens(self._prepared.directory / self._prepared.shards[i][0])
        return self._open[i]


class LabelledRows:
    """Texts with a label each, between the special tokens that their tokenizer puts around a text.

    Args:
        max_len: longer texts are cut, so that these have room, too.
        ids: which rows of the data, in this order.
        labels: class names in order; default: the data's own.

    Attributes:
        lengths, classes: tokens and class of each row, [len(self)] int32; known without reading the texts.
    """

    def __init__(
        self,
        prepared: Prepared,
        max_len: int,
        ids: NDArray[np.int64],
        *,
        labels: Sequence[str] | None = None,
        named: str = "the data",
    ) -> None:
        names = list(labels if labels is not None else prepared.labels or ())
        self._max_len, self._ids = max_len, ids
        self._prepared = prepared
        parts = [shards.open_labelled(prepared.directory / name) for name, _ in prepared.shards]
        self._starts = np.concatenate([[0], np.cumsum([len(p[2]) for p in parts])]).astype(np.int64)
        self._parts = [(offsets, flat) for offsets, flat, _ in parts]
        self.classes = _numbers([labels for _, _, labels in parts], names, named)[ids]
        lengths = np.concatenate([np.diff(o) for o, _ in self._parts] or [np.empty(0, np.int32)])[ids]
        self._around = tuple(np.array(each, dtype=np.int64) for each in tokenize.around(prepared.tokenizer))
        lengths += sum(map(len, self._around))
        self.lengths = np.clip(lengths, 1, max_len)  # tokens of each row, as far as they are used

    def __len__(self) -> int:
        return len(self._ids)

    def take(self, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        """Rows `ids`: ``input_ids``, ``attention_mask`` [n, longest, to a multiple of 8] and ``label`` [n], int64."""
        longest = int(self.lengths[ids].max()) if len(ids) else 1
        width = min(self._max_len, -(-longest // 8) * 8)
        inputs = np.full((len(ids), width), self._pad(), dtype=np.int64)
        mask = np.zeros((len(ids), width), dtype=np.int64)
        before, behind = self._around
        room = max(0, self._max_len - len(before) - len(behind))  # for the text
        for row, i in enumerate(ids):
            place = int(self._ids[int(i)])
            part = int(np.searchsorted(self._starts, place, side="right")) - 1
            offsets, flat = self._parts[part]
            begin, end = offsets[place - self._starts[part]], offsets[place - self._starts[part] + 1]
            whole = np.concatenate([before, flat[begin : min(end, begin + room)], behind])[:width]
            inputs[row, : len(whole)] = whole
            mask[row, : len(whole)] = 1
        return {
            "input_ids": torch.from_numpy(inputs),
            "attention_mask": torch.from_numpy(mask),
            "label": torch.from_numpy(self.classes[ids].astype(np.int64)),
        }

    @property
    def bytes_per_target(self) -> float:
        """Bytes of text per label: the data's mean."""
        return self._prepared.text_bytes / max(1, self._prepared.documents)

    def _pad(self) -> int:
        import json

        if not hasattr(self, "_pad_id"):
            file = self._prepared.tokenizer / "tokenizer_config.json"
            settings = json.loads(file.read_text(encoding="utf-8"))
            name = settings.get("pad_token")
            name = name.get("content") if isinstance(name, dict) else name
            from tokenizers import Tokenizer

            found = (
                Tokenizer.from_file(str(self._prepared.tokenizer / "tokenizer.json")).token_to_id(name)
                if name
                else None
            )
            self._pad_id = int(found) if found is not None else self._prepared.end_id
        return self._pad_id


def _numbers(columns: Sequence[Any], names: Sequence[str], named: str) -> NDArray[np.int32]:
    """The place in `names` of each label of some Arrow arrays, [Σ len]. Never a Python string a row: there may be millions."""
    import pyarrow as pa
    import pyarrow.compute as pc

    known = pa.array(names, pa.string())
    found = [pc.index_in(column, value_set=known) for column in columns]  # null: not among them
    unknown: set[str] = set()
    for column, numbers in zip(columns, found, strict=True):
        if numbers.null_count:
            unknown.update(pc.unique(column.filter(numbers.is_null())).to_pylist())
    if unknown:
        raise DataError(
            f"labels {sorted(unknown)[:3]} in {named}",
            f"the classes are {', '.join(names[:20])}",
            "correct the label column",
        )
    return np.concatenate([numbers.to_numpy() for numbers in found] or [np.empty(0, np.int32)])
