"""A flipped bit in one replica: found, named, and mended from the majority, over real processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fleet import Fleet
from test_exactness import SEQ, make, summed
from test_methods import feed_of

from manyhands.core import config
from manyhands.core.errors import Diverged, UsageError
from manyhands.core.events import Mended
from manyhands.train.job import Job
from manyhands.train.mending import fingerprint_of, vote
from manyhands.train.replica import Replica

WHO = [(f"w{i}", f"host-{i % 2}") for i in range(5)]
GOOD = ["ddp", "ddp(optimizer=sgd(momentum=0.9))", "powersgd", "diloco(every=2)", "eager", "zero1"]


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
            flip(replica, case["kind"])
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


def flip(replica: Replica, kind: str) -> None:
    """One bit of one number, as a broken memory cell would."""
    shared = replica.method.shared()[kind]
    name = next(n for n, t in shared.items() if t.numel() > 3)
    shared[name].detach().view(-1).view(torch.int64)[2] ^= 1 << 50
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
