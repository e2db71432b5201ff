"""What the job's display must leave alone: the worker's log, the user's cursor, and training whose terminal is gone."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from manyhands.core import events as e
from manyhands.train.sinks import Terminal, fan_out

HERE = Path(__file__).parent
START = """
import os, signal, sys
from happenings import stepped
from manyhands.core import events as e
from manyhands.train.sinks import TensorBoard, Terminal, fan_out
"""


class Shell:
    """A process whose standard output is a pseudo-terminal, standard error a file."""

    def __init__(self, program: str, errors: Path) -> None:
        self.master, slave = pty.openpty()
        environment = {
            k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
        }
        with errors.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", START + program],
                stdout=slave,
                stderr=file,
                stdin=subprocess.PIPE,
                cwd=HERE,
                env={**environment, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"},
            )
        os.close(slave)

    def until(self, words: bytes = b"") -> str:
        """All that it says until `words`, or until it has ended."""
        said = b""
        with contextlib.suppress(OSError):  # how Linux says that the other side is closed
            while (not words or words not in said) and (chunk := os.read(self.master, 1 << 16)):
                said += chunk
        return said.decode()

    def hang_up(self) -> None:
        os.close(self.master)
        self.master = -1

    def end(self) -> int:
        self.process.communicate(timeout=60)
        if self.master >= 0:
            os.close(self.master)
        return self.process.returncode


def test_a_workers_log_gets_its_lines_while_the_bar_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    shell = Shell(
        "t = Terminal(sys.stdout); t(stepped(1)); print('a library warns', file=sys.stderr); t(stepped(2)); t.close()",
        log,
    )
    said = shell.until()
    assert shell.end() == 0, log.read_text()
    assert "loss 10.8231" in said
    assert "a library warns" not in said
    assert log.read_text() == "a library warns\n"


def test_what_is_printed_to_the_same_terminal_stands_above_the_bar(tmp_path: Path) -> None:
    shell = Shell(
        "t = Terminal(sys.stdout); t(stepped(1)); print('said beside'); t(stepped(2)); "
        "t(e.Finished(step=2, reason='done', wall_s=1, summary='s.json', load='to copy ' * 60)); t.close()",
        tmp_path / "err",
    )
    said = shell.until()
    assert "to copy " * 60 in said  # the terminal breaks it: with line ends in it, it would be no Python
    assert shell.end() == 0, (tmp_path / "err").read_text()
    assert "\x1b[2Ksaid beside\r\n" in said.replace("\r\x1b[2K\r", "\r")
    assert said.index("loss 10.8231") < said.index("said beside") < said.rindex("loss 10.8231")


def test_a_log_is_told_once_of_what_nobody_knows_the_extent_of() -> None:
    """Compressed files, until their first piece is done: progress is looked at four times a second."""
    shown = io.StringIO()
    terminal = Terminal(shown)
    for phase in ("train tokenizer", *["tokenize"] * 3):
        terminal(e.Preparing(done_bytes=0, total_bytes=None, tokens=0, phase=phase))
    terminal(e.Preparing(done_bytes=5, total_bytes=None, tokens=1))
    assert shown.getvalue().splitlines()[:2] == ["train tokenizer …", "tokenize …"]
    assert len(shown.getvalue().splitlines()) == 3


def test_a_kill_leaves_the_shells_cursor(tmp_path: Path) -> None:
    shell = Shell(
        "t = Terminal(sys.stdout); t(stepped(1)); os.kill(os.getpid(), signal.SIGKILL)", tmp_path / "err"
    )
    said = shell.until()
    assert shell.end() == -signal.SIGKILL
    assert "loss 10.8231" in said
    assert "\x1b[?25l" not in said  # nothing is hidden that only a living process could show again


def test_a_terminal_that_hangs_up_does_not_end_training(tmp_path: Path) -> None:
    program = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
heard = []
terminal = Terminal(sys.stdout)
emit = fan_out([terminal, heard.append])
emit(stepped(1))
input()
for step in range(2, 40):
    emit(stepped(step))
    emit(e.Warned(message="and a line"))
warned = [h.message for h in heard if isinstance(h, e.Warned) and h.message != "and a line"]
print(sum(isinstance(h, e.Stepped) for h in heard), warned, file=sys.stderr, flush=True)
os._exit(0)
"""
    shell = Shell(program, tmp_path / "err")
    shell.until(b"loss")
    shell.hang_up()
    assert shell.process.stdin is not None
    shell.process.stdin.write(b"\n")
    assert shell.end() == 0
    assert (tmp_path / "err").read_text().split(maxsplit=1) == [
        "39",
        "['Terminal lost events: Input/output error; the training goes on']\n",
    ]


def test_a_closed_pipe_does_not_end_training() -> None:
    """As in ``manyhands train | head -1``: all steps are done, the others are told once, the exit code is 0."""
    program = """
heard = []
emit = fan_out([Terminal(sys.stdout), heard.append])
emit(stepped(1))
input()
for step in range(2, 40):
    emit(stepped(step))
print(sum(isinstance(h, e.Stepped) for h in heard), [h.message for h in heard if isinstance(h, e.Warned)], file=sys.stderr)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", START + program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=HERE,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("step 1/")
    process.stdout.close()
    process.stdout = None
    _, said = process.communicate("\n", timeout=60)
    assert process.returncode == 0, said
    assert said == "39 ['Terminal lost events: Broken pipe; the training goes on']\n"


def test_a_full_disk_is_reported_once_though_some_events_are_never_written() -> None:
    heard: list[e.Event] = []

    def full(event: e.Event) -> None:
        if not isinstance(event, e.Evaluating):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    emit = fan_out([full, heard.append])
    for step in range(5):
        emit(e.Evaluated(step=step, metrics={}, wall_s=1.0))
        emit(e.Evaluating(done=step, total=5))
    assert sum(isinstance(event, e.Warned) for event in heard) == 1


def test_tensorboard_shows_one_curve_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    program = """
from pathlib import Path
first = TensorBoard(Path(sys.argv[1]))
for step in range(1, 6):
    first(stepped(step, loss=float(step)))
first.close()
again = TensorBoard(Path(sys.argv[1]))
again(e.Resumed(step=2, path="run/checkpoint-2", from_workers=2, workers=3))
for step in range(3, 5):
    again(stepped(step, loss=step + 0.5))
again.close()
TensorBoard(Path(sys.argv[1])).close()  # a run without a step
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator(sys.argv[1])
found.Reload()
print([(s.step, s.value) for s in found.Scalars("train/loss")])
"""
    done = subprocess.run(
        [sys.executable, "-c", START + program, tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=HERE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5)]"
