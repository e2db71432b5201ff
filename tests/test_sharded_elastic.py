"""Divided state when workers are lost, leave or join: rebuilt from those who hold it, else from the last checkpoint."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from jobs import Job
from runs import TINY, events, losses
from test_exactness import assert_close, plain_run, summed
from test_sharded import BASE, begin
from trapped import Job as Traps

from manyhands.exchange.combine import is_own, leaves
from manyhands.exchange.ef21 import EF21
from manyhands.exchange.feedback import ErrorFeedback
from manyhands.exchange.int8 import Int8
from manyhands.exchange.topk import TopK
from manyhands.placement.sharded import Sharded
from manyhands.strategy.optimizers import SGD, Adafactor, AdamW
from manyhands.train import exchange_state, session
from manyhands.train.sharded_rebuild import covered, hand_over, redivide
from manyhands.train.standing import Standing

STEPS = 16
LR = "lr=0.003, schedule=constant"
COMMON = ("--precision", "fp64", "--steps", STEPS, "--eval-fraction", 0)


def watched(output: Path) -> tuple[str, list[dict[str, Any]]]:
    return warm.manyhands("ledger", output), events(output, "reformed")


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    output = tmp_path_factory.mktemp("plain")
    options = [*TINY, *COMMON, "--strategy", f"ddp({LR})", "--workers", 1]
    warm.manyhands("train", "--data", corpus, *options, "--output", output)
    return losses(output)


def test_a_lost_shard_is_rebuilt_from_its_replica_and_a_replacement_gets_its_own(
    corpus: Path,
    tmp_path: Path,
    undisturbed: dict[int, float],
) -> None:
    options = (*COMMON, "--strategy", f"zero3({LR}, shard=2)", "--steps", 100_000, "--restarts", 1)
    with Job(tmp_path, corpus, *options, workers=4) as job:
        job.reach(3)
        job.send("w1", signal.SIGKILL)
        job.wait_for(lambda: bool(job.seen("joined")), "a replacement")
        job.reach(max(job.step + 2, STEPS))
        job.process.send_signal(signal.SIGTERM)
        said = job.end(128 + signal.SIGTERM)
    ledger, reformed = watched(tmp_path)
    assert [each["rebuilt"] for each in reformed] == [
        "shards rebuilt from replica group 1",
        "shards divided anew",
    ]
    assert "shards rebuilt from replica group 1" in said
    assert [each["workers"] for each in reformed] == [3, 4]
    assert {each["by"] for each in reformed} == {"survivors"}
    assert "every sample once" in ledger
    first = {step: loss for step, loss in losses(tmp_path).items() if step <= STEPS}
    assert first == pytest.approx(undisturbed, rel=1e-7)


def test_where_nobody_holds_a_shard_the_checkpoint_does(
    corpus: Path,
    tmp_path: Path,
    undisturbed: dict[int, float],
) -> None:
    options = (*COMMON, "--strategy", f"zero3({LR}, shard=2)", "--restarts", 0, "--save-every", 5)
    with Job(tmp_path, corpus, *options, workers=4) as job:
        job.reach(8)
        job.kill_all("w0", "w2")
        said = job.end()
    ledger, reformed = watched(tmp_path)
    assert any(Path(each["by"]).name.startswith("checkpoint-") for each in reformed)
    redone = next(each["redone_steps"] for each in reformed if each["redone_steps"])
    assert f"{redone} steps are done again" in said or "1 step is done again" in said
    assert "every sample once" in ledger
    assert losses(tmp_path) == pytest.approx(undisturbed, rel=1e-7)


def test_whoever_leaves_hands_its_shard_over(
    corpus: Path,
    tmp_path: Path,
    undisturbed: dict[int, float],
) -> None:
    """Also where an evaluation is due, or under way. One in which all are asked to stop is broken off, and all is saved."""
    run = tmp_path / "run"
    options = (*COMMON, "--strategy", f"zero3({LR})", "--restarts", 0, "--eval-data", corpus)
    traps = [
        {"seat": "w1", "place": "step", "step": 4, "act": "asked"},
        {"seat": "w2", "place": "score", "step": 5, "act": "asked"},
        {"seat": "w3", "place": "score", "step": 10, "act": "asked"},
    ]
    with Traps(run, corpus, *options, "--eval-every", 5, traps=traps, workers=4, base=TINY) as job:
        job.kill("w1", signal.SIGTERM)
        job.kill("w2", signal.SIGTERM)
        job.trapped("w3")
        job.process.send_signal(signal.SIGTERM)
        job.end(128 + signal.SIGTERM)
    ledger, reformed = watched(run)
    assert [(r["step"], r["workers"], r["by"]) for r in reformed] == [
        (5, 3, "survivors"),
        (5, 2, "survivors"),
    ]
    assert {each["rebuilt"] for each in reformed} == {"shards divided anew"}
    assert "every sample once" in ledger
    assert not events(run, "lost")
    assert [each["step"] for each in events(run, "evaluated")] == [5]
    assert losses(run) == pytest.approx({n: undisturbed[n] for n in range(1, 11)}, rel=1e-7)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-10"]


# -- in one fleet: what was divided in one way is divided in another, some of its holders being gone


def regrouped_run(
    world: Any, case: dict[str, Any], second: Sharded, gone: list[int], leave: list[int]
) -> dict[str, Any]:
    """Steps as `case` says, half of them before the workers are divided anew; those that are `gone` come back with nothing."""
    half = case["steps"] // 2
    replica, feed = begin(world, case)
    found = [replica.step(feed.part(step), summed).loss for step in range(half)]
    if leave:
        hand_over(replica, [rank in leave for rank in range(world.size)])
    before = owed(world, replica, leaving=leave + gone)
    standing = Standing(steps=half, leader=next(r for r in range(world.size) if r not in gone + leave))
    fresh = world.rank in gone + leave
    replica.close()
    if fresh:
        replica, _ = begin(world_of_one(), {**case, "placement": second.fitted(1)})
    made = redivide(world, replica, again(replica, {**case, "placement": second}), standing, fresh=fresh)
    if made is None:
        return {"missing": True}
    replica, words = made
    after = owed(world, replica)
    found += [replica.step(feed.part(step), summed).loss for step in range(half, case["steps"])]
    replica.check_agreement()
    weights = {k: v.detach().clone() for k, v in (session.whole_weights(replica) or {}).items()}
    replica.close()
    state = {k: v.tolist() for k, v in weights.items()}
    return {"losses": found, "state": state, "words": words, "owed": (before, after)}


def again(old: Any, case: dict[str, Any]) -> Any:
    """What makes the next set's replica: around the same model where every worker has all of it."""

    def make(world: Any) -> Any:
        return begin(world, case, model=old.model if case["placement"].stage == 1 else None)[0]

    return make


