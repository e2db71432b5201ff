"""Training through a parameter server: what must be equal is equal, what is stale is measured, a killed server costs seconds."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import contract
import numpy as np
import pytest
import torch
import warm
from runs import TINY, command, environment, events, manyhands, summary
from test_exactness import SEQ, N, Rows, make, summed

from manyhands.core.errors import PeerLost, Stopped, UsageError
from manyhands.data.sample import Order
from manyhands.exchange.feedback import ErrorFeedback
from manyhands.exchange.half import BF16
from manyhands.exchange.topk import TopK
from manyhands.placement.served import Served
from manyhands.serve.server import Server
from manyhands.strategy.base import Strategy
from manyhands.strategy.optimizers import SGD, AdamW
from manyhands.train import session
from manyhands.train.feed import Feed
from manyhands.train.method import rows_of
from manyhands.train.replica import Part, Replica
from manyhands.wire.solo import Solo
from manyhands.wire.world import Member, World

TOKEN = "a token that only the tests know"


def run(world: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Steps of a small model in float64; parameters, losses and figures."""
    torch.set_num_threads(1)
    model = make()
    placement = {"placement": case["placement"]} if case.get("placement") else {}
    strategy = Strategy(outer=case["optimizer"], **placement)
    replica = Replica(model, strategy, world.wire, max_grad_norm=0.5, targets_per_row=SEQ, total=20)
    feed = Feed(
        rows=Rows(),
        order=Order(N, 6, 3, False),
        rank=world.rank,
        weights=[2.0, 1.0, 1.0][: world.size],
        micro_batch=1,
        device_batch=3,
        coalesce=True,
        device=torch.device("cpu"),
        seed=3,
    )
    if case.get("resume"):
        session.restore_replica(replica, Path(case["resume"]))
    results, own = [], []
    while replica.steps < case["steps"]:
        part = feed.part(replica.steps)
        own.append(sum(rows_of(batch) for _, batch in part.micro_batches))
        results.append(replica.step(part, summed))
    replica.meet()
    replica.check_agreement()
    if case.get("save"):
        session.save_replica(world, replica, Path(case["save"]))
    figures = replica.method.figures() if case.get("placement") else {}
    weights = {name: t.detach().clone().numpy() for name, t in model.state_dict().items()}
    with replica.agreed():  # nobody leaves before all have asked
        pass
    replica.close()
    return {
        "losses": [r.loss for r in results],
        "norms": [r.grad_norm for r in results],
        "weights": weights,
        "figures": figures,
        "own": own,
        "rows": [[rows for _, rows in r.work] for r in results],
        "busy": [[(*work, *spent) for work, spent in zip(r.work, r.spent, strict=True)] for r in results],
    }


def alone() -> World:
    return World(Solo(), (Member(0, "here", "cpu"),), "solo")


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """`serving(n, **fields)`: n fresh servers in this process, and the placement that names them."""
    token = tmp_path / "token"
    token.write_text(TOKEN)
    with contextlib.ExitStack() as stack:
        made = 0

        def start(n: int = 1, **fields: Any) -> Served:
            nonlocal made
            addresses = []
            for _ in range(n):
                made += 1
                server = Server(listen=f"unix:{tmp_path}/{made}", token=TOKEN, lease_s=1000.0)
                server.start()
                stack.callback(server.stop, 0)
                addresses.append(server.address)
            return Served(address=",".join(addresses), token_file=str(token), lease_s=1000.0, **fields)

        yield start


def equal(a: dict[str, Any], b: dict[str, Any], tolerance: float = 1e-10) -> None:
    for name, array in b.items():
        assert np.allclose(a[name], array, rtol=0, atol=tolerance), name


