"""Fast byte-level BPE against the `tokenizers` library, and texts cut where their tokens stay."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from manyhands.data import bytelevel, formats, stream, tokenize
from manyhands.data.source import DataSpec, SourceFile, Span

SAMPLE = [
    Path(__file__).read_text(),
    "春眠不覺曉，處處聞啼鳥。\n" * 3,
    "it's we'll they've I'm he'd you're isn't  \t\n x",
]
HARD = "aé春'’sStTrevmdl1²½٣ \n\t\r\x0b\x85\xa0\u2003\u200b\u3000\x1c\x1f!._-\u0301🙂\ue000"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("bpe") / "tok"
    tokenize.train("bpe:600", SAMPLE * 2, directory)
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def words(library: Any) -> bytelevel.Words:
    made = bytelevel.build(library)
    assert made is not None
    return made


def _same(words: bytelevel.Words, library: Any, texts: list[str]) -> None:
    flat, counts = words(texts)
    expected = [one.ids for one in library.encode_batch_fast(texts, add_special_tokens=False)]
    assert counts.tolist() == [len(ids) for ids in expected], texts
    assert flat.tolist() == [token for ids in expected for token in ids], texts


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(st.text(st.sampled_from(HARD), max_size=14) | st.text(max_size=20), max_size=4))
@example(texts=["", "", "a\n\n", " \n", "", "'s's 's\n's''s x'S'll"])
@example(texts=["\u3000  春\n"])
def test_the_tokens_are_the_librarys(words: bytelevel.Words, library: Any, texts: list[str]) -> None:
    assert words.knows(texts) or any(tokenize.END in text for text in texts)
    _same(words, library, texts)


def test_words_are_forgotten_and_tables_grow(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bytelevel, "MAX_WORDS", 50)
    made = bytelevel.build(library)
    assert made is not None
    for first in range(0, 9000, 3000):
        _same(made, library, [" ".join(map(str, range(first, first + 3000))), "the same again"])
    assert len(made._numbers) <= 6100


def test_a_special_token_in_the_text_is_the_librarys_affair(library: Any, tmp_path: Path) -> None:
    text = f"one{tokenize.END}two"
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": tokenize.END}))
    flat, counts = tokenize.Encoder(tmp_path)(["plain", text])
    expected = [one.ids for one in library.encode_batch(["plain", text], add_special_tokens=False)]
    assert flat.tolist() == list(itertools.chain(*expected))
    assert counts.tolist() == [len(ids) for ids in expected]


def test_numbers_with_gaps_keep_their_type_and_added_tokens_their_bytes(library: Any, tmp_path: Path) -> None:
    state = json.loads(library.to_str())
    state["model"]["vocab"]["Ġx"] = 70_000
    state["model"]["merges"].append(["Ġ", "x"])
    told = state["added_tokens"][0]
    for content, special in (("<|user|>", True), ("    ", False)):
        state["added_tokens"].append(
            {**told, "id": len(state["model"]["vocab"]) + len(state["added_tokens"]) - 1}
            | {"content": content, "special": special}
        )
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": tokenize.END}))
    encoder = tokenize.Encoder(tmp_path)
    assert encoder.vocab_size == 70_001
    for texts in (["a x", "many x x"], ["one<|user|>two", "if x:\n    y"]):
        flat, _ = encoder(texts)
        assert 70_000 in flat
        expected = [one.ids for one in encoder._tokenizer.encode_batch(texts, add_special_tokens=False)]
        assert flat.tolist() == list(itertools.chain(*expected))
        lengths = encoder.byte_lengths()
        assert lengths is not None
        spelt = "".join(texts).replace("<|user|>", "")
        assert lengths[flat].sum() == len(spelt)


@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_of_a_tokenizer_of_bytes_are_found(special: bool, tmp_path: Path) -> None:
    tokenize.train("byte", [], tmp_path / "byte")
    made = Tokenizer.from_file(str(tmp_path / "byte" / "tokenizer.json"))
    made.add_tokens([AddedToken("<|user|>", special=special)])
    made.save(str(tmp_path / "byte" / "tokenizer.json"))
    flat, counts = tokenize.Encoder(tmp_path / "byte")(["a<|user|>b", "c"])
    assert (flat.tolist(), counts.tolist()) == ([97, 257, 98, 99], [3, 1])


def _changed(change: Callable[[dict[str, Any]], None], library: Any) -> Any:
    state = json.loads(library.to_str())
    change(state)
    return Tokenizer.from_str(json.dumps(state))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(normalizer={"type": "Lowercase"}),
        lambda s: s["pre_tokenizer"].update(add_prefix_space=True),
        lambda s: s["pre_tokenizer"].update(use_regex=False),
        lambda s: s.update(pre_tokenizer={"type": "Whitespace"}),
        lambda s: s["model"].update(dropout=0.1),
    ],
)
def test_other_tokenizers_are_left_to_the_library(
    change: Callable[[dict[str, Any]], None], library: Any
) -> None:
    assert bytelevel.build(_changed(change, library)) is None


CUTTING = {
    "lines": "def f(x):\n    return x  # comment\n\n\n" * 40,
    "windows": "one line\r\n\r\n  another, it's\r\n" * 40,
    "wikitext": " \n = Title = \n \n The first , and the last . \n" * 40,
    "chinese": "春眠不覺曉，\n　　處處聞啼鳥。" * 60,
    "one line": "many hands make light work " * 60,
}


@pytest.mark.parametrize("name", list(CUTTING))
def test_a_text_cut_into_fragments_and_pieces_has_the_tokens_of_the_whole(
    name: str, words: bytelevel.Words, library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 300)
    monkeypatch.setattr(stream, "WINDOW_BYTES", 120)
    text, spec = CUTTING[name], DataSpec(data=("x",))
    raw = text.encode()
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(raw))
    expected = library.encode(text, add_special_tokens=False).ids
    file = SourceFile(str(tmp_path / "a.txt"), "text", None, len(raw), "")
    packed = SourceFile(str(tmp_path / "a.txt.gz"), "text", "gzip", 1, "")
    for f, spans in [
        (packed, [Span(0)]),
        (file, [Span(0)]),
        *((file, [Span(0, 0, at), Span(0, at, len(raw))]) for at in range(201, len(raw) - 1, 97)),
    ]:
        rows = [row for span in spans for row in formats.read(f, span, spec)]
        texts = [row.text for row in rows if isinstance(row, formats.Row)]
        assert "".join(texts) == text
        assert [r.last for r in rows if isinstance(r, formats.Row)] == [False] * (len(rows) - 1) + [True]
        assert words(texts)[0].tolist() == expected, (spans, texts)
    assert len(texts) > 2


def test_a_long_text_is_encoded_in_parts(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "MAX_CHARS", 100)
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": tokenize.END}))
    texts = ["short", "many hands make\n light work  " * 30, "", "x" * 250]
    flat, counts = tokenize.Encoder(tmp_path)(texts)
    expected = [one.ids for one in library.encode_batch(texts[:3], add_special_tokens=False)]
    assert counts.tolist()[:3] == [len(ids) for ids in expected]
    assert flat[: counts[:3].sum()].tolist() == list(itertools.chain(*expected))
    assert library.decode(flat[counts[:3].sum() :].tolist()) == texts[3]


def _own(made: Tokenizer, directory: Path) -> tokenize.Encoder:
    made.add_special_tokens(["<end>"])
    directory.mkdir()
    made.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return tokenize.Encoder(directory)


@pytest.mark.parametrize("kind", ["words", "lower", "named", "prefix", "some bytes", "between"])
def test_a_tokenizer_that_looks_like_ours_gives_its_own_tokens(kind: str, tmp_path: Path) -> None:
    """Of characters or bytes, but not quite: looked up in a table its texts would become other tokens."""
    if kind in ("prefix", "some bytes"):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: 100 if kind == "some bytes" else None]
        made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix", use_regex=False)
        made.decoder = decoders.ByteLevel()
    else:
        unknown = "[UNK]" if kind == "named" else tokenize.UNKNOWN
        vocabulary = ["many", "hands", *"abdehmnsy ", unknown]
        made = Tokenizer(models.WordLevel({c: i for i, c in enumerate(vocabulary)}, unk_token=unknown))
        made.pre_tokenizer = pre_tokenizers.Split(
            " " if kind == "words" else "", "merged_with_next" if kind == "between" else "isolated"
        )
        made.decoder = decoders.Fuse()
        if kind == "lower":
            made.normalizer = normalizers.Lowercase()
    texts = ["many hands", "Many HANDS", "é"]
    flat, counts = _own(made, tmp_path / "own")(texts)
    expected = [one.ids for one in made.encode_batch(texts, add_special_tokens=False)]
    assert counts.tolist() == list(map(len, expected))
    assert flat.tolist() == [token for ids in expected for token in ids]
