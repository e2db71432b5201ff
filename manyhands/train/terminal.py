"""The job on a terminal: a table of the plan, a live bar, and plain lines where nobody watches."""

from __future__ import annotations

import time
from typing import Any, TextIO

from manyhands.core import events as e

PLAIN_S = 5.0  # between progress lines of preparing and evaluating where there is no bar


class Terminal:
    """Shows events on `console`: with a live bar on a TTY, one line an event otherwise."""

    def __init__(self, console: TextIO) -> None:
        from rich.console import Console

        self._console = Console(file=console, highlight=False, soft_wrap=not console.isatty())
        self._live = self._console.is_terminal
        self._bar: Any = None
        self._task: Any = None
        self._kind = ""
        self._said = 0.0

    def __call__(self, event: e.Event) -> None:
        shown = getattr(self, f"_{type(event).__name__.lower()}", None)
        if shown is not None:
            shown(event)

    def close(self) -> None:
        self._stop()

    # -- events

    def _planned(self, event: e.Planned) -> None:
        from rich.table import Table

        self._stop()
        if not self._live:
            for what, value, origin in event.rows:
                self._say(f"{what + ':':<19} {value}  [{origin}]")
            return
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold", ratio=3)
        table.add_column(style="dim", overflow="fold", ratio=2)
        for what, value, origin in event.rows:
            table.add_row(_safe(what), _safe(value), _safe(origin))
        self._console.print(table)

    def _preparing(self, event: e.Preparing) -> None:
        total = event.total_bytes
        self._progress(
            "prepare", event.phase, event.done_bytes, total, f"{event.tokens:,} tokens", bytes_=True
        )

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

    def _stepped(self, event: e.Stepped) -> None:
        figures = (
            f"loss {event.loss:.4f}  lr {event.lr:.2e}  norm {event.grad_norm:.2f}  {event.tokens_per_s:,.0f} tok/s  "
            f"mfu {event.mfu:.1%}  comm {event.communicate_share:.1%}  mem {_bytes(event.memory_bytes)}"
        )
        if self._live:
            self._progress(
                "train", "train", event.step, event.total_steps, f"{figures}  eta {_clock(event.eta_s)}"
            )
        else:
            self._say(f"step {event.step}/{event.total_steps}  {figures}  eta {_clock(event.eta_s)}")
        if event.step >= event.total_steps:
            self._stop(keep=True)

    def _evaluating(self, event: e.Evaluating) -> None:
        self._progress("evaluate", "evaluate", event.done, event.total, "")

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
        for line in (event.prompt + event.text).strip("\n").splitlines():
            self._say(f"  {line}")

    def _finished(self, event: e.Finished) -> None:
        self._stop(keep=True)
        self._say(
            f"{event.reason} after step {event.step:,} in {_clock(event.wall_s)}; figures in {event.summary}"
        )

    # -- how

    def _progress(
        self, kind: str, label: str, done: float, total: float | None, text: str, *, bytes_: bool = False
    ) -> None:
        if not self._live:
            if time.monotonic() - self._said > PLAIN_S:
                self._said = time.monotonic()
                amount = f"{_bytes(int(done))}" if bytes_ else f"{done:,.0f}"
                of = "" if total is None else f" of {_bytes(int(total)) if bytes_ else f'{total:,.0f}'}"
                self._say(f"{label}: {amount}{of}  {text}".rstrip())
            return
        if self._bar is None or self._kind != kind:
            self._stop()
            self._start(kind)
        self._bar.update(self._task, completed=done, total=total, description=label, text=text)

    def _start(self, kind: str) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        narrow = self._console.width < 100
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=12 if narrow else 24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[text]}"),
            console=self._console,
            transient=False,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(kind, total=None, text="")
        self._kind = kind
        self._bar.start()

    def _stop(self, *, keep: bool = False) -> None:
        if self._bar is not None:
            if not keep:
                self._bar.live.transient = True
            self._bar.stop()
            self._bar, self._kind = None, ""

    def _say(self, text: str, style: str | None = None) -> None:
        self._console.print(
            _safe(text) if self._live else text, style=style if self._live else None, markup=self._live
        )


def _safe(text: str) -> str:
    from rich.markup import escape

    return escape(text)


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
