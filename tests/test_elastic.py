"""Jobs whose workers are killed, stopped, asked to leave, and replaced: real processes, the whole program."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import warm
from fleet import Fleet
from jobs import STEPS, Job
from runs import TINY, events, summary
from trapped import Job as Traps

from manyhands.core.errors import ManyhandsError
from manyhands.core.membership import Epoch, Seat
from manyhands.launch.chaos import Chaos, Fault, flip
from manyhands.train import carried
from manyhands.train.crew import Crew
from manyhands.train.division import remaining, spans_of
from manyhands.train.job import Job as Options
from manyhands.train.standing import Position, Standing, conclude
from manyhands.train.tally import LOSS_STEPS
from manyhands.train.worker import _Run


def test_survivors_finish_the_same_steps_to_the_bit(corpus: Path, tmp_path: Path) -> None:
    """Rank 0 and another one are killed: the parameters are those of a run that nobody disturbed."""
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    options = ("--reproducible", "--restarts", 0, "--eval-every", 20)
    job = [*("--data", corpus, *TINY, "--steps", STEPS, "--workers", 3), *options]
    warm.manyhands("train", *job, "--output", quiet)
    with Job(killed, corpus, *options) as job:
        job.reach(7)
        job.send("w0", signal.SIGKILL)
        job.reach(15)
        job.send("w2", signal.SIGKILL)
        said = job.end()
    assert summary(killed)["parameters_sha256"] == summary(quiet)["parameters_sha256"]
    assert summary(killed)["world_sizes"] == [3, 2, 1]
    assert [e["seat"] for e in events(killed, "lost")] == ["w0", "w2"]
    assert all(e["how"] == "death" and e["stack"] for e in events(killed, "lost"))
    assert "w0" in said
    assert "w2" in said
    assert "every sample once" in warm.manyhands("ledger", killed)
    evaluations = [[e["step"] for e in events(run, "evaluated")] for run in (quiet, killed)]
    assert evaluations[0] == evaluations[1]


def test_the_first_rank_has_summed_up_before_it_says_that_it_has_nothing_left_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its failure in that would be told to nobody who could fail the job."""
    said: list[str] = []
    run = _Run.__new__(_Run)
    run.job, run.parts, run.world_sizes, run.started = (
        Options(),
        SimpleNamespace(facts=0, plan=0, material=0),
        [2],
        0.0,
    )
    run.crew = SimpleNamespace(membership=SimpleNamespace(leave=said.append))
    run.output, run.emit = tmp_path, lambda event: None
    monkeypatch.setattr("manyhands.train.summary.summarize", lambda *args, **options: {})
    for rank, told in ((0, ["summed up", "done"]), (1, ["done"])):
        monkeypatch.setattr("manyhands.train.ending.tell", lambda *args: said.append("summed up") or {})
        run._finish(SimpleNamespace(world=SimpleNamespace(rank=rank)), "done", collective=True)
        assert said == told
        said.clear()


def test_a_replacement_gets_the_state_from_a_peer(corpus: Path, tmp_path: Path) -> None:
    given = ("--reproducible", "--steps", 100000)
    with Job(tmp_path, corpus, *given, workers=2, MANYHANDS_FORK="0") as job:
        job.reach(5)
        job.send("w1", signal.SIGKILL)
        job.wait_for(lambda: bool(job.seen("joined")), "a replacement")
        (joined,) = job.seen("joined")
        assert joined["seat"] == "w1-1"
        assert int(str(joined["size_bytes"])) > 400_000
        done = job.step
        job.reach(done + 3)
        job.send("w0", signal.SIGKILL)  # who has been there from the start: the newcomer has everything
        job.reach(done + 8)
        job.process.send_signal(signal.SIGTERM)
        job.end(128 + signal.SIGTERM)
    told = {e["step"]: (e["loss"], e["samples"]) for e in events(tmp_path, "stepped")}
    last = [told[step] for step in sorted(told)[-LOSS_STEPS:]]
    mean = sum(loss * rows for loss, rows in last) / sum(rows for _, rows in last)
    # the newcomer speaks for all at the end: of steps before its time, too
    assert summary(tmp_path)["train_loss"] == pytest.approx(mean, rel=1e-6)
    assert "every sample once" in warm.manyhands("ledger", tmp_path)


