"""Where events end: lines of JSON, sinks that fail or speak themselves, TensorBoard's own reader."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from happenings import job, stepped

from manyhands.core import events as e
from manyhands.train.sinks import JsonLines, TensorBoard, fan_out

HERE = Path(__file__).parent
EVERY = e.Event.__subclasses__()


# -- lines of JSON


def read(path: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = path.read_text(encoding="utf-8")
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def example(kind: type[e.Event]) -> e.Event:
    return next(event for event in job() if type(event) is kind)


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_each_event_is_one_line_of_json(kind: type[e.Event], tmp_path: Path) -> None:
    event = example(kind)
    sink = JsonLines(tmp_path / "metrics.jsonl")
    sink(event)
    sink.close()
    if kind in (e.Preparing, e.Evaluating):
        assert read(tmp_path / "metrics.jsonl") == []
        return
    (record,) = read(tmp_path / "metrics.jsonl")
    assert record.pop("event") == kind.__name__.lower()
    assert set(record) == {f.name for f in dataclasses.fields(kind)}


def test_infinite_figures_are_written_as_words(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "m.jsonl")
    sink(stepped(loss=math.nan, grad_norm=math.inf, eta_s=-math.inf))
    sink(e.Evaluated(step=1, metrics={"loss": math.nan, "perplexity": math.inf}, wall_s=1.0))
    one, two = read(tmp_path / "m.jsonl")
    assert (one["loss"], one["grad_norm"], one["eta_s"]) == ("nan", "inf", "-inf")
    assert two["metrics"] == {"loss": "nan", "perplexity": "inf"}
    assert math.isnan(float(one["loss"])), "float() reads it back"
    sink.close()


def test_a_line_is_readable_as_soon_as_it_happened_and_a_second_run_appends(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    for attempt in range(3):
        sink = JsonLines(path)
        sink(e.Warned(message=f"a\nb\u2028c é {attempt}"))
        assert [r["message"][-1] for r in read(path)] == [str(i) for i in range(attempt + 1)]
        sink.close()


@pytest.mark.parametrize("torn", [b"", b'{"event": "st', b"x" * 70_000, b"\xc3"])
@pytest.mark.parametrize("before", [b"", b'{"event": "warned"}\n'])
def test_what_a_killed_writer_left_of_a_line_is_cut_off(torn: bytes, before: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(before + torn)
    sink = JsonLines(path)
    sink(e.Warned(message="new"))
    sink.close()
    assert len(read(path)) == before.count(b"\n") + 1
    assert read(path)[-1]["message"] == "new"


def test_a_full_disk_tears_no_line_and_stops_no_training(tmp_path: Path) -> None:
    """The limit on file sizes stands for the disk; then there is room again."""
    program = """
import sys, resource
from pathlib import Path
from manyhands.core import events as e
from manyhands.train.sinks import JsonLines, fan_out
heard = []
sink = JsonLines(Path(sys.argv[1]))
emit = fan_out([sink, heard.append])
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for lost in range(2):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000 * (lost + 1), hard))
    for i in range(20):
        emit(e.Evaluated(step=i, metrics={"loss": 1.0}, wall_s=1.0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    emit(e.Evaluated(step=99 + lost, metrics={}, wall_s=1.0))
sink.close()
assert sum(isinstance(h, e.Evaluated) for h in heard) == 42
for h in heard:
    if isinstance(h, e.Warned):
        print(h.where, h.message)
"""
    path = tmp_path / "m.jsonl"
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 2, "once for each time that it filled"
    assert all(line == f"{path} JsonLines lost events: File too large; the training goes on" for line in said)
    steps = [r["step"] for r in read(path)]
    assert {99, 100} <= set(steps)
    assert 2 < len(steps) < 42


# -- fan out


def test_sinks_get_whole_events_one_at_a_time_from_many_threads(tmp_path: Path) -> None:
    inside: list[int] = []
    seen: list[tuple[str, int]] = []

    def alone(event: e.Event) -> None:
        assert isinstance(event, e.Warned)
        inside.append(1)
        assert len(inside) == 1
        seen.append((event.where, int(event.message)))
        inside.pop()

    lines = JsonLines(tmp_path / "m.jsonl")
    emit = fan_out([alone, lines])
    ready = threading.Barrier(6)

    def work(name: str) -> None:
        ready.wait()
        for i in range(200):
            emit(e.Warned(message=str(i), where=name))

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines.close()
    assert [(r["where"], int(r["message"])) for r in read(tmp_path / "m.jsonl")] == seen
    for i in range(6):
        assert [number for where, number in seen if where == str(i)] == list(range(200))


def test_a_sink_may_emit_itself_and_one_that_fails_harms_no_other() -> None:
    heard: list[e.Event] = []

    def echo(event: e.Event) -> None:
        if isinstance(event, e.Finished):
            emit(e.Warned(message="echo"))

    def closed(event: e.Event) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    emit = fan_out([closed, echo, heard.append])
    emit(example(e.Finished))
    emit(example(e.Saved))
    assert [type(h).__name__ for h in heard] == ["Warned", "Finished", "Warned", "Saved"]
    messages = {h.message for h in heard if isinstance(h, e.Warned)}
    assert messages == {"echo", "function lost events: Broken pipe; the training goes on"}


def test_a_defect_of_a_sink_is_not_hidden() -> None:
    def defect(event: e.Event) -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        fan_out([defect])(example(e.Saved))


# -- TensorBoard


def test_tensorboards_own_reader_reads_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    program = """
import sys
from pathlib import Path
from happenings import job, stepped
from manyhands.train.sinks import TensorBoard
sink = TensorBoard(Path(sys.argv[1]))
for event in [*job(), stepped(12_001, loss=float("nan"), mfu=0.5)]:
    sink(event)
sink.close()
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator(sys.argv[1])
found.Reload()
import json
print(json.dumps({tag: [(s.step, s.value) for s in found.Scalars(tag)] for tag in found.Tags()["scalars"]}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "tb"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=HERE,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {
        *(f"train/{n}" for n in ("loss", "lr", "grad_norm", "tokens_per_s", "mfu", "communicate_share")),
        "eval/loss",
        "eval/bits_per_byte",
        *(f"w{i}/{n}" for i in range(3) for n in ("share", "compute", "data", "wait", "network")),
    }
    assert [step for step, _ in found["train/loss"]] == [2401, 2402, 12_000, 12_001]
    assert found["train/loss"][0][1] == pytest.approx(10.8231)
    assert math.isnan(found["train/loss"][-1][1])
    assert found["eval/bits_per_byte"] == [[2402, pytest.approx(1.19)]]


def test_tensorboard_that_is_not_installed_says_how_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from manyhands.core.errors import UsageError

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"pip install 'manyhands\[tensorboard\]'"):
        TensorBoard(tmp_path)
