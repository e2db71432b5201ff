"""Text to tokens. Every tokenizer ends as a directory that ``AutoTokenizer.from_pretrained`` loads.

* ``byte``: GPT-2's byte alphabet without merges (256 tokens and the end of text).
* ``char``: one token per character of the data.
* ``bpe:N``: byte-level BPE (Sennrich 2016, as in GPT-2) trained on the data, N tokens in all.
* ``word:N``: lower-cased words and punctuation, the N most frequent; for classifiers.
* a directory: as it is.

`byte` and `char` are encoded by table look-up, `bpe:N` and other byte-level BPE with GPT-2's words as `bytelevel` says:
the same tokens as the tokenizer itself gives, sooner.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from manyhands.core.errors import DataError, UsageError
from manyhands.data import bytelevel

if TYPE_CHECKING:
    from numpy.typing import NDArray

END, UNKNOWN, PAD = "<|endoftext|>", "<|unk|>", "<|pad|>"
MAX_CHARS = 1 << 20  # of one text encoded at a time
TRAIN_CHARS = 1 << 14  # of one text trained on; the library holds a thousand and more of them
_CUT = re.compile(r"\S(?=\s)")
# of a pre-tokenizer that cuts a text into its characters
CHARACTERS = {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False}
KINDS = ("byte", "char", "bpe:N", "word:N", "a directory")


def parse(spec: str) -> tuple[str, int]:
    """(kind, size) of a tokenizer's name; ("directory", 0) for a path. Raises `UsageError`."""
    kind, _, number = spec.partition(":")
    if kind in ("byte", "char") and not number:
        return kind, 0
    if kind in ("bpe", "word") and number.isdigit():
        least = 258 if kind == "bpe" else 3
        if int(number) < least:
            raise UsageError(
                f"tokenizer = {spec!r}", f"{kind} has at least {least} tokens", f"give {kind}:{least} or more"
            )
        return kind, int(number)
    if any((Path(spec) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return "directory", 0
    raise UsageError(
        f"tokenizer = {spec!r}", f"it is one of {', '.join(KINDS)}", "a directory holds tokenizer.json"
    )


def identity(path: Path, encoder: Encoder) -> str:
    """Changes with what the tokenizer of a directory gives, not with how its files are written: a checkpoint's copy has the same.

    Padding and truncation, which are not used, do not matter.
    """
    digest = hashlib.sha256(f"{encoder.end_id}/".encode())
    if encoder.has_gaps:  # of these an early release kept numbers in too small a type
        digest.update(f"{encoder.vocab_size}/".encode())
    if encoder.finds_added:  # an early release did not find them
        digest.update(b"added/")
    if (path / "tokenizer.json").is_file():
        state = json.loads((path / "tokenizer.json").read_bytes())
        digest.update(json.dumps({**state, "padding": None, "truncation": None}, sort_keys=True).encode())
        return digest.hexdigest()
    for file in sorted(path.iterdir()):
        if file.is_file() and (
            "token" in file.name
            or file.suffix == ".model"
            or file.name in ("vocab.json", "merges.txt", "vocab.txt")
        ):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def train(spec: str, texts: Iterable[str], directory: Path) -> None:
    """Make the tokenizer `spec` from `texts` and save it into `directory` (renamed into place when whole)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    kind, size = parse(spec)
    texts = (part for text in texts for part in _parts(text, TRAIN_CHARS))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"eos_token": END, "bos_token": END, "pad_token": END}
    if kind == "byte":
        made = Tokenizer(models.BPE({c: i for i, c in enumerate([*_in_byte_order(alphabet), END])}, []))
    elif kind == "bpe":
        made = Tokenizer(models.BPE())
    else:
        made = Tokenizer(models.WordLevel({UNKNOWN: 0}, unk_token=UNKNOWN))
        special["unk_token"] = UNKNOWN
    if kind in ("byte", "bpe"):
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "bpe")
        made.decoder = decoders.ByteLevel()
    if kind == "bpe":
        trainer = trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
        )
        _aside(lambda: made.train_from_iterator(texts, trainer))
    elif kind == "char":
        characters: set[str] = set()
        for text in texts:
            characters.update(text)  # of all texts at once: a set for each would fill the memory
        made = Tokenizer(
            models.WordLevel(
                {c: i for i, c in enumerate([*sorted(characters), UNKNOWN, END])}, unk_token=UNKNOWN
            )
        )
        made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        made.decoder = decoders.Fuse()
    elif kind == "word":
        special = {"unk_token": UNKNOWN, "pad_token": PAD, "eos_token": END}
        made.normalizer = normalizers.Lowercase()
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
        )
        words = trainers.WordLevelTrainer(
            vocab_size=size, special_tokens=[PAD, UNKNOWN, END], show_progress=False
        )
        _aside(lambda: made.train_from_iterator(texts, words))
    elif kind == "directory":
        raise UsageError(f"tokenizer = {spec!r}", "a directory is used as it is", "")
    _save(made, special, directory)


def _aside(work: Callable[[], object]) -> None:
    """Do `work` in a thread of its own: it may be in the library for long, where no signal reaches Python.

    What a signal's handler raises leaves from here at once; the thread, which writes nothing, ends with the process.
    """
    done = threading.Event()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="train tokenizer", daemon=True).start()
    done.wait()
    if failed:
        raise failed[0]


def _in_byte_order(alphabet: Sequence[str]) -> list[str]:
    """GPT-2's printable stand-ins for bytes 0 to 255 (its `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    of = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    assert sorted(of.values()) == list(alphabet)
    return [of[b] for b in range(256)]


def _save(made: Any, special: dict[str, str], directory: Path) -> None:
    """tokenizer.json and its configuration, without importing Transformers (preparing needs neither it nor torch)."""
    from tokenizers import AddedToken

    made.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in dict.fromkeys(special.values())]
    )
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    made.save(str(temporary / "tokenizer.json"))
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": int(1e30),
        "clean_up_tokenization_spaces": False,
        **special,
    }
    (temporary / "tokenizer_config.json").write_text(json.dumps(configuration, indent=2) + "\n")
    (temporary / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    temporary.replace(directory)


class Encoder:
    """Encodes batches of texts with a tokenizer directory.

    Attributes:
        vocab_size: tokens in all, those that no text has among them: one more than the highest, for there may be gaps
            (in front of added tokens, usually).
        has_gaps: some numbers below it stand for nothing.
        finds_added: bytes or characters, with tokens of the user's among them.
        end_id: the token between documents.
        unknown_id: the token of what is in no other; None where there is none.
        dtype: the smallest unsigned type that holds every token.
    """

    def __init__(self, directory: Path) -> None:
        self._tokenizer, self.end_id = _load(directory)
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.has_gaps = self.vocab_size > self._tokenizer.get_vocab_size(with_added_tokens=True)
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        self.unknown_id: int | None = (
            self._tokenizer.token_to_id(unknown) if isinstance(unknown, str) else None
        )
        self.dtype: type[np.unsignedinteger[Any]] = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        self._table = self._lookup()
        self._added = [
            token.content
            for token in self._tokenizer.get_added_tokens_decoder().values()
            if token.content not in (END, UNKNOWN, PAD)
        ]
        self.finds_added = self._table is not None and bool(self._added)
        self._words = bytelevel.build(self._tokenizer) if self._table is None else None

    def __call__(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """(the tokens of all texts on end, how many each text has), without special tokens.

        A text of more than `MAX_CHARS` is encoded in parts, cut before white space.
        """
        parts = [_parts(text, MAX_CHARS) for text in texts]
        if sum(map(len, parts)) == len(texts):
            return self._encode(texts)
        encoded = [[self._encode([part])[0] for part in each] for each in parts]
        return _joined([np.concatenate(each) for each in encoded], self.dtype)

    def _encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        if self._table is not None and not any(token in text for token in self._added for text in texts):
            return _joined([self._table(text) for text in texts], self.dtype)
        if self._words is not None and self._words.knows(texts):
            flat, counts = self._words(texts)
            return flat.astype(self.dtype), counts
        # rows of tokenizers' objects become Python lists only one at a time
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return _joined([np.array(one.ids, dtype=self.dtype) for one in encoded], self.dtype)

    def byte_lengths(self) -> NDArray[np.int64] | None:
        """UTF-8 bytes of each token, where all but the unknown one (0) stand for a fixed piece of text; None otherwise.

        Special tokens stand between texts, other added ones (runs of blanks, usually) for what they spell.
        """
        state = json.loads(self._tokenizer.to_str())
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        added = {t["content"]: t for t in state["added_tokens"]}
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        byte_level = '"ByteLevel"' in json.dumps(state.get("decoder"))
        if not byte_level and (state.get("decoder") or {}).get("type") != "Fuse":
            return None
        for token, number in vocabulary.items():
            told = added.get(token)
            if told is None:
                lengths[number] = len(token) if byte_level else len(token.encode())
            elif not told["special"]:
                if told["lstrip"] or told["rstrip"]:  # and blanks beside it, however many
                    return None
                lengths[number] = len(token.encode())
        return lengths

    def _lookup(self) -> Callable[[str], NDArray[Any]] | None:
        """Encodes by table, where each byte or each character is a token of its own whatever stands beside it."""
        state = json.loads(self._tokenizer.to_str())
        model, pre = state["model"], state.get("pre_tokenizer") or {}
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
        if state.get("normalizer") is not None:
            return None
        if model["type"] == "BPE" and pre.get("type") == "ByteLevel":
            from tokenizers import pre_tokenizers

            order = _in_byte_order(sorted(pre_tokenizers.ByteLevel.alphabet()))
            joined = ("merges", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
            if (
                pre.get("add_prefix_space", True)
                or any(map(model.get, joined))
                or set(order) - set(vocabulary)
            ):
                return None
            table = np.array([vocabulary[c] for c in order], dtype=self.dtype)
            return lambda text: table[np.frombuffer(text.encode(), dtype=np.uint8)]
        if model["type"] == "WordLevel" and pre == CHARACTERS and self.unknown_id is not None:
            points = {ord(c): i for c, i in vocabulary.items() if len(c) == 1}
            lookup = np.full(max(points, default=0) + 2, self.unknown_id, dtype=self.dtype)
            for point, number in points.items():
                lookup[point] = number
            last = len(lookup) - 1
            return lambda text: lookup[
                np.minimum(np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32), last)
            ]
        return None


def around(directory: Path) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and behind each text, as BERT's [CLS] and [SEP]; ours put none."""
    tokenizer, _ = _load(directory)
    for word in ("a", *tokenizer.get_vocab()):
        one = tokenizer.encode(word)
        text = [i for i, special in enumerate(one.special_tokens_mask) if not special]
        if text:
            return one.ids[: text[0]], one.ids[text[-1] + 1 :]
    return [], []


def _parts(text: str, size: int) -> list[str]:
    """The text, in parts of at most `size` characters."""
    if len(text) <= size:
        return [text]
    parts, begin = [], 0
    while len(text) - begin > size:
        found = _CUT.search(text, begin + size - (size >> 3), begin + size)
        end = found.end() if found else begin + size
        parts.append(text[begin:end])
        begin = end
    return [*parts, text[begin:]]


def _joined(arrays: list[NDArray[Any]], dtype: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
    counts = np.fromiter(map(len, arrays), dtype=np.int64, count=len(arrays))
    return (np.concatenate(arrays) if arrays else np.empty(0, dtype=dtype)), counts


def _load(directory: Path) -> tuple[Any, int]:
    """The fast tokenizer of a directory and its end-of-text token."""
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        return _convert(directory)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(
            f"{path}: {str(error).splitlines()[0]}", "it must be a tokenizer", "take another copy of it"
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    name: Any = None
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            settings = json.loads((directory / file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        name = name or settings.get("eos_token") or settings.get("sep_token")
    if isinstance(name, dict):
        name = name.get("content")
    end = tokenizer.token_to_id(name) if name else None
    if end is None:
        end = next(
            (i for t in (END, "</s>", "[SEP]", "<eos>") if (i := tokenizer.token_to_id(t)) is not None), None
        )
    if end is None:
        raise DataError(
            f"{directory}: no end-of-text token",
            "documents are separated by one",
            "name eos_token in tokenizer_config.json",
        )
    return tokenizer, int(end)


def _convert(directory: Path) -> tuple[Any, int]:
    """A slow tokenizer of Transformers, converted."""
    from transformers import AutoTokenizer

    try:
        slow = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        tokenizer, end = (
            slow.backend_tokenizer,
            slow.eos_token_id if slow.eos_token_id is not None else slow.sep_token_id,
        )
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{directory}: {str(error).splitlines()[0]}",
            "it must hold a fast tokenizer",
            "save it with tokenizer.json",
        ) from error
    if end is None:
        raise DataError(
            f"{directory}: no end-of-text token", "documents are separated by one", "name eos_token"
        )
    return tokenizer, int(end)
