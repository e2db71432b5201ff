"""The parameter server: its rules, its arithmetic, who waits for whom; over real sockets, with no launcher and no model."""

from __future__ import annotations

import math
import threading
import time
from functools import partial
from typing import Any

import pushers
import pytest
import torch
from pushers import SHAPES, TOKEN, WAIT_S, Worker, close_to, gradient, initial, plain, together

from manyhands.core import config
from manyhands.core.errors import UsageError
from manyhands.placement.served import Served, bound_of
from manyhands.serve import protocol
from manyhands.serve.client import Servers
from manyhands.serve.layout import Layout, divide
from manyhands.serve.link import Endpoint, Link
from manyhands.serve.rules import Push, Rules
from manyhands.serve.store import Store
from manyhands.strategy.delayed_nesterov import DelayedNesterov
from manyhands.strategy.optimizers import SGD, AdamW

serve = pushers.serve  # the fixture

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


def test_pushes_in_half_precision_are_added_in_float32() -> None:
    data = {"optimizer": config.to_data(SGD(1.0), "optimizers"), "consistency": "sync"}
    store = Store(Rules.read(data), {"p": torch.zeros(2, dtype=torch.bfloat16)}, {})
    said = {"member": "me", "step": 0, "version": 0, "share": 1.0, "nominal": 1.0, "loss": 1.0, "count": 1}
    for part in (256.0, 1.0, 1.0):  # 256 + 1 is 256 in bfloat16
        payload = torch.full((2,), part, dtype=torch.bfloat16).view(torch.uint8)
        store.add(Push.read({**said, "used": "1"}, 1), payload)
    assert store.norm_sq() == pytest.approx(2 * 258.0**2)
    store.update(0.5, 1.0)
    assert store.params["p"].tolist() == [-129.0, -129.0]


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


@pytest.mark.parametrize("n_servers", [1, 2])
def test_a_round_tells_all_alike_who_was_busy_and_each_how_long_it_waited(serve: Any, n_servers: int) -> None:
    servers = [serve() for _ in range(n_servers)]
    a, b = serve.workers(servers, 2)
    a.begin(SGD(0.1), consistency="sync")
    for worker in (a, b):
        worker.servers.join(0)

    def later() -> dict[str, Any]:
        for server in servers:
            with server.shard.cond:
                assert server.shard.cond.wait_for(lambda s=server: "worker-0" in s.shard.pending, WAIT_S)
        return b.push(0, gradient(0, 1), load=[2.0, 8, 0.1, 0.2, 0.3])

    first, last = together(lambda: a.push(0, gradient(0, 0), load=[1.0, 4, 0, 0, 0]), later)
    table = {"worker-0": [1.0, 4, 0, 0, 0], "worker-1": [2.0, 8, 0.1, 0.2, 0.3]}
    assert first["loads"] == last["loads"] == table
    assert first["waited_s"] > 0.0
    assert last["waited_s"] == 0.0


def test_without_rounds_the_latest_of_each_is_told(serve: Any) -> None:
    a, b = serve.workers([serve()], 2)
    a.begin(SGD(0.1), consistency="async")
    for worker in (a, b):
        worker.servers.join(0)
    assert a.push(0, gradient(0, 0))["loads"] == {}  # a worker that tells nothing
    assert a.push(1, gradient(1, 0), load=[1.0, 4, 0, 0, 0])["loads"] == {"worker-0": [1.0, 4, 0, 0, 0]}
    a.push(2, gradient(2, 0), load=[2.0, 8, 0, 0, 0])
    answer = b.push(0, gradient(0, 1), load=[5.0, 4, 0, 0, 0])
    assert answer["loads"] == {"worker-0": [2.0, 8, 0, 0, 0], "worker-1": [5.0, 4, 0, 0, 0]}


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


def test_a_worker_keeps_to_a_servers_shorter_lease(serve: Any) -> None:
    """Its own is 1,000 s, and it computes for longer than the server would wait for it."""
    server = serve(lease_s=2.4)
    (a,) = serve.workers([server], 1)
    a.begin(SGD(0.1), consistency="sync")
    a.servers.join(0)
    joined, member = time.monotonic(), server.shard.members["worker-0"]
    while member.seen < joined + 2.5:
        assert server.shard.members.get("worker-0") is member
        time.sleep(0.01)


