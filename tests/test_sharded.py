"""ZeRO 1, 2 and 3: the same model as `ddp`, in a fraction of the memory."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from facts import facts
from runs import TINY, events, losses, summary
from safetensors.torch import load_file
from test_exactness import SEQ, N, Rows, assert_close, make, plain_run, summed

from manyhands.core.config import from_text
from manyhands.core.errors import Diverged, UsageError
from manyhands.data.sample import Order
from manyhands.exchange.allreduce import AllReduce
from manyhands.exchange.feedback import ErrorFeedback
from manyhands.exchange.int8 import Int8
from manyhands.placement.replicated import Replicated
from manyhands.placement.sharded import Sharded
from manyhands.strategy.base import Strategy
from manyhands.strategy.delayed_nesterov import DelayedNesterov
from manyhands.strategy.optimizers import SGD, Adafactor, AdamW, Muon
from manyhands.strategy.sign import SignSGD
from manyhands.tasks.pretrain import Pretrain
from manyhands.train import session
from manyhands.train.feed import Feed
from manyhands.train.job import Job
from manyhands.train.plan import derive
from manyhands.train.replica import Part, Replica
from manyhands.train.sharded_gradients import local


def begin(world: Any, case: dict[str, Any], model: Any = None) -> tuple[Replica, Feed]:
    torch.set_num_threads(1)
    alike = model is None
    model = make(case.get("dtype", torch.float64)) if alike else model
    strategy = Strategy(
        outer=case["optimizer"], placement=case["placement"], exchange=case.get("exchange", AllReduce())
    )
    replica = Replica(
        model, strategy, world.wire, max_grad_norm=case["clip"], targets_per_row=SEQ, compare=alike
    )
    return replica, Feed(
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


def sharded_run(world: Any, case: dict[str, Any]) -> dict[str, Any]:
    replica, feed = begin(world, case)
    losses = [replica.step(feed.part(step), summed).loss for step in range(case["steps"])]
    replica.check_agreement()
    kept = sum(t.numel() for t in replica.method.optimizer.state_by_name().values())
    weights = {k: v.detach().clone() for k, v in (session.whole_weights(replica) or {}).items()}
    replica.close()
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in weights.values())).hexdigest()
    return {
        "losses": losses,
        "state": {k: v.tolist() for k, v in weights.items()},
        "sha256": digest,
        "kept": kept,
    }


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
        assert_close(answers[0], plain_run(case))


def cut_run(world: Any, case: dict[str, Any]) -> dict[str, Any]:
    """One worker has memory for fewer rows; what all run in one pass at most."""
    rows: list[int] = []

    def counted(model: Any, batch: Any) -> Any:
        rows.append(len(batch["targets"]))
        return summed(model, batch)

    replica, feed = begin(world, case)
    replica.fits.most = 4 if world.rank == 1 else None
    losses = [replica.step(feed.part(step), counted).loss for step in range(case["steps"])]
    weights = {k: v.tolist() for k, v in (session.whole_weights(replica) or {}).items()}
    replica.close()
    return {"losses": losses, "state": weights, "rows": max(rows), "most": replica.fits.most}


def test_all_run_passes_of_as_many_rows_as_the_least_memory_holds(fleets: Any) -> None:
    for coalesce, micro_batch in ((True, 1), (False, 6)):
        case = {**BASE, "placement": Sharded(stage=3), "coalesce": coalesce, "micro_batch": micro_batch}
        answers = fleets(2, "group").run(cut_run, case)
        assert_close(answers[0], plain_run(case))
        assert [(answer["rows"], answer["most"]) for answer in answers] == [(4, 4)] * 2


@pytest.mark.parametrize("optimizer", [SignSGD(0.01, momentum=0.5), DelayedNesterov(0.1, every=2)], ids=repr)
def test_each_worker_updates_rows_by_any_rule_of_single_elements(fleets: Any, optimizer: Any) -> None:
    case = {**BASE, "optimizer": optimizer}
    whole = fleets(2, "group").run(sharded_run, {**case, "placement": Replicated()})
    for stage in (2, 3):
        ours = fleets(2, "group").run(sharded_run, {**case, "placement": Sharded(stage=stage)})
        assert_close(ours[0], whole[0])
        assert max(answer["kept"] for answer in ours) < 0.8 * whole[0]["kept"]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "optimizer", [AdamW(0.01), SGD(0.3, momentum=0.9), Muon(0.01), Adafactor(0.01)], ids=repr
)
def test_a_sharded_optimizer_gives_the_bits_of_ddp(fleets: Any, size: int, optimizer: Any) -> None:
    case = {**BASE, "optimizer": optimizer}
    ours = fleets(size, "shared").run(sharded_run, {**case, "placement": Sharded(stage=1)})
    ddp = fleets(size, "shared").run(sharded_run, {**case, "placement": Replicated()})
    assert ours[0]["sha256"] == ddp[0]["sha256"]
    assert ours[0]["losses"] == ddp[0]["losses"]
    kept = [answer["kept"] for answer in ours]
    assert max(kept) < ddp[0]["kept"] * (0.75 if isinstance(optimizer, (AdamW, SGD)) else 0.8)
    assert sum(kept) >= ddp[0]["kept"]


@pytest.mark.parametrize("accumulate", ["sharded", "whole"])
def test_groups_exchange_their_pieces(fleets: Any, accumulate: str) -> None:
    for shard in (1, 2):
        for stage in (2, 3):
            placement = Sharded(stage=stage, shard=shard, accumulate=accumulate)
            case = {**BASE, "placement": placement, "exchange": AllReduce(bucket_mb=0.0001)}
            answers = fleets(4, "group").run(sharded_run, case)
            assert_close(answers[0], plain_run(case))


def between_pieces_run(world: Any, case: dict[str, Any]) -> dict[str, Any]:
    """What is contributed between pieces, the largest value anywhere in the buckets, and the largest norm."""
    replica, feed = begin(world, case)
    gradients = replica.method.gradients
    collect = gradients.collect
    between = 0

    def watched(params: Any) -> None:
        nonlocal between
        collect(params)
        between += sum(int(bucket.count_nonzero()) for bucket in gradients.buckets)
        between -= sum(int(view.count_nonzero()) for view in gradients.views)

    gradients.collect = watched
    largest, norms = 0.0, []
    for step in range(case["steps"]):
        norms.append(replica.step(feed.part(step), summed).grad_norm)
        largest = max(largest, *(bucket.abs().max().item() for bucket in gradients.buckets))
    digest = replica.check_agreement()
    replica.close()
    return {"between": between, "largest": largest, "norm": max(norms), "digest": digest}


@pytest.mark.parametrize("exchange", ["error-feedback(int2)", "sign"])
def test_what_an_exchange_puts_between_pieces_is_not_contributed_again(fleets: Any, exchange: str) -> None:
    case = {**BASE, "placement": Sharded(shard=2), "exchange": from_text("exchanges", exchange), "steps": 40}
    case |= {"weights": [1.0, 1.0, 2.0, 1.0], "clip": 1e9}
    answers = fleets(4, "group").run(between_pieces_run, case)
    assert len({answer["digest"] for answer in answers}) == 1
    for answer in answers:
        assert answer["between"] == 0
        assert 0 < answer["largest"] < 10
        assert 0 < answer["norm"] < 100


# -- checkpoints


def part_run(world: Any, case: dict[str, Any], directory: str, steps: int) -> dict[str, Any]:
    """Continue from the newest checkpoint in `directory`, if there is one, up to `steps`; save."""
    replica, feed = begin(world, case)
    done = session.restore_replica(replica, Path(directory)) if any(Path(directory).iterdir()) else 0
    losses = [replica.step(feed.part(step), summed).loss for step in range(done, steps)]
    session.save_replica(world, replica, Path(directory))
    held = sum(local(p).numel() for p in replica.model.parameters())
    replica.close()
    return {"losses": losses, "held": held}


@pytest.mark.parametrize(
    "chain",
    [
        [("group", 2, Sharded(stage=3)), ("shared", 3, Replicated())],
        [("shared", 3, Replicated()), ("group", 2, Sharded(stage=2)), ("group", 3, Sharded(stage=3))],
        [("group", 3, Sharded(stage=2)), ("shared", 2, Sharded(stage=1)), ("group", 4, Sharded(shard=2))],
    ],
    ids=["zero3-ddp", "ddp-zero2-zero3", "zero2-zero1-hybrid"],
)
def test_a_run_goes_on_with_other_stages_and_workers(fleets: Any, tmp_path: Path, chain: Any) -> None:
    losses: list[float] = []
    case = {**BASE, "optimizer": AdamW(0.01)}
    for i, (transport, size, placement) in enumerate(chain):
        fleet = fleets(size, transport)
        answers = fleet.run(part_run, {**case, "placement": placement}, str(tmp_path), 2 * i + 2)
        losses += answers[0]["losses"]
    found = tmp_path / f"checkpoint-{2 * len(chain)}"
    state = {k: v.tolist() for k, v in load_file(found / "model.safetensors").items()}
    reference = plain_run({**case, "steps": 2 * len(chain)})
    reference["state"] = {k: v for k, v in reference["state"].items() if k in state}
    assert_close({"losses": losses, "state": state}, reference)
    moments = load_file(found / "training" / "optimizer.safetensors")
    assert moments["embed.weight.exp_avg"].shape == (13, 8)


def residual_run(world: Any, case: dict[str, Any], directory: str) -> Any:
    """What groups hold back, before saving and after loading, and the parameters' agreement meanwhile."""
    replica, feed = begin(world, case)
    for step in range(3):
        replica.step(feed.part(step), summed)
    session.save_replica(world, replica, Path(directory))
    before = replica.method.exchange_state()
    replica.close()
    replica, feed = begin(world, case)
    assert session.restore_replica(replica, Path(directory)) == 3
    after = replica.method.exchange_state()
    replica.step(feed.part(3), summed)
    digest = replica.check_agreement()
    replica.close()
    return digest, {k: v.tolist() for k, v in before.items()}, {k: v.tolist() for k, v in after.items()}