@pytest.mark.parametrize(
    ("size", "n_servers", "consistency"), [(2, 1, "sync"), (3, 2, "sync"), (2, 2, "bounded(0)")]
)
def test_without_staleness_it_is_all_reduce(
    fleets: Any, serving: Any, size: int, n_servers: int, consistency: str
) -> None:
    fleet = fleets(size)
    for optimizer in (AdamW(0.01), SGD(0.1, momentum=0.9, nesterov=True)):
        case = {"optimizer": optimizer, "steps": 5}
        reference = fleet.run(run, case)[0]
        found = fleet.run(run, {**case, "placement": serving(n_servers, consistency=consistency)})
        for worker in found:
            equal(worker["weights"], reference["weights"])
            assert worker["losses"] == pytest.approx(reference["losses"], abs=1e-10)
            assert worker["norms"] == pytest.approx(reference["norms"], abs=1e-10)
        assert set(found[0]["figures"]["staleness"]) == {"0"}
        assert found[0]["rows"] == [list(step) for step in zip(*(w["own"] for w in found), strict=True)]
        assert all(worker["busy"] == found[0]["busy"] for worker in found)
        assert all(seconds > 0 for step in found[0]["busy"] for seconds, *_ in step)


def fail_before_a_push(world: Any, placement: Served) -> tuple[int, int, float] | None:
    """Rank 1 ends after two steps, and rank 0 goes on: whom it misses, its steps, and how far they have taken it."""
    model = torch.nn.Linear(2, 1).double()
    for param in model.parameters():
        torch.nn.init.zeros_(param)
    replica = Replica(model, Strategy(placement=placement, outer=SGD(1.0)), world.wire)
    lost = None
    try:
        for step in range(2 if world.rank else 3):
            part = Part(step, [(world.rank, {"x": torch.ones(1, 2).double()})], 2, 2, 0)
            replica.step(part, lambda m, batch: (m(batch["x"]).sum() + m(batch["x"]).sum(), 1))
    except PeerLost as error:
        lost = error.rank
    found = lost, replica.steps, float(model.weight.detach().sum())
    replica.close()
    return found if world.rank == 0 else None


@pytest.mark.parametrize("n_servers", [1, 2])
def test_no_round_is_made_without_a_workers_samples(fleets: Any, serving: Any, n_servers: int) -> None:
    (found, _) = fleets(2).run(fail_before_a_push, serving(n_servers, consistency="sync"))
    assert found == (1, 2, -8.0)


def test_one_worker_alone_goes_on_after_any_silence(tmp_path: Path) -> None:
    """It was stopped for a while: no round was made without it."""
    (tmp_path / "token").write_text(TOKEN)
    server = Server(listen=f"unix:{tmp_path}/1", token=TOKEN, lease_s=1000.0)
    server.start()
    placement = Served(address=server.address, token_file=str(tmp_path / "token"), lease_s=1000.0)
    replica = Replica(torch.nn.Linear(2, 1), Strategy(placement=placement, outer=SGD(1.0)), alone().wire)
    for step in range(2):
        part = Part(step, [(0, {"x": torch.ones(1, 2)})], 1, 1, 0)
        replica.step(part, lambda m, batch: (m(batch["x"]).sum(), 1))
        server.shard.members["worker-0"].seen -= 2 * server.shard.lease_s
        server.shard.expire()
        assert server.shard.members == {}
    assert server.shard.version == 2
    replica.close()
    server.stop(0)


@pytest.mark.parametrize("consistency", ["sync", "bounded(3)", "async"])
def test_one_worker_is_plain_training(serving: Any, consistency: str) -> None:
    case = {"optimizer": AdamW(0.01), "steps": 5}
    reference = run(alone(), case)
    found = run(alone(), {**case, "placement": serving(2, consistency=consistency)})
    equal(found["weights"], reference["weights"])
    assert found["losses"] == pytest.approx(reference["losses"], abs=1e-10)


def test_without_order_workers_still_end_with_the_same_bits(fleets: Any, serving: Any) -> None:
    for fields in ({"consistency": "async", "accumulate": 3}, {"consistency": "bounded(1)", "discard": 2}):
        case = {"optimizer": SGD(0.05), "steps": 12, "placement": serving(**fields)}
        found = fleets(2).run(run, case)
        equal(found[0]["weights"], found[1]["weights"], 0.0)
        for rank, worker in enumerate(found):
            heard, own = [sum(step[rank] for step in w["rows"]) for w in found], sum(worker["own"])
            assert heard[rank] == own  # of its own pushes it knows all
            assert 0 <= heard[1 - rank] <= own  # the other, as far as they had come
        figures = found[0]["figures"]
        assert sum(figures["staleness"].values()) <= 24
        assert figures["updates"] > 0
        assert figures["consistency"] == fields["consistency"]
        assert all(np.isfinite(t).all() for t in found[0]["weights"].values())


