"""What a job shows on a terminal as wide as it is, in a file, and on consoles of other encodings."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from happenings import balance, job, membership, stepped

from manyhands.core import events as e
from manyhands.core.environment import told_by_launcher
from manyhands.train.sinks import Terminal
from manyhands.train.terminal import _fitting

HERE = Path(__file__).parent


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
from happenings import job
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


# -- who waits for whom, who was lost


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
