"""ZeRO 1, 2 and 3: the same model as `ddp`, in a fraction of the memory."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from test_exactness import SEQ, N, Rows, assert_close, make, plain_run, summed

from manyhands.data.sample import Order
from manyhands.exchange.allreduce import AllReduce
from manyhands.placement.replicated import Replicated
from manyhands.placement.sharded import Sharded
from manyhands.strategy.base import Strategy
from manyhands.strategy.optimizers import SGD, Adafactor, AdamW, Muon
from manyhands.train.feed import Feed
from manyhands.train.replica import Replica


def sharded_run(world: Any, case: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = make(case.get("dtype", torch.float64))
    strategy = Strategy(
        outer=case["optimizer"], placement=case["placement"], exchange=case.get("exchange", AllReduce())
    )
    replica = Replica(model, strategy, world.wire, max_grad_norm=case["clip"], targets_per_row=SEQ)
    feed = Feed(
        rows=Rows(),
        order=Order(N, case["global_batch"], 3, False),
        rank=world.rank,
        weights=case["weights"][: world.size],
        micro_batch=case["micro_batch"],
        device_batch=case["device_batch"],
        coalesce=case["coalesce"],
        device=torch.device("cpu"),
        seed=3,
    )
    losses = [replica.step(feed.part(step), summed).loss for step in range(case["steps"])]
    held = sum(t.numel() for t in model.state_dict().values())
    if hasattr(replica.method, "weights"):
        weights = replica.method.weights() or {}
        replica.method.check()
    else:
        replica.check_agreement()
        weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    replica.close()
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in weights.values())).hexdigest()
    return {"losses": losses, "state": {k: v.tolist() for k, v in weights.items()}, "sha256": digest, "held": held}


BASE: dict[str, Any] = {
    "optimizer": AdamW(0.01),
    "clip": 0.05,
    "global_batch": 18,
    "micro_batch": 2,
    "device_batch": 64,
    "coalesce": False,
    "weights": [1.0, 3.0, 0.0, 1.0],
    "steps": 4,
}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_sharded_model_equals_one_process(fleets: Any, size: int, stage: int) -> None:
    for accumulate in ("sharded", "whole"):
        case = {**BASE, "placement": Sharded(stage=stage, accumulate=accumulate)}
        answers = fleets(size, "group").run(sharded_run, case)
        reference = plain_run(case)
        reference["state"] = {k: v for k, v in reference["state"].items() if k in answers[0]["state"]}
        assert_close(answers[0], reference)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("optimizer", [AdamW(0.01), SGD(0.3, momentum=0.9), Muon(0.01), Adafactor(0.01)], ids=repr)
def test_a_sharded_optimizer_gives_the_bits_of_ddp(fleets: Any, size: int, optimizer: Any) -> None:
    case = {**BASE, "optimizer": optimizer}
    ours = fleets(size, "shared").run(sharded_run, {**case, "placement": Sharded(stage=1)})
    ddp = fleets(size, "shared").run(sharded_run, {**case, "placement": Replicated()})
    assert ours[0]["sha256"] == ddp[0]["sha256"]
    assert ours[0]["losses"] == ddp[0]["losses"]


@pytest.mark.parametrize("accumulate", ["sharded", "whole"])
def test_groups_exchange_their_pieces(fleets: Any, accumulate: str) -> None:
    for shard in (1, 2):
        for stage in (2, 3):
            placement = Sharded(stage=stage, shard=shard, accumulate=accumulate)
            case = {**BASE, "placement": placement, "exchange": AllReduce(bucket_mb=0.0001)}
            answers = fleets(4, "group").run(sharded_run, case)
            reference = plain_run(case)
            reference["state"] = {k: v for k, v in reference["state"].items() if k in answers[0]["state"]}
            assert_close(answers[0], reference)
