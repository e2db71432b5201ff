"""`manyhands ledger OUTPUT [OUTPUT2 …]`: which samples were used by which step and worker, and whether each was once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.cli import options
from manyhands.core.errors import UsageError

if TYPE_CHECKING:
    from manyhands.train.audit import Problem, Report
    from manyhands.train.ledger import File

SHOWN = 20  # problems in the text; --json has more


def main(arguments: Sequence[str]) -> int:
    """Exit code 0: every sample once (but those left out by rule, which are counted); 1: some lost or doubled."""
    from manyhands.train.audit import audit, load

    p = options.Parser(
        prog="manyhands ledger",
        description="Show which samples were used by which step and worker, and verify that each was used exactly once.",
        epilog="Exit code 0: each once; 1: samples were lost or used twice, or a ledger cannot be read; 2: usage.",
        allow_abbrev=False,
    )
    p.add_argument(
        "outputs",
        nargs="+",
        metavar="OUTPUT",
        help="directories of one job: each host's, or a run's and then those that continued it",
    )
    p.add_argument("--step", type=int, metavar="N", help="who computed which samples of step N")
    p.add_argument("--json", action="store_true", help="for machines")
    given = options.parse(p, arguments)
    found = load([Path(output) for output in dict.fromkeys(given.outputs)])
    report = audit(found)
    if given.step is not None:
        story = step_story(found, report, given.step)
        options.say(json.dumps(story, indent=2) if given.json else _step_text(story))
        return 0
    options.say(json.dumps(as_data(report), indent=2) if given.json else text(report))
    return 0 if report.ok else 1


def as_data(report: Report) -> dict[str, Any]:
    """The report as JSON data."""
    data = dataclasses.asdict(dataclasses.replace(report, order=None))
    del data["order"]
    data["shares"] = [dataclasses.asdict(share) for _, share in sorted(report.shares.items())]
    data["problems"] = [
        {**dataclasses.asdict(p), "sample_ids": _ids(report, p, 100)} for p in report.problems
    ]
    return {"ok": report.ok, "verdict": verdict(report), **data}


def verdict(report: Report) -> str:
    """One line."""
    if not report.ok:
        parts = [f"{n:,} {what}" for n, what in ((report.lost, "lost"), (report.doubled, "used twice")) if n]
        return f"NOT every sample once: {', '.join(parts) or f'{report.problem_count} contradictions'}"
    dropped = f"; {report.dropped:,} left out by rule, as recorded" if report.dropped else ""
    if report.skipped:
        dropped += f"; {report.skipped:,} computed once, in {_updates(report)}"
    basis = "" if report.counted else " (by places: this order's sample numbers are not recomputed)"
    open_ = f"; {report.unfinished:,} of the last steps not yet" if report.unfinished else ""
    return (
        f"every sample once: {report.used:,} samples in {report.steps - report.elsewhere:,} steps, "
        f"{report.passes:.4g} passes over the data{dropped}{open_}{basis}"
    )


def text(report: Report) -> str:
    """For people: a table by worker, membership changes, what is wrong, the verdict."""
    width = max([6, *(len(seat) for seat in report.shares)])
    lines = [f"{'worker':<{width}}  {'steps':>9}  {'samples':>12}  {'share':>6}  from–to"]
    for seat, share in sorted(report.shares.items()):
        span = f"{share.first:,}–{share.last:,}" if share.steps else "–"
        more = f"  ({share.dropped:,} more left out)" if share.dropped else ""
        more += f"  ({share.skipped:,} more in skipped updates)" if share.skipped else ""
        part = share.samples / report.used if report.used else 0.0
        lines.append(f"{seat:<{width}}  {share.steps:>9,}  {share.samples:>12,}  {part:>6.1%}  {span}{more}")
    lines += ["", *_changes(report)]
    if report.void:
        lines.append(
            f"{report.void:,} committed steps are void: given up with a state that nobody continued from"
        )
    lines += [f"{n:,} samples left out: {why}" for why, n in sorted(report.reasons.items())]
    if report.skipped:
        lines.append(f"{report.skipped:,} samples of {_updates(report)} changed nothing, by rule:")
        lines += [f"    {n:,}: {why}" for why, n in sorted(report.skips.items())]
    if report.elsewhere:
        lines.append(
            f"steps 1–{report.elsewhere:,} are told in the output of the run that this one continues"
        )
    lines += [f"note: {note}" for note in report.notes]
    lines += [_problem_text(report, problem) for problem in report.problems[:SHOWN]]
    if report.problem_count > SHOWN:
        lines.append(
            f"… and {report.problem_count - SHOWN:,} more problems (--json lists the first thousand)"
        )
    return "\n".join([*lines, verdict(report)])


def _updates(report: Report) -> str:
    return f"{report.skipped_updates:,} skipped update{'s' if report.skipped_updates > 1 else ''}"


def _changes(report: Report) -> list[str]:
    lines, before, attempt = [], set[str](), 0
    resumed = dict(report.attempts)
    for change in report.changes:
        now = set(change.seats)
        if change.attempt != attempt:
            what = f"attempt {change.attempt}" + (
                f", which goes on after step {resumed[change.attempt]:,}"
                if resumed.get(change.attempt)
                else ""
            )
            what += f": {', '.join(change.seats)}"
        else:
            went, came = sorted(before - now), sorted(now - before)
            said = [f"without {', '.join(went)}" if went else "", f"with {', '.join(came)}" if came else ""]
            what = " and ".join(s for s in said if s) or "the same workers, anew"
        lines.append(f"from step {change.step:,} (epoch {change.epoch}): {what}")
        before, attempt = now, change.attempt
    if len(lines) > 2 * SHOWN:
        left = len(lines) - 2 * SHOWN
        lines = [*lines[:SHOWN], f"… {left:,} more membership changes …", *lines[-SHOWN:]]
    return lines


def _problem_text(report: Report, problem: Problem) -> str:
    steps = (
        f"step {problem.first:,}"
        if problem.first == problem.last
        else f"steps {problem.first:,}–{problem.last:,}"
    )
    where = ""
    if problem.places is not None:
        first, end = problem.places
        where = f", place {first}" if end == first + 1 else f", places {first}–{end - 1}"
    ids = _ids(report, problem, 8)
    which = ""
    if ids:
        more = ", …" if problem.samples > len(ids) else ""
        which = f"; {problem.samples:,} samples ({', '.join(map(str, ids))}{more})"
    who = f" by {', '.join(problem.who)}" if problem.who else ""
    return f"{problem.kind}: {steps}{where}{who}: {problem.detail}{which}"


def _ids(report: Report, problem: Problem, most: int) -> list[int]:
    """The first sample numbers that a problem concerns."""
    order, size = report.order, report.batches.micro_batch
    if not problem.samples or order is None or problem.kind == "impossible":
        return []
    found: list[int] = []
    for step in range(problem.first, problem.last + 1):
        ids = order.ids(step - 1)
        first, end = problem.places or (0, len(ids))
        found += ids[first * size : end * size].tolist()
        if len(found) >= most:
            break
    return found[:most]


def step_story(found: Sequence[File], report: Report, step: int) -> dict[str, Any]:
    """Who computed what of a step: every line that tells of it, and what became of that."""
    from manyhands.train.ledger_merge import intervals, parts
    from manyhands.train.ledger_order import plain_order

    here = next((i for i in intervals(found) if i.first <= step <= i.last), None)
    if here is None:
        raise UsageError(
            f"--step {step}",
            "no worker has told of it",
            f"the ledger has the steps {report.elsewhere + 1:,} … {report.steps:,}",
        )
    order, size = plain_order(report.batches), report.batches.micro_batch
    ids = report.order.ids(step - 1) if report.order is not None else None
    shares: list[dict[str, Any]] = []
    for (seat, dropped, why), spans in sorted(parts(here.valid).items(), key=lambda each: each[1]):
        samples = [int(i) for a, b in spans for i in ids[a * size : b * size]] if ids is not None else None
        one = {"worker": seat, "places": spans, "samples": samples, "dropped": dropped, "why": why}
        shares.append({**one, "skipped": ""})
    for t in here.skipped:
        for share in shares:
            if t.run.who.get(share["worker"]) and not share["dropped"]:
                share["skipped"] = t.run.why
    kinds = (("counts", here.valid), ("void", here.void), ("applied twice", here.again))
    told = [
        {"by": t.seat, "attempt": t.attempt, "epoch": t.run.epoch, "who": t.run.who, "is": what}
        for what, group in kinds
        for t in group
    ]
    problems = [dataclasses.asdict(p) for p in report.problems if p.first <= step <= p.last]
    return {"step": step, "rows": order.rows(step - 1), "shares": shares, "told": told, "problems": problems}


def _step_text(story: dict[str, Any]) -> str:
    lines = [f"step {story['step']:,}: {story['rows']:,} samples"]
    for share in story["shares"]:
        places = ", ".join(f"{a}–{b - 1}" if b > a + 1 else str(a) for a, b in share["places"]) or "none"
        left = f"  left out: {share['why']}" if share["dropped"] else ""
        left += f"  update skipped: {share['skipped']}" if share["skipped"] else ""
        lines.append(f"{share['worker']}: places {places}{left}")
        if share["samples"]:
            lines.append("    samples " + " ".join(map(str, share["samples"])))
    for told in story["told"]:
        lines.append(f"told by {told['by']} (attempt {told['attempt']}, epoch {told['epoch']}): {told['is']}")
    lines += [f"{p['kind']}: {p['detail']}" for p in story["problems"]]
    return "\n".join(lines)