def test_a_replacement_divides_steps_as_the_others_do(corpus: Path, tmp_path: Path) -> None:
    """Shares that were given hold until the workers are others. From then on they are equal, and do not follow the clock."""
    given = ("--shares", "3,1", "--balance", "auto", "--steps", 100000)
    with Job(tmp_path, corpus, *given, workers=2) as job:
        job.reach(3)
        job.send("w1", signal.SIGKILL)
        job.wait_for(lambda: bool(job.seen("joined")), "a replacement")
        slow = Chaos(tmp_path, [Fault("slow", 0.0, 0.0, for_s=600.0)], lambda: True)  # w0 alone
        slow.start()
        job.reach(job.step + 40)
        slow.stop()
        job.process.send_signal(signal.SIGTERM)
        job.end(128 + signal.SIGTERM)
    assert not job.seen("redivided")
    assert "every sample once" in warm.manyhands("ledger", tmp_path)


def test_replicas_that_differ_end_the_job_and_are_told_once(corpus: Path, tmp_path: Path) -> None:
    told, output = tmp_path / "told", tmp_path / "run"
    told.mkdir()
    given = ("--check-every", 2, "--steps", 100000)
    with Job(output, corpus, *given, MANYHANDS_CHAOS=str(told)) as job:
        job.reach(3)
        (mark,) = told.glob("w1.*")
        assert flip(mark, int(mark.suffix[1:]), random.Random(1)).startswith("done")
        said = job.end(1).strip().splitlines()
    last = said[-1]
    assert last.startswith("manyhands: after step ")
    assert "w1" in last
    assert " differs" in last
    assert "--on-divergence mend" in last
    assert not [line for line in said[:-1] if " differs" in line]
    assert not any("takes its place" in line for line in said)


@pytest.mark.parametrize(
    "strategy",
    [
        "hogwild(every=5)",
        "parameter-server(lr=0.003)",
        "parameter-server(consistency=async, servers=2, lr=0.003, exchange=error-feedback(int8))",
    ],
)
def test_a_replacement_joins_at_an_agreement(corpus: Path, tmp_path: Path, strategy: str) -> None:
    """Methods whose parameters move between agreements: the newcomer has the state before anybody goes on."""
    given = ("--strategy", strategy, "--steps", 100000)
    with Job(tmp_path, corpus, *given, workers=2) as job:
        job.reach(7)
        job.send("w1", signal.SIGKILL)
        job.wait_for(lambda: bool(job.seen("joined")), "a replacement")
        job.reach(job.step + 12)
        job.process.send_signal(signal.SIGTERM)
        job.end(128 + signal.SIGTERM)
    assert "every sample once" in warm.manyhands("ledger", tmp_path)


@pytest.mark.parametrize(
    ("strategy", "dropped"),
    [
        ("local-sgd(lr=0.003, every=6)", False),
        ("eager(lr=0.003)", False),
        ("forecast(lr=0.003, every=6, delay=2, fragments=3)", True),
        ("hogwild(every=10)", False),
        ("gossip(lr=0.003, every=3)", True),
        ("parameter-server(consistency=bounded(2), servers=2, lr=0.003, optimizer=sgd)", False),
        ("zero3(lr=0.003)", False),
    ],
)
def test_every_family_goes_on(corpus: Path, tmp_path: Path, strategy: str, dropped: bool) -> None:
    options = ("--strategy", strategy, "--restarts", 0, "--save-every", 10, "--eval-every", 14)
    with Job(tmp_path, corpus, *options) as job:
        job.reach(11)
        job.send("w1", signal.SIGKILL)
        job.end()
    assert summary(tmp_path)["steps"] == STEPS
    assert dropped or summary(tmp_path)["samples"] == (STEPS - 1) * 12 + 9  # an epoch ends with the last one
    assert summary(tmp_path)["world_sizes"] == [3, 2]
    told = warm.manyhands("ledger", tmp_path)
    assert "every sample once" in told
    assert dropped or "left out by rule" not in told


