"""Broken files and items: what is skipped and counted, what ends the job, and by which name it is told."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from manyhands.core.errors import DataError
from manyhands.core.events import Warned
from manyhands.data import shards, source
from manyhands.data.prepare import Prepared, prepare
from manyhands.data.source import DataSpec


def _prepare(tmp_path: Path, *data: Path, **options: Any) -> tuple[Prepared, dict[str, str]]:
    """What was prepared, and the warnings by their places."""
    seen: list[Any] = []
    spec = DataSpec(data=tuple(map(str, data)), **options)
    made = prepare(spec, cache=tmp_path / "cache", emit=seen.append)
    return made, {event.where: event.message for event in seen if isinstance(event, Warned)}


def test_a_bad_byte_in_an_array_costs_its_item(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "one"}, {"text": "tw\xff"}, {"text": "three"}]')
    made, warned = _prepare(tmp_path, path)
    assert made.documents == 2
    assert made.skipped == {"encoding": 1}
    assert warned == {f"{path}: item 2": "byte 0xff is not utf-8"}
    with pytest.raises(DataError, match="item 2: byte 0xff is not utf-8"):
        _prepare(tmp_path, path, on_error="fail")


def test_a_broken_file_is_skipped_where_others_are_whole(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.csv").write_text("text\nfine\n")
    (texts / "b.csv").write_text("body\nother\n")
    (texts / "c.json").write_text('[{"text": "kept"}, {"text"')
    (texts / "d.txt.gz").write_bytes(gzip.compress(b"cut off " * 1000)[:-20])
    made, warned = _prepare(tmp_path, texts)
    assert made.documents == 2
    assert made.skipped == {"file": 3}
    assert "no column 'text'" in warned[str(texts / "b.csv")]
    assert "item 2 is not JSON" in warned[str(texts / "c.json")]
    assert str(texts / "d.txt.gz") in warned
    with pytest.raises(DataError, match=r"b\.csv: no column 'text'"):
        _prepare(tmp_path, texts, on_error="fail")
    with pytest.raises(DataError, match=r"all 4 files are broken; .*a\.csv: no column 'title'"):
        _prepare(
            tmp_path, texts / "a.csv", texts / "b.csv", texts / "b.csv", texts / "d.txt.gz", text="title"
        )


def test_a_big_broken_table_is_one_broken_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("body\n" + "x" * 100 + "\n" + "more\n" * 600_000)
    (tmp_path / "b.parquet").write_bytes(b"no parquet" * 200_000)
    (tmp_path / "c.txt").write_text("fine")
    made, _ = _prepare(tmp_path, tmp_path / "a.csv", tmp_path / "b.parquet", tmp_path / "c.txt")
    assert len(json.loads((made.directory / "plan.json").read_text())["pieces"]) > 2
    assert made.skipped == {"file": 2}
    assert made.documents == 1


def test_a_disk_that_fails_is_no_broken_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    files = source.find_files(DataSpec(data=(str(tmp_path / "*.txt"),)), tmp_path / "cache")
    monkeypatch.setattr(source, "find_files", lambda *_: files)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt.*No such file"):
        _prepare(tmp_path, tmp_path / "a.txt", tmp_path / "b.txt")


def test_a_row_is_numbered_in_its_file_whatever_the_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.arrow"
    rows: list[Any] = [f"row {i}" for i in range(200)]
    rows[185] = None
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("text", pa.string())])) as out:
        for begin in range(0, 200, 40):
            out.write_batch(pa.record_batch([pa.array(rows[begin : begin + 40])], names=["text"]))
    monkeypatch.setattr(
        source, "cut", lambda files, spec: [(span,) for span in source._spans(0, files[0], 1000, spec)]
    )
    made, warned = _prepare(tmp_path, path)
    assert len(json.loads((made.directory / "plan.json").read_text())["pieces"]) > 2
    assert list(warned) == [f"{path}: row 186"]


def test_a_copy_is_warned_of_by_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    for name in ("a.jsonl", "b.jsonl"):
        _, warned = _prepare(tmp_path, tmp_path / name)
        assert list(warned) == [f"{tmp_path / name}:2"]


def test_nan_is_no_label(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    table = pa.table({"text": ["a", "b", "c"], "label": pa.array([1.0, float("nan"), None])})
    pq.write_table(table, tmp_path / "a.parquet")
    made, warned = _prepare(tmp_path, tmp_path / "a.parquet", label="label")
    assert made.labels == ("1.0",)
    assert made.skipped == {"label": 2}
    assert f"{tmp_path / 'a.parquet'}: row 2" in warned


def test_a_column_that_is_there_twice_is_refused_where_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,note,note\na,b,c\n")
    assert _prepare(tmp_path, path)[0].documents == 1
    with pytest.raises(DataError, match="2 columns 'note'"):
        _prepare(tmp_path, path, text="note")
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table)
    with pytest.raises(DataError, match="2 columns 'text'"):
        _prepare(tmp_path, tmp_path / "a.arrow")


def test_a_changed_shard_is_named_and_an_untouched_one_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("many hands make light work\n" * 100)
    made, _ = _prepare(tmp_path, path)
    shard = made.directory / made.shards[0][0]
    read: list[Any] = []
    name = shards._name
    monkeypatch.setattr(shards, "_name", lambda file: read.append(file) or name(file))
    _prepare(tmp_path, path)
    assert not read
    os.utime(shard, (1, 1))
    _prepare(tmp_path, path)
    _prepare(tmp_path, path)
    assert len(read) == 1
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-600] + bytes([whole[-600] ^ 1]) + whole[-599:])
    with pytest.raises(DataError, match=f"{shard.name} was changed .*delete"):
        _prepare(tmp_path, path)
    shutil.rmtree(made.directory)
    _prepare(tmp_path, path)
    assert shard.read_bytes() == whole
