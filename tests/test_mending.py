"""A flipped bit in one replica: found, named, and mended from the majority, over real processes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fleet import Fleet
from test_exactness import SEQ, make, summed
from test_methods import feed_of

from manyhands.core import config
from manyhands.core.errors import Diverged, UsageError
from manyhands.core.events import Aligned, Mended
from manyhands.train import mending
from manyhands.train.job import Job
from manyhands.train.mending import fingerprint_of, vote
from manyhands.train.order import Order
from manyhands.train.replica import Replica

WHO = [(f"w{i}", f"host-{i % 2}") for i in range(5)]
GOOD = [
    "ddp",
    "ddp(optimizer=sgd(momentum=0.9))",
    "powersgd",
    "diloco(every=2)",
    "eager",
    "forecast(every=2)",
    "zero1",
]


KIND_OF = mending.kind_of


def flipping_run(world: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Train; after step `at` flip a bit on `ranks`; compare (and mend) after each step; what happened."""
    torch.set_num_threads(1)
    model = make()
    replica = Replica(
        model, config.from_text("strategies", case["strategy"]), world.wire, targets_per_row=SEQ
    )
    feed, heard, refused = feed_of(world, {}), [], ""
    for step in range(case["steps"]):
        replica.step(feed.part(step), summed)
        if step + 1 == case.get("at") and world.rank in case["ranks"]:
            (spoil if case.get("nan") else flip)(replica, case["kind"])
        if step + 1 == case.get("at") and world.rank == case.get("meanwhile"):
            flip_after_mending(replica)
        try:
            replica.check_agreement(mend=case["mend"], who=WHO, emit=heard.append)
        except Diverged as error:
            refused = str(error)
            break
    replica.meet()
    with replica.agreed():
        state = {k: v.tolist() for k, v in model.state_dict().items()}
    optimizer = {k: v.tolist() for k, v in replica.method.shared()["optimizer state"].items()}
    replica.close()
    assert all(isinstance(event, Mended) for event in heard)
    told = [(e.seat, e.rank, e.host, e.step, e.what, e.source) for e in heard]
    return {"state": state, "optimizer": optimizer, "refused": refused, "told": told}


def flip_after_mending(replica: Replica) -> None:
    """A bit of this replica flips while another one is given the majority's state."""
    replace = mending.replace

    def once(*args: Any) -> Any:
        mending.replace = replace
        found = replace(*args)
        flip(replica, "parameters")
        return found

    mending.replace = once


def flip(replica: Replica, kind: str) -> None:
    """One bit of one number, as a broken memory cell would."""
    change(replica, kind, lambda numbers: numbers.view(torch.int64)[2].bitwise_xor_(1 << 50))


def spoil(replica: Replica, kind: str) -> None:
    """One number is none any more."""
    change(replica, kind, lambda numbers: numbers[2].fill_(math.nan))


def change(replica: Replica, kind: str, how: Callable[[torch.Tensor], object]) -> None:
    shared = replica.method.shared()[kind]
    name = next(n for n, t in shared.items() if t.numel() > 3)
    how(shared[name].detach().view(-1))
    if replica.method.at_rest and kind == "parameters" and hasattr(replica.method, "mended"):
        replica.method.mended()  # of local steps: the model has adopted it


def case_of(strategy: str, **changes: Any) -> dict[str, Any]:
    return {"strategy": strategy, "steps": 6, "mend": True, "kind": "parameters", "ranks": (1,), **changes}


Fleets = Callable[[int, str], Fleet]


@pytest.mark.parametrize("strategy", GOOD)
def test_a_flipped_bit_is_mended_before_it_was_used(fleets: Fleets, strategy: str) -> None:
    fleet = fleets(3, "shared")
    undisturbed = fleet.run(flipping_run, case_of(strategy))
    assert not undisturbed[0]["told"]
    found = fleet.run(flipping_run, case_of(strategy, at=4))
    assert found == [{**plain, "told": found[0]["told"]} for plain in undisturbed]
    assert found[1]["told"] == [("w1", 1, "host-1", 4, "parameters", "w0")]


def test_so_is_a_second_one_that_flips_meanwhile(fleets: Fleets) -> None:
    fleet = fleets(3, "shared")
    undisturbed = fleet.run(flipping_run, case_of("ddp"))
    found = fleet.run(flipping_run, case_of("ddp", at=4, meanwhile=2))
    assert [f["state"] for f in found] == [u["state"] for u in undisturbed]
    assert [told[:2] for told in found[0]["told"]] == [("w1", 1), ("w2", 2)]
    assert [f["refused"] for f in found] == ["", "", ""]


@pytest.mark.parametrize("strategy", ["ddp", "ddp(optimizer=sgd(momentum=0.9))", "diloco(every=2)"])
def test_so_is_one_in_the_optimizers_state(fleets: Fleets, strategy: str) -> None:
    fleet = fleets(3, "shared")
    undisturbed = fleet.run(flipping_run, case_of(strategy))
    found = fleet.run(flipping_run, case_of(strategy, at=4, kind="optimizer state", ranks=(0,)))
    assert [f["told"] for f in found] == [[("w0", 0, "host-0", 4, "optimizer state", "w1")]] * 3
    assert [(f["state"], f["optimizer"]) for f in found] == [
        (u["state"], u["optimizer"]) for u in undisturbed
    ]


