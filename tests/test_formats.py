"""Readers: where files may be cut, arrays read item by item, byte order marks, and text that is none."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manyhands.core import config
from manyhands.core.errors import DataError, UsageError
from manyhands.data import delimited, formats, shards, source, stream
from manyhands.data.prepare import prepare
from manyhands.data.source import DataSpec, SourceFile, Span
from manyhands.train.job import Job
from manyhands.train.material import data_spec


def _file(path: Path, kind: str) -> SourceFile:
    return SourceFile(str(path), kind, None, path.stat().st_size, str(path))


def _read(path: Path, kind: str, **options: Any) -> list[Any]:
    return list(formats.read(_file(path, kind), Span(0), DataSpec(data=("x",), **options)))


ODD = [
    '"two\nlines"',
    '"a ""quoted"" word\n\n"',
    'stray " quote',
    "plain",
    "also plain",
    '"a, comma\tand a tab"',
    '"ünï 春\r\n"',
]


@pytest.mark.parametrize(("kind", "comma"), [("csv", ","), ("tsv", "\t")])
def test_a_big_table_is_cut_between_its_rows(
    kind: str, comma: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 128)
    delimited.edges.cache_clear()
    rng = np.random.default_rng(0)
    rows = [f"text{comma}label", *(f"{ODD[rng.integers(len(ODD))]}{comma}{i}" for i in range(400))]
    rows.insert(200, f"ragged{comma}1{comma}2")
    rows.insert(90, f'"{comma}a quote that nobody meant')
    path = tmp_path / f"a.{kind}"
    path.write_bytes("\n".join(rows).encode())
    spec = DataSpec(data=("x",), label="label", quoting="csv")
    whole = list(formats.read(_file(path, kind), Span(0), spec))
    assert [row.label for row in whole if isinstance(row, formats.Row)] == list(map(str, range(400)))
    bad = [row for row in whole if isinstance(row, formats.Bad)]
    lines = [
        path.read_bytes()[: path.read_bytes().index(w)].count(b"\n") + 1 for w in (b"a quote that", b"ragged")
    ]
    assert [row.where for row in bad] == [f"{path}:{line}" for line in lines]
    for size in (40, 200, 2000):
        spans = source._spans(0, _file(path, kind), size, spec)
        assert len(spans) > 2
        assert [row for span in spans for row in formats.read(_file(path, kind), span, spec)] == whole


@pytest.mark.parametrize(
    ("closing", "words"), [("", "never closed"), ('"a, b",0\n', "closed 40 lines below, with text behind it")]
)
def test_a_stray_quote_costs_its_own_line(closing: str, words: str, tmp_path: Path) -> None:
    rows = [f"row {i},{i % 3}\n" for i in range(1000)]
    rows[10] = '"' + rows[10]
    if closing:
        rows[50] = closing
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(rows))
    read = _read(tmp_path / "a.csv", "csv", label="label")
    bad = read.pop(10)
    assert bad.where == f"{tmp_path / 'a.csv'}:12"
    assert bad.message.endswith(words)
    assert [row.text for row in read] == [
        "a, b" if closing and i == 50 else f"row {i}" for i in range(1000) if i != 10
    ]


def test_lines_that_are_read_again_are_not_read_with_all_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 0
    reader = csv.reader

    def counted(text: Iterator[str], **options: Any) -> Any:
        def each() -> Iterator[str]:
            nonlocal taken
            for line in text:
                taken += 1
                yield line

        return reader(each(), **options)

    monkeypatch.setattr(csv, "reader", counted)
    (tmp_path / "a.csv").write_text("text,label\n" + 'x","y\n' * 500 + "good,1\n")
    read = _read(tmp_path / "a.csv", "csv", label="label")
    assert len([row for row in read if isinstance(row, formats.Bad)]) == 500
    assert read[-1] == formats.Row("good", "1")
    assert taken < 10 * 500


def test_quotes_in_tsv_are_letters_unless_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"Ah\t1\noh" he said\t2\n"fine"\t3\n')
    texts = {
        quoting: [row.text for row in _read(path, "tsv", label="label", quoting=quoting) if row[1] in "123"]
        for quoting in ("auto", "none", "csv")
    }
    assert texts["auto"] == texts["none"] == ['"Ah', 'oh" he said', '"fine"']
    assert texts["csv"] == ['oh" he said', "fine"]
    spec = DataSpec(data=(str(path),), text="0", format="csv")
    made = [
        prepare(dataclasses.replace(spec, quoting=q), cache=tmp_path / "c")
        for q in ("csv", "none")  # type: ignore[arg-type]
    ]
    assert made[0].identity != made[1].identity
    job = config.assemble(Job, [("--quoting", {"quoting": "none"})])[0]
    assert data_spec(config.from_data(Job, config.to_data(job)), job.data, "byte").quoting == "none"
    with pytest.raises(UsageError, match="'auto', 'csv', 'none'"):
        config.assemble(Job, [("--quoting", {"quoting": "all"})])


def test_pieces_of_a_table_make_the_same_stream(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f'"row {i}\nof many hands",{i % 3}\n' for i in range(60_000)))
    spec = DataSpec(data=(str(path),), tokenizer="byte")
    made = [prepare(spec, cache=tmp_path / f"c{n}", processes=n) for n in (1, 2)]
    assert made[0].documents == 60_000
    assert made[0].shards == made[1].shards
    assert len(json.loads((made[0].directory / "plan.json").read_text())["pieces"]) > 1


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("chars", [1, 2, 7, 1 << 20])
def test_arrays_are_read_item_by_item(
    chars: int, indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "BLOCK_CHARS", chars)
    items: list[Any] = [{"text": f"{i} ünï 春 ]}},[{{", "more": [i, {"a": 1.5e3}]} for i in range(20)]
    items[3:3] = ["a text", 12345, {"text": 7}]
    (tmp_path / "a.json").write_text(json.dumps(items, indent=indent, ensure_ascii=False))
    rows = _read(tmp_path / "a.json", "json")
    assert [row.text for row in rows if isinstance(row, formats.Row)] == [
        value if isinstance(value, str) else value["text"]
        for value in items
        if value not in (12345, {"text": 7})
    ]
    assert [row.where.rpartition(" ")[2] for row in rows if isinstance(row, formats.Bad)] == ["5", "6"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds nothing"),
        ('{"text": "a"}', "holds an object"),
        ("text", "holds 'text'"),
        ('[{"text": "a"}, {"text"', "item 2 is not JSON"),
        ('[{"text": "a"} {"text": "b"}]', "item 2 is not JSON"),
        ('[{"text": "a"}', "item 2 is not JSON"),
    ],
)
def test_a_broken_array_is_one_error(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=re.escape(words)):
        _read(tmp_path / "a.json", "json")


@pytest.mark.parametrize("kind", ["text", "line", "jsonl", "json", "csv"])
def test_a_byte_order_mark_is_left_out(kind: str, tmp_path: Path) -> None:
    content = {"jsonl": '{"text": "one"}\n', "json": '["one"]', "csv": "text\none\n"}.get(kind, "one")
    (tmp_path / "a").write_text(content, encoding="utf-8-sig")
    document = "line" if kind == "line" else "file"
    (row,) = _read(tmp_path / "a", "text" if kind == "line" else kind, document=document)
    assert row.text == "one"


@pytest.mark.parametrize(("encoding", "remedy"), [("utf-16", "iconv"), ("utf-8-sig", "use utf-8")])
def test_an_encoding_whose_lines_cannot_be_found_is_refused(encoding: str, remedy: str) -> None:
    with pytest.raises(UsageError, match=remedy):
        DataSpec(data=("x",), encoding=encoding)


@pytest.mark.parametrize("packing", ["gzip", "zstd"])
def test_packed_files_in_several_parts_and_cut_off(packing: str, tmp_path: Path) -> None:
    import gzip

    import zstandard

    pack = gzip.compress if packing == "gzip" else zstandard.ZstdCompressor().compress
    raw = [b"many hands %d\n" % i * 3000 for i in range(5)]
    raw[2] = b""
    whole = b"".join(map(pack, raw))
    path = tmp_path / "a"
    file = SourceFile(str(path), "text", packing, 1, "")

    def read() -> bytes:
        rows = formats.read(file, Span(0), DataSpec(data=("x",)))
        return b"".join(row.text.encode() for row in rows if isinstance(row, formats.Row))

    path.write_bytes(whole)
    assert read() == b"".join(raw)
    for damaged in (whole[:-9], whole[: len(whole) // 2], b"no such thing"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=re.escape(str(path))):
            read()


def test_what_is_no_text_or_has_no_label_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.7\n")
    (tmp_path / "b").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "c.txt").write_text("fine")
    for name, label, words in (
        ("a.pdf", None, "is no text"),
        ("b", None, "is no text"),
        ("c.txt", "y", "is plain text"),
    ):
        with pytest.raises(DataError, match=words):
            prepare(DataSpec(data=(str(tmp_path / name),), label=label), cache=tmp_path / "cache")
    assert prepare(DataSpec(data=(str(tmp_path / "c.txt"),)), cache=tmp_path / "cache").documents == 1


def test_half_a_pair_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude42"}\n{"text": "half \\ud83d"}\n')
    fine, bad = _read(tmp_path / "a.jsonl", "jsonl")
    assert fine.text == "🙂"
    assert (bad.where, bad.kind) == (f"{tmp_path / 'a.jsonl'}:2", "encoding")


def test_too_long_a_line_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "LINE_BYTES", 50)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "%s"}\n{"text": "b"}\n{"text": \n' % ("x" * 500))
    rows = _read(path, "jsonl")
    assert [row.text for row in rows if isinstance(row, formats.Row)] == ["a", "b"]
    assert [(row.where, row.kind) for row in rows if isinstance(row, formats.Bad)] == [
        (f"{path}:2", "length"),
        (f"{path}:4", "json"),
    ]


def test_bad_bytes_are_named_by_their_line_in_any_fragment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 200)
    monkeypatch.setattr(stream, "WINDOW_BYTES", 60)
    lines = [b"a line of text, number %d" % i for i in range(100)]
    lines[40] = lines[77] = b"not \xff text"
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n".join(lines))
    for spans in ([Span(0)], [Span(0, 0, 1333), Span(0, 1333, path.stat().st_size)]):
        rows = [r for s in spans for r in formats.read(_file(path, "text"), s, DataSpec(data=("x",)))]
        bad = [row.where for row in rows if isinstance(row, formats.Bad)]
        assert bad == [f"{path}:41", f"{path}:78"]
        text = "".join(row.text for row in rows if isinstance(row, formats.Row))
        assert text == "\n".join(line.decode() for i, line in enumerate(lines) if i not in (40, 77)) or (
            text.split()
            == [w for i, line in enumerate(lines) if i not in (40, 77) for w in line.decode().split()]
        )


def test_half_a_pair_is_no_label(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": "\\ud83d"}\n{"text": "y", "label": "b"}\n')
    spec = DataSpec(data=(str(tmp_path / "a.jsonl"),), label="label")
    prepared = prepare(spec, cache=tmp_path / "cache")
    assert (prepared.labels, prepared.skipped) == (("b",), {"encoding": 1})


def test_a_table_of_empty_lines_holds_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\n" * (3 << 19))
    with pytest.raises(DataError, match="holds no text"):
        prepare(DataSpec(data=(str(tmp_path / "a.csv"),)), cache=tmp_path / "cache")


def test_what_follows_a_text_that_is_cut_off_is_another_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gzip

    monkeypatch.setattr(stream, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(stream, "WINDOW_BYTES", 100)
    text = " ".join(f"{i * 7919 % 10007}" for i in range(20_000))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode())[:-9000])
    (tmp_path / "b.txt").write_text("the next one")
    prepared = prepare(DataSpec(data=(str(tmp_path / "?.txt*"),)), cache=tmp_path / "cache")
    tokens = np.concatenate([shards.open_tokens(prepared.directory / name) for name, _ in prepared.shards])
    ends = np.flatnonzero(tokens == prepared.end_id)
    assert prepared.skipped == {"file": 1}
    assert (prepared.documents, len(ends)) == (2, 2)
    assert bytes(tokens[ends[0] + 1 : -1].astype(np.uint8)) == b"the next one"
