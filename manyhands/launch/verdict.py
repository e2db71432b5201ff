"""Which worker failed first, and why, in words: pure functions of what the workers left."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyhands.core.passes import Pass

TAIL_LINES = 10
LESS = "use fewer --workers here, a shorter --seq-len, a smaller model or --gradient-checkpointing"
TAIL_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class End:
    """How one worker ended.

    Attributes:
        code: of the process; negative: the signal that killed it.
        time_s: when the launcher noticed it, in seconds since the epoch.
        record: the contents of its ``rank-k.error.json``, if it could still write one.
        tail: its log's last lines.
        survived: the job went on without it.
        late: it came, or fell, after the job was done.
    """

    rank: int
    host: str
    code: int
    time_s: float
    record: dict[str, Any] | None
    log: Path
    tail: str = ""
    survived: bool = False
    late: bool = False

    @property
    def meant(self) -> int:
        """Its exit code, though a signal that ends the others may have come before it had left."""
        return int(self.record.get("code", self.code)) if self.record else self.code

    @property
    def since_s(self) -> float:
        return float(self.record["time_s"]) if self.record else self.time_s


@dataclass(frozen=True)
class Verdict:
    """The launch's exit code, and the first failure in words, or why there was nothing to do (empty: neither)."""

    exit_code: int
    words: str = ""


def judge(
    ends: Sequence[End],
    *,
    stopped_by: int | None,
    told_s: float | None,
    out_of_memory: bool = False,
    ended: tuple[int, str] | None = None,
) -> Verdict:
    """What to say of a launch.

    Real causes come before their consequences: first whatever failed by itself, by time; then a lost peer. A
    worker that a signal stopped is no failure, and neither is one that ended after it was told to (`told_s`), or that was
    `late`. Where the job had gone on without each of them, the last is the reason.

    Args:
        stopped_by: the signal that this launcher was sent.
        told_s: when the launcher began to end the workers itself, because one had failed.
        out_of_memory: whether the kernel killed a process for memory meanwhile.
        ended: (exit code, why), where the coordinator has ended the job.
    """
    if ended is not None and ended[0] != 0 and stopped_by is None:
        losses = any(end.survived for end in ends)  # that led to it were told one by one
        own = any(end.record is not None and end.record["message"] == ended[1] for end in ends)
        if losses or own:  # the job's own failure, told by a worker for all
            return Verdict(ended[0], f"manyhands: {ended[1]}")
    late, ends = any(end.late for end in ends), [end for end in ends if not end.late]
    if late and all(end.survived for end in ends):  # it was a successor's turn
        return Verdict(0, "manyhands: the job was done already")
    ends = [end for end in ends if not end.survived] or sorted(ends, key=lambda end: end.since_s)[-1:]
    bad = sorted((end for end in ends if end.code != 0), key=lambda end: end.since_s)
    kinds = [_kind(end, stopped_by is not None, told_s) for end in bad]
    failed = [end for end, kind in zip(bad, kinds, strict=True) if kind == "failed"]
    if failed:
        return Verdict(2 if failed[0].meant == 2 else 1, describe(failed[0], out_of_memory))
    if stopped_by is not None and bad:
        return Verdict(128 + stopped_by)
    stopped = [end for end, kind in zip(bad, kinds, strict=True) if kind == "stopped"]
    if stopped:
        code = stopped[0].code
        return Verdict(code if code > 128 else 128 - code)
    lost = [end for end, kind in zip(bad, kinds, strict=True) if kind == "peer-lost"]
    if lost or bad:
        return Verdict(1, describe((lost or bad)[0], out_of_memory))
    return Verdict(0)


def _kind(end: End, stopping: bool, told_s: float | None) -> str:
    """ "failed", "peer-lost", "stopped" by a signal from outside, or "told" by the launcher."""
    if end.record is not None and end.record["kind"] != "stopped":
        return str(end.record["kind"])
    orderly = end.code in (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)
    ours = stopping or (told_s is not None and end.since_s >= told_s)
    if ours and (orderly or end.code == -signal.SIGKILL):
        return "told"
    return "stopped" if orderly else "failed"


