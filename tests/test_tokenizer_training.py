"""What a tokenizer is trained on, and how soon that ends when it is asked to."""

from __future__ import annotations

import gzip
import json
import os
import signal
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from manyhands.core.errors import DataError, Stopped
from manyhands.core.signals import Interrupts
from manyhands.data import prepare as preparing
from manyhands.data import source, stream, tokenize
from manyhands.data.source import DataSpec


def _sample(spec: DataSpec, cache: Path, *, everything: bool = False) -> list[str]:
    return list(preparing._sample(spec, source.find_files(spec, cache), everything=everything))


def test_a_sample_ends_at_its_limit_of_text_however_it_is_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "TRAIN_BYTES", 20_000)
    monkeypatch.setattr(stream, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(stream, "WINDOW_BYTES", 100)
    text = "many hands make light work\n" * 4000
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode()))
        (tmp_path / f"{name}.json").write_text(json.dumps([line + name for line in text.splitlines()]))
    (tmp_path / "plain.txt").write_text(text)
    for pattern in ("?.txt.gz", "?.json"):
        spec = DataSpec(data=(str(tmp_path / pattern),))
        found = _sample(spec, tmp_path / "cache")
        assert 15_000 < sum(map(len, found)) < 22_000
        assert sum(map(len, _sample(spec, tmp_path / "cache", everything=True))) > 200_000
    plain = DataSpec(data=(str(tmp_path / "plain.txt"),))
    assert "".join(_sample(plain, tmp_path / "cache")) == text, "its size says what is taken"


def test_training_can_be_stopped_while_the_library_is_at_it() -> None:
    gate = threading.Event()

    def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        gate.wait(60)

    with pytest.raises(Stopped), Interrupts() as interrupts, interrupts.phase("prepare"):
        tokenize._aside(work)
    assert not gate.is_set()
    gate.set()


def test_training_leaves_the_main_thread_to_signals_and_its_errors_arrive(tmp_path: Path) -> None:
    threads = []

    def texts(*, broken: bool) -> Iterator[str]:
        threads.append(threading.current_thread())
        yield "many hands"
        if broken:
            raise DataError("a broken file")

    for spec in ("bpe:260", "word:10"):
        tokenize.train(spec, texts(broken=False), tmp_path / spec.partition(":")[0])
        with pytest.raises(DataError, match="a broken file"):
            tokenize.train(spec, texts(broken=True), tmp_path / "none")
    assert threading.main_thread() not in threads
    assert not (tmp_path / "none").exists()


def test_characters_of_any_number_of_texts_are_found_in_little_memory(tmp_path: Path) -> None:
    texts = ("".join(map(chr, range(97 + i % 20, 117 + i % 20))) for i in range(20_000))
    tracemalloc.start()
    try:
        tokenize.train("char", texts, tmp_path / "char")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
    assert tokenize.Encoder(tmp_path / "char").vocab_size == 39 + 2