def world_of_one() -> Any:
    from manyhands.wire.solo import Solo
    from manyhands.wire.world import Member, World

    return World(Solo(), (Member(0, "here", "cpu"),), "solo")


def owed(world: Any, replica: Any, leaving: list[int] | None = None) -> float:
    """Σ of what all (but those who are gone) hold back."""
    shares = [] if world.rank in (leaving or []) else replica.method.held(replica.steps)
    mine = sum(float(s.tensor.double().sum()) for s in shares if s.key.startswith("residual/"))
    return float(sum(world.gather(mine)))


@pytest.mark.parametrize(
    ("first", "second", "gone", "words"),
    [
        (Sharded(stage=3, shard=2), Sharded(stage=3, shard=4), [1], "shards rebuilt from replica group 1"),
        (
            Sharded(stage=2, shard=2),
            Sharded(stage=2, shard=1),
            [1, 2],
            "shards rebuilt from replica groups 0 and 1",
        ),
        (Sharded(stage=3, shard=1), Sharded(stage=3), [0, 1, 3], "shards rebuilt from replica group 2"),
        (Sharded(stage=1, shard=2), Sharded(stage=1), [3], "shards rebuilt from replica group 0"),
        (Sharded(stage=3), Sharded(stage=3, shard=2), [], "shards divided anew"),
    ],
    ids=["3", "2", "3-one-left", "1", "3-none-lost"],
)
def test_shards_of_survivors_are_divided_anew(
    fleets: Any, first: Sharded, second: Sharded, gone: list[int], words: str
) -> None:
    case = {**BASE, "placement": first, "weights": [1.0, 1.0, 2.0, 1.0]}
    answers = fleets(4, "group").run(regrouped_run, case, second, gone, [])
    assert {answer["words"] for answer in answers} == {words}
    assert_close(answers[0], plain_run(case))


@pytest.mark.parametrize(
    ("placement", "optimizer", "gone", "missing"),
    [
        (Sharded(stage=3, shard=2), AdamW(0.01), [1, 3], True),
        (Sharded(stage=1), AdamW(0.01), [2], True),
        (Sharded(stage=1), Adafactor(0.01), [2], True),
        (Sharded(stage=1), SGD(0.3), [2], False),  # keeps nothing
    ],
    ids=["both-holders", "zero1", "whole-tensors", "no-state"],
)
def test_it_is_noticed_where_nobody_holds_a_shard(
    fleets: Any, placement: Sharded, optimizer: Any, gone: list[int], missing: bool
) -> None:
    case = {**BASE, "placement": placement, "optimizer": optimizer}
    answers = fleets(4, "group").run(regrouped_run, case, placement, gone, [])
    assert {"missing" in answer for answer in answers} == {missing}
    if not missing:
        assert_close(answers[0], plain_run(case))


@pytest.mark.parametrize("placement", [Sharded(stage=3, shard=2), Sharded(stage=1)], ids=["zero3", "zero1"])
def test_what_is_handed_over_is_all_there(fleets: Any, placement: Sharded) -> None:
    case = {**BASE, "placement": placement}
    answers = fleets(4, "group").run(regrouped_run, case, placement.fitted(4), [], [1, 3])
    assert_close(answers[0], plain_run(case))


