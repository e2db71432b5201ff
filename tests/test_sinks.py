"""Where events end: lines of JSON, a terminal as wide as it is, TensorBoard's own reader."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from manyhands.core import events as e
from manyhands.core.environment import told_by_launcher
from manyhands.train.sinks import JsonLines, TensorBoard, Terminal, fan_out
from manyhands.train.terminal import _fitting

HERE = Path(__file__).parent
EVERY = e.Event.__subclasses__()


def stepped(step: int = 2402, **changes: Any) -> e.Stepped:
    """Figures about as wide as they get."""
    figures: dict[str, Any] = {
        "step": step,
        "total_steps": 12_000,
        "epoch": 0.1,
        "loss": 10.8231,
        "lr": 6e-4,
        "grad_norm": 123.45,
        "samples": 10,
        "target_tokens": 640,
        "tokens_per_s": 123_456.0,
        "mfu": 0.417,
        "communicate_share": 0.123,
        "memory_bytes": 12_345_678_901,
        "eta_s": 86_399.0,
    }
    return e.Stepped(**{**figures, **changes})


def balance(slowest: str = "w1", workers: int = 3) -> e.Balance:
    loads = [
        e.Load(
            seat=f"w{i}",
            rank=i,
            host="node-1",
            rows=100 + i,
            compute_s=2.0 if f"w{i}" == slowest else 1.0,
            wait_s=0.0 if f"w{i}" == slowest else 0.9,
            data_s=0.02,
            network_s=0.08,
        )
        for i in range(workers)
    ]
    reason = "compute" if slowest else ""
    return e.Balance(step=2402, wall_s=2.1, workers=loads, slowest=slowest, reason=reason)


def membership() -> list[e.Event]:
    who: dict[str, Any] = {"rank": 2, "host": "node-1"}
    stack = "loop.py:120 in run\nreplica.py:80 in step"
    lost: dict[str, Any] = {"seat": "w2", "phase": "step", "step": 2403, **who}
    return [
        e.Redivided(step=2402, shares=(8, 4, 4), rows_per_s=(20.1, 10.2, 9.9)),
        balance(),
        e.Lost(how="hang", detail="no heartbeat", stack=stack, silent_s=10.2, **lost),
        e.Reformed(epoch=2, workers=2, step=2403, wall_s=0.41, kept_places=5, redone_places=3),
        e.Joined(seat="w2-1", step=2404, size_bytes=15 << 20, wall_s=0.8, **who),
        e.Mended(seat="w1", step=2500, what="parameters", source="w0", size_bytes=5 << 20, wall_s=0.2, **who),
        e.Aligned(step=2500, ranks=(1,), drift=3.1e-9, size_bytes=5 << 20, wall_s=0.1),
        e.Left(seat="w1", step=2501, detail="asked to by SIGTERM", **who),
    ]


def job() -> list[e.Event]:
    """One event of each class and more, in the order of a job, with texts that mean something to a terminal."""
    return [
        e.Planned(
            rows=[
                ("model", "gpt2-small, 124,439,808 parameters, 12 layers, 768 wide, 12 heads", "--model"),
                ("data", "corpus/[bold]*.txt: 1,234 files → 5.6 GiB", "--data"),
                ("precision", "bf16", "default: this CPU has bf16 units (avx512_bf16, amx_bf16)"),
            ]
        ),
        *(
            e.Preparing(done_bytes=i * 30_000_000, total_bytes=100_000_000, tokens=i * 7_000_000)
            for i in range(3)
        ),
        e.Preparing(done_bytes=5, total_bytes=None, tokens=1, phase="train tokenizer"),
        e.PreparedData(
            directory="d", documents=3, tokens=9, text_bytes=20, skipped=1, reused=False, wall_s=1.5
        ),
        e.Resumed(step=2400, path="run/checkpoint-2400", from_workers=2, workers=3),
        stepped(2401),
        e.Warned(message="the disk is nearly full", where="rank 0"),
        e.Saved(step=2401, path="run/checkpoint-2401", size_bytes=1_500_000_000, wall_s=3.2, blocked_s=0.4),
        stepped(2402),
        *(e.Evaluating(done=i, total=40) for i in (10, 20)),
        e.Evaluated(step=2402, metrics={"loss": 3.21, "bits_per_byte": 1.19}, wall_s=4.2),
        *membership(),
        stepped(12_000),
        e.Sampled(step=12_000, prompt="def ", text="f():\n\treturn :smile: [red]no\x1b[2J\x07\u202e é\ud800"),
        e.Served(consistency="bounded(4)", updates=9, discarded=1, staleness={"0": 7, "3": 2}),
        e.Finished(step=12_000, reason="done", wall_s=7300, summary="run/summary.json"),
    ]


def test_who_waits_for_whom_is_shown_by_worker() -> None:
    text = plain([balance(), balance()])
    assert text.count("w1 33% of rows (compute 95% data 1% network 4%)") == 1  # said again when it changes
    assert "the others wait for w1 (its computing), up to 43% of the time" in text
    assert plain([balance(), balance(slowest="w0")]).count("% of rows") == 3  # their shares are the same
    three = [balance(slowest="w0")] * 3  # by now it is no chance
    assert plain([balance(), *three, *three]).count("the others wait for w0") == 1
    assert plain([balance(), *three[:2], balance(), *three[:2]]).count("wait for w0") == 0
    other = dataclasses.replace(balance(), workers=balance(workers=2).workers)
    assert plain([balance(), other]).count("% of rows") == 5
    assert "wait for" not in plain([balance(slowest="")])
    assert "3 more, which wait longer" in plain([balance(workers=10)])
    assert plain([balance(workers=1)]) == ""


def test_a_loss_that_the_launcher_tells_is_not_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYHANDS_TOLD", "w")
    seats = ["w1", "w12-3", "host-7-1", "w1-7-0", "x"]
    assert [seat for seat in seats if told_by_launcher(seat)] == ["w1", "w12-3"]
    (lost,) = [event for event in membership() if isinstance(event, e.Lost)]
    console = io.StringIO()
    Terminal(console, told=told_by_launcher)(lost)
    assert console.getvalue() == ""
    monkeypatch.delenv("MANYHANDS_TOLD")
    assert not told_by_launcher("w1")


def test_a_loss_and_what_came_of_it_are_one_line_each() -> None:
    lines = plain(membership()[2:]).splitlines()
    assert lines == [
        (
            "lost w2 (rank 2, node-1), which hung in step 2,404 at replica.py:80 in step: no heartbeat; "
            "last heard of 10.2 s before"
        ),
        "2 workers go on with step 2,404 after 0.41 s (epoch 2): 5 micro-batches of it kept, 3 to compute",
        "w2-1 (rank 2, node-1) joined before step 2,405; fetched 15.0 MiB of state in 0.8 s meanwhile",
        (
            "mended w1 (rank 2, node-1) after step 2,500: its parameters differed from the majority's; "
            "given w0's (5.0 MiB in 0.2 s)"
        ),
        (
            "worker 1 computes on another kind of device, which rounds differently: after step 2,500 a relative "
            "3.1e-09 apart, and given the others' state, as at every comparison (--check-every)"
        ),
        "w1 (rank 2, node-1) left after step 2,501: asked to by SIGTERM",
    ]


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


# -- a terminal that nobody watches


def plain(events: list[e.Event], encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    console = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    terminal = Terminal(console)
    for event in events:
        terminal(event)
    terminal.close()
    return raw.getvalue().decode(encoding)


def test_a_file_gets_plain_lines_that_are_not_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as many CI systems do
    monkeypatch.setenv("COLUMNS", "40")
    text = plain(job())
    assert "\x1b" not in text
    lines = text.splitlines()
    assert (
        "step 2402/12000  loss 10.8231  lr 6.00e-04  norm 123.45  123,456 tok/s  mfu 41.7%  comm 12.3%  "
        "mem 11.5 GiB  eta 23:59:59"
    ) in lines
    assert "data:               corpus/[bold]*.txt: 1,234 files → 5.6 GiB  [--data]" in lines
    assert "resumed from run/checkpoint-2400 (step 2,400, 2 → 3 workers)" in lines
    assert "warning: rank 0: the disk is nearly full" in lines
    assert "held out after step 2,402: loss 3.2100  bits per byte 1.1900  (4.2 s)" in lines
    assert lines[-1] == "done after step 12,000 in 2:01:40; figures in run/summary.json"
    assert sum("step 2402/12000" in line for line in lines) == 1


def test_a_models_text_is_shown_as_it_is_and_steers_no_terminal() -> None:
    lines = plain(job()).splitlines()
    at = lines.index("the model continues:")
    assert lines[at + 1] == "  def f():"
    assert lines[at + 2].split() == ["return", ":smile:", "[red]no\\x1b[2J\\x07\\u202e", "é\\ud800"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_console_of_another_encoding_gets_what_it_can_show(encoding: str) -> None:
    text = plain(job(), encoding)
    assert "2 -> 3 workers" in text
    assert "files -> 5.6 GiB" in text


def test_strange_figures_are_shown_too() -> None:
    events = [
        stepped(loss=math.nan, grad_norm=math.inf, tokens_per_s=0.0, eta_s=0.0),
        e.Evaluated(step=0, metrics={}, wall_s=0.0),
        e.Sampled(step=0, prompt="", text=""),
        e.Planned(rows=[]),
    ]
    assert "loss nan" in plain(events)
    assert "norm inf" in plain(events)


def test_figures_are_left_out_by_importance() -> None:
    figures = [(1, "aaaa"), (0, "bb"), (2, "cccccc")]
    assert [_fitting(figures, room) for room in (16, 15, 8, 7, 2, 1, -3)] == [
        "aaaa  bb  cccccc",
        "aaaa  bb",
        "aaaa  bb",
        "bb",
        "bb",
        "",
        "",
    ]


# -- a terminal that somebody watches


def watched(columns: int, **environment: str) -> str:
    """All that a job writes to a real pseudo-terminal of so many columns."""
    import fcntl
    import pty
    import termios

    program = """
