"""What a job under faults was worth: goodput, recoveries, ledger, loss, beside the undisturbed run; as JSON, text and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.core.errors import DataError

if TYPE_CHECKING:
    from manyhands.launch.chaos import Injected


def events_of(output: Path) -> list[dict[str, Any]]:
    """``metrics.jsonl``; a last line that is cut off is left out."""
    path = output / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}", "a run writes its events there", "see its logs"
        ) from None
    return [json.loads(line) for line in lines]


def training_s(events: Sequence[Mapping[str, Any]]) -> tuple[float, int]:
    """(seconds from the first step that was told to the last, how many steps that were), without pauses to evaluate."""
    steps = [e for e in events if e["event"] == "stepped"]
    if len(steps) < 2:
        return 0.0, 0
    first, last = steps[0], steps[-1]
    paused = sum(
        e["wall_s"]
        for e in events
        if e["event"] == "evaluated" and first["time_s"] < e["time_s"] < last["time_s"]
    )
    return last["time_s"] - first["time_s"] - paused, last["step"] - first["step"]


def summary_of(output: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((output / "summary.json").read_text())
    except OSError:
        return {}
    return found


def recoveries(events: Sequence[Mapping[str, Any]], injected: Sequence[Injected]) -> list[float]:
    """Seconds from each kill to the moment when the others went on, by the clock outside."""
    went_on = sorted(e["time_s"] for e in events if e["event"] == "reformed")
    found = []
    for each in injected:
        if each.fault.kind == "kill" and each.outcome == "done":
            after = next((t for t in went_on if t >= each.at), None)
            if after is not None:
                found.append(after - each.at)
    return found


def compare(
    disturbed: Path, undisturbed: Path, injected: Sequence[Injected], code: int, seed: int
) -> dict[str, Any]:
    """All figures as JSON data. `code`: the exit code of the disturbed job."""
    from manyhands.cli.ledger import as_data
    from manyhands.train.audit import audit, load

    events, plain = events_of(disturbed), events_of(undisturbed)
    (seconds, steps), (plain_s, plain_steps) = training_s(events), training_s(plain)
    after, before = summary_of(disturbed), summary_of(undisturbed)
    reformed = [e for e in events if e["event"] == "reformed"]
    lost = [e for e in events if e["event"] == "lost"]
    ledger = as_data(audit(load([disturbed])))
    times = recoveries(events, injected)
    useful_s = plain_s / plain_steps * steps if plain_steps else 0.0
    return {
        "seed": seed,
        "exit_code": code,
        "goodput": useful_s / seconds if seconds else None,
        "useful_work": _useful(events, plain, plain_s / plain_steps if plain_steps else 0.0),
        "steps": steps,
        "train_s": seconds,
        "undisturbed_step_s": plain_s / plain_steps if plain_steps else None,
        "faults": [
            {
                "kind": i.fault.kind,
                "at_s": i.fault.at_s,
                "for_s": i.fault.for_s,
                "time_s": i.at,
                "seat": i.seat,
                "outcome": i.outcome,
            }
            for i in injected
        ],
        "lost": [
            {k: e[k] for k in ("time_s", "seat", "how", "detail", "phase", "step", "silent_s")} for e in lost
        ],
        "reformed": len(reformed),
        "recovery_s": _spread(times),
        "reform_s": _spread([e["wall_s"] for e in reformed]),
        "kept_places": sum(e["kept_places"] for e in reformed),
        "redone_places": sum(e["redone_places"] for e in reformed),
        "void_steps": ledger["void"],
        "ledger": {k: ledger[k] for k in ("ok", "verdict", "used", "lost", "doubled", "dropped", "void")},
        "losses": {"disturbed": _losses(after), "undisturbed": _losses(before)},
        "loss_difference": _difference(after, before),
        "same_parameters": after.get("parameters_sha256") == before.get("parameters_sha256") and bool(after),
    }


def _useful(
    events: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]], step_s: float
) -> float | None:
    """The part of the time of all workers that were there that went into the result.

    A step's worth is what it takes of all workers' time undisturbed. A dead worker counts as there until the group re-forms.
    """
    steps = [e for e in events if e["event"] == "stepped"]
    workers = max((len(e["workers"]) for e in plain if e["event"] == "balance"), default=0)
    if len(steps) < 2 or not workers or not step_s:
        return None
    at, there, seconds = steps[0]["time_s"], workers, 0.0
    for e in events:
        if e["event"] == "reformed" and at < e["time_s"] < steps[-1]["time_s"]:
            seconds += there * (e["time_s"] - at)
            at, there = e["time_s"], e["workers"]
    seconds += there * (steps[-1]["time_s"] - at)
    return float(workers * step_s * (steps[-1]["step"] - steps[0]["step"]) / seconds)


def _spread(values: Sequence[float]) -> dict[str, float | int] | None:
    if not values:
        return None
    return {"n": len(values), "median": statistics.median(values), "max": max(values), "min": min(values)}


def _losses(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {"train": summary.get("train_loss"), "eval": summary.get("eval", {}).get("loss")}


def _difference(after: Mapping[str, Any], before: Mapping[str, Any]) -> float | None:
    """Of the held-out loss, or of the training loss where nothing was held out."""
    for one, other in zip(_figures(after), _figures(before), strict=True):
        if isinstance(one, float) and isinstance(other, float):
            return one - other
    return None


def _figures(summary: Mapping[str, Any]) -> tuple[Any, Any]:
    return summary.get("eval", {}).get("loss"), summary.get("train_loss")


def text(report: Mapping[str, Any]) -> str:
    """For people."""
    lines = [f"faults (seed {report['seed']}):"]
    start = min((f["time_s"] - f["at_s"] for f in report["faults"]), default=0.0)
    for fault in report["faults"]:
        how_long = f" for {fault['for_s']:.0f} s" if fault["for_s"] else ""
        lines.append(
            f"  {fault['time_s'] - start:8.1f} s  {fault['kind']:<5} {fault['seat']:<6}{how_long}  {fault['outcome']}"
        )
    if not report["faults"]:
        lines.append("  none came to be before the job's end")
    lines.append("")
    if report["goodput"] is not None:
        lines.append(
            f"goodput          {report['goodput']:.1%}: {report['steps']:,} steps took {report['train_s']:.1f} s; "
            f"undisturbed they take {report['undisturbed_step_s'] * report['steps']:.1f} s"
        )
    if report["useful_work"] is not None:
        shared = "; they share processors: fewer are faster" if report["useful_work"] > 1 else ""
        lines.append(
            f"useful work      {report['useful_work']:.1%} of the time of the workers that were there{shared}"
        )
    if report["recovery_s"]:
        r = report["recovery_s"]
        lines.append(
            f"recovery         {r['median']:.2f} s median, {r['max']:.2f} s at most, of {r['n']} kills"
        )
    lines.append(
        f"work             {report['kept_places']:,} micro-batches of interrupted steps kept, "
        f"{report['redone_places']:,} left to compute; {report['void_steps']:,} finished steps given up"
    )
    lines.append(f"ledger           {report['ledger']['verdict']}")
    if report["loss_difference"] is not None:
        same = " (the same bits)" if report["same_parameters"] else ""
        lines.append(f"loss             {report['loss_difference']:+.6f} against the undisturbed run{same}")
    if report["exit_code"]:
        lines.append(f"the job ended with exit code {report['exit_code']}: see its logs")
    return "\n".join(lines)


# -- a picture

COLOURS = {
    "kill": "#c0392b",
    "stop": "#8e44ad",
    "slow": "#d68910",
    "cut": "#2471a3",
    "full": "#7b7d7d",
    "flip": "#148f77",
}
WIDTH, ROW, LEFT, TOP = 960, 22, 90, 40


def timeline(events: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> str:
    """An SVG: a row for each worker (while it took part), marks for faults, below it the steps over time."""
    from html import escape

    steps = [(e["time_s"], e["step"]) for e in events if e["event"] == "stepped"]
    if not steps:
        return ""
    begin, end = steps[0][0], max(steps[-1][0], steps[0][0] + 1e-3)
    spans = _lives(events, begin, end)
    seats = sorted(spans, key=lambda seat: spans[seat][0])
    graph = TOP + ROW * len(seats) + 20
    height = graph + 160

    def x(time_s: float) -> float:
        part: float = (min(max(time_s, begin), end) - begin) / (end - begin)
        return LEFT + part * (WIDTH - LEFT - 20)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    place = LEFT
    for kind in dict.fromkeys(f["kind"] for f in report["faults"]):
        out.append(
            f'<circle cx="{place}" cy="18" r="5" fill="{COLOURS[kind]}"/><text x="{place + 9}" y="22">{kind}</text>'
        )
        place += 60
    good = report["goodput"]
    if good is not None:
        out.append(f'<text x="{WIDTH - 20}" y="22" text-anchor="end">goodput {good:.1%}</text>')
    for i, seat in enumerate(seats):
        y = TOP + ROW * i
        a, b = spans[seat]
        out.append(f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(seat)}</text>')
        out.append(
            f'<rect x="{x(a):.1f}" y="{y + 3}" width="{max(1, x(b) - x(a)):.1f}" height="{ROW - 8}" fill="#aed6f1"/>'
        )
        for f in report["faults"]:
            if f["seat"] == seat and f["outcome"].startswith("done"):
                if f["for_s"]:
                    out.append(
                        f'<rect x="{x(f["time_s"]):.1f}" y="{y + 3}" width="{x(f["time_s"] + f["for_s"]) - x(f["time_s"]):.1f}" '
                        f'height="{ROW - 8}" fill="{COLOURS[f["kind"]]}" opacity="0.35"/>'
                    )
                out.append(
                    f'<circle cx="{x(f["time_s"]):.1f}" cy="{y + 10}" r="5" fill="{COLOURS[f["kind"]]}"/>'
                )
    most = steps[-1][1]
    points = " ".join(f"{x(t):.1f},{graph + 130 - s / most * 120:.1f}" for t, s in steps)
    out += [
        f'<polyline points="{points}" fill="none" stroke="#1b4f72" stroke-width="1.5"/>',
        f'<line x1="{LEFT}" y1="{graph + 130}" x2="{WIDTH - 20}" y2="{graph + 130}" stroke="#999"/>',
        f'<text x="{LEFT - 8}" y="{graph + 14}" text-anchor="end">step {most:,}</text>',
        f'<text x="{LEFT}" y="{graph + 146}">0 s</text>',
        f'<text x="{WIDTH - 20}" y="{graph + 146}" text-anchor="end">{end - begin:.0f} s</text>',
        "</svg>",
    ]
    return "\n".join(out) + "\n"


def _lives(events: Sequence[Mapping[str, Any]], begin: float, end: float) -> dict[str, tuple[float, float]]:
    """From when to when each worker took part."""
    since: dict[str, float] = {}
    until: dict[str, float] = {}
    for e in events:
        if e["event"] == "balance":
            for load in e["workers"]:
                since.setdefault(load["seat"], begin if not until else e["time_s"])
        elif e["event"] == "joined":
            since.setdefault(e["seat"], e["time_s"])
        elif e["event"] in ("lost", "left"):
            since.setdefault(e["seat"], begin)
            until[e["seat"]] = e["time_s"]
    return {seat: (a, until.get(seat, end)) for seat, a in since.items()}