def test_without_the_option_the_worker_is_named_and_training_stops(fleets: Fleets) -> None:
    found = fleets(3, "shared").run(flipping_run, case_of("ddp", at=4, ranks=(2,), mend=False))
    assert len({f["refused"] for f in found}) == 1
    assert (
        "after step 4 worker 2 (w2 on host-0): parameters differs from the 2 others'" in found[0]["refused"]
    )
    assert "--on-divergence mend" in found[0]["refused"]


def test_one_against_one_has_no_majority(fleets: Fleets) -> None:
    found = fleets(2, "shared").run(flipping_run, case_of("ddp", at=4))
    assert "worker 0 (w0 on host-0), worker 1 (w1 on host-1) differ, and no majority" in found[0]["refused"]
    assert "three or more workers" in found[0]["refused"]


@pytest.mark.parametrize("strategy", ["ddp", "diloco(every=2)"])
def test_of_two_the_one_that_is_not_finite_has_no_vote(fleets: Fleets, strategy: str) -> None:
    fleet = fleets(2, "shared")
    undisturbed = fleet.run(flipping_run, case_of(strategy))
    found = fleet.run(flipping_run, case_of(strategy, at=4, nan=True))
    assert found == [{**plain, "told": found[0]["told"]} for plain in undisturbed]
    assert found[0]["told"] == [("w1", 1, "host-1", 4, "parameters", "w0")]
    refused = fleet.run(flipping_run, case_of(strategy, at=4, nan=True, mend=False))[0]["refused"]
    assert "worker 1 (w1 on host-1), not finite: parameters differs from the other's" in refused


def test_the_option_is_refused_where_it_would_be_ignored() -> None:
    for strategy in ("zero3", "hogwild", "gossip"):
        with pytest.raises(UsageError, match="on_divergence = 'mend' with strategy"):
            Job(strategy=config.from_text("strategies", strategy), on_divergence="mend")
    for strategy in ("zero1", "ddp", "diloco"):
        Job(strategy=config.from_text("strategies", strategy), on_divergence="mend")


def test_the_vote_over_all_small_cases() -> None:
    for n in range(1, 6):
        for prints in itertools.product(range(3), repeat=n):
            majority, minority = vote([(p,) for p in prints])
            assert sorted(majority + minority) == list(range(n))
            most = max(prints.count(p) for p in prints)
            if 2 * most > n:
                assert len(majority) == most
                assert len({prints[r] for r in majority}) == 1
            else:
                assert not majority
            for finite in itertools.product((False, True), repeat=n):
                voters = [r for r in range(n) if finite[r]] or list(range(n))
                again = vote([(p,) for p in prints], finite)
                among_them = vote([(prints[r],) for r in voters])
                assert again.majority == tuple(voters[i] for i in among_them.majority)
                assert sorted(again.majority + again.minority) == list(range(n))


def test_any_flipped_bit_changes_both_words() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(33), torch.randn(5).to(torch.bfloat16), torch.tensor(3.0, dtype=torch.float64)]
    before = fingerprint_of(tensors)
    for tensor, kind in zip(tensors, (torch.int32, torch.int16, torch.int64), strict=True):
        bits = tensor.view(-1).view(kind)
        for i in range(bits.numel()):
            for bit in (0, 7, 8 * tensor.element_size() - 2):
                bits[i] ^= 1 << bit
                after = fingerprint_of(tensors)
                assert (after != before).all()
                bits[i] ^= 1 << bit
    assert torch.equal(fingerprint_of(tensors), before)