@pytest.mark.parametrize(("strategy", "workers"), [("ddp", 3), ("gossip(lr=0.003, every=2)", 4)])
def test_a_process_group_is_formed_anew(corpus: Path, tmp_path: Path, strategy: str, workers: int) -> None:
    """The same over gloo, which several hosts use. Of four, one whose pair has broken is behind two that go on as one."""
    options = ("--strategy", strategy, "--transport", "group", "--restarts", 0)
    with Job(tmp_path, corpus, *options, workers=workers) as job:
        job.reach(7)
        job.send("w0", signal.SIGKILL)
        job.end()
    assert summary(tmp_path)["world_sizes"] == [workers, workers - 1]
    assert "every sample once" in warm.manyhands("ledger", tmp_path)


@pytest.mark.parametrize(
    "strategy",
    [
        "ddp(exchange='error-feedback(int4)')",
        "gossip(lr=0.003, every=3)",
        "parameter-server(exchange=error-feedback(int4))",
    ],
)
def test_one_that_is_asked_to_leave_leaves_alone(corpus: Path, tmp_path: Path, strategy: str) -> None:
    with Job(tmp_path, corpus, "--strategy", strategy, "--restarts", 0) as job:
        job.reach(7)
        job.send("w0", signal.SIGTERM)
        job.end()
    assert summary(tmp_path)["reason"] == "done"
    assert summary(tmp_path)["world_sizes"] == [3, 2]
    assert [e["seat"] for e in events(tmp_path, "left")] == ["w0"]
    assert not events(tmp_path, "lost")
    told = warm.manyhands("ledger", tmp_path)
    assert "every sample once" in told
    assert "left out by rule" not in told


def test_what_an_evaluation_between_agreements_interrupts_is_kept(corpus: Path, tmp_path: Path) -> None:
    """Whoever is asked to leave in it takes its way to the others first; where all are asked to stop, all ways are saved."""
    run = tmp_path / "run"
    options = ("--strategy", "diloco(lr=0.003, every=5)", "--lost-round", "drop", "--restarts", 0)
    options += ("--steps", STEPS, "--eval-every", 7, "--eval-fraction", 0.2, "--device-batch", 2)
    traps = [
        {"seat": "w0", "place": "score", "act": "asked"},
        {"seat": "w2", "place": "score", "step": 14, "act": "asked"},
    ]
    with Traps(run, corpus, *options, traps=traps, base=TINY) as job:
        job.kill("w0", signal.SIGTERM)
        job.trapped("w2")
        job.process.send_signal(signal.SIGTERM)
        job.end(128 + signal.SIGTERM)
    assert [(r["step"], r["workers"], r["redone_places"]) for r in events(run, "reformed")] == [(7, 2, 0)]
    assert [e["step"] for e in events(run, "evaluated")] == [7]
    assert (run / "checkpoint-14").exists()
    assert not events(run, "lost")
    told = warm.manyhands("ledger", run)
    assert "every sample once" in told
    assert "left out by rule" not in told


def test_one_that_hangs_is_given_up(corpus: Path, tmp_path: Path) -> None:
    with Job(tmp_path, corpus, "--restarts", 0, "--hang-s", 2, workers=2) as job:
        job.reach(7)
        job.send("w1", signal.SIGSTOP)
        job.end()
    (lost,) = events(tmp_path, "lost")
    assert lost["seat"] == "w1"
    assert lost["how"] == "hang"
    assert lost["silent_s"] >= 1.5
    assert "every sample once" in warm.manyhands("ledger", tmp_path)