def test_pushes_that_are_too_stale_are_told(tmp_path: Path) -> None:
    """Of two workers that push one after the other, one is an update late."""
    corpus, output = tmp_path / "corpus.txt", tmp_path / "run"
    corpus.write_text("many hands make light work\n" * 300)
    strategy = "parameter-server(consistency=async, discard=0, lr=1e-3)"
    given = ["--data", corpus, *TINY, "--steps", 20, "--workers", 2, "--output", output]
    manyhands("train", *given, "--strategy", strategy)
    told = warm.manyhands("ledger", output)
    assert summary(output)["served"]["discarded"]
    assert "its push was staler than the servers take (discard)" in told
    assert "every sample once" in told


@pytest.mark.parametrize("served_first", [True, False])
def test_a_run_moves_between_all_reduce_and_a_server(
    fleets: Any, serving: Any, tmp_path: Path, served_first: bool
) -> None:
    """Four steps of two workers one way, four of three workers the other way, against eight steps of all-reduce."""
    optimizer = AdamW(0.01)
    reference = fleets(2).run(run, {"optimizer": optimizer, "steps": 8})[0]
    placements = [serving(2) if served_first else None, None if served_first else serving(3)]
    saved = str(tmp_path / "run")
    fleets(2).run(run, {"optimizer": optimizer, "steps": 4, "save": saved, "placement": placements[0]})
    case = {"optimizer": optimizer, "steps": 8, "resume": saved, "placement": placements[1]}
    equal(fleets(3).run(run, case)[2]["weights"], reference["weights"])