def test_what_groups_hold_back_stays_the_same_sum(fleets: Any) -> None:
    exchange = ErrorFeedback(Int8(block=16))
    case = {**BASE, "placement": Sharded(shard=2), "exchange": exchange, "weights": [1.0, 1.0, 2.0, 1.0]}
    for second, leave in ((Sharded(shard=1), []), (Sharded(shard=2), [2, 3])):
        answers = fleets(4, "group").run(regrouped_run, case, second, [], leave)
        before, after = answers[0]["owed"]
        assert before
        assert after == pytest.approx(before, rel=1e-9)


def test_an_agreement_that_reached_some_is_finished_by_the_others(fleets: Any) -> None:
    """The last word of a step came to one group only: the others' pieces follow, nothing is computed again."""
    case = {**BASE, "placement": Sharded(shard=2), "weights": [1.0, 1.0, 2.0, 1.0]}
    answers = fleets(4, "group").run(late_run, case)
    assert_close(answers[0], plain_run(case))


def late_run(world: Any, case: dict[str, Any]) -> dict[str, Any]:
    from manyhands.core.errors import PeerLost

    replica, feed = begin(world, case)
    found = [replica.step(feed.part(0), summed).loss]
    if world.rank in (1, 2):
        apply = replica.method._apply

        def lost(table: Any) -> Any:
            raise PeerLost(None, "gather", "as if the table had not come")

        replica.method._apply = lost
        with pytest.raises(PeerLost):
            replica.step(feed.part(1), summed)
        replica.method._apply = apply
        found.append(0.0)
    else:
        found.append(replica.step(feed.part(1), summed).loss)
    assert replica.method.rewind() == {}
    assert replica.steps == (1 if world.rank in (1, 2) else 2)
    said: list[tuple[str, int]] = []
    replica.tell_phase = lambda *words: said.append(words)
    made = redivide(world, replica, again(replica, case), Standing(steps=2, leader=0), fresh=False)
    assert made is not None
    assert set(said) == {("re-forming", 2)}  # with each lot: it goes on
    replica = made[0]
    found += [replica.step(feed.part(step), summed).loss for step in (2, 3)]
    weights = {k: v.detach().clone() for k, v in (session.whole_weights(replica) or {}).items()}
    return {"losses": found, "state": {k: v.tolist() for k, v in weights.items()}}


def test_boxes_cover_a_tensor_or_do_not() -> None:
    assert covered((), [((), ())])
    assert not covered((), [])
    assert covered((0, 3), [])
    assert covered((4, 4), [((0, 0), (4, 2)), ((0, 2), (2, 2)), ((2, 2), (2, 2))])
    assert not covered((4, 4), [((0, 0), (4, 2)), ((0, 2), (2, 2)), ((2, 3), (2, 1))])
    assert not covered(
        (4,), [((0,), (2,)), ((1,), (2,))]
    )  # as many elements as there are, but not all of them


@pytest.mark.parametrize("stage", [1, 3])
def test_the_sum_of_estimates_is_of_those_who_hold_the_same_pieces(fleets: Any, stage: int) -> None:
    """EF21 keeps Σ hᵢ of the groups: where the set of workers changes it is summed anew, and here is what it was."""
    exchange = EF21(TopK(density=0.3, chunk=0))
    case = {**BASE, "placement": Sharded(stage=stage, shard=2), "exchange": exchange}
    for before, after in fleets(4, "group").run(resummed_run, case):
        assert any(before)
        assert after == pytest.approx(before, rel=1e-12, abs=1e-15)


def resummed_run(world: Any, case: dict[str, Any]) -> tuple[list[float], list[float]]:
    replica, feed = begin(world, case)
    for step in range(2):
        replica.step(feed.part(step), summed)
    told = []
    for again in (False, True):
        if again:
            exchange_state.resum(replica.states, replica.exchange_wire)
        sums = [leaf for state in replica.states for path, leaf in leaves(state) if "agreed" in path]
        told.append(torch.cat([leaf.reshape(-1) for leaf in sums]).tolist())
    replica.close()
    return told[0], told[1]


def test_whoever_leaves_with_a_whole_replica_hands_over_what_it_held_back(fleets: Any) -> None:
    case = {**BASE, "placement": Sharded(stage=1), "exchange": ErrorFeedback(Int8(block=16))}
    answers = fleets(4, "group").run(leaving_run, case, [1, 3])
    before, after = ([answer[i] for answer in answers] for i in (0, 1))
    assert before[1]
    assert sum(after) == pytest.approx(sum(before), rel=1e-9)
    assert (after[1], after[3]) == (0.0, 0.0)


def leaving_run(world: Any, case: dict[str, Any], leave: list[int]) -> tuple[float, float]:
    replica, feed = begin(world, case)
    for step in range(2):
        replica.step(feed.part(step), summed)
    before = held_back(replica)
    hand_over(replica, [rank in leave for rank in range(world.size)])
    after = held_back(replica)
    replica.close()
    return before, after


def held_back(replica: Any) -> float:
    return sum(float(t.sum()) for state in replica.states for path, t in leaves(state) if is_own(path))
