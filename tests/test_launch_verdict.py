"""Which failure is told: a table over every way that workers end."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest

from manyhands.core.passes import Pass, tell, told
from manyhands.launch.verdict import LESS, End, back_off, cause, judge, read_record, read_tail


def end(rank: int, code: int, time_s: float = 10.0, kind: str | None = None) -> End:
    record: dict[str, Any] | None = None
    if kind is not None:
        record = {
            "time_s": time_s,
            "type": "E",
            "message": f"m{rank}",
            "ours": True,
            "kind": kind,
            "where": "",
        }
    return End(rank=rank, host="h", code=code, time_s=time_s, record=record, log=Path(f"rank-{rank}.log"))


def survivor(gone: End) -> End:
    return dataclasses.replace(gone, survived=True)


def test_what_a_worker_told_of_the_whole_job_is_the_jobs_failure() -> None:
    """Replicas that differ are no worker's failure, though each ends by it."""
    ends = [end(0, 1, kind="failed"), end(1, 1, kind="failed")]
    assert judge(ends, stopped_by=None, told_s=None, ended=(1, "m1")).words == "manyhands: m1"
    assert "worker 0" in judge(ends, stopped_by=None, told_s=None, ended=(1, "another reason")).words
    assert judge(ends, stopped_by=signal.SIGTERM, told_s=None, ended=(1, "m1")).words != "manyhands: m1"


FAILED, LOST, STOPPED = "failed", "peer-lost", "stopped"


@pytest.mark.parametrize(
    ("ends", "stopped_by", "told_s", "code", "rank"),
    [
        ([end(0, 0), end(1, 0)], None, None, 0, None),
        ([end(0, 0), end(1, 0)], signal.SIGTERM, None, 0, None),  # the signal came when all was done
        ([end(0, 1, 5, FAILED), end(1, 1, 4, FAILED)], None, 4.1, 1, 1),  # the earliest
        ([end(0, 1, 4, FAILED), end(1, 2, 5, FAILED)], None, 4.1, 1, 0),
        ([end(0, 1, 5, FAILED), end(1, 2, 4, FAILED)], None, 4.1, 2, 1),  # usage
        ([end(0, 1, 4, LOST), end(1, 1, 5, FAILED)], None, 4.1, 1, 1),  # the cause, not its consequence
        (
            [end(0, 1, 4, LOST), end(1, -9, 5)],
            None,
            4.9,
            1,
            0,
        ),  # killed by us after it ignored SIGTERM: the cause is unknown
        ([end(0, 1, 4, LOST), end(1, -11, 5)], None, 4.1, 1, 1),
        ([end(0, -9, 4), end(1, 1, 5, LOST)], None, 4.1, 1, 0),
        ([end(0, 143, 6, STOPPED), end(1, 1, 5, FAILED)], None, 5.1, 1, 1),  # ended because it was told to
        ([end(0, -15, 6), end(1, 7, 5)], None, 5.1, 1, 1),
        ([end(0, 143, 5, STOPPED), end(1, 143, 5, STOPPED)], signal.SIGTERM, None, 143, None),
        ([end(0, 130, 5, STOPPED), end(1, 1, 6, LOST)], signal.SIGINT, None, 130, None),
        ([end(0, -9, 5), end(1, -9, 5)], signal.SIGINT, None, 130, None),  # a second Ctrl-C
        ([end(0, 0, 5), end(1, -2, 5)], signal.SIGINT, None, 130, None),
        ([end(0, 143, 5, STOPPED), end(1, 1, 6, FAILED)], signal.SIGTERM, None, 1, 1),  # it could not save
        ([end(0, 143, 5, STOPPED), end(1, 1, 6, LOST)], None, 5.5, 143, None),  # one was stopped from outside
        ([end(0, -15, 5), end(1, 143, 6, STOPPED)], None, 5.5, 143, None),
        ([end(0, 9, 5)], None, None, 1, 0),
        # the job had gone on without each: the last is why there is nobody left
        (
            [survivor(end(0, -9, 4)), survivor(end(0, 1, 9, FAILED)), survivor(end(1, 1, 7, FAILED))],
            None,
            None,
            1,
            0,
        ),
        ([survivor(end(1, -9, 4)), survivor(end(0, 130, 9, STOPPED))], None, None, 130, None),
        ([survivor(end(1, -9, 4)), end(0, 0, 9)], None, None, 0, None),
    ],
)
def test_verdict(
    ends: list[End], stopped_by: int | None, told_s: float | None, code: int, rank: int | None
) -> None:
    for order in (ends, ends[::-1]):
        verdict = judge(order, stopped_by=stopped_by, told_s=told_s)
        assert verdict.exit_code == code
        assert (
            verdict.words.startswith(f"manyhands: worker {rank} on h ")
            if rank is not None
            else verdict.words == ""
        )