def test_nothing_is_lost_in_encoded_pushes(serving: Any) -> None:
    """With a constant gradient c: start − end = rate · (T c − what is still held back)."""
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 3).double()
    slope = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    strategy = Strategy(placement=serving(2), exchange=ErrorFeedback(BF16()), outer=SGD(0.5))
    replica = Replica(model, strategy, Solo())

    def loss(forward: Any, batch: Any) -> tuple[torch.Tensor, int]:
        return sum((p * slope[name]).sum() for name, p in forward.named_parameters()), 1  # type: ignore[return-value]

    for step in range(7):
        replica.step(Part(step, [(0, {"x": torch.zeros(1)})], 1, 1, 0), loss)
    for server, layout in enumerate(replica.method._servers.layouts):  # type: ignore[attr-defined]
        held = torch.cat(replica.states[server]["residual"])
        assert held.abs().max() > 0
        for entry, at in zip(layout.entries, layout.offsets, strict=True):
            kept = held[at // 8 : at // 8 + entry.numel].view(entry.shape)
            moved = start[entry.name] - dict(model.named_parameters())[entry.name].detach()
            assert torch.allclose(moved / 0.5 + kept, 7 * slope[entry.name], rtol=0, atol=1e-12)
    assert not replica.method._held  # type: ignore[attr-defined]  # of steps that all have done nobody asks
    replica.close()


@pytest.mark.parametrize("n_servers", [1, 2])
def test_an_update_of_which_nobody_was_told_counts(serving: Any, n_servers: int) -> None:
    """A worker is lost before the answers come: the step is done, and what the push left out is held back."""
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 3).double()
    slope = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    strategy = Strategy(placement=serving(n_servers), exchange=ErrorFeedback(BF16()), outer=SGD(0.5))
    replica = Replica(model, strategy, Solo())
    method: Any = replica.method

    def loss(forward: Any, batch: Any) -> tuple[torch.Tensor, int]:
        return sum((p * slope[name]).sum() for name, p in forward.named_parameters()), 1  # type: ignore[return-value]

    part = [(0, {"x": torch.zeros(1)})]
    replica.step(Part(0, part, 1, 1, 0), loss)
    push = method._servers.push

    def unheard(*args: Any) -> dict[str, Any]:
        push(*args)
        raise PeerLost(1, "push", "killed")

    method._servers.push = unheard
    with pytest.raises(PeerLost):
        replica.step(Part(1, part, 1, 1, 0), loss)
    assert replica.steps == 1
    assert method.rewind() == {}
    assert replica.steps == 2
    assert replica.tokens == 2
    salvaged = method.salvage()
    assert salvaged["steps"] == 2
    for server, layout in enumerate(method._servers.layouts):
        held = torch.cat(replica.states[server]["residual"])
        for entry, at in zip(layout.entries, layout.offsets, strict=True):
            kept = held[at // 8 : at // 8 + entry.numel].view(entry.shape)
            moved = start[entry.name] - salvaged["params"][entry.name]
            assert torch.allclose(moved / 0.5 + kept, 2 * slope[entry.name], rtol=0, atol=1e-12)
    replica.close()


def test_clipping_bounds_what_is_applied_of_pushes_that_held_something_back(serving: Any) -> None:
    """One of forty values travels at a time: what it has gathered by then is longer than any gradient was."""
    model = torch.nn.Linear(40, 1, bias=False).double()
    placement = serving(1, consistency="async")
    strategy = Strategy(
        placement=placement, exchange=ErrorFeedback(TopK(density=0.025, chunk=0)), outer=SGD(1.0)
    )
    replica = Replica(model, strategy, Solo(), max_grad_norm=1.0)

    def loss(forward: Any, batch: Any) -> tuple[torch.Tensor, int]:
        return forward.weight.sum() / 40**0.5, 1  # a gradient of norm 1

    moved, norms = [], []
    for step in range(60):
        before = model.weight.detach().clone()
        result = replica.step(Part(step, [(0, {"x": torch.zeros(1)})], 1, 1, 0), loss)
        moved.append(float((model.weight.detach() - before).norm()))
        norms.append(result.grad_norm)
    assert max(norms) > 3, "what was held back travels at last"
    assert 0.9 < max(moved) <= 1.0 + 1e-9
    replica.close()


def test_a_push_that_is_dropped_takes_nothing_along(serving: Any) -> None:
    """Another worker's push in between makes this one too stale: what was held back before is held back still."""
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 3).double()
    slope = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    placement = serving(2, consistency="async", discard=0)
    strategy = Strategy(placement=placement, exchange=ErrorFeedback(BF16()), outer=SGD(0.5))
    replica = Replica(model, strategy, Solo())
    method: Any = replica.method

    def loss(forward: Any, batch: Any) -> tuple[torch.Tensor, int]:
        return sum((p * slope[name]).sum() for name, p in forward.named_parameters()), 1  # type: ignore[return-value]

    def held() -> list[torch.Tensor]:
        return [r.clone() for state in replica.states for r in state["residual"]]

    def step(number: int) -> None:
        replica.step(Part(number, [(0, {"x": torch.zeros(1)})], 1, 1, 0), loss)

    step(0)
    first, version = held(), method._version
    assert all(r.abs().max() > 0 for r in first)
    method._version = 0  # as if others had made updates meanwhile
    step(1)
    assert all(torch.equal(a, b) for a, b in zip(first, held(), strict=True))
    assert method.figures()["discarded"] == 1
    assert method._version == version
    step(2)
    assert not any(torch.equal(a, b) for a, b in zip(first, held(), strict=True))
    replica.close()