def test_what_groups_hold_back_survives_a_checkpoint(fleets: Any, tmp_path: Path) -> None:
    exchange = ErrorFeedback(Int8(block=16))
    case = {**BASE, "placement": Sharded(shard=2), "exchange": exchange, "weights": [1.0, 1.0, 2.0, 1.0]}
    answers = fleets(4, "group").run(residual_run, case, str(tmp_path))
    assert len({digest for digest, _, _ in answers}) == 1
    _, before, after = answers[0]
    assert any("residual" in name for name in before)
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(torch.tensor(after[name]), torch.tensor(value), rtol=1e-12, atol=1e-15)
    largest = max(torch.tensor(v).abs().max().item() for n, v in before.items() if "residual" in n)
    assert largest > 0


# -- layers computed together


def llama_run(world: Any, case: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = llama(case.get("tied", False))
    strategy = Strategy(outer=AdamW(0.01), placement=case["placement"])
    replica = Replica(model, strategy, world.wire, max_grad_norm=0.5, targets_per_row=8)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 32, (3, 7, 9), generator=generator)  # [steps, rows, tokens]
    losses = []
    for step, rows in enumerate(tokens):
        mine = [i for i in range(7) if i % world.size == world.rank]
        batches = [(i, {"input_ids": rows[i : i + 1, :-1], "targets": rows[i : i + 1, 1:]}) for i in mine]
        part = Part(step, batches, 7, 7, 0)
        losses.append(replica.step(part, Pretrain().loss).loss)
    replica.check_agreement()
    weights = session.whole_weights(replica) or {}
    held = sum(local(p).numel() for p in model.parameters())
    return {"losses": losses, "state": {k: v.tolist() for k, v in weights.items()}, "held": held}


