"""Workers whose memory runs out, or that the kernel kills for it: passes become smaller, down to one row."""

from __future__ import annotations

from pathlib import Path

from runs import TINY, events, losses, manyhands, summary
from trapped import Job


def oom(seat: str) -> dict[str, object]:
    return {"seat": seat, "place": "forward", "act": "oom"}


def test_the_successor_has_half_as_many_rows_in_a_pass(corpus: Path, tmp_path: Path) -> None:
    """Twice, without a restart to spend, and nobody is asked for anything."""
    run, quiet = tmp_path / "run", tmp_path / "quiet"
    traps = [oom("w1"), oom("w1-1"), {"seat": "w1-2", "place": "forward", "act": "rows"}]
    # a newcomer that fetches the state while the others compute has no rows in its first step: w0 goes on for two
    traps += [{"seat": "w0", "place": "forward", "step": step, "act": "newcomer"} for step in (1, 5)]
    given = [*TINY, "--steps", 12, "--restarts", 0]
    with Job(run, corpus, *given, traps=traps, workers=2, base=()) as job:
        said = job.end()
        rows = {record["seat"]: record["rows"] for record in job.said("rows")}
    assert rows == {"w1": 6, "w1-1": 3, "w1-2": 2}
    first, second = events(run, "lost")
    for lost in (first, second):
        assert lost["detail"] == "was killed by SIGKILL (the kernel ran out of memory)"
        assert lost["then"] in said
    assert first["then"] == "w1-1 takes its place, with 3 rows in a pass instead of 6"
    assert second["then"] == "w1-2 takes its place, with 2 rows in a pass instead of 3"
    assert summary(run)["steps"] == 12
    assert "every sample once" in manyhands("ledger", run).stdout
    manyhands("train", "--data", corpus, *given, "--workers", 2, "--output", quiet)
    assert max(abs(losses(run)[step] - loss) for step, loss in losses(quiet).items()) < 1e-3


def test_with_one_row_there_is_no_successor(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = [*TINY, "--steps", 8, "--device-batch", 1]
    with Job(run, corpus, *given, traps=[oom("w1")], workers=2, base=()) as job:
        said = job.end()
    (lost,) = events(run, "lost")
    assert lost["then"].startswith(
        "it is not replaced: its passes had one row, and have one at least; use fewer --workers"
    )
    assert lost["then"] in said
    assert summary(run)["steps"] == 8


def test_all_workers_of_a_divided_model_go_on_with_smaller_passes(corpus: Path, tmp_path: Path) -> None:
    """A pass is everybody's: who has no memory for it ends it for all, in the same processes, and nobody is lost."""
    run = tmp_path / "run"
    traps = [
        {"seat": "w1", "place": "forward", "step": 2, "act": "no-memory"},
        {"seat": "w1", "place": "forward", "step": 2, "act": "rows"},
        {"seat": "w0", "place": "forward", "step": 3, "act": "rows"},
    ]
    given = [*TINY, "--strategy", "zero2", "--steps", 5, "--restarts", 0]
    with Job(run, corpus, *given, traps=traps, workers=2, base=()) as job:
        said = job.end()
        rows = [(record["seat"], record["rows"]) for record in job.said("rows")]
    assert rows == [("w1", 6), ("w1", 3), ("w0", 3)]
    assert "step 3: memory ran out; passes have at most 3 rows from now on" in said
    assert events(run, "lost") == []
    (reformed,) = events(run, "reformed")
    assert (reformed["workers"], reformed["step"], reformed["by"]) == (2, 2, "survivors")
    assert summary(run)["steps"] == 5
    assert "every sample once" in manyhands("ledger", run).stdout


def test_a_sum_that_cannot_be_taken_back_is_left_to_a_successor_with_smaller_passes(
    corpus: Path, tmp_path: Path
) -> None:
    """Gradients of the pass are on their way when its backward finds no memory; no restart is spent."""
    run = tmp_path / "run"
    trap = {"seat": "w1", "place": "forward", "step": 2, "act": "no-memory-late"}
    traps = [trap, {"seat": "w1-1", "place": "forward", "act": "rows"}]
    traps += [{"seat": "w0", "place": "forward", "step": 4, "act": "newcomer"}]
    given = [
        *TINY,
        "--strategy",
        "ddp(bucket_mb=0.01)",
        "--transport",
        "group",
        "--steps",
        12,
        "--restarts",
        0,
    ]
    with Job(run, corpus, *given, traps=traps, workers=2, base=()) as job:
        said = job.end()
        rows = {record["seat"]: record["rows"] for record in job.said("rows")}
    (lost,) = events(run, "lost")
    assert lost["how"] == "death"
    assert (
        "memory ran out in a backward of 6 rows whose gradients are added to others already" in lost["detail"]
    )
    assert lost["then"] == "w1-1 takes its place, with 3 rows in a pass instead of 6"
    assert lost["then"] in said
    assert rows == {"w1": 6, "w1-1": 3}
    assert "every sample once" in manyhands("ledger", run).stdout