def test_a_worker_that_is_stopped_leaves_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A standing server outlives the run; the lease must not keep the next one waiting."""
    from manyhands.train.job import Job
    from manyhands.train.order import Order as Work
    from manyhands.train.worker import work

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    token, corpus = tmp_path / "token", tmp_path / "corpus.txt"
    token.write_text(TOKEN)
    corpus.write_text("many hands make light work\n" * 200)
    server = Server(listen=f"unix:{tmp_path}/socket", token=TOKEN, lease_s=1000.0)
    server.start()
    placement = Served(address=server.address, token_file=str(token), lease_s=1000.0)
    job = Job(
        data=(str(corpus),),
        strategy=Strategy(placement=placement, outer=SGD(0.1)),
        model="gpt2-nano",
        tokenizer="byte",
        seq_len=16,
        global_batch=4,
        steps=1000,
        eval_fraction=0.0,
        prompt="",
        precision="fp32",
        compile="off",
        device="cpu",
        threads=1,
        output=str(tmp_path / "run"),
    )

    def interrupt() -> None:
        with server.shard.cond:
            assert server.shard.cond.wait_for(lambda: server.shard.version >= 2, 60.0)
        os.kill(os.getpid(), signal.SIGTERM)

    other = threading.Thread(target=interrupt)
    other.start()
    try:
        with pytest.raises(Stopped):
            work(Work(job, {}))
        assert server.shard.version >= 2
        assert server.shard.members == {}
    finally:
        other.join()
        server.stop(0)


def test_impossible_pairings_are_refused(serving: Any) -> None:
    from manyhands.cadence.delayed import Delayed
    from manyhands.cadence.every import Every, PostLocal
    from manyhands.exchange.allreduce import AllReduce
    from manyhands.exchange.powersgd import PowerSGD

    placement = serving()
    for cadence in (Every(4), PostLocal(4, start=10), Delayed()):
        with pytest.raises(UsageError, match="pushes at every step"):
            Strategy(placement=placement, cadence=cadence)
    for exchange, words in (
        (AllReduce(precision="bf16"), "a push goes one way"),
        (TopK(average="senders"), "give it average='all'"),
        (PowerSGD(), "a push goes one way"),
        (AllReduce(bucket_mb=1.0), "bucket_mb would be ignored"),
    ):
        with pytest.raises(UsageError, match=words):
            Strategy(placement=placement, exchange=exchange)
    with pytest.raises(UsageError, match="only manyhands' own launcher starts servers"):
        Replica(make(), Strategy(placement=Served()), Solo())
    with pytest.raises(UsageError, match="inner optimizer"):
        Strategy(placement=placement, inner=AdamW(0.1))


def test_a_killed_server_is_started_again(tmp_path: Path) -> None:
    """The main job as a user runs it: two servers, one of them killed, then the other one stopped for good."""
    words, rng = ["hand", "many", "light", "work"], random.Random(1)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(" ".join(rng.choice(words) for _ in range(9)) for _ in range(300)))
    output = tmp_path / "run"
    strategy = "parameter-server(consistency=bounded(2), servers=2, exchange=error-feedback(int8), lr=1e-3)"
    arguments = ["--data", corpus, *TINY, "--steps", 30, "--workers", 2, "--save-every", 15, "--hang-s", 4]
    process = subprocess.Popen(
        command("train", *arguments, "--strategy", strategy, "--output", output),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    said, killed, stopped = "", 0, 0
    with process.stdout:
        for line in process.stdout:
            said += line
            if line.startswith("step ") and not killed:
                killed = server_pid(output / "servers" / "server-1")
                os.kill(killed, signal.SIGKILL)
            elif line.startswith("step ") and not stopped and "starting it again" in said:
                stopped = server_pid(output / "servers" / "server-0")
                os.kill(stopped, signal.SIGSTOP)
    assert process.wait() == 0, said
    assert killed
    assert stopped
    assert "parameter server 0 has given no sign of life" in said
    for server in range(2):
        assert f"parameter server {server} ended (SIGKILL); starting it again" in said
    found = summary(output)
    assert found["steps"] == 30
    assert found["samples"] == sum(worker["samples"] for worker in found["workers"])
    contract.check(found, {**contract.SUMMARY, "served": contract.SERVED})
    assert found["served"]["updates"] == 60
    assert not (output / "servers").exists()
    assert "continues with update" in (output / "logs" / "server-1.log").read_text()
    losses = [e["loss"] for e in events(output, "stepped")]
    assert losses[-1] < losses[0]


def server_pid(state: Path) -> int:
    """The process that serves from this directory."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(state) in path.read_bytes().decode(errors="replace").split("\0"):
                return int(path.parent.name)
    raise AssertionError(f"nobody serves from {state}")