import sys
from test_sinks import job
from manyhands.train.terminal import Terminal
terminal = Terminal(sys.stdout)
for event in job():
    terminal(event)
    if terminal._bar is not None:
        terminal._bar.refresh()  # do not leave it to the clock
terminal.close()
"""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    inherited = {
        k: v
        for k, v in os.environ.items()
        if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    }
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=slave,
        stderr=slave,
        cwd=HERE,
        env={**inherited, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **environment},
    )
    os.close(slave)
    said = b""
    with contextlib.suppress(OSError):  # how Linux says that the other side is closed
        while chunk := os.read(master, 1 << 16):
            said += chunk
    os.close(master)
    assert process.wait(60) == 0, said.decode()
    return said.decode("utf-8")


def without_codes(said: str) -> list[str]:
    """Each line that was ever drawn."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said).replace("\r", "\n").split("\n")


@pytest.mark.parametrize("columns", [120, 80, 50, 24])
def test_the_bar_fits_the_terminal(columns: int) -> None:
    lines = without_codes(watched(columns))
    assert max(map(len, lines)) <= columns
    bars = [line for line in lines if line.startswith("train ") and "%" in line]
    assert bars
    text = " ".join(bars)
    assert "loss 10.8231" in text or columns < 40
    if columns >= 80:
        assert all(word in text for word in ("━", "123,456 tok/s", "comm 12.3%", "eta 23:59:59"))
    assert ("step 2402/12000" in text) == (columns == 120)
    if columns >= 50:
        assert "[bold]" in "".join(lines)
    assert ":smile:" in "".join(lines)


