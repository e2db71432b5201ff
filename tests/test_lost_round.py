"""`--lost-round`: whether what a lost worker had done since the last agreement is done again or left out."""

from __future__ import annotations

import contextlib
import io
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import warm
from jobs import Job as Running
from runs import events, losses, summary
from test_exactness import SEQ, make, summed
from test_methods import feed_of

from manyhands.core.config import from_text
from manyhands.core.errors import PeerLost, UsageError
from manyhands.core.membership import Seat
from manyhands.core.request import Gather
from manyhands.train import carried
from manyhands.train.division import Division
from manyhands.train.job import Job
from manyhands.train.replica import Replica
from manyhands.train.standing import Position, conclude

STEPS = 30


@pytest.mark.parametrize(("choice", "leaves_out"), [("drop", True), ("redo", False)])
def test_a_lost_workers_round_is_left_out_or_done_again(
    corpus: Path,
    tmp_path: Path,
    choice: str,
    leaves_out: bool,
) -> None:
    options = ("--strategy", "diloco(lr=0.003, every=6)", "--lost-round", choice, "--restarts", 0)
    with Running(tmp_path, corpus, *options, "--steps", STEPS) as job:
        job.reach(8)
        job.send("w1", signal.SIGKILL)
        job.end()
    assert summary(tmp_path)["world_sizes"] == [3, 2]
    (reformed,) = events(tmp_path, "reformed")
    assert reformed["by"] == "survivors"
    assert max(losses(tmp_path)) == STEPS
    told = warm.manyhands("ledger", tmp_path)
    assert "every sample once" in told
    assert ("left out by rule" in told) is leaves_out
    if leaves_out:
        (dropped,) = [line for line in told.splitlines() if "samples left out" in line]
        assert "--lost-round drop" in dropped
        assert 0 < int(dropped.split()[0].replace(",", "")) <= 6 * 12 // 3, (
            "of one round, the part of one worker"
        )
        assert "more left out" in next(line for line in told.splitlines() if line.startswith("w1 "))


@pytest.mark.parametrize(
    ("strategy", "choice", "message"),
    [
        ("ddp", "drop", "only local steps have rounds"),
        ("zero3", "redo", "only local steps have rounds"),
        ("parameter-server", "drop", "only local steps have rounds"),
        ("streaming-diloco", "redo", "the round is dropped"),
        ("gossip", "redo", "no common point"),
    ],
)
def test_what_would_be_ignored_is_refused(strategy: str, choice: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Job(strategy=from_text("strategies", strategy), lost_round=choice)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "strategy", ["diloco", "local-sgd", "slowmo", "post-local-sgd", "muloco", "sparseloco", "forecast"]
)
def test_strategies_that_agree_all_at_once_can_do_either(strategy: str) -> None:
    for choice in ("redo", "drop"):
        Job(strategy=from_text("strategies", strategy), lost_round=choice)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="elastic"):
        Job(strategy=from_text("strategies", strategy), lost_round="drop", elastic="off")


@pytest.mark.parametrize(
    "strategy",
    [
        "streaming-diloco(every=4, fragments=2, delay=1)",
        "streaming-diloco(every=4, fragments=2, delay=1, exchange=gossip)",
        "forecast(every=3, delay=2, exchange=error-feedback(int4))",
        "forecast(every=4, delay=1, fragments=2, exchange=error-feedback(int4))",
    ],
)
def test_who_has_the_last_agreement_gives_it_to_the_others(fleets: Any, strategy: str) -> None:
    """A third worker is lost when an agreement has arrived at one worker and not at another, in one step of both."""
    behind, apart, together = zip(*fleets(2, "shared").run(_lost_as_it_arrives, strategy), strict=True)
    assert behind == ((1,), (1,))
    assert apart[0] != apart[1]
    assert together[0] == together[1]