# -- what the workers conclude


def test_the_job_goes_on_from_the_furthest_agreement() -> None:
    positions = [
        Position(seat="late", fresh=False, steps=4, held={4: [0, 1]}),
        Position(seat="new", fresh=True, steps=0),
        Position(seat="a", fresh=False, steps=5, chores=["save"], held={5: [3]}),
        Position(seat="b", fresh=False, steps=5, chores=["evaluate", "save"], held={}),
    ]
    for given in (positions, [Position.of(p.to_data()) for p in positions]):
        standing = conclude(given)
        assert (standing.steps, standing.leader) == (5, 2)
        assert standing.behind == (0, 1)
        assert standing.fresh == (1,)
        assert standing.chores == ("evaluate", "save")
        assert standing.held == {5: {"a": (3,)}}
    with pytest.raises(ManyhandsError, match="no worker"):
        conclude([positions[1]])


def test_who_fetches_the_state_says_so_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, int]] = []

    def fetch(address: str, version: int, moved: Callable[[], None]) -> tuple[dict[str, Any], dict[str, Any]]:
        moved()
        moved()
        return {}, {"steps": 5}

    membership: Any = SimpleNamespace(at=lambda phase, step: said.append((phase, step)))
    nothing: Any = None
    crew = Crew(membership, nothing, nothing, fetch=fetch, replica=nothing, rebuild=nothing)
    crew.epoch = Epoch(number=3, seats=(Seat(id="w0", host="h", address="there"), Seat(id="n", host="h")))
    loop: Any = SimpleNamespace(
        replica=SimpleNamespace(steps=0),
        take_facts=lambda facts: None,
        world=SimpleNamespace(rank=1, gather=said.append),
    )
    monkeypatch.setattr(
        carried, "load", lambda replica, tensors, facts, leader: setattr(replica, "steps", facts["steps"])
    )
    crew._hand_out(loop, Standing(steps=5, leader=0, behind=(1,)))
    assert said == [("fetch", 0), ("fetch", 0), ("re-forming", 5), None]  # and then waits for the others


def test_of_two_at_one_step_the_one_with_more_agreements_is_ahead() -> None:
    """A peer was lost when one had an agreement that came with their last step, the other not."""
    told = [Position(seat=seat, fresh=False, steps=5, agreements=n) for seat, n in (("a", 2), ("b", 3))]
    standing = conclude([Position.of(p.to_data()) for p in told])
    assert (standing.leader, standing.behind) == (1, (0,))


def test_what_nobody_holds_is_divided() -> None:
    held = {"a": [0, 1, 2], "b": [5]}
    parts = remaining(9, held, [1, 1])
    assert sorted(place for part in parts for place in part) == [3, 4, 6, 7, 8]
    assert remaining(9, held, [0, 1]) == [[], [3, 4, 6, 7, 8]]
    assert remaining(3, {"a": [0, 1, 2]}, [1, 2]) == [[], []]
    assert spans_of([]) == []


def test_what_a_leaving_worker_holds_back_is_handed_over(fleets: Callable[[int, str], Fleet]) -> None:
    left = fleets(3, "shared").run(_hand_over)
    assert left == [[6.0, 6.0], [0.0, 0.0], [0.0, 0.0]]


def _hand_over(world: object) -> list[float]:
    from types import SimpleNamespace

    from manyhands.train.carried import hand_over

    residual = torch.full((2,), float(world.rank + 1))  # type: ignore[attr-defined]
    replica = SimpleNamespace(wire=world.wire, states=[{"residual": [residual]}])  # type: ignore[attr-defined]
    hand_over(replica, [False, True, True])  # type: ignore[arg-type]
    return [float(v) for v in residual]