def describe(end: End, out_of_memory: bool = False) -> str:
    """One failure: worker, host, cause, log."""
    how = _how(end, out_of_memory)
    if killed(end) and out_of_memory:
        how += f": {LESS}"
    tail = f"\n  its last words:\n{end.tail}" if end.tail and end.record is None else ""
    return f"manyhands: worker {end.rank} on {end.host} {how}{tail}\n  log: {end.log}"


def cause(end: End, out_of_memory: bool = False) -> tuple[str, str]:
    """(how, in words) of a worker's end, as the coordinator tells them: "death", "failed" by itself, or "left" as asked.

    Memory that ran out is no failure of the step: the successor has smaller passes, and `back_off` ends that at one row.
    """
    kind = _kind(end, False, None)
    if kind == "stopped":
        return "left", "has left, as a signal asked it to"
    outside = kind == "peer-lost" or killed(end) or bool((end.record or {}).get("starved"))
    return ("death" if outside else "failed"), _how(end, out_of_memory)


def killed(end: End) -> bool:
    """Whether it was killed from outside, without a word: by hand, by a scheduler, or by the kernel for memory."""
    return end.record is None and end.code == -signal.SIGKILL


def back_off(largest: Pass | None) -> tuple[int | None, str]:
    """After a worker has ended for want of memory: (the most rows of its successor's passes, in words).

    0: there is to be no successor; None: its passes are as they were.

    Args:
        largest: the worker's largest pass; None: it had not come to any, or it is the host's memory that was short, and it
            computes on a GPU.

    >>> back_off(Pass(9, divisible=True))
    (5, 'with 5 rows in a pass instead of 9')
    """
    if largest is None:
        return None, ""
    if not largest.divisible:
        rows = f"{largest.rows} row{'s' if largest.rows > 1 else ''}"
        rule = f"its passes of {rows} are one micro-batch each, which is not cut"
        return None, f"{rule}: give a smaller --micro-batch where this goes on"
    if largest.rows < 2:
        return 0, f"it is not replaced: its passes had one row, and have one at least; {LESS}"
    rows_now = (largest.rows + 1) // 2
    return rows_now, f"with {rows_now} row{'s' if rows_now > 1 else ''} in a pass instead of {largest.rows}"


def final(end: End, before: Sequence[End] = ()) -> bool:
    """Whether whoever took this worker's place would meet the same.

    So it is with an error in what the user gave (a usage error, data, a model) or in the installation, and with whatever has
    ended another worker in the same way `before`: by the same exception at the same place, or the same signal or exit
    code. A kill from outside says nothing of the next one.
    """
    alike = _likeness(end)
    marked = end.record is not None and bool(end.record.get("final"))
    return marked or (alike is not None and alike in [_likeness(other) for other in before])


def _likeness(end: End) -> tuple[object, ...] | None:
    if end.record is not None:
        failed = end.record["kind"] == "failed"
        return (end.record["type"], end.record["where"]) if failed else None
    return None if end.code in (0, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT) else (end.code,)


def _how(end: End, out_of_memory: bool) -> str:
    record = end.record
    if record is not None:
        during = f" during {record['phase']}" if record.get("phase") else ""
        why = (
            str(record["message"])
            if record["ours"]
            else f"{record['type']}: {record['message']} ({record['where']})"
        )
        return f"failed{during}: {why}"
    if end.code < 0:
        name = _signal_name(-end.code)
        reason = {
            "SIGKILL": " (the kernel ran out of memory)"
            if out_of_memory
            else " (by hand, by a scheduler, or because a container's memory ran out)",
        }.get(name, "")
        return f"was killed by {name}{reason}"
    return f"ended with exit code {end.code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def read_record(path: Path) -> dict[str, Any] | None:
    """A worker's record of its end; None where it left none."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record


def read_tail(log: Path, begin: int) -> str:
    """The last lines of what was written to a log from byte `begin` on, indented."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(begin, size - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-TAIL_LINES:])