def llama(tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).double()


@pytest.mark.parametrize(("size", "shard"), [(2, 1), (4, 2), (4, 1)])
def test_layers_computed_together_equal_one_process(fleets: Any, size: int, shard: int) -> None:
    from manyhands.wire.solo import Solo
    from manyhands.wire.world import Member, World

    for tied in (False, True):
        placement = Sharded(stage=3, shard=shard, tensor_parallel=2)
        case = {"placement": placement, "tied": tied}
        answers = fleets(size, "group").run(llama_run, case)
        alone = llama_run(
            World(Solo(), (Member(0, "here", "cpu"),), "solo"), {"placement": Replicated(), "tied": tied}
        )
        assert_close(answers[0], alone)
        assert answers[0]["held"] < alone["held"] * (0.75 if shard == 1 else 0.45)


# -- as a user runs it


def test_zero3_runs_evaluates_samples_and_resumes_as_zero1_on_other_workers(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("Many hands make light work; too many cooks spoil the broth.\n" * 400)

    def train(output: Path, strategy: str, workers: int, steps: int, *more: object) -> None:
        warm.manyhands(
            *("train", "--data", text, *TINY, "--strategy", strategy, "--output", output, *more),
            *("--cache", tmp_path / "cache", "--eval-fraction", 0.2, "--workers", workers),
            *("--steps", steps, "--eval-every", 3, "--save-every", 4, "--prompt", "Many"),
        )

    ours, plain = tmp_path / "ours", tmp_path / "plain"
    train(ours, "zero3(lr=3e-3, schedule=constant)", 2, 5)
    assert events(ours, "sampled")
    train(ours, "zero1(lr=3e-3, schedule=constant)", 3, 8, "--resume", ours)
    train(plain, "ddp(lr=3e-3, schedule=constant)", 2, 8)
    assert losses(ours).keys() == losses(plain).keys()
    for step, loss in losses(plain).items():
        assert losses(ours)[step] == pytest.approx(loss, rel=1e-4)
    assert summary(ours)["eval"]["loss"] == pytest.approx(summary(plain)["eval"]["loss"], rel=1e-4)
    assert summary(ours)["world_sizes"] == [2, 3]


# -- refusals, and one worker


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zero3(shard=2, exchange=powersgd)", "zero1"),
        ("zero3(exchange=int8)", "shard=2"),
        ("zero3(exchange=all-reduce(precision=bf16))", "leave out the exchange"),
        ("zero3(shard=2, exchange=fetchsgd)", "it keeps momentum.0 of a whole bucket"),
        ("zero2(shard=1, exchange=warmup(fetchsgd, rounds=0))", "use zero1"),
        ("zero2(optimizer=muon)", "zero1(optimizer='muon')"),
        ("zero3(optimizer=adafactor)", "adamw"),
        ("zero3(accumulate=never)", "'whole'"),
        ("zero3(tensor_parallel=0)", "tensor_parallel"),
    ],
)
def test_what_cannot_be_is_refused_at_configuration(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        from_text("strategies", text)


@pytest.mark.parametrize(
    "exchange", ["error-feedback(int8)", "ef21(topk)", "auto", "countsketch", "momentum(topk)", "two-phase"]
)
def test_exchanges_that_keep_single_elements_or_none_are_taken(exchange: str) -> None:
    assert (
        from_text("strategies", f"zero3(shard=2, optimizer=sgd, exchange={exchange})").exchange != AllReduce()
    )


def test_workers_that_do_not_divide_are_refused_with_the_nearest_number() -> None:
    with pytest.raises(UsageError, match="give 2, or 0"):
        Sharded(shard=3).mesh(4)
    with pytest.raises(UsageError, match="give 1"):
        Sharded(tensor_parallel=2).mesh(3)
    assert Sharded(shard=2, tensor_parallel=2).mesh(8) == (2, 2, 2)
    for stage in (0, 4):
        with pytest.raises(UsageError, match="stage"):
            Sharded(stage=stage)
    with pytest.raises(UsageError, match="stage = 2 or 3"):
        Sharded(stage=1, tensor_parallel=2)


def test_a_running_job_divides_its_workers_as_well_as_it_can() -> None:
    assert Sharded(shard=2, tensor_parallel=2).fitted(6).mesh(6) == (1, 3, 2)
    assert Sharded(shard=2, tensor_parallel=2).fitted(7).mesh(7) == (1, 7, 1)
    assert Sharded(shard=2).fitted(1).mesh(1) == (1, 1, 1)
    assert Sharded().fitted(5) == Sharded()


def test_a_model_without_a_plan_is_refused_by_name() -> None:
    from manyhands.train.sharded_tensor import plan_of

    with pytest.raises(UsageError, match="Net"):
        plan_of(make(), 2)
    with pytest.raises(UsageError, match="num_key_value_heads = 2"):
        plan_of(llama(False), 4)
    assert not any("embed" in name or "head" in name for name in plan_of(llama(True), 2))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_worker_is_plain_training(stage: int) -> None:
    from manyhands.wire.solo import Solo
    from manyhands.wire.world import Member, World

    world = World(Solo(), (Member(0, "here", "cpu"),), "solo")
    case = {**BASE, "placement": Sharded(stage=stage)}
    assert_close(sharded_run(world, case), plain_run(case))


def test_a_gradient_that_is_not_finite_is_left_out_by_all(fleets: Any) -> None:
    for placement in (Sharded(stage=1), Sharded(stage=3), Sharded(shard=1)):
        for answer in fleets(2, "group").run(poisoned_run, {**BASE, "placement": placement}):
            assert answer == {"skipped": [False, True, False], "same": True}


def poisoned_run(world: Any, case: dict[str, Any]) -> dict[str, Any]:
    replica, feed = begin(world, case)
    skipped = []
    for step in range(3):
        before = replica.check_agreement()

        def loss(model: Any, batch: Any, step: int = step) -> Any:
            total, count = summed(model, batch)
            return (total * float("nan") if step == 1 and world.rank == 1 else total), count

        skipped.append(replica.step(feed.part(step), loss).skipped)
        if step == 1:
            same = replica.check_agreement() == before
    return {"skipped": skipped, "same": same}


def test_a_divided_model_is_not_compiled() -> None:
    found = facts(world_size=2, has_bf16=True, draws_random=True, flops_per_token=1e12)
    job = Job(data=("x",), strategy=from_text("strategies", "zero3"))
    assert not derive(job, found).compile
    assert derive(dataclasses.replace(job, strategy=from_text("strategies", "zero1")), found).compile
    with pytest.raises(UsageError, match="leave it out"):
        derive(dataclasses.replace(job, compile="on"), found)


def _flipped(world: Any, kind: str) -> str:
    """A bit of one of two groups flips; what each worker hears of it."""
    case = {**BASE, "placement": Sharded(stage=3, shard=2), "exchange": AllReduce()}
    replica, feed = begin(world, case)
    for step in range(2):
        replica.step(feed.part(step), summed)
    before = replica.check_agreement()
    if world.rank == 3:
        held = replica.method.layout.held() if kind == "parameters" else {}
        state = replica.method.optimizer.state_by_name()
        moment = next(t for name, t in sorted(state.items()) if name.endswith("exp_avg") and t.numel())
        one = next((t for _, t in held.values() if t.numel()), moment)
        one.detach().view(-1).view(torch.int64)[0] ^= 1
    try:
        after = replica.check_agreement()
    except Diverged as error:
        after = str(error)
    replica.close()
    return "the same" if after == before else after


@pytest.mark.parametrize("kind", ["parameters", "optimizer state"])
def test_a_bit_that_flips_in_one_group_is_named_to_all(fleets: Any, kind: str) -> None:
    said = fleets(4, "group").run(_flipped, kind)
    assert len(set(said)) == 1
    assert f"worker 3 (group 1) holds other {kind} than worker 1 (group 0) after step 2" in said[0]