def test_the_last_bar_stays_and_those_of_preparing_go() -> None:
    said = watched(100)
    assert "\x1b[2J" not in said, "the model's text cleared the screen"
    shown = [line for line in without_codes(said) if line.startswith(("train ", "tokenize ", "evaluate "))]
    assert {line.split()[0] for line in shown} == {"train", "tokenize", "evaluate"}
    end = said.rindex("100%")
    assert "\x1b[2K" not in said[end:], "nothing erases the finished bar"
    assert said.endswith("figures in run/summary.json\r\n")
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h"), "the cursor is back"


def test_no_color_has_none() -> None:
    codes = set(re.findall(r"\x1b\[([0-9;]*)m", watched(80, NO_COLOR="1")))
    assert codes <= {"0", "1", "2", ""}, "bold and dim are no colours"
    assert set(re.findall(r"\x1b\[([0-9;]*)m", watched(80))) - codes


def test_a_terminal_of_ascii_and_a_dumb_one() -> None:
    assert watched(80, PYTHONIOENCODING="ascii").isascii()
    said = watched(80, TERM="dumb")
    assert "\x1b" not in said
    assert "step 2402/12000" in said


# -- TensorBoard


def test_tensorboards_own_reader_reads_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    program = """
import sys
from pathlib import Path
from test_sinks import job, stepped
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
