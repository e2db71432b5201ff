"""Byte-level BPE, fast: words are found by NumPy, and each distinct word goes through the `tokenizers` library once.

GPT-2's tokenizer cuts text into words (Radford et al. 2019; `PATTERN`) and encodes each alone, so equal words have equal tokens.
The library matches the pattern with a regular-expression engine, which takes most of its time. Here characters become classes by
table, word ends follow from neighbouring classes in whole arrays, and words become tokens by a dictionary. What class a
character has is asked of the library, one character at a time, when it first appears: the two agree by construction.

The library remains the reference: `tests/test_bytelevel.py` compares the tokens of any text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
UNSEEN, SPACE, LETTER, NUMBER, OTHER, BREAK = range(6)  # classes of characters; BREAK stands between texts
MAX_WORDS = 1 << 18  # distinct words remembered; some 40 MB


def build(tokenizer: Any) -> Words | None:
    """The fast encoder of a `tokenizers.Tokenizer`, or None where its words are not `PATTERN`'s."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.to_str())
    model, before = state["model"], state.get("pre_tokenizer") or {}
    usual = model["type"] == "BPE" and not model.get("dropout") and state.get("normalizer") is None
    if not usual or before.get("type") != "ByteLevel":
        return None
    if not before.get("use_regex", True) or before.get("add_prefix_space", True):
        return None
    alone = {**state, "pre_tokenizer": {**before, "use_regex": False}, "post_processor": None}
    alone["added_tokens"] = []  # texts that hold one are left to the library: see `Words.knows`
    return Words(
        Tokenizer.from_str(json.dumps(alone)), special=[token["content"] for token in state["added_tokens"]]
    )


class Words:
    """Tokens of texts by their words. Memory is some 100 bytes a character given, and `MAX_WORDS`."""

    def __init__(self, alone: Any, special: Sequence[str]) -> None:
        self._alone = alone  # encodes one whole word
        self._special = tuple(special)
        self._classes = np.zeros(0x110000, dtype=np.uint8)
        self._forget()

    def _forget(self) -> None:
        self._numbers = _Numbers()
        self._begins = np.zeros(1 << 12, dtype=np.int64)  # [words] where a word's tokens are in _flat
        self._lengths = np.zeros(1 << 12, dtype=np.int64)  # [words]
        self._flat = np.zeros(1 << 14, dtype=np.uint32)
        self._used = 0

    def knows(self, texts: Sequence[str]) -> bool:
        """Whether these are the library's tokens: not where a special token is spelt out in a text."""
        return not any(token in text for token in self._special for text in texts)

    def __call__(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """(tokens of all texts, how many each text has). Raises `UnicodeEncodeError` for a lone surrogate."""
        if not texts:
            return np.empty(0, dtype=np.uint32), np.empty(0, dtype=np.int64)
        joined = "\n".join(texts)
        begins = np.cumsum([0, *(len(text) + 1 for text in texts[:-1])])  # [texts] in joined
        edges = self._edges(joined, begins[1:] - 1)
        if len(self._numbers) > MAX_WORDS:
            self._forget()
        words = list(map(joined.__getitem__, map(slice, edges[:-1].tolist(), edges[1:].tolist())))
        numbers = np.fromiter(map(self._numbers.__getitem__, words), dtype=np.int64, count=len(words))
        if self._numbers.new:
            self._learn()
        lengths = self._lengths[numbers]  # [words in the text]
        if len(texts) > 1:  # the line end that joins two texts is nobody's
            lengths[np.searchsorted(edges, begins[1:] - 1)] = 0
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        places = np.arange(total) + np.repeat(self._begins[numbers] - ends + lengths, lengths)
        before = np.concatenate([[0], ends])[np.searchsorted(edges, [*begins, len(joined)])]
        return self._flat[places], np.diff(before)

    def _learn(self) -> None:
        """Tokens of the new words, by the library."""
        new = self._numbers.new
        encoded = [one.ids for one in self._alone.encode_batch_fast(new, add_special_tokens=False)]
        first, count = len(self._numbers) - len(new), sum(map(len, encoded))
        self._begins = _grown(self._begins, first + len(new))
        self._lengths = _grown(self._lengths, first + len(new))
        self._flat = _grown(self._flat, self._used + count)
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(new))
        self._lengths[first : first + len(new)] = lengths
        self._begins[first : first + len(new)] = self._used + np.cumsum(lengths) - lengths
        self._flat[self._used : self._used + count] = [token for ids in encoded for token in ids]
        self._used += count
        new.clear()

    def _edges(self, text: str, breaks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where words begin, and the end. `breaks`: places of characters that are words of their own, of no text."""
        points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        n = len(points)
        kinds = self._kinds(points)  # [n + 1], the end is a break
        kinds[breaks] = BREAK
        begins = np.empty(n + 1, dtype=bool)
        begins[0] = begins[n] = True
        np.not_equal(kinds[1:n], kinds[: n - 1], out=begins[1:n])
        begins[breaks] = begins[breaks + 1] = True
        # \s+(?!\S) leaves the last white space before a word; a blank then begins that word
        white = kinds[:n] == SPACE
        last = np.flatnonzero(white & (kinds[1:] != SPACE) & (kinds[1:] != BREAK))
        begins[last] = True
        begins[last[points[last] == 0x20] + 1] = False
        # 's and the like: an apostrophe that begins a word, with letters behind it
        for i in np.flatnonzero((points == 0x27) & begins[:n]).tolist():
            if kinds[i + 1] == LETTER:
                behind = text[i + 1 : i + 3]
                size = 1 if behind[0] in "stmd" else 2 if behind in ("re", "ve", "ll") else 0
                if size:
                    begins[i + 1] = False
                    begins[i + 1 + size] = True
        return np.flatnonzero(begins)

    def _kinds(self, points: NDArray[np.uint32]) -> NDArray[np.uint8]:
        """[n + 1] classes of the characters; the last is `BREAK`."""
        kinds = np.empty(len(points) + 1, dtype=np.uint8)
        kinds[-1] = BREAK
        np.take(self._classes, points, out=kinds[:-1])
        unseen = kinds[:-1] == UNSEEN
        if unseen.any():
            for point in np.unique(points[unseen]).tolist():
                self._classes[point] = _kind(chr(point))
            np.take(self._classes, points, out=kinds[:-1])
        return kinds


class _Numbers(dict[str, int]):
    """Words numbered as they are first asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.new: list[str] = []

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        self.new.append(word)
        return number


def _grown(array: NDArray[Any], size: int) -> NDArray[Any]:
    """The array with room for `size`, by doubling."""
    if size <= len(array):
        return array
    wider = np.zeros(max(size, 2 * len(array)), dtype=array.dtype)
    wider[: len(array)] = array
    return wider


def _kind(character: str) -> int:
    """What the library takes a character for: which of four neighbours it makes one word with."""
    from tokenizers.pre_tokenizers import ByteLevel

    library = ByteLevel(add_prefix_space=False, use_regex=True)
    for kind, neighbour in ((LETTER, "a"), (NUMBER, "1"), (OTHER, "!")):
        if len(library.pre_tokenize_str(neighbour + character)) == 1:
            return kind
    return SPACE