def unlike_run(world: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Ranks of `case["kinds"]`; where that is not 0 each update is rounded otherwise, as another device does."""
    torch.set_num_threads(1)
    kind = case["kinds"][world.rank]
    replica = Replica(
        make(), config.from_text("strategies", case["strategy"]), world.wire, targets_per_row=SEQ
    )
    mending.kind_of = lambda device: kind
    feed, heard, refused = feed_of(world, {}), [], ""
    try:
        for step in range(case["steps"]):
            replica.step(feed.part(step), summed)
            with torch.no_grad():
                for tensor in replica.method.shared()["parameters"].values():
                    tensor.mul_(1 + case.get("drift", 1e-12) * kind)
            if step + 1 == case.get("at") and world.rank == case["flipped"]:
                (spoil if case.get("nan") else flip)(replica, "parameters")
            if replica.steps % 2 == 0:
                replica.check_agreement(mend=case.get("mend", False), who=WHO, emit=heard.append)
    except Diverged as error:
        refused = str(error)
    finally:
        mending.kind_of = KIND_OF
    shared = {k: v.tolist() for k, v in replica.method.shared()["parameters"].items()}
    mine = torch.cat([p.detach().flatten() for p in replica.model.parameters()]).tolist()
    replica.close()
    told = [(type(e).__name__, e.step, getattr(e, "ranks", None) or e.rank) for e in heard]
    drifts = [e.drift for e in heard if isinstance(e, Aligned)]
    return {"shared": shared, "mine": mine, "told": told, "drifts": drifts, "refused": refused}


def test_replicas_on_other_devices_are_aligned_and_their_likes_still_compared(fleets: Fleets) -> None:
    fleet = fleets(3, "shared")
    unlike = {"strategy": "ddp", "steps": 6, "kinds": (0, 7, 0)}
    found = fleet.run(unlike_run, unlike)
    assert found[0]["shared"] == found[1]["shared"] == found[2]["shared"]
    assert found[0]["told"] == [("Aligned", step, (1,)) for step in (2, 4, 6)]
    assert all(1e-12 < drift < 1e-10 for drift in found[0]["drifts"])
    flipped = fleet.run(unlike_run, {**unlike, "at": 4, "flipped": 2})
    assert "worker 0 (w0 on host-0), worker 2 (w2 on host-0) differ, and no majority" in flipped[0]["refused"]
    far = fleet.run(unlike_run, {**unlike, "drift": 1e-2})
    assert len({f["refused"] for f in far}) == 1
    assert "the parameters of worker 1 are a relative" in far[0]["refused"]


def test_a_flipped_bit_is_mended_and_the_other_kind_aligned(fleets: Fleets) -> None:
    mending_case = {"strategy": "ddp", "steps": 4, "kinds": (0, 7, 7, 7), "at": 3, "flipped": 3, "mend": True}
    found = fleets(4, "shared").run(unlike_run, mending_case)
    assert found[0]["told"] == [("Aligned", 2, (0,)), ("Mended", 4, 3), ("Aligned", 4, (0,))]
    assert all(f["shared"] == found[0]["shared"] and not f["refused"] for f in found)
    refused = fleets(4, "shared").run(unlike_run, {**mending_case, "mend": False})
    assert "worker 3 (w3 on host-1): parameters differs from the 2 others" in refused[0]["refused"]


def test_who_is_not_finite_and_has_no_like_is_mended_from_another_kind(fleets: Fleets) -> None:
    case = {"strategy": "ddp", "steps": 4, "kinds": (0, 7), "at": 4, "flipped": 0, "nan": True, "mend": True}
    fleet = fleets(2, "shared")
    # of two kinds with one worker each the first is the one that the others get the state of
    found = fleet.run(unlike_run, case)
    assert found[0]["told"] == [("Aligned", 2, (1,)), ("Mended", 4, 0)]
    assert found[0]["shared"] == found[1]["shared"]
    assert not any(f["refused"] for f in found)
    refused = fleet.run(unlike_run, {**case, "mend": False})[0]["refused"]
    assert "worker 0 (w0 on host-0), not finite: parameters differs from the other's" in refused


@pytest.mark.parametrize(
    "strategy",
    ["diloco(every=4)", "forecast(every=4, fragments=2)", "streaming-diloco(every=4, fragments=2, delay=1)"],
)
def test_who_is_aligned_keeps_the_steps_of_his_own(fleets: Fleets, strategy: str) -> None:
    """Compared in the middle of a round, after the anchors have drifted."""
    fleet = fleets(3, "shared")
    case = {"strategy": strategy, "steps": 6, "kinds": (0, 0, 7)}
    alone = fleet.run(unlike_run, {**case, "drift": 0.0})
    assert not any(f["refused"] for f in alone)
    found = fleet.run(unlike_run, case)
    assert found[0]["shared"] == found[1]["shared"] == found[2]["shared"]
    assert found[2]["mine"] == pytest.approx(alone[2]["mine"], rel=1e-8, abs=1e-10)
    flat = [x for values in found[2]["shared"].values() for x in torch.tensor(values).flatten().tolist()]
    assert found[2]["mine"] != pytest.approx(flat, rel=1e-6, abs=1e-9)  # it has gone on from them


def test_what_is_derived_for_one_device_is_not_for_another() -> None:
    given = Job(device_batch=None)
    effective = dataclasses.replace(given, device_batch=128, compile="on", precision="bf16", steps=7)
    order = Order.from_json(Order.running(effective, given, "cuda", {}, 1.0).to_json())
    assert order.job_on("cuda") == effective
    assert order.job_on("cpu") == dataclasses.replace(given, steps=7)
    plain = Order.from_json(Order(given, {}).to_json())
    assert plain.job_on("cpu") == plain.job_on("cuda") == given


def test_a_job_on_two_kinds_of_device_needs_whole_replicas() -> None:
    for strategy in ("zero3", "hogwild"):
        with pytest.raises(UsageError, match="device = 'mixed'"):
            Job(strategy=config.from_text("strategies", strategy), device="mixed")
    with pytest.raises(UsageError, match="check_every = 0"):
        Job(device="mixed", check_every=0)
    assert Job(device="mixed").device == "mixed"
