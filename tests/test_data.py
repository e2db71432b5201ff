"""The data floor: every format, every mistake with its line, the same stream for any number of processes, nothing half-written."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.core.errors import DataError, UsageError
from manyhands.data import formats, hub, shards, source, tokenize
from manyhands.data.prepare import Prepared, _label_order, prepare
from manyhands.data.rows import LabelledRows, TokenRows
from manyhands.data.source import DataSpec, SourceFile, Span

ROWS = [{"text": f"line {i} ünï 春", "label": "ab"[i % 2]} for i in range(7)]


def _write(path: Path, kind: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(ROWS)
    if kind == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind in ("csv", "tsv"):
        comma = "," if kind == "csv" else "\t"
        path.write_text(
            "\n".join([f"text{comma}label", *(f"{r['text']}{comma}{r['label']}" for r in ROWS)]) + "\n"
        )
    elif kind == "parquet":
        pq.write_table(table, path, row_group_size=3)
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)


def _tokens(prepared: Prepared) -> np.ndarray[Any, Any]:
    return np.concatenate([shards.open_tokens(prepared.directory / name) for name, _ in prepared.shards])


def _text(prepared: Prepared) -> str:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(prepared.tokenizer / "tokenizer.json"))
    return str(tokenizer.decode(_tokens(prepared).tolist(), skip_special_tokens=False))


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "arrow", "stream"])
def test_every_format_and_packing_gives_the_same_rows(kind: str, packing: str, tmp_path: Path) -> None:
    import zstandard

    name = "data.arrow" if kind == "stream" else f"data.{kind}"
    _write(tmp_path / name, kind)
    if packing:
        raw = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        packed = gzip.compress(raw) if packing == ".gz" else zstandard.ZstdCompressor().compress(raw)
        (tmp_path / (name + packing)).write_bytes(packed)
    spec = DataSpec(data=(str(tmp_path),), label="label")
    prepared = prepare(spec, cache=tmp_path / ".cache")
    assert prepared.labels == ("a", "b")
    assert (prepared.documents, prepared.rows, prepared.skipped) == (7, 7, {})
    plain = prepare(DataSpec(data=(str(tmp_path),)), cache=tmp_path / ".cache")
    assert _text(plain) == "".join(r["text"] + tokenize.END for r in ROWS)
    assert plain.text_bytes == sum(len(r["text"].encode()) for r in ROWS)


def test_text_by_files_lines_globs_urls_and_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "d" / "e" / "b.md").write_text("three\n")
    (tmp_path / "d" / ".hidden.txt").write_text("no\n")
    (tmp_path / "d" / "c.bin").write_text("no\n")
    cache = tmp_path / "cache"
    files = prepare(DataSpec(data=(str(tmp_path / "d"),)), cache=cache)
    assert _text(files) == f"one\ntwo\n{tokenize.END}three\n{tokenize.END}"
    lines = prepare(
        DataSpec(data=(f"file://{tmp_path}/d/**/*.txt", str(tmp_path / "d/e/b.md")), document="line"),
        cache=cache,
    )
    assert _text(lines) == "".join(w + tokenize.END for w in ("one", "two", "three")), (
        "hidden files match no glob"
    )


def test_hugging_face_data_sets_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    prepared = prepare(DataSpec(data=(f"hf:{tmp_path}/saved",), label="label"), cache=tmp_path / "cache")
    assert (prepared.rows, prepared.labels) == (7, ("a", "b"))
    with pytest.raises(DataError, match="hf:"):
        prepare(DataSpec(data=(f"hf:{tmp_path}/nothing",)), cache=tmp_path / "cache")
    with pytest.raises(DataError, match="without splits"):
        prepare(DataSpec(data=(f"hf:{tmp_path}/saved:test",)), cache=tmp_path / "cache")
    assert len(hub.load(f"{tmp_path}/saved:train")) == len(ROWS)
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: asked.append((path, split)))
    hub.load("some/where:train[:10%]")
    assert asked == [("some/where", "train[:10%]")]
    (tmp_path / "at 10:30").mkdir()  # nor is any colon of a path the one before a split
    hub.load(f"{tmp_path}/at 10:30:test")
    assert asked[1:] == [(f"{tmp_path}/at 10:30", "test")]


def test_what_the_web_says_of_a_file_tells_its_content(tmp_path: Path) -> None:
    web = SimpleNamespace(protocol=("http", "https"), ukey=lambda path: "of the address alone")
    known = [
        source._remote_identity(web, "https://x/a.txt", info)
        for info in ({"size": 3, "ETag": "a"}, {"size": 4, "ETag": "a"}, {"size": 3, "ETag": "b"})
    ]
    assert len(set(known)) == 3


def test_a_row_that_nobody_has_labelled_is_no_class_of_its_own(tmp_path: Path) -> None:
    import datasets

    kinds = datasets.ClassLabel(names=["good", "bad"])
    features = datasets.Features({"text": datasets.Value("string"), "label": kinds})
    rows = [{"text": word, "label": label} for word, label in (("a", 0), ("b", -1), ("c", 1))]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    prepared = prepare(DataSpec(data=(f"hf:{tmp_path}/saved",), label="label"), cache=tmp_path / "cache")
    assert (prepared.rows, prepared.labels, prepared.skipped) == (2, ("bad", "good"), {"label": 1})


def test_numbers_come_before_words_and_nan_is_a_word() -> None:
    names = ["nan", "10", "x", "2", "-1", "inf", "a"]
    wanted = ["-1", "2", "10", "inf", "a", "nan", "x"]
    for order in (names, names[::-1], [*names[3:], *names[:3]]):
        assert sorted(order, key=_label_order) == wanted


def test_columns_joined_listed_and_by_number(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (tmp_path / "a.jsonl").write_text('{"title": "T", "body": ["x", "y"]}\n')
    assert (
        _text(prepare(DataSpec(data=(str(tmp_path / "a.jsonl"),), text="title,body"), cache=cache))
        == f"T x\ny{tokenize.END}"
    )
    (tmp_path / "b.csv").write_text('3,"quoted, with\nnewline",end\n10,plain,end\n')
    numbered = prepare(DataSpec(data=(str(tmp_path / "b.csv"),), text="1,2", label="0"), cache=cache)
    assert numbered.labels == ("3", "10"), "numbers in their order"
    (tmp_path / "c.txt").write_bytes("\xe9t\xe9\n".encode("latin-1"))
    assert (
        _text(prepare(DataSpec(data=(str(tmp_path / "c.txt"),), encoding="latin-1"), cache=cache))
        == f"été\n{tokenize.END}"
    )


BROKEN = [
    ("a.txt", b"fine\nbad \xff here\nfine\n", ":2", "encoding"),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n{"text": 3}\n{"txt": "b"}\n', ":2", "json"),
    ("a.csv", b'text,label\na,1\nb,2,3\n"two\nlines",1\nc\n', ":3", "ragged"),
    ("a.csv", b"text,label\na,1\n\xff,2\n", ":3", "encoding"),
    ("a.csv", b'text,label\na,1\n"open,2\nb,3\n', ":3", "csv"),
]


@pytest.mark.parametrize(("name", "content", "line", "kind"), BROKEN, ids=[f"{b[0]}-{b[3]}" for b in BROKEN])
def test_broken_rows_are_named_with_their_line(
    name: str, content: bytes, line: str, kind: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    seen: list[Any] = []
    prepared = prepare(DataSpec(data=(str(tmp_path / name),)), cache=tmp_path / "cache", emit=seen.append)
    assert prepared.skipped[kind] >= 1
    assert any(getattr(e, "where", "").endswith(f"{name}{line}") for e in seen), seen
    with pytest.raises(DataError, match=f"{name}{line}"):
        prepare(DataSpec(data=(str(tmp_path / name),), on_error="fail"), cache=tmp_path / "cache")


def test_an_empty_label_is_no_class_and_a_name_may_look_like_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1].csv").write_text("text,label\na,1\nb,\nc,2\n")
    spec = DataSpec(data=(str(tmp_path / "a[1].csv"),), label="label")
    prepared = prepare(spec, cache=tmp_path / "cache")
    assert prepared.labels == ("1", "2")
    assert prepared.skipped == {"label": 1}


def test_a_link_that_leads_nowhere_ends_no_job_unless_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one\n")
    (tmp_path / "texts" / "b.txt").symlink_to(tmp_path / "gone.txt")
    prepared = prepare(DataSpec(data=(str(tmp_path / "texts"),)), cache=tmp_path / "cache")
    assert prepared.documents == 1
    with pytest.raises(DataError, match=r"b\.txt"):
        prepare(DataSpec(data=(str(tmp_path / "texts" / "b.txt"),)), cache=tmp_path / "cache")


def test_lines_are_counted_from_the_file_not_from_the_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "PIECE_BYTES", 1 << 20)
    path = tmp_path / "big.jsonl"
    with path.open("w") as file:
        for i in range(60_000):
            file.write('{"text": "%s"}\n' % ("x" * 40) if i not in (5, 59_000) else "{broken\n")
    seen: list[Any] = []
    prepared = prepare(DataSpec(data=(str(path),)), cache=tmp_path / "cache", emit=seen.append)
    assert prepared.skipped == {"json": 2}
    assert {e.where for e in seen if hasattr(e, "where")} == {f"{path}:6", f"{path}:59001"}
    assert len(json.loads((prepared.directory / "plan.json").read_text())["pieces"]) > 1


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ({"data": ("/nonexistent.txt",)}, DataError, "does not exist"),
        ({"data": ("EMPTY",)}, DataError, "holds no text"),
        ({"data": ("CSV",), "text": "body"}, DataError, "no column 'body'"),
        ({"data": ("CSV",), "tokenizer": "bpe"}, UsageError, "bpe:N"),
        ({"data": ("CSV",), "tokenizer": "bpe:9"}, UsageError, "at least 258"),
        ({"data": ("CSV",), "format": "xml"}, UsageError, "known: "),
        ({"data": ("CSV",), "encoding": "utf-9"}, UsageError, "no such encoding"),
        ({"data": ("GZ",)}, DataError, "must be readable"),
    ],
)
def test_bad_input_is_one_clear_error(
    spec: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    names = {"EMPTY": "empty.txt", "CSV": "a.csv", "GZ": "a.txt.gz"}
    (tmp_path / "empty.txt").touch()
    (tmp_path / "a.csv").write_text("text,label\na,b\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"many hands " * 1000)[:-20])
    data = tuple(str(tmp_path / names[d]) if d in names else d for d in spec["data"])
    with pytest.raises(error, match=words):
        prepare(DataSpec(**{**spec, "data": data}), cache=tmp_path / "cache")


TEXTS = [
    "Many hands\n\n make  light work.",
    "def f(x):\n\treturn x['ü'] + \"春眠不覺曉\"  # 🙂",
    "  lead and trail  ",
    "a" * 300,
]


@pytest.mark.parametrize("spec", ["byte", "char", "bpe:600", "word:50"])
def test_every_tokenizer_loads_with_transformers_and_gives_the_text_back(spec: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenize.train(spec, TEXTS * 3, tmp_path / "tok")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tok")
    encoder = tokenize.Encoder(tmp_path / "tok")
    assert tokenizer.eos_token == tokenize.END
    assert tokenizer.pad_token is not None
    assert encoder.vocab_size == len(tokenizer)
    assert encoder.end_id == tokenizer.eos_token_id
    flat, counts = encoder(TEXTS)
    for text, ids in zip(TEXTS, np.split(flat, np.cumsum(counts)[:-1]), strict=True):
        assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"], (
            "look-ups equal the tokenizer"
        )
        if not spec.startswith("word"):
            assert tokenizer.decode(ids.tolist()) == text
            lengths = encoder.byte_lengths()
            assert lengths is not None
            assert int(lengths[ids].sum()) == len(text.encode())


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_byte_tokens_of_any_text(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.getbasetemp() / "bytes-tok"
    if not directory.exists():
        tokenize.train("byte", (), directory)
    ids, _ = tokenize.Encoder(directory)([text.encode("utf-8", "replace").decode()])
    assert len(ids) == len(text.encode("utf-8", "replace"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "corpus.txt"
    with path.open("w") as file:
        for _ in range(60):
            file.write("\n".join(" ".join(map(str, rng.integers(0, 5000, 12))) for _ in range(900)) + "\n")
    return path


def _names(prepared: Prepared) -> list[str]:
    return [name for name, _ in prepared.shards]


def test_the_stream_is_the_same_for_any_processes(corpus: Path, tmp_path: Path) -> None:
    spec = DataSpec(data=(str(corpus),), tokenizer="bpe:400")
    runs = [prepare(spec, cache=tmp_path / f"cache{n}", processes=n) for n in (1, 2, 3)]
    assert len(runs[0].shards) > 2
    assert _names(runs[0]) == _names(runs[1]) == _names(runs[2])
    for name in _names(runs[0]):
        digest = hashlib.sha256((runs[0].directory / name).read_bytes()).hexdigest()
        assert name == f"{digest[:24]}.arrow"
    import datasets

    table = datasets.Dataset.from_file(str(runs[0].directory / _names(runs[0])[0]))
    assert table.column_names == ["tokens"]
    seen: list[Any] = []
    again = prepare(spec, cache=tmp_path / "cache1", emit=seen.append)
    assert again == runs[0]
    assert seen[-1].reused


PREPARE = """
import sys
from pathlib import Path
from manyhands.data.prepare import prepare
from manyhands.data.source import DataSpec
print("begin", flush=True)
done = prepare(DataSpec(data=(sys.argv[1],), tokenizer="bpe:400"), cache=Path(sys.argv[2]), processes=int(sys.argv[3]))
heavy = {"torch", "transformers"} & set(sys.modules)
assert not heavy, heavy
print(*[name for name, _ in done.shards])
"""


def _preparing(corpus: Path, cache: Path, processes: int = 1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(corpus), str(cache), str(processes)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_jobs_at_once_share_the_work(corpus: Path, tmp_path: Path) -> None:
    both = [_preparing(corpus, tmp_path / "cache") for _ in range(2)]
    outs = [p.communicate(timeout=120)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert outs[0] == outs[1]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_preparation_goes_on_where_it_was(corpus: Path, tmp_path: Path, processes: int) -> None:
    cache = tmp_path / "cache"
    process = _preparing(corpus, cache, processes)
    while not (pieces := list(cache.glob("data/*/piece-*.json"))):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {p: p.stat().st_mtime_ns for p in pieces}
    for shard in cache.glob("data/*/*.arrow"):
        assert len(shards.open_tokens(shard)) > 0
    process = _preparing(corpus, cache, processes)
    out = process.communicate(timeout=120)[0].split()[1:]
    assert process.returncode == 0
    assert {p: p.stat().st_mtime_ns for p in pieces} == before, "finished pieces are not made again"
    whole = prepare(DataSpec(data=(str(corpus),), tokenizer="bpe:400"), cache=tmp_path / "fresh")
    assert out == _names(whole)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root"
)
def test_a_full_disk_leaves_nothing_half_written(corpus: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this root may not mount")
    try:
        spec = DataSpec(data=(str(corpus),))
        with pytest.raises(DataError, match="No space left"):
            prepare(spec, cache=disk / "cache")
        for path in disk.glob("cache/data/*/*"):
            assert path.suffix != ".tmp", path
            if path.suffix == ".arrow":
                assert len(shards.open_tokens(path)) > 0
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert prepare(spec, cache=disk / "cache").documents == 1
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


MEMORY = """
import sys
from pathlib import Path
from manyhands.data import source
source.PIECE_BYTES = 2 << 20
from manyhands.data.prepare import prepare
from manyhands.data.source import DataSpec
prepare(DataSpec(data=(sys.argv[1],), tokenizer="byte"), cache=Path(sys.argv[2]))
# not ru_maxrss, which an exec inherits from the process before it
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """The documented bound is 1 GiB a worker with pieces of 32 MiB; here pieces of 2 MiB and two sizes of text."""
    peaks = []
    for size_mb in (8, 96):
        path = tmp_path / f"{size_mb}.txt"
        line = "many hands make light work " * 40 + "\n"
        path.write_text(line * (size_mb * (1 << 20) // len(line)))
        run = subprocess.run(
            [sys.executable, "-c", MEMORY, str(path), str(tmp_path / "cache")],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(run.stdout.split()[-1]) / 1024)
    assert peaks[1] < 256, peaks
    assert peaks[1] < peaks[0] + 40, peaks


@pytest.mark.parametrize("seq_len", [1, 7, 64, 100_000])
def test_every_token_but_the_first_is_a_target_once(corpus: Path, tmp_path: Path, seq_len: int) -> None:
    prepared = prepare(DataSpec(data=(str(corpus),)), cache=tmp_path / "cache")
    tokens = _tokens(prepared)
    rows = TokenRows(prepared, seq_len)
    ids = np.arange(len(rows)) if seq_len > 7 else np.arange(0, len(rows), max(1, len(rows) // 500))
    batch = rows.take(ids)
    assert batch["input_ids"].shape == batch["targets"].shape == (len(ids), seq_len)
    for row, i in enumerate(ids[:200]):
        window = tokens[i * seq_len : i * seq_len + seq_len + 1].astype(np.int64)
        assert batch["input_ids"][row, : len(window) - 1].tolist() == window[:-1].tolist()
        assert batch["targets"][row, : len(window) - 1].tolist() == window[1:].tolist()
        assert (batch["targets"][row, len(window) - 1 :] == -100).all()
    if seq_len > 7:
        assert int((batch["targets"] != -100).sum()) == len(tokens) - 1
    assert rows.bytes_per_target == pytest.approx((prepared.text_bytes - 1) / (len(tokens) - 1), rel=1e-9)


def test_labelled_rows_are_cut_padded_and_numbered(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\naa bb cc dd,x\nee,y\nff gg,x\n")
    prepared = prepare(
        DataSpec(data=(str(tmp_path / "a.csv"),), label="label", tokenizer="word:20"), cache=tmp_path / "c"
    )
    rows = LabelledRows(prepared, 3, np.array([2, 0, 1]))
    batch = rows.take(np.array([0, 1, 2]))
    assert batch["label"].tolist() == [0, 0, 1]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert batch["input_ids"].shape == (3, 3)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all(), "the padding token"
    assert batch["label"].dtype == torch.int64
    other = LabelledRows(prepared, 3, np.array([2, 0, 1]), labels=["w", "y", "x"])
    assert other.take(np.array([2, 0]))["label"].tolist() == [1, 2]
    with pytest.raises(DataError, match=r"labels \['y'\] in the data. the classes are x"):
        LabelledRows(prepared, 3, np.arange(3), labels=["x"])


def test_labels_of_many_rows_cost_four_bytes_each(tmp_path: Path) -> None:
    """No Python string for each."""
    (tmp_path / "a.csv").write_text("text,label\naa,x\nbb,y\n")
    prepared = prepare(
        DataSpec(data=(str(tmp_path / "a.csv"),), label="label", tokenizer="word:20"), cache=tmp_path / "c"
    )
    n = 200_000
    tokens, lengths = np.zeros(n, dtype=np.uint16), np.ones(n, dtype=np.int64)
    name = shards.write_labelled(prepared.directory, tokens, lengths, ["x", "y"] * (n // 2))
    many, ids = dataclasses.replace(prepared, shards=((name, n),), rows=n), np.arange(n)
    LabelledRows(many, 3, ids)  # whoever is first imports
    tracemalloc.start()
    try:
        rows = LabelledRows(many, 3, ids)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert rows.classes.dtype == rows.lengths.dtype == np.int32
    assert rows.classes[:4].tolist() == [0, 1, 0, 1]
    assert held < 9 * n  # a class and a length
    assert peak < 24 * n


def test_pieces_are_bounded_and_cover_everything() -> None:
    files = [
        SourceFile(f"{i}.txt", "text", None, size, str(i))
        for i, size in enumerate([5, 3 << 20, 100 << 20, 7])
    ]
    pieces = source.cut(files, DataSpec(data=("x",)))
    for i, file in enumerate(files):
        spans = sorted((s.begin, s.end) for piece in pieces for s in piece if s.file == i)
        assert spans == [(0, -1)] or (
            spans[0][0] == 0
            and spans[-1][1] == file.size_bytes
            and all(a[1] == b[0] for a, b in itertools.pairwise(spans))
        )


def test_a_span_begins_at_the_first_line_that_starts_in_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("aaa\nbbb\nccc\n")
    file = SourceFile(str(path), "text", None, 12, "")
    for cut in range(1, 12):
        rows = [
            r
            for span in (Span(0, 0, cut), Span(0, cut, 12))
            for r in formats.read(file, span, DataSpec(data=("x",), document="line"))
        ]
        assert [r.text for r in rows if isinstance(r, formats.Row)] == ["aaa", "bbb", "ccc"], cut
