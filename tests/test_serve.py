"""The parameter server: its rules, its arithmetic, its memory; over real sockets, with no launcher and no model."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhands.core import config, tls
from manyhands.core.errors import CheckpointError, PeerLost, UsageError
from manyhands.placement.served import Served, bound_of
from manyhands.serve import protocol
from manyhands.serve.client import Endpoint, Link, Servers
from manyhands.serve.layout import Layout, divide
from manyhands.serve.server import Server
from manyhands.strategy.delayed_nesterov import DelayedNesterov
from manyhands.strategy.optimizers import SGD, AdamW

TOKEN = "a token that only the tests know"
SHAPES = {"wide": (7, 5), "bias": (5,), "scalar": (), "head": (3, 7)}
WAIT_S = 60.0


def initial(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=g, dtype=dtype) for name, shape in SHAPES.items()}


def gradient(step: int, worker: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1000 * step + worker + 1)
    return {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in SHAPES.items()}


class Worker:
    """A worker without a model: pushes given sums of gradients."""

    def __init__(
        self, servers: list[Server], name: str, *, job: str = "job", patience_s: float = 20.0
    ) -> None:
        links = [
            Link(lambda s=s: Endpoint(s.address, s.fingerprint), TOKEN, patience_s=patience_s)
            for s in servers
        ]
        self.servers = Servers(links, member=name, job=job, lease_s=1000.0)
        self.servers.lay_out(initial())
        self.out = [torch.zeros(lay.size_bytes, dtype=torch.uint8) for lay in self.servers.layouts]
        self.version = 0

    def begin(self, optimizer: Any, *, serial: int = 0, steps: int = 0, **rules: Any) -> None:
        rules = {"optimizer": config.to_data(optimizer, "optimizers"), **rules}
        self.servers.begin(rules, initial(), {}, serial=serial, steps=steps, tokens=0)

    def push(
        self,
        step: int,
        sums: dict[str, torch.Tensor],
        *,
        count: int = 4,
        share: float = 0.5,
        nominal: float = 8.0,
        loss: float = 1.0,
        norm: float | None = None,
        codec: Any = None,
        used: dict[str, bool] | None = None,
        stop: int = 0,
        save: bool = False,
    ) -> dict[str, Any]:
        payloads = []
        for lay in self.servers.layouts:
            flat = torch.zeros(lay.size_bytes, dtype=torch.uint8)
            for name, view in lay.views(flat).items():
                view.copy_(sums[name] / nominal)
            if codec is not None:
                flat = torch.cat([codec.encode(f, step) for f in lay.flats(flat)])
            payloads.append(flat)
        mean = math.sqrt(sum(float((s / count).square().sum()) for s in sums.values()))
        header = {
            "step": step,
            "version": self.version,
            "share": share,
            "nominal": nominal,
            "loss": loss,
            "count": count,
            "norm": mean if norm is None else norm,
            "stop": stop,
            "save": save,
        }
        answer = self.servers.push(header, used or dict.fromkeys(sums, True), payloads, self.out)
        self.version = answer["version"]
        return answer

    @property
    def params(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for lay, out in zip(self.servers.layouts, self.out, strict=True):
            found.update({name: view.clone() for name, view in lay.views(out).items()})
        return found


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """`serve(**options)`: a started server on a free port, stopped at the end; its log in `server.lines`."""
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> Server:
            lines: list[str] = []
            server = Server(
                **{"listen": "127.0.0.1:0", "token": TOKEN, "log": lines.append, "lease_s": 1000.0, **options}
            )
            server.lines = lines  # type: ignore[attr-defined]
            server.start()
            stack.callback(lambda: server._ended.is_set() or server.stop(0))
            return server

        start.workers = lambda servers, n, **more: [  # type: ignore[attr-defined]
            enter(stack, Worker(servers, f"worker-{i}", **more)) for i in range(n)
        ]
        yield start


def enter(stack: contextlib.ExitStack, worker: Worker) -> Worker:
    stack.callback(worker.servers.close)
    return worker


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Run on threads of their own; their results in order, or the first error."""
    results: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            results[i] = calls[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "a call hangs"
    if errors:
        raise errors[0]
    return results


def plain(
    optimizer: Any, grads: list[dict[str, torch.Tensor]], factors: list[float] | None = None
) -> dict[str, Any]:
    """The same updates with PyTorch alone: one for each mean gradient."""
    params = {name: torch.nn.Parameter(t) for name, t in initial().items()}
    made = optimizer.build(list(params.items()), "cpu")
    for i, grad in enumerate(grads):
        for name, param in params.items():
            param.grad = grad[name].clone()
        made.set_lr(factors[i] if factors else 1.0)
        made.step()
    return {name: p.detach() for name, p in params.items()}


def close_to(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-12) -> None:
    for name in b:
        assert torch.allclose(a[name], b[name], rtol=0, atol=tolerance), name


# ---------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("n_servers", [1, 3])
@pytest.mark.parametrize(
    "optimizer", [SGD(0.1, momentum=0.9), AdamW(0.01, schedule=None)], ids=["sgd", "adamw"]
)
def test_sync_is_one_update_of_the_sum(serve: Any, n_servers: int, optimizer: Any) -> None:
    servers = [serve() for _ in range(n_servers)]
    a, b = serve.workers(servers, 2)
    a.begin(optimizer, consistency="sync", max_norm=0.7)
    for worker in (a, b):
        worker.servers.join(0)
    means = []
    for step in range(4):
        sums = [gradient(step, w) for w in range(2)]
        pushes = [partial(w.push, step, sums[i], count=3 + 2 * i) for i, w in enumerate((a, b))]
        answers = together(*pushes)
        mean = {n: (sums[0][n] + sums[1][n]) / 8 for n in SHAPES}
        norm = math.sqrt(sum(float(g.square().sum()) for g in mean.values()))
        means.append({n: g * min(1.0, 0.7 / (norm + 1e-6)) for n, g in mean.items()})
        for answer in answers:
            assert answer["count"] == 8
            assert answer["loss"] == 2.0
            assert answer["norm"] == pytest.approx(norm, abs=1e-12)
            assert answer["version"] == step + 1
    for worker in (a, b):
        close_to(worker.params, plain(optimizer, means))
    status = a.servers.status()
    assert status[0]["staleness"] == {"0": 8}
    assert sum(s["parameter_bytes"] for s in status) == sum(t.numel() * 8 for t in initial().values())


def test_a_push_sent_twice_is_applied_once(serve: Any) -> None:
    (worker,) = serve.workers([serve()], 1)
    worker.begin(SGD(0.1), consistency="async")
    worker.servers.join(0)
    worker.push(0, gradient(0, 0), share=1.0)
    before = worker.params
    assert worker.push(0, gradient(0, 0), share=1.0)["version"] == 1
    close_to(worker.params, before, 0.0)


def test_the_pushes_of_a_round_move_sgd_as_one_update(serve: Any) -> None:
    a, b = serve.workers([serve()], 2)
    a.begin(SGD(0.1), consistency="async")
    sums = [gradient(0, w) for w in range(2)]
    a.push(0, sums[0], count=4, share=0.5)
    b.push(0, sums[1], count=4, share=0.5)
    mean = {n: (sums[0][n] + sums[1][n]) / 8 for n in SHAPES}
    close_to(b.params, plain(SGD(0.1), [mean]))


def test_accumulate_makes_one_update_of_k_pushes(serve: Any) -> None:
    a, b = serve.workers([serve()], 2)
    optimizer = AdamW(0.01, schedule=None)
    a.begin(optimizer, consistency="async", accumulate=2)
    sums = [gradient(0, w) for w in range(3)]
    assert a.push(0, sums[0], count=3)["version"] == 0
    assert b.push(0, sums[1], count=5)["version"] == 1
    mean = {n: (sums[0][n] + sums[1][n]) / 8 for n in SHAPES}
    close_to(b.params, plain(optimizer, [mean]))
    a.push(1, sums[2], count=4)
    a.servers.pull(
        a.out, flush=True
    )  # what waits for company is applied where all meet: at half the rate, being half
    close_to(a.params, plain(optimizer, [mean, {n: s / 4 for n, s in sums[2].items()}], [1.0, 0.5]))


def test_stale_pushes_are_counted_and_discarded(serve: Any) -> None:
    a, b = serve.workers([serve()], 2)
    a.begin(SGD(0.1), consistency="async", discard=1)
    b.servers.join(0)
    a.servers.join(0)
    for step in range(3):
        a.push(step, gradient(step, 0))
    before = a.params
    used = [b.push(0, gradient(0, 1))["applied"]]  # taken at version 0, three updates ago
    close_to(b.params, before, 0.0)
    used += [b.push(step, gradient(step, 1))["applied"] for step in (0, 1)]
    status = a.servers.status()[0]
    assert status["staleness"] == {"0": 4, "3": 1}
    assert status["discarded"] == 1
    assert used == [[False], [False], [True]]  # the second time, as after a lost answer
    assert status["version"] == 4


def test_delay_compensation_is_equation_10(serve: Any) -> None:
    a, b = serve.workers([serve()], 2)
    a.begin(SGD(0.1), consistency="async", compensation=0.3)
    for worker in (a, b):
        worker.servers.join(0)
        worker.servers.pull(worker.out)
    then = b.params
    a.push(0, gradient(0, 0))
    now = a.params
    b.push(0, gradient(0, 1))
    for name in SHAPES:
        g = gradient(0, 1)[name] / 4
        expected = now[name] - 0.05 * (g + 0.3 * g * g * (now[name] - then[name]))
        assert torch.allclose(b.params[name], expected, rtol=0, atol=1e-12)


def test_delayed_nesterov_renews_momentum_after_every_nth_push(serve: Any) -> None:
    """Algorithm by hand for N = 2 workers; for N = 1 it is PyTorch's Nesterov momentum."""
    a, b = serve.workers([serve()], 2)
    beta, c, rate = 0.9, 0.2, 0.1
    a.begin(DelayedNesterov(rate, every=2, momentum=beta, activation=c), consistency="async")
    theta, m, delta = initial(), dict.fromkeys(SHAPES, 0.0), dict.fromkeys(SHAPES, 0.0)
    for t in range(6):
        (a, b)[t % 2].push(t // 2, gradient(t, 0), count=4, share=0.5)
        renewed = (t + 1) % 2 == 0
        for name in SHAPES:
            g = gradient(t, 0)[name] / 4
            delta[name] = delta[name] + g
            if renewed:
                m[name], delta[name] = beta * m[name] + delta[name] / 2, 0.0
            active = 1 - c * 2 + c if renewed else c
            theta[name] = theta[name] - rate * (active * beta * m[name] + g / 2)
    close_to(b.params, theta)
    means = [gradient(step, 1) for step in range(4)]
    nesterov = plain(SGD(0.1, momentum=0.9, nesterov=True), means)
    close_to(plain(DelayedNesterov(0.1, every=1, momentum=0.9), means), nesterov)


def test_pushes_may_be_encoded(serve: Any) -> None:
    from manyhands.exchange.half import BF16

    (worker,) = serve.workers([serve()], 1)
    worker.begin(SGD(0.1), consistency="sync", codec=config.to_data(BF16(), "exchanges"))
    worker.servers.join(0)
    sums = gradient(0, 0)
    worker.push(0, sums, codec=BF16(), nominal=4.0)
    rounded = {n: (s / 4).to(torch.bfloat16).double() for n, s in sums.items()}
    close_to(worker.params, plain(SGD(0.1), [rounded]))
    sent, received = worker.servers.traffic
    raw = sum(t.numel() * 8 for t in initial().values())
    assert (sent - raw, received) == (raw // 4, raw)


def test_parameters_without_gradient_are_left_alone(serve: Any) -> None:
    (worker,) = serve.workers([serve()], 1)
    worker.begin(AdamW(0.1, schedule=None), consistency="sync")
    worker.servers.join(0)
    worker.push(0, gradient(0, 0), used={n: n != "head" for n in SHAPES})
    assert torch.equal(worker.params["head"], initial()["head"])
    assert not torch.equal(worker.params["wide"], initial()["wide"])
    assert not any(n.startswith("head.") for n in worker.servers.state()[2])


@pytest.mark.parametrize("consistency", ["sync", "async"])
def test_what_is_not_finite_is_left_out(serve: Any, consistency: str) -> None:
    (worker,) = serve.workers([serve()], 1)
    worker.begin(SGD(0.1), consistency=consistency)
    worker.servers.join(0)
    bad = gradient(0, 0)
    bad["wide"][0, 0] = math.inf
    assert worker.push(0, bad)["skipped"]
    close_to(worker.params, initial(), 0.0)
    assert not worker.push(1, gradient(1, 0))["skipped"]
    assert worker.servers.status()[0]["skipped"] == 1


# --------------------------------------------------------------------------------- who waits for whom


def test_nobody_is_further_ahead_than_the_bound(serve: Any) -> None:
    server = serve()
    fast, slow = serve.workers([server], 2)
    fast.begin(SGD(0.01), consistency="bounded(2)")
    fast.servers.join(0)
    slow.servers.join(0)
    done: list[int] = []
    arrived = threading.Condition()

    def run() -> None:
        for step in range(6):
            fast.push(step, gradient(step, 0))
            with arrived:
                done.append(step)
                arrived.notify()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    for slow_step in range(4):
        with arrived:  # after k steps of the slow one, k + 2 of the fast one are answered and not one more
            assert arrived.wait_for(lambda k=slow_step: len(done) == k + 2, WAIT_S)
        with server.shard.cond:
            assert server.shard.cond.wait_for(
                lambda k=slow_step: server.shard.members["worker-0"].clock == k + 3, WAIT_S
            )
        assert len(done) == slow_step + 2
        slow.push(slow_step, gradient(slow_step, 1))
    thread.join(WAIT_S)
    assert done == list(range(6))


def test_a_round_goes_on_without_a_worker_that_left_and_it_may_come_back(serve: Any) -> None:
    server = serve()
    a, b = serve.workers([server], 2)
    a.begin(SGD(0.1), consistency="sync")
    for worker in (a, b):
        worker.servers.join(0)
    together(lambda: a.push(0, gradient(0, 0)), lambda: b.push(0, gradient(0, 1)))

    def leave() -> None:
        with server.shard.cond:
            assert server.shard.cond.wait_for(lambda: "worker-0" in server.shard.pending, WAIT_S)
        b.servers.close()

    together(lambda: a.push(1, gradient(1, 0)), leave)
    back = Worker([server], "worker-1")
    try:
        assert back.servers.join(0) == 2
        answers = together(lambda: a.push(2, gradient(2, 0)), lambda: back.push(2, gradient(2, 1)))
        assert [answer["count"] for answer in answers] == [8, 8]
        close_to(a.params, back.params, 0.0)
    finally:
        back.servers.close()


def test_a_silent_worker_loses_its_lease(serve: Any) -> None:
    server = serve(lease_s=0.3)
    (a,) = serve.workers([server], 1)
    b = Worker([server], "worker-1")
    a.begin(SGD(0.1), consistency="sync")
    a.servers.join(0)
    for link in b.servers._links:  # it joins, and is never heard of again
        link.call({"op": "join", "member": "worker-1", "job": "job", "step": 0})
    assert a.push(0, gradient(0, 0))["count"] == 4
    assert any("worker-1 is no longer waited for: silent" in line for line in server.lines)
    b.servers.close()


def test_a_wish_to_stop_reaches_all_at_the_same_step(serve: Any) -> None:
    a, b = serve.workers([serve()], 2)
    a.begin(SGD(0.1), consistency="async")
    a.servers.join(0)
    b.servers.join(0)
    for step in range(5):
        a.push(step, gradient(step, 0))
    assert b.push(0, gradient(0, 1), stop=15, save=True)["stop"] == 0
    stops = [a.push(5, gradient(5, 0))] + [b.push(step, gradient(step, 1)) for step in range(1, 6)]
    assert [s["stop"] for s in stops] == [15, 0, 0, 0, 0, 15]
    assert [s["save"] for s in stops] == [True, False, False, False, False, True]


def test_a_late_worker_saves_and_stops_with_the_others(serve: Any) -> None:
    """It pushes an old step, is told where the others are, and hears what they do after that step: they wait for it."""
    server = serve()
    a, b = serve.workers([server], 2)
    a.begin(SGD(0.1), consistency="sync")
    a.servers.join(0)
    b.servers.join(0)
    together(lambda: a.push(0, gradient(0, 0)), lambda: b.push(0, gradient(0, 1)))
    server.shard.expire("worker-1")  # its lease has run out: it is suspended
    for step in range(1, 4):
        answer = a.push(step, gradient(step, 0), save=step == 3, stop=15 * (step == 3))
    assert (answer["save"], answer["stop"], answer["applied"]) == (True, 15, [True])
    late = b.push(1, gradient(1, 1))
    assert (late["late"], late["step"], late["applied"]) == (True, 3, [False])
    assert (late["save"], late["stop"]) == (True, 15)
    close_to(a.params, b.params, 0.0)


# --------------------------------------------------------------------------------------- what survives


@pytest.mark.parametrize(
    "rules", [{"consistency": "sync"}, {"consistency": "async", "compensation": 0.1, "accumulate": 2}]
)
@pytest.mark.parametrize("durability", ["each", "synced"])
def test_acknowledged_pushes_survive(serve: Any, tmp_path: Path, durability: Any, rules: Any) -> None:
    """A server that vanishes without a word, and another that finds its files, give the same bits as one that lives."""
    runs = []
    for restart in (False, True):
        options = {"state": tmp_path / f"{restart}", "durability": durability}
        server = serve(**options)
        (worker,) = serve.workers([server], 1)
        worker.begin(AdamW(0.01, schedule=None), **rules)
        worker.servers.join(0)
        worker.servers.pull(worker.out)
        for step in range(5):
            worker.push(step, gradient(step, 0))
        if restart:
            vanish(server)
            server = serve(**options)
            (worker,) = serve.workers([server], 1)
            assert server.shard.members["worker-0"].clock == 5
            worker.push(4, gradient(4, 0))  # its answer was lost, say: it is not applied again
        for step in range(5, 8):
            worker.push(step, gradient(step, 0))
        runs.append((worker.params, worker.servers.state()[2], worker.servers.status()[0]["version"]))
    close_to(runs[0][0], runs[1][0], 0.0)
    close_to(runs[0][1], runs[1][1], 0.0)
    assert runs[0][2] == runs[1][2]


def vanish(server: Server) -> None:
    """As after a SIGKILL: nothing more is written. The lock goes with the process."""
    server._ended.set()
    server._server.stop(0).wait()
    keeper: Any = server.shard._keeper
    keeper._journal.close()
    server.shard._keeper = None


def test_interval_loses_what_it_says(serve: Any, tmp_path: Path) -> None:
    options = {"state": tmp_path / "state", "durability": "interval"}
    server = serve(**options)
    (worker,) = serve.workers([server], 1)
    worker.begin(SGD(0.1), consistency="async")
    worker.push(0, gradient(0, 0))
    log = sum(p.stat().st_size for p in (tmp_path / "state").glob("log-*"))
    worker.push(1, gradient(1, 0))
    assert sum(p.stat().st_size for p in (tmp_path / "state").glob("log-*")) == log
    vanish(server)
    again = serve(**options)
    assert again.shard.version == 0
    assert list(again.shard.members) == ["worker-0"]  # who takes part is never lost


def test_a_torn_record_is_left_out(serve: Any, tmp_path: Path) -> None:
    options = {"state": tmp_path / "state"}
    server = serve(**options)
    (worker,) = serve.workers([server], 1)
    worker.begin(SGD(0.1), consistency="async")
    worker.push(0, gradient(0, 0))
    one = worker.params
    worker.push(1, gradient(1, 0))
    vanish(server)
    (log,) = (tmp_path / "state").glob("log-*")
    os.truncate(log, log.stat().st_size - 3)
    again = serve(**options)
    assert again.shard.version == 1
    close_to({n: p.detach() for n, p in again.shard.store.params.items()}, one, 0.0)


def test_failed_writes_and_zeros_at_the_end_leave_the_log_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from manyhands.serve import journal as module

    def full(file: Any, data: memoryview) -> None:
        file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    journal = module.Journal(tmp_path, "each")
    journal.rotate()
    payload = torch.arange(100, dtype=torch.uint8)

    def record(i: int) -> None:
        journal.record({"i": i}, protocol.view(payload), "push")

    record(0)
    for _ in range(3):  # a disk that stays full for a while
        with monkeypatch.context() as patch:
            patch.setattr(module, "_write_all", full)
            with pytest.raises(CheckpointError, match="No space left"):
                record(-1)
    record(1)
    journal.close()
    (log,) = tmp_path.glob("log-*")
    os.truncate(log, log.stat().st_size + 4096)  # grown, but never written, before a loss of power
    found = list(module.replayed([log]))
    assert [header["i"] for header, _ in found] == [0, 1]
    assert all(torch.equal(body, payload) for _, body in found)


def test_two_servers_do_not_share_a_state(serve: Any, tmp_path: Path) -> None:
    serve(state=tmp_path)
    with pytest.raises(CheckpointError, match="in use by another server"):
        serve(state=tmp_path)


def test_snapshots_fold_the_log(serve: Any, tmp_path: Path) -> None:
    server = serve(state=tmp_path, interval_s=1e-9)
    (worker,) = serve.workers([server], 1)
    worker.begin(SGD(0.1), consistency="async")
    for step in range(4):
        worker.push(step, gradient(step, 0))
    server.stop(0)
    assert len(list(tmp_path.glob("snapshot-*"))) == 1
    assert len(list(tmp_path.glob("log-*"))) == 1
    again = serve(state=tmp_path)
    assert again.shard.version == 4
    close_to({n: p.detach() for n, p in again.shard.store.params.items()}, worker.params, 0.0)


# -------------------------------------------------------------------------------------- who is refused


def raw_call(server: Server, messages: list[bytes], token: str = TOKEN) -> Any:
    """A foreign program's call over a real connection: the RpcError that it gets."""
    import grpc

    with grpc.insecure_channel(server.address) as channel:
        call = channel.stream_stream(protocol.METHOD)
        with pytest.raises(grpc.RpcError) as caught:
            list(call(iter(messages), metadata=(("authorization", f"Bearer {token}"),), timeout=WAIT_S))
    return caught.value.code().name


HEAD = struct.Struct("<4sIQ")
JUNK = {
    "nothing": [],
    "noise": [b"\x00\xff" * 40],
    "short": [b"MHP1"],
    "foreign": [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"],
    "oversized header": [HEAD.pack(b"MHP1", 0xFFFFFFFF, 0) + b"{}"],
    "oversized payload": [HEAD.pack(b"MHP1", 2, 1 << 60) + b"{}"],
    "not json": [HEAD.pack(b"MHP1", 2, 0) + b"{["],
    "not an object": [HEAD.pack(b"MHP1", 2, 0) + b"[]"],
    "pickle": [HEAD.pack(b"MHP1", 4, 0) + b"\x80\x04N."],
    "no such op": list(protocol.messages({"op": "shutdown"})),
    "huge push": [HEAD.pack(b"MHP1", 13, 1 << 41) + b'{"op":"push"}'],
    "fields": list(protocol.messages({"op": "push", "member": "x", "step": -1, "used": "1111"})),
    "types": list(protocol.messages({"op": "push", "member": ["x"], "step": 0, "used": "1111"})),
    "no member": list(protocol.messages({"op": "join", "job": "job"})),
    "tensors": list(protocol.messages({"op": "begin", "tensors": [["p", "object", [1]]]})),
    "shape": list(protocol.messages({"op": "begin", "tensors": [["p", "float32", [-1]]]})),
    "claims more than it sends": [*protocol.messages({"op": "begin", "tensors": [["p", "float32", [9]]]})],
    "module": list(
        protocol.messages({"op": "begin", "tensors": [], "rules": {"optimizer": {"kind": "os:system"}}})
    ),
}


@pytest.mark.parametrize("what", JUNK)
def test_garbage_is_refused_logged_and_harmless(serve: Any, what: str) -> None:
    server = serve()
    (worker,) = serve.workers([server], 1)
    worker.begin(SGD(0.1), consistency="async")
    worker.push(0, gradient(0, 0))
    said = len(server.lines)
    assert raw_call(server, JUNK[what]) in ("INVALID_ARGUMENT", "FAILED_PRECONDITION")
    assert len(server.lines) > said
    close_to(worker.params, {n: p.detach() for n, p in server.shard.store.params.items()}, 0.0)
    assert worker.push(1, gradient(1, 0))["version"] == 2


def test_a_message_longer_than_allowed_is_refused(serve: Any) -> None:
    server = serve()
    assert raw_call(server, [b"\x00" * (protocol.MESSAGE_BYTES + 1)]) == "RESOURCE_EXHAUSTED"
    assert raw_call(server, [b""]) == "INVALID_ARGUMENT"


def test_a_wrong_token_is_refused_before_anything_is_read(serve: Any) -> None:
    server = serve()
    for token in ("", "wrong", TOKEN + "x"):
        assert raw_call(server, list(protocol.messages({"op": "status"})), token) == "UNAUTHENTICATED"
    assert sum("wrong token" in line for line in server.lines) == 3
    link = Link(lambda: Endpoint(server.address), "not the right token")
    with pytest.raises(UsageError, match="refused the token"):
        link.call({"op": "status"})
    link.close()


@pytest.mark.parametrize(
    "noise", [b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 4096, b"\x16\x03\x01\xff\xff" + b"\xff" * 400]
)
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_noise_on_the_socket_harms_nobody(serve: Any, noise: bytes, secure: bool) -> None:
    server = serve(identity=tls.self_signed() if secure else None)
    (worker,) = serve.workers([server], 1)
    worker.begin(SGD(0.1), consistency="async")
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as stranger:
        stranger.sendall(noise)
        stranger.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(4096):
                pass
    assert worker.push(0, gradient(0, 0))["version"] == 1


def test_tls_is_pinned_to_the_certificate(serve: Any) -> None:
    server, other = serve(identity=tls.self_signed()), tls.self_signed()
    (worker,) = serve.workers([server], 1)
    worker.begin(SGD(0.1), consistency="sync")
    worker.servers.join(0)
    assert worker.push(0, gradient(0, 0))["version"] == 1
    wrong = Link(lambda: Endpoint(server.address, other.fingerprint), TOKEN)
    with pytest.raises(UsageError, match="shows the certificate sha256:"):
        wrong.call({"op": "status"})
    wrong.close()
    plain_link = Link(lambda: Endpoint(server.address), TOKEN, patience_s=0.1)
    with pytest.raises(PeerLost):
        plain_link.call({"op": "status"})
    plain_link.close()


def own_certificate(directory: Path, *, names: Sequence[str], authority: bool) -> list[str]:
    """Files of a certificate as a company's tools make them, and its key: signed by itself or by an authority, a chain then."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def called(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    def signed(subject: x509.Name, key: Any, issuer: x509.Name, by: Any, sans: Sequence[str]) -> bytes:
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer)
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=1))
        builder = builder.not_valid_after(now + datetime.timedelta(days=9))
        if sans:
            alternatives = x509.SubjectAlternativeName([x509.DNSName(n) for n in sans])
            builder = builder.add_extension(alternatives, critical=False)
        return builder.sign(by, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    key, root = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    subject, issuer = called("parameters.example.org"), called("An authority")
    if authority:
        pem = signed(subject, key, issuer, root, names) + signed(issuer, root, issuer, root, ())
    else:
        pem = signed(subject, key, subject, key, names)
    files = directory / "own.pem", directory / "own.key"
    files[0].write_bytes(pem)
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return [str(file) for file in files]


@pytest.mark.parametrize("authority", [False, True], ids=["self-signed", "chain"])
@pytest.mark.parametrize("names", [("*.example.org", "b.example.org"), ()], ids=["names", "common-name"])
def test_a_certificate_of_ones_own_serves(
    serve: Any, tmp_path: Path, names: tuple[str, ...], authority: bool
) -> None:
    from manyhands.cli.serve import known_identity

    certificate, key = own_certificate(tmp_path, names=names, authority=authority)
    identity = known_identity(argparse.Namespace(tls_cert=certificate, tls_key=key), None)
    server = serve(identity=identity)
    (worker,) = serve.workers([server], 1, patience_s=5.0)
    worker.begin(SGD(0.1), consistency="async")
    assert worker.push(0, gradient(0, 0))["version"] == 1


def test_a_server_that_hangs_up_while_it_greets_is_called_again(serve: Any) -> None:
    """As one does that is being started anew: the first connection ends in the middle of the handshake."""
    server = serve(identity=tls.self_signed())
    with socket.create_server(("127.0.0.1", 0)) as dying:
        places = iter([Endpoint(f"127.0.0.1:{dying.getsockname()[1]}", server.fingerprint)])

        def hang_up() -> None:
            stranger, _ = dying.accept()
            with stranger:
                stranger.recv(5)  # of its greeting
                stranger.shutdown(socket.SHUT_WR)
                while stranger.recv(4096):
                    pass

        there = Endpoint(server.address, server.fingerprint)
        link = Link(lambda: next(places, there), TOKEN, patience_s=20.0)
        answers = together(lambda: link.call({"op": "status"}), hang_up)
        assert answers[0].header["version"] == 0
        link.close()


def test_a_channel_that_another_thread_closed_is_no_end(serve: Any) -> None:
    server = serve()
    link = Link(lambda: Endpoint(server.address), TOKEN, patience_s=20.0)
    link.call({"op": "status"})
    first: Any = link._channel
    first.channel.close()  # between this thread's look and its call
    assert link.call({"op": "status"}).header["version"] == 0
    newer = link._channel
    assert newer is not first
    link._disconnect(first)  # one that failed on the old channel leaves the new one alone
    assert link._channel is newer
    assert link.call({"op": "status"}).header["version"] == 0
    link.close()


def test_only_a_socket_makes_way(tmp_path: Path) -> None:
    path = tmp_path / "thesis.tex"
    path.write_text("years of work")
    with pytest.raises(UsageError, match="something else than a socket"):
        Server(listen=f"unix:{path}", token=TOKEN)
    assert path.read_text() == "years of work"
    left = tmp_path / "socket"  # of a server that was killed
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(left))
    server = Server(listen=f"unix:{left}", token=TOKEN)
    server.start()
    link = Link(lambda: Endpoint(server.address), TOKEN)
    assert link.call({"op": "status"}).header["version"] == 0
    link.close()
    server.stop(0)


def test_a_worker_of_an_old_job_changes_nothing(serve: Any) -> None:
    """Members are called alike in all jobs: one that wakes up late must not be taken for its successor."""
    server = serve()
    (old,) = serve.workers([server], 1, job="old")
    old.begin(SGD(0.1), consistency="async")
    old.push(0, gradient(0, 0))
    server.shard.expire("worker-0")
    (new,) = serve.workers([server], 1, job="new")
    new.begin(SGD(0.1), consistency="async")
    new.servers.join(0)
    new.push(0, gradient(0, 1))
    before = new.params
    (link,) = old.servers._links
    for call in (
        lambda: old.push(1, gradient(1, 0)),
        lambda: old.servers.pull(old.out, flush=True),
        lambda: link.call({**old.servers._who("agree"), "step": 1, "norm_sq": 1.0}),
        lambda: link.call(old.servers._who("beat")),
        lambda: link.call(old.servers._who("leave")),
        lambda: old.servers.join(0),
    ):
        with pytest.raises(UsageError, match="works for another job"):
            call()
    assert old.servers.status()[0]["members"] == {"worker-0": 1}
    new.servers.pull(new.out)
    close_to(new.params, before, 0.0)


def test_another_job_waits_for_its_turn(serve: Any) -> None:
    server = serve()
    (first,) = serve.workers([server], 1)
    (second,) = serve.workers([server], 1, job="another")
    first.begin(SGD(0.1), consistency="async")
    first.servers.join(0)
    with pytest.raises(UsageError, match="works for another job"):
        second.begin(SGD(0.1), consistency="async")
    with pytest.raises(UsageError, match="works for another job"):
        second.servers.join(0)
    first.servers.close()
    second.begin(SGD(0.1), consistency="async")
    assert second.push(0, gradient(0, 0))["version"] == 1


# --------------------------------------------------------------------------------- layout and framing


def test_parameters_are_divided_by_bytes() -> None:
    entries = [
        protocol.Entry(f"p{i}", "float32", (n,)) for i, n in enumerate([100, 1, 60, 50, 40, 30, 20, 9])
    ]
    parts = divide(entries, 3)
    assert sorted(e.name for part in parts for e in part) == sorted(e.name for e in entries)
    loads = [sum(e.size_bytes for e in part) for part in parts]
    assert max(loads) <= 4 / 3 * sum(loads) / 3 + 4  # Graham's bound
    with pytest.raises(UsageError, match="servers = 9 for 8 parameters"):
        divide(entries, 9)


def test_a_layout_has_no_gaps_and_no_misaligned_tensor() -> None:
    entries = [
        protocol.Entry(name, dtype, shape)
        for name, dtype, shape in [
            ("a", "float16", (3,)),
            ("b", "float64", (2, 2)),
            ("c", "float32", ()),
            ("d", "bfloat16", (5,)),
            ("e", "float32", (0, 4)),
            ("f", "float64", (1,)),
        ]
    ]
    layout = Layout.of(entries)
    assert layout.size_bytes == sum(e.size_bytes for e in entries)
    flat = torch.zeros(layout.size_bytes, dtype=torch.uint8)
    for i, view in enumerate(layout.views(flat).values(), 1):
        view.fill_(i)
    assert [f.dtype for f in layout.flats(flat)] == [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]
    assert sum(f.numel() for f in layout.flats(flat)) == sum(e.numel for e in entries)
    for i, view in enumerate(layout.views(flat).values(), 1):
        assert (view == i).all()


def test_payloads_of_any_length_arrive() -> None:
    for n in (0, 1, protocol.CHUNK_BYTES - 1, protocol.CHUNK_BYTES, 2 * protocol.CHUNK_BYTES + 5):
        sent = torch.arange(n).to(torch.uint8)
        cut = n // 3
        stream = protocol.messages({"x": 1}, [protocol.view(sent[:cut]), protocol.view(sent[cut:])])
        chunks = list(stream)
        assert all(len(c) <= protocol.CHUNK_BYTES for c in chunks[1:])
        again = iter(chunks)
        opening = protocol.opening(again)
        assert opening == ({"x": 1}, n)
        room, view = protocol.buffer(n)
        protocol.receive(again, view)
        assert torch.equal(room, sent)
        for wrong in (n - 1, n + 1):
            if wrong >= 0:
                rest = iter(chunks)
                protocol.opening(rest)
                with pytest.raises(protocol.Garbage):
                    protocol.receive(rest, protocol.buffer(wrong)[1])


# ------------------------------------------------------------------------------------ values and verbs


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"consistency": "bounded"}, "write bounded"),
        ({"consistency": "asinc"}, "did you mean 'async'"),
        ({"consistency": "bounded(-1)"}, "sync, bounded"),
        ({"discard": 3}, "leave out discard"),
        ({"compensation": 0.1}, "no push is stale"),
        ({"accumulate": 4, "consistency": "bounded(0)"}, "no push is stale"),
        ({"accumulate": 0}, "at least 1"),
        ({"token_file": "x"}, "without address"),
        ({"address": "10.0.0.1:70", "token_file": "x"}, "without fingerprint"),
        ({"address": "127.0.0.1:70"}, "without token_file"),
        ({"address": "nonsense", "token_file": "x"}, "it is host:port"),
        ({"address": "127.0.0.1:70", "token_file": "x", "servers": 2}, "leave out servers"),
        ({"address": "127.0.0.1:70", "token_file": "x", "fingerprint": "sha1:0"}, "64 hexadecimal"),
        ({"durability": "eech", "consistency": "async"}, "did you mean 'each'"),
        ({"lease_s": 0.0}, "positive time"),
    ],
)
def test_impossible_values_are_refused_with_the_rule(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Served(**given)


def test_consistency_is_read_from_a_call_form() -> None:
    for consistency in ("async", "'async'", "sync", "bounded(2)"):
        read = config.from_text("placements", f"served(consistency={consistency}, accumulate=1)")
        assert read == Served(consistency=consistency.strip("'"))
    placement = config.from_text("placements", "served(consistency=bounded(3), servers=2)")
    assert placement == Served(consistency="bounded(3)", servers=2)
    assert config.from_choice("placements", config.to_data(placement, "placements"), "x") == placement
    assert [bound_of(c) for c in ("sync", "bounded(7)", "async")] == [0, 7, None]


def start_alone(tmp_path: Path, *more: str) -> tuple[subprocess.Popen[str], Endpoint]:
    """`manyhands serve-parameters` as a process of its own, and where it says it is."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "manyhands", "serve-parameters"),
            *("--token-file", str(tmp_path / "token"), *more),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "serving on" in line:
            words = line.replace(",", " ").replace(";", " ").split()
            found = [w for w in words if w.startswith("sha256:")]
            return process, Endpoint(words[words.index("on") + 1], found[0] if found else "")
    raise AssertionError(f"it ended with {process.wait()}")


def test_a_killed_server_continues_alone(tmp_path: Path) -> None:
    """The command as a user runs it: TLS, a token made at the start, SIGKILL, and the same address again."""
    state = ("--state", str(tmp_path / "state"))
    process, where = start_alone(tmp_path, *state)
    assert (tmp_path / "token").stat().st_mode & 0o077 == 0
    token = tls.read_token(str(tmp_path / "token"))
    servers = Servers([Link(lambda: where, token, patience_s=60.0)], member="me", job="job", lease_s=1000.0)
    worker = Worker.__new__(Worker)
    servers.lay_out(initial())
    worker.servers, worker.version = servers, 0
    worker.out = [torch.zeros(servers.layouts[0].size_bytes, dtype=torch.uint8)]
    try:
        worker.begin(SGD(0.1, momentum=0.9), consistency="sync")
        servers.join(0)
        worker.push(0, gradient(0, 0))
        process.kill()
        process.communicate()
        answers = together(
            lambda: worker.push(1, gradient(1, 0)),  # calls until the server is there again
            lambda: start_alone(tmp_path, *state, "--listen", where.address),
        )
        process, again = answers[1]
        assert again == where  # the certificate is kept with the state
        assert answers[0]["version"] == 2
        means = [{n: g / 4 for n, g in gradient(step, 0).items()} for step in range(2)]
        close_to(worker.params, plain(SGD(0.1, momentum=0.9), means))
        servers.close()
    finally:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0
    assert "stopped" in said


def test_the_command_refuses_what_it_cannot_mean(tmp_path: Path) -> None:
    from manyhands.cli.main import main

    token = str(tmp_path / "token")
    for arguments in (
        [],
        ["--token-file", token, "--plain", "--listen", "0.0.0.0:0"],
        ["--token-file", token, "--lease", "0"],
        ["--token-file", token, "--tls-cert", "x"],
        ["--token-file", token, "--listen", "192.0.2.1:1"],
    ):
        assert main(["serve-parameters", *arguments]) == 2
    (tmp_path / "token").write_text("short")
    assert main(["serve-parameters", "--token-file", token]) == 2
