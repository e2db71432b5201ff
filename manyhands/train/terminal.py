"""The job on a terminal: a table of the plan, a live bar, and plain lines where nobody watches."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

from manyhands.core import events as e
from manyhands.train import membership_words as membership

PLAIN_S = 5.0  # between progress lines of preparing and evaluating where there is no bar
GONE = (errno.EIO, errno.EPIPE)  # a terminal that hung up, a pipe that nobody reads
DRAWN_S = 0.1  # between two drawings of a bar
BALANCE_S = 60.0  # between lines on workers whose shares stay the same, where there is no bar
BLAMED = 3  # times in a row that the others wait for somebody else than was said: hardly by chance, so told at once
NARROW = 60  # columns below which figures need the place of the bar
_PLAINER = str.maketrans(
    {"→": "->", "…": "...", "·": "*", "×": "x", "–": "-", "—": "-", "’": "'", "“": '"', "”": '"'}
)


class Terminal:
    """Shows events on `console`: with a live bar on a TTY, one line an event otherwise.

    Args:
        told: says of a seat whether somebody else tells of its loss.
    """

    def __init__(self, console: TextIO, told: Callable[[str], bool] = lambda seat: False) -> None:
        self._told = told
        # asked of the file: FORCE_COLOR and the like must not draw a bar into a log
        self._live = console.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")
        self._console = _rich(console, soft_wrap=not self._live)
        self._bar: Any = None
        self._task: Any = None
        self._kind = ""
        self._said = self._drawn = 0.0
        self._begun = ""  # the phase of preparing that was named last
        self._loads: list[tuple[str, str]] = []  # lines below the bar: (text, style)
        self._shares: tuple[object, ...] = ()  # as said last
        self._shares_at = -math.inf
        self._slowest: list[str] = []  # of the last events
        self._slowest_said = ""
        self._told_drift = 0.0

    def __call__(self, event: e.Event) -> None:
        shown = getattr(self, f"_{type(event).__name__.lower()}", None)
        try:
            if shown is not None:
                shown(event)
        except OSError as error:
            if error.errno in GONE:  # nobody will read on; this is said once, by whoever hands out the events
                _to_nowhere(self._console.file)
            raise

    def close(self) -> None:
        self._stop()

    # -- events

    def _planned(self, event: e.Planned) -> None:
        from rich.table import Table

        self._stop()
        if not self._live:
            for what, value, origin in event.rows:
                self._say(f"{what + ':':<19} {value}" + (f"  [{origin}]" if origin else ""))
            return
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold", ratio=3)
        table.add_column(style="dim", overflow="fold", ratio=2)
        for what, value, origin in event.rows:
            table.add_row(*(self._clean(text) for text in (what, value, origin)))
        self._console.print(table)

    def _preparing(self, event: e.Preparing) -> None:
        total, known = event.total_bytes, event.done_bytes or event.tokens or event.total_bytes is not None
        if not self._live and not known:  # a tokenizer is trained, or no piece is done yet
            if event.phase != self._begun:
                self._begun = event.phase
                self._say(f"{event.phase} …")
            return
        figures = [(0, f"{event.tokens:,} tokens")] if known else []
        self._progress("prepare", event.phase, event.done_bytes, total, figures, bytes_=True)

    def _prepareddata(self, event: e.PreparedData) -> None:
        self._stop()
        how = "found prepared" if event.reused else f"prepared in {event.wall_s:.1f} s"
        skipped = f", {event.skipped:,} broken rows skipped" if event.skipped else ""
        self._say(f"data {how}: {event.documents:,} documents, {event.tokens:,} tokens{skipped}")

    def _warned(self, event: e.Warned) -> None:
        where = f"{event.where}: " if event.where else ""
        self._say(f"warning: {where}{event.message}", style="yellow")

    def _resumed(self, event: e.Resumed) -> None:
        self._say(
            f"resumed from {event.path} (step {event.step:,}, {event.from_workers} → {event.workers} workers)"
        )

    def _redivided(self, event: e.Redivided) -> None:
        shares = " + ".join(map(str, event.shares))
        speeds = ", ".join("?" if speed is None else f"{speed:.3g}" for speed in event.rows_per_s)
        self._say(f"step {event.step}: shares {shares} (rows/s of each worker: {speeds})", style="dim")

    def _stepped(self, event: e.Stepped) -> None:
        step = f"step {event.step}/{event.total_steps}"
        figures = [  # as shown; the number says which are left out first where there is no room
            (4, step),
            (0, f"loss {event.loss:.4f}"),
            (5, f"lr {event.lr:.2e}"),
            (6, f"norm {event.grad_norm:.2f}"),
            (2, f"{event.tokens_per_s:,.0f} tok/s"),
            (7, f"mfu {event.mfu:.1%}"),
            (3, f"comm {event.communicate_share:.1%}"),
            (8, f"mem {_bytes(event.memory_bytes)}"),
            (1, f"eta {_clock(event.eta_s)}"),
        ]
        if self._live:
            self._progress("train", "train", event.step, event.total_steps, figures)
        else:
            self._say("  ".join(text for _, text in figures))
        if event.step >= event.total_steps:
            self._stop(keep=True)

    def _balance(self, event: e.Balance) -> None:
        if len(event.workers) < 2:
            return
        if self._live:
            self._loads = membership.load_lines(event)
            if self._bar is not None and self._kind == "train" and time.monotonic() - self._drawn > DRAWN_S:
                self._bar.refresh()
            return
        rows = sum(load.rows for load in event.workers) or 1
        shares = tuple((load.seat, round(100 * load.rows / rows)) for load in event.workers)
        self._slowest = [*self._slowest, event.slowest][-BLAMED:]
        news = event.slowest != self._slowest_said and self._slowest == [event.slowest] * BLAMED
        if shares != self._shares or news or time.monotonic() - self._shares_at > BALANCE_S:
            self._shares, self._shares_at, self._slowest_said = shares, time.monotonic(), event.slowest
            self._say("  ".join(text for text, _ in membership.load_lines(event, short=True)))

    def _lost(self, event: e.Lost) -> None:
        self._loads = []
        if not self._told(event.seat):
            self._say(membership.lost(event), style="red")

    def _left(self, event: e.Left) -> None:
        self._loads = []
        self._say(membership.left(event))

    def _joined(self, event: e.Joined) -> None:
        self._loads = []
        self._say(membership.joined(event), style="green")

    def _reformed(self, event: e.Reformed) -> None:
        self._say(membership.reformed(event))

    def _mended(self, event: e.Mended) -> None:
        self._say(membership.mended(event), style="yellow")

    def _aligned(self, event: e.Aligned) -> None:
        if not event.drift <= 10 * self._told_drift:  # it goes on like this, unless something is wrong
            self._told_drift = event.drift
            self._say(membership.aligned(event))

    def _evaluating(self, event: e.Evaluating) -> None:
        self._progress("evaluate", "evaluate", event.done, event.total, [])

    def _evaluated(self, event: e.Evaluated) -> None:
        self._stop(keep=self._kind == "train")
        figures = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in event.metrics.items())
        self._say(f"held out after step {event.step:,}: {figures}  ({event.wall_s:.1f} s)", style="bold")

    def _saved(self, event: e.Saved) -> None:
        self._say(
            f"saved {event.path}  ({_bytes(event.size_bytes)} in {event.wall_s:.1f} s, training waited {event.blocked_s:.2f} s)"
        )

    def _sampled(self, event: e.Sampled) -> None:
        self._stop(keep=True)
        self._say("the model continues:", style="bold")
        for line in (event.prompt + event.text).strip("\n").split("\n"):
            self._say(f"  {line}")

    def _served(self, event: e.Served) -> None:
        self._stop(keep=True)
        total = sum(event.staleness.values())
        dropped = f", {event.discarded:,} discarded" if event.discarded else ""
        self._say(f"staleness of {total:,} pushes ({event.consistency}), {event.updates:,} updates{dropped}:")
        for staleness, pushes in sorted(event.staleness.items(), key=lambda item: int(item[0])):
            share = pushes / max(1, total)
            self._say(f"  {staleness:>5} {'#' * round(40 * share):<40} {share:6.1%}")

    def _finished(self, event: e.Finished) -> None:
        self._stop(keep=True)
        self._say(
            f"{event.reason} after step {event.step:,} in {_clock(event.wall_s)}; figures in {event.summary}"
        )
        if event.load:
            self._say("load it with:")
            self._say(f"  {event.load}", whole=True)

    # -- how

    def _progress(
        self,
        kind: str,
        label: str,
        done: float,
        total: float | None,
        figures: Sequence[tuple[int, str]],
        *,
        bytes_: bool = False,
    ) -> None:
        if not self._live:
            if time.monotonic() - self._said > PLAIN_S:
                self._said = time.monotonic()
                amount = f"{_bytes(int(done))}" if bytes_ else f"{done:,.0f}"
                of = "" if total is None else f" of {_bytes(int(total)) if bytes_ else f'{total:,.0f}'}"
                self._say("  ".join([f"{label}: {amount}{of}", *(text for _, text in figures)]))
            return
        if self._bar is None or self._kind != kind:
            self._stop()
            self._start(kind)
        bar = self._bar_width()
        room = self._console.width - len(label) - len(" 100% ") - (bar + 1 if bar else 0) - 1
        self._bar.update(
            self._task, completed=done, total=total, description=label, text=_fitting(figures, room)
        )
        if not self._bar.live.is_started:
            self._bar.start()  # draws
        elif time.monotonic() - self._drawn > DRAWN_S:
            self._bar.refresh()
        else:
            return
        self._drawn = time.monotonic()

    def _bar_width(self) -> int:
        width = self._console.width
        return 0 if width < NARROW else 10 if width < 100 else 24

    def _start(self, kind: str) -> None:
        from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
        from rich.table import Column

        columns: list[ProgressColumn] = [
            TextColumn("{task.description}", style="bold", markup=False, table_column=Column(no_wrap=True)),
            TextColumn("{task.percentage:>3.0f}%", markup=False, table_column=Column(no_wrap=True)),
            # the last resort of a window made smaller: cut, not wrapped
            TextColumn(
                "{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, overflow="crop")
            ),
        ]
        if self._bar_width():
            columns.insert(1, BarColumn(bar_width=self._bar_width()))
        lines = self._load_lines

        class WithLoads(Progress):
            def get_renderables(self) -> Iterable[Any]:
                yield self.make_tasks_table(self.tasks)
                yield from lines() if kind == "train" else ()

        self._bar = WithLoads(
            *columns,
            console=self._console,
            auto_refresh=False,  # drawn when there is something new: a thread would take time from training
            redirect_stdout=sys.stdout.isatty(),  # a worker's own output goes to its log, bar or no bar
            redirect_stderr=sys.stderr.isatty(),
        )
        self._task = self._bar.add_task(kind, total=None, text="")
        self._kind = kind

    def _load_lines(self) -> list[Any]:
        from rich.text import Text

        return [
            Text(f"  {self._clean(text)}", style=style, no_wrap=True, overflow="ellipsis")
            for text, style in self._loads
        ]

    def _stop(self, *, keep: bool = False) -> None:
        self._loads = []  # what stays on the screen is the bar alone
        if self._bar is not None:
            if not keep:
                self._bar.live.transient = True
            self._bar.stop()
            self._bar, self._kind = None, ""

    def _say(self, text: str, style: str | None = None, *, whole: bool = False) -> None:
        """A line; `whole`: to be copied, so the terminal alone breaks it."""
        from rich.text import Text

        shown = Text(self._clean(text), style=style or "" if self._live else "")
        self._console.print(shown, soft_wrap=whole or None)

    def _clean(self, text: str) -> str:
        """What this console can show: a model's or file's text steers no terminal and needs no other encoding."""
        shown = "".join(_visible(c) for c in text)
        encoding = self._console.encoding
        try:
            shown.encode(encoding)
        except UnicodeEncodeError:
            return shown.translate(_PLAINER).encode(encoding, "replace").decode(encoding)
        return shown


def _rich(console: TextIO, *, soft_wrap: bool) -> Any:
    """A console that takes nothing it cannot give back: it leaves the cursor, and the process alive."""
    from rich.console import Console

    class Guest(Console):
        def show_cursor(self, show: bool = True) -> bool:
            return False  # hidden, it would stay so in the user's shell after a kill

        def on_broken_pipe(self) -> None:
            raise  # noqa: PLE0704 - the BrokenPipeError; rich's own ends the process

    return Guest(file=console, highlight=False, emoji=False, markup=False, soft_wrap=soft_wrap)


def _to_nowhere(file: Any) -> None:
    """Let `file` write into nothing, so that neither it nor the interpreter's last flush fails again."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)


def _visible(c: str) -> str:
    # Cc: control characters; Cf: invisible ones, of which some turn the direction of writing; Cs: lone surrogates.
    # The two joiners (Cf) are part of writing in Persian, Hindi and others.
    if c in "\n\t\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"):
        return c
    return f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}"


def _fitting(figures: Sequence[tuple[int, str]], room: int) -> str:
    """As many as fit into `room` columns, in their order; those with the highest numbers are left out first.

    >>> _fitting([(1, "a"), (0, "bb"), (2, "ccc")], 5)
    'a  bb'
    """
    kept = list(figures)
    while kept and sum(len(text) + 2 for _, text in kept) - 2 > room:
        kept.remove(max(kept))
    return "  ".join(text for _, text in kept)


def _bytes(n: int) -> str:
    size = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return ""


def _clock(seconds: float) -> str:
    s = max(0, round(seconds))
    return f"{s // 3600}:{s % 3600 // 60:02d}:{s % 60:02d}" if s >= 3600 else f"{s // 60}:{s % 60:02d}"