def test_the_end_of_a_launch_whose_last_one_was_late() -> None:
    """It came, or fell, when the job was done: whoever it had replaced is no reason any more."""
    late = dataclasses.replace(survivor(end(0, -9, 9)), late=True)
    for ends in ([late], [survivor(end(0, 1, 4, FAILED)), late]):
        assert judge(ends, stopped_by=None, told_s=None).exit_code == 0
    assert judge([end(1, 1, 4, FAILED), late], stopped_by=None, told_s=None).exit_code == 1


def test_memory_is_named() -> None:
    assert "ran out of memory" in judge([end(0, -9)], stopped_by=None, told_s=None, out_of_memory=True).words
    assert "SIGKILL (by hand" in judge([end(0, -9)], stopped_by=None, told_s=None).words


def test_memory_halves_the_next_ones_passes() -> None:
    """Down to one row; what is not to be cut stays, and the message says what would help."""
    rows, found = 100, []
    while rows:
        limit, words = back_off(Pass(rows, divisible=True))
        assert limit is not None
        found.append(limit)
        rows = limit
    assert found == [50, 25, 13, 7, 4, 2, 1, 0]
    assert words.startswith("it is not replaced")
    assert LESS in words
    limit, words = back_off(Pass(4, divisible=False))
    assert limit is None
    assert "smaller --micro-batch" in words
    assert back_off(None) == (None, "")
    assert "ran out of memory" in cause(end(0, -9), out_of_memory=True)[1]
    assert "--workers" not in cause(end(0, -9), out_of_memory=True)[1]  # the launcher does something about it
    assert LESS in judge([end(0, -9)], stopped_by=None, told_s=None, out_of_memory=True).words


def test_memory_that_ran_out_is_no_failure_of_the_step() -> None:
    """Three of those would end the job, whatever their successors do otherwise (`coordinate.judge.deadly`)."""
    failed = end(0, 1, kind="failed")
    assert failed.record is not None
    starved = dataclasses.replace(failed, record={**failed.record, "starved": True})
    assert (cause(failed)[0], cause(starved)[0]) == ("failed", "death")
    assert cause(starved)[1] == cause(failed)[1] == "failed: m0"


def test_the_largest_pass_is_told_to_the_launcher(tmp_path: Path) -> None:
    assert told(str(tmp_path), "w0") is None
    tell(str(tmp_path), "w0", Pass(6, divisible=True))
    assert told(str(tmp_path), "w0") == Pass(6, divisible=True)
    tell(str(tmp_path / "gone"), "w0", Pass(6, divisible=True))
    (tmp_path / "pass-w1.json").write_text('{"rows": ')
    assert told(str(tmp_path), "w1") is None


def test_a_signal_without_a_name() -> None:
    assert "signal 40" in judge([end(0, -40)], stopped_by=None, told_s=None).words


def test_what_cannot_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / "half").write_text('{"time_s"')
    assert read_record(tmp_path / "half") is None
    assert read_record(tmp_path / "absent") is None
    assert read_tail(tmp_path / "absent", 0) == ""


def test_the_tail_is_this_runs_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n" + "".join(f"line {i}\n" for i in range(20)))
    assert read_tail(log, len("before\n")).splitlines() == [f"    line {i}" for i in range(10, 20)]
    assert "before" not in read_tail(log, len("before\n"))