def test_patience_begins_when_a_server_is_gone(serve: Any) -> None:
    """A call had waited longer than that for another worker when the server went away: it is made again all the same."""
    servers = [serve(), serve()]
    (a,) = serve.workers(servers[:1], 1, patience_s=0.05)
    (same,) = serve.workers(servers[1:], 1)  # what the server would be when it is started anew
    for worker in (a, same):
        worker.begin(SGD(0.1), consistency="sync")
    servers[0].shard._enter("worker-1", 0)
    (link,) = a.servers._links

    def go_away() -> None:
        shard = servers[0].shard
        with shard.cond:
            assert shard.cond.wait_for(lambda: "worker-0" in shard.pending and shard.folded, WAIT_S)
            begun = time.monotonic()
            while time.monotonic() < begun + 2 * link._patience_s:
                shard.cond.wait(link._patience_s)
            assert shard.pending["worker-0"][1].numel() == 0  # it is in the sum already: one copy is enough
        link._where = lambda: Endpoint(servers[1].address)
        servers[0].stop(0)

    answer, _ = together(lambda: a.push(0, gradient(0, 0)), go_away)
    assert answer["version"] == 1


def test_a_server_that_is_gone_keeps_no_other_from_hearing_of_a_worker(serve: Any) -> None:
    lease_s = 1.5
    servers = [serve(lease_s=lease_s), serve(lease_s=lease_s)]
    links = [Link(lambda s=s: Endpoint(s.address, s.fingerprint), TOKEN, patience_s=60.0) for s in servers]
    a = Servers(links, member="worker-0", job="job", lease_s=lease_s)
    a.lay_out(initial())
    rules = {"optimizer": config.to_data(SGD(0.1), "optimizers"), "consistency": "sync"}
    a.begin(rules, initial(), {}, serial=0, steps=0, tokens=0)
    a.join(0)
    servers[0].stop(0)
    gone, deadline = time.monotonic(), time.monotonic() + 60.0
    while (
        servers[1].shard.members["worker-0"].seen < gone + 2 * lease_s
    ):  # it computes, and one server is away
        assert time.monotonic() < deadline
        time.sleep(0.01)
    a.hang_up()


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


def test_a_wish_to_change_the_set_reaches_all_at_the_same_step(serve: Any) -> None:
    a, b = serve.workers([serve()], 2)
    a.begin(SGD(0.1), consistency="async")
    for worker in (a, b):
        worker.servers.join(0)
    for step in range(3):
        a.push(step, gradient(step, 0))
    changes = [b.push(0, gradient(0, 1), change=True)["change"], a.push(3, gradient(3, 0))["change"]]
    changes += [b.push(step, gradient(step, 1))["change"] for step in (1, 2, 3, 4)]
    assert changes == [False, True, False, False, True, False]


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


def test_a_header_that_is_too_long_is_no_reason_to_call_again(serve: Any) -> None:
    server = serve()
    link = Link(lambda: Endpoint(server.address), TOKEN, patience_s=WAIT_S)
    begun = time.monotonic()
    with pytest.raises(protocol.Garbage, match="so many tensors needs more parameter servers"):
        link.call({"op": "status", "names": "x" * protocol.HEADER_BYTES})
    assert time.monotonic() < begun + WAIT_S / 2
    link.close()


# -------------------------------------------------------------------------------------------- values


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
        ({"address": " , ", "token_file": "x"}, "names each server once"),
        ({"address": "127.0.0.1:70,127.0.0.1:70", "token_file": "x"}, "names each server once"),
        ({"address": "unix:s", "token_file": "x", "fingerprint": "sha256:" + "0" * 64}, "no certificate"),
        ({"durability": "eech", "consistency": "async"}, "did you mean 'each'"),
        ({"lease_s": 0.0}, "positive time"),
        ({"durability": "synced", "address": "127.0.0.1:70", "token_file": "x"}, "its --durability"),
        ({"interval_s": 3.0, "address": "127.0.0.1:70", "token_file": "x"}, "its --interval"),
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