def _lost_as_it_arrives(world: Any, strategy: str) -> tuple[tuple[int, ...], Any, Any]:
    model = make()
    replica = Replica(model, from_text("strategies", strategy), world.wire, targets_per_row=SEQ)
    feed, method = feed_of(world, {}), replica.method

    def parameters() -> list[Any]:
        with replica.agreed(collective=False):
            return [p.tolist() for p in model.parameters()]

    def step() -> None:
        replica.step(feed.part(replica.steps), summed)

    def flying() -> list[Any]:
        due = method._cadence.finishes(replica.steps + 1)
        return [f.flight for i, f in enumerate(method._fragments) if f.flight and i in due]

    for _ in range(10):
        step()
    while not flying():
        step()
    if world.rank == 1:
        (flight,) = flying()
        talks, arrive = flight.talks, flight.talks.finish

        def lost() -> None:
            arrive()
            flight.header.wait()
            raise PeerLost(2, "an agreement", "killed")

        talks.finish = lost
    with pytest.raises(PeerLost) if world.rank == 1 else contextlib.nullcontext():
        step()
    method.rewind()
    mine = Position(seat=f"w{world.rank}", fresh=False, steps=replica.steps, agreements=method.agreements)
    standing = conclude([Position.of(p) for p in world.gather(mine.to_data())])
    before = parameters()
    file = io.BytesIO()
    torch.save(carried.state_of(replica), file)
    told = world.wire.begin(Gather(torch.frombuffer(file.getbuffer(), dtype=torch.uint8))).wait()
    if world.rank in standing.behind:
        state = torch.load(io.BytesIO(told[standing.leader].numpy().tobytes()), weights_only=True)
        carried.load(replica, *state, standing.leader)
    for _ in range(5):
        step()
    replica.meet()
    after = parameters()
    replica.close()
    return standing.behind, before, after


def test_what_is_dropped_is_given_to_nobody_and_told_once() -> None:
    """Two rounds of losses: what the first one lost stays lost in the second."""
    feed = SimpleNamespace(
        rank=0,
        weights=(1, 1, 1),
        order=SimpleNamespace(rows=lambda step: 6),
        division=lambda step: [range(2 * r, 2 * r + 2) for r in range(3)],
    )
    division = Division(feed)  # type: ignore[arg-type]
    seats = [Seat(id=f"w{r}", host="h") for r in range(3)]
    for step in (4, 5):
        division.begin(step, seats, 1)
    begun = division.begun()
    assert begun["w1"] == {4: [2, 3], 5: [2, 3]}
    slow = {4: begun["w1"][4]}  # w2 has not begun step 5
    standing = conclude(
        [
            Position(seat="w0", fresh=False, steps=4, held={4: [0, 1], 5: [0]}, dropped={"w1": begun["w1"]}),
            Position.of(
                Position(seat="w2", fresh=False, steps=4, held={4: [4]}, dropped={"w1": slow}).to_data()
            ),
        ]
    )
    assert standing.dropped == {4: {"w1": (2, 3)}, 5: {"w1": (2, 3)}}
    division.go_on(standing)
    feed.weights, feed.division = (1, 1), lambda step: [range(3), range(3, 6)]
    assert division.open_places() == 8
    parts = {step: [division.of_rank(r, range(step, step + 1))[step] for r in (0, 1)] for step in (4, 5, 6)}
    assert sorted(p for part in parts[4] for p in part) == [5]
    assert sorted(p for part in parts[5] for p in part) == [1, 4, 5]
    assert parts[6] == [[0, 1, 2], [3, 4, 5]]
    division.begin(4, [seats[0], seats[2]], 2)
    assert division.begun()["w1"] == {4: [2, 3], 5: [2, 3]}
    ((step, epoch, who, rows),) = division.committed(5)
    assert (step, epoch, rows) == (4, 2, 6)
    assert "w1" not in who
    assert division.take_dropped(4) == {"w1": [(2, 4)]}
    assert division.take_dropped(4) == {}
