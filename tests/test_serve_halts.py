"""When one was lost: the servers take no more pushes, and tell which are in the parameters, the same to all who ask."""

from __future__ import annotations

import math
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pushers
import pytest
import torch
from pushers import SHAPES, WAIT_S, Worker, close_to, gradient, initial, plain, together, vanish

from manyhands.serve import protocol
from manyhands.serve.members import Member
from manyhands.serve.shard import Shard
from manyhands.strategy.optimizers import SGD

serve = pushers.serve  # the fixture
HEADER = {
    "step": 0,
    "version": 0,
    "share": 0.5,
    "nominal": 8.0,
    "loss": 1.0,
    "count": 4,
    "norm": 1.0,
}  # of a push


def test_after_a_halt_it_is_known_which_pushes_count(serve: Any) -> None:
    """One worker is lost, another one does not know yet: nothing is taken any more until the job begins anew."""
    servers = [serve(), serve()]
    a, b, c = serve.workers(servers, 3)
    a.begin(SGD(0.1), consistency="async")
    for worker in (a, b, c):
        worker.servers.join(0)
        worker.servers.serial = 0
    for step in range(3):
        a.push(step, gradient(step, 0))
    b.push(0, gradient(0, 1))
    b.servers.close()
    status = servers[0].shard.status()
    halted = a.servers.halt()
    assert (halted.clocks, halted.unused) == ({"worker-0": 3, "worker-1": 1, "worker-2": 0}, {})
    payloads = [torch.zeros(lay.size_bytes, dtype=torch.uint8) for lay in c.servers.layouts]
    used = dict.fromkeys(SHAPES, True)
    assert c.servers.push(HEADER, used, payloads, c.out) == {"halted": True}
    assert servers[0].shard.status() == {**status, "members": {"worker-0": 3, "worker-2": 0}}
    a.begin(SGD(0.1), serial=1, steps=1, consistency="async")
    a.servers.serial = 1
    assert a.servers.join(1, exact=True) == 1
    assert c.servers.push(HEADER, used, payloads, c.out) == {"halted": True}  # of the beginning before
    assert c.servers.halt() is None
    c.servers.close()  # and does not take along who has its name now
    assert set(servers[0].shard.members) == {"worker-0"}
    assert a.push(1, gradient(1, 0))["applied"] == [True, True]


def test_a_halt_applies_what_waits_and_a_new_beginning_counts_on(serve: Any) -> None:
    """A push that waits for company is taken: its worker will not make it again."""
    server = serve()
    (a,) = serve.workers([server], 1)
    a.begin(SGD(0.1), consistency="async", accumulate=3)
    a.servers.join(0)
    a.push(0, gradient(0, 0), share=1.0)
    a.push(1, gradient(1, 0), share=1.0)
    assert server.shard.version == 0
    assert a.servers.halt().clocks == {"worker-0": 2}
    assert server.shard.version == 1
    _, params, _ = a.servers.state()
    assert not torch.equal(params["wide"], initial()["wide"])
    a.begin(SGD(0.1), serial=1, steps=2, consistency="async", accumulate=3)
    status = server.shard.status()
    assert (status["version"], status["updates"], status["staleness"]) == (0, 1, {"0": 2})


def first_half(worker: Worker, sums: dict[str, torch.Tensor], server: int, **more: Any) -> dict[str, Any]:
    """Push to one of two servers and no further; its answer."""
    layout = worker.servers.layouts[server]
    flat = torch.zeros(layout.size_bytes, dtype=torch.uint8)
    for name, view in layout.views(flat).items():
        view.copy_(sums[name] / 8)
    flags = "1" * len(layout.entries)
    ask = {**HEADER, **worker.servers._who("push"), "used": flags, **more}
    return worker.servers._links[server].call(ask, [protocol.view(flat)]).header


def first_halves(workers: list[Worker], sums: list[dict[str, torch.Tensor]]) -> list[dict[str, Any]]:
    """All push step 0 to two servers; each one's request that tells the norm of the whole, which nobody has told yet."""
    pushes = [partial(first_half, w, s, i) for w, s in zip(workers, sums, strict=True) for i in range(2)]
    parts = [float(answer["norm_sq"]) for answer in together(*pushes)]
    whole = parts[0] + parts[1]
    return [{**worker.servers._who("agree"), "step": 0, "norm_sq": whole} for worker in workers]


def test_a_halt_finishes_a_round_that_only_one_of_two_servers_has_applied(serve: Any) -> None:
    servers = [serve(), serve()]
    a, b = serve.workers(servers, 2)
    a.begin(SGD(0.1), consistency="sync", max_norm=0.7)
    for worker in (a, b):
        worker.servers.join(0)
        worker.servers.serial = 0
    sums = [gradient(0, w) for w in range(2)]
    ask, _ = first_halves([a, b], sums)
    a.servers._links[0].call(ask)  # and then both workers lost somebody
    assert [s.shard.step for s in servers] == [1, 0]
    for worker in (a, b):
        halted = worker.servers.halt()
        assert (halted.step, halted.tokens, halted.applied) == (1, 8, [True, True])
    _, params, _ = a.servers.state()
    mean = {n: (sums[0][n] + sums[1][n]) / 8 for n in SHAPES}
    norm = math.sqrt(sum(float(g.square().sum()) for g in mean.values()))
    close_to(params, plain(SGD(0.1), [{n: g * min(1.0, 0.7 / (norm + 1e-6)) for n, g in mean.items()}]))


def test_after_a_halt_no_round_is_applied(serve: Any) -> None:
    """Else it would be in the parameters for those who ask later, and not for those who asked before."""
    servers = [serve(), serve()]
    a, b = serve.workers(servers, 2)
    a.begin(SGD(0.1), consistency="sync")
    for worker in (a, b):
        worker.servers.join(0)
        worker.servers.serial = 0
    asks = first_halves([a, b], [gradient(0, w) for w in range(2)])
    assert a.servers.halt().step == 0
    for link, ask in zip(b.servers._links, asks, strict=True):
        assert link.call(ask).header["halted"]
    halted = b.servers.halt()
    assert (halted.step, halted.applied) == (0, [False, False])


def test_a_halt_wakes_those_who_wait_for_a_round(serve: Any) -> None:
    """And who leaves afterwards does not complete it."""
    server = serve()
    a, b = serve.workers([server], 2)
    a.begin(SGD(0.1), consistency="sync")
    for worker in (a, b):
        worker.servers.join(0)
        worker.servers.serial = 0
    layout = a.servers.layouts[0]
    payloads, used = [torch.zeros(layout.size_bytes, dtype=torch.uint8)], dict.fromkeys(SHAPES, True)
    answers: list[Any] = []
    waiting = threading.Thread(
        target=lambda: answers.append(a.servers.push(HEADER, used, payloads, a.out)), daemon=True
    )
    waiting.start()
    with server.shard.cond:
        assert server.shard.cond.wait_for(lambda: "worker-0" in server.shard.pending, WAIT_S)
    halted = b.servers.halt()
    assert halted.step == 0
    waiting.join(WAIT_S)
    assert answers == [{"halted": True}]
    b.servers.close()
    assert server.shard.step == 0


@pytest.mark.parametrize("silent", [False, True], ids=["left", "silent"])
@pytest.mark.parametrize("n_servers", [1, 2])
def test_a_round_of_a_job_is_one_of_all_its_workers(
    serve: Any, tmp_path: Path, n_servers: int, silent: bool
) -> None:
    """One fails, or is silent for too long, before it pushes: its samples would be in no update."""
    places = [tmp_path / str(i) for i in range(n_servers)]
    servers = [serve(state=place) for place in places]
    a, b = serve.workers(servers, 2)
    begun([a, b], consistency="sync", whole=True)
    payloads = [torch.zeros(layout.size_bytes, dtype=torch.uint8) for layout in a.servers.layouts]

    def go() -> None:
        for server in servers:
            with server.shard.cond:
                assert server.shard.cond.wait_for(lambda s=server: "worker-0" in s.shard.pending, WAIT_S)
                if silent:
                    server.shard.members["worker-1"].seen -= 2 * server.shard.lease_s
                    server.shard.expire()
        if not silent:
            b.servers.close()

    used = dict.fromkeys(SHAPES, True)
    answer, _ = together(lambda: a.servers.push(HEADER, used, payloads, a.out), go)
    assert answer == {"halted": True, "lost": "worker-1"}
    for server, place in zip(servers, places, strict=True):
        vanish(server)
        again = serve(state=place)  # nor does one that continues make the round
        assert (again.shard.version, again.shard.halted) == (0, True)


def test_nobody_is_silent_while_the_server_cannot_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update of a large model takes longer than a lease."""
    at, asked = [100.0], threading.Event()
    monkeypatch.setattr("manyhands.serve.shard.time", SimpleNamespace(monotonic=lambda: asked.set() or at[0]))
    shard = Shard(lease_s=30.0)
    shard.members["worker-0"] = Member(0, seen=100.0)
    janitor = threading.Thread(target=shard.expire)
    with shard.cond:
        janitor.start()
        assert asked.wait(WAIT_S)
        at[0] += 40.0
    janitor.join()
    assert set(shard.members) == {"worker-0"}
    shard.expire()
    assert shard.members == {}


def test_who_has_not_heard_of_its_last_round_is_told_though_another_has_left(
    serve: Any, tmp_path: Path
) -> None:
    """It asks again after its connection has failed; the other one had nothing left to do."""
    server = serve(state=tmp_path / "state")
    a, b = serve.workers([server], 2)
    begun([a, b], consistency="sync", whole=True)
    together(lambda: a.push(0, gradient(0, 0)), lambda: b.push(0, gradient(0, 1)))
    b.servers.close()
    assert a.push(0, gradient(0, 0))["applied"] == [True]
    assert server.shard.version == 1
    server.stop(0)
    again = serve(state=tmp_path / "state")  # and who pushes on hears whom it misses
    assert again.shard.halts == {"halted": True, "lost": "worker-1"}


def second_half(worker: Worker, server: int, staleness: int, step: int = 0) -> dict[str, Any]:
    ask = {**HEADER, **worker.servers._who("agree"), "step": step, "staleness": staleness}
    return worker.servers._links[server].call(ask).header


def begun(workers: list[Worker], **rules: Any) -> None:
    workers[0].begin(SGD(0.1), **{"consistency": "async", **rules})
    for worker in workers:
        worker.servers.join(0)
        worker.servers.serial = 0


def test_a_push_that_only_one_of_two_servers_has_is_in_no_parameter(serve: Any) -> None:
    servers = [serve(), serve()]
    a, b = serve.workers(servers, 2)
    begun([a, b])
    a.push(0, gradient(0, 0))
    assert first_half(b, gradient(0, 1), 1)["staleness"] == 1
    b.servers.hang_up()
    halted = a.servers.halt()
    assert halted is not None
    assert halted.clocks == {"worker-0": 1, "worker-1": 0}
    before = a.params
    a.servers.pull(a.out)
    close_to(a.params, before, 0.0)


@pytest.mark.parametrize("told", [0, 1])
@pytest.mark.parametrize("restart", [False, True])
def test_a_push_that_only_one_of_two_servers_was_told_to_apply_is_finished_on_the_other(
    serve: Any, tmp_path: Path, told: int, restart: bool
) -> None:
    options = [{"state": tmp_path / f"{i}"} for i in range(2)]
    servers = [serve(**options[i]) for i in range(2)]
    a, b, c = serve.workers(servers, 3)
    begun([a, b])
    for server in range(2):
        assert first_half(b, gradient(0, 1), server)["staleness"] == 0
    assert [s.shard.version for s in servers] == [0, 0]
    assert second_half(b, told, 0)["applied"]
    b.servers.close()
    assert [s.shard.version for s in servers] == [1 - told, told]
    if restart:
        for server in servers:
            vanish(server)
        servers = [serve(**options[i]) for i in range(2)]
        a, c = serve.workers(servers, 2)
    for worker in (a, c):  # all who ask are told the same
        halted = worker.servers.halt()
        assert halted.clocks == {"worker-0": 0, "worker-1": 1}
    assert [s.shard.version for s in servers] == [1, 1]
    assert servers[0].shard.staleness == servers[1].shard.staleness == {0: 1}
    a.servers.pull(a.out)
    (alone,) = serve.workers([serve()], 1)
    alone.begin(SGD(0.1), consistency="async")
    alone.push(0, gradient(0, 1), norm=1.0)
    close_to(a.params, alone.params, 1e-15)


def test_all_servers_drop_the_pushes_that_the_first_finds_too_stale(serve: Any) -> None:
    """Between its two halves others may push, and not come to all servers in the same order."""
    servers = [serve(), serve()]
    a, b = serve.workers(servers, 2)
    begun([a, b], discard=0)
    for server in range(2):
        first_half(b, gradient(0, 1), server)
    a.push(0, gradient(0, 0))
    assert [second_half(b, server, 0)["applied"] for server in range(2)] == [True, True]
    a.push(1, gradient(1, 0))  # at its own version: b's came in between
    answers = [first_half(b, gradient(1, 1), server, step=1) for server in range(2)]
    assert [answer["staleness"] for answer in answers] == [2, 2]
    assert [second_half(b, server, 2, step=1)["applied"] for server in range(2)] == [False, False]
    halted = a.servers.halt()
    assert halted is not None
    assert halted.unused == {"worker-0": {1}, "worker-1": {1}}


def test_a_snapshot_between_the_halves_of_a_push_loses_neither(serve: Any, tmp_path: Path) -> None:
    options = [{"state": tmp_path / f"{i}", "interval_s": 1e-9} for i in range(2)]
    servers = [serve(**options[i]) for i in range(2)]
    a, b = serve.workers(servers, 2)
    begun([a, b])
    for server in range(2):
        first_half(b, gradient(0, 1), server)
    for step in range(3):
        a.push(step, gradient(step, 0))  # each makes a snapshot, and an empty log
    for server in servers:
        keeper: Any = server.shard._keeper
        keeper._writing.result(WAIT_S)
        vanish(server)
    servers = [serve(**options[i]) for i in range(2)]
    b, _ = serve.workers(servers, 2)
    b.servers.member, b.servers.serial = "worker-1", 0
    assert [second_half(b, server, 0)["applied"] for server in range(2)] == [True, True]
    assert [s.shard.version for s in servers] == [4, 4]
    assert [second_half(b, server, 0)["applied"] for server in range(2)] == [True, True]  # asked again
    assert [s.shard.version for s in servers] == [4, 4]


def test_a_restart_between_the_halves_of_everybodys_push_changes_nothing(serve: Any, tmp_path: Path) -> None:
    """No round is made of pushes that wait for their second half."""
    found = []
    for restart in (False, True):
        options = [{"state": tmp_path / f"{restart}-{i}"} for i in range(2)]
        servers = [serve(**options[i]) for i in range(2)]
        a, b = serve.workers(servers, 2)
        begun([a, b])
        for step in range(2):
            pushes = [(w, gradient(step, i), server) for i, w in enumerate((a, b)) for server in range(2)]
            for worker, sums, server in pushes:
                first_half(worker, sums, server, step=step)
            if restart:
                for server in servers:
                    vanish(server)
                servers = [serve(**options[i]) for i in range(2)]
                a, b = serve.workers(servers, 2)
                a.servers.serial = b.servers.serial = 0
            for worker in (a, b):
                for server in range(2):
                    assert second_half(worker, server, 0, step=step)["applied"]
        a.servers.pull(a.out)
        found.append(a.params)
    close_to(found[1], found[0], 0.0)


def test_a_wish_that_was_heard_before_a_restart_is_decided_as_it_was(serve: Any, tmp_path: Path) -> None:
    """`stop` of a, after b has pushed a later step and was not answered yet."""
    options = {"state": tmp_path / "0"}
    servers = [serve(**options), serve()]
    a, b = serve.workers(servers, 2)
    begun([a, b])
    for step in range(3):
        b.push(step, gradient(step, 1))
    first_half(b, gradient(3, 1), 0, step=3)
    first_half(a, gradient(0, 0), 0, stop=15)
    assert second_half(b, 0, 0, step=3)["stop"] == 15
    vanish(servers[0])
    servers[0] = serve(**options)
    a, _ = serve.workers(servers, 2)
    a.servers.serial = 0
    assert second_half(a, 0, 0)["stop"] == 0
    first_half(a, gradient(3, 0), 0, step=3)
    assert second_half(a, 0, 0, step=3)["stop"] == 15  # after the same step as b


def test_an_orderly_end_keeps_all_beside_half_a_push(serve: Any, tmp_path: Path) -> None:
    options = {"state": tmp_path / "0", "durability": "interval"}
    servers = [serve(**options), serve()]
    a, b = serve.workers(servers, 2)
    begun([a, b])
    for step in range(3):
        a.push(step, gradient(step, 0))
    first_half(b, gradient(0, 1), 0)
    servers[0].stop(0)
    again = serve(**options)
    assert again.shard.version == 3
    assert again.shard.members["worker-0"].clock == 3


def test_a_finished_push_makes_the_same_updates_on_all_servers(serve: Any) -> None:
    """Two pushes make one update: the one that waits for company is not applied before what is finished joins it."""
    servers = [serve(), serve()]
    a, b = serve.workers(servers, 2)
    begun([a, b], accumulate=2)
    a.push(0, gradient(0, 0))
    for server in range(2):
        first_half(b, gradient(0, 1), server)
    second_half(b, 0, 0)
    assert [s.shard.version for s in servers] == [1, 0]
    assert a.servers.halt() is not None
    assert [s.shard.version for s in servers] == [1, 1]


def test_a_push_that_is_finished_after_its_worker_left_is_compensated(serve: Any) -> None:
    found = []
    for left in (False, True):
        servers = [serve(), serve()]
        a, b = serve.workers(servers, 2)
        begun([a, b], compensation=2.0)
        a.servers.pull(a.out)
        b.servers.pull(b.out)
        a.push(0, gradient(0, 0))
        for server in range(2):
            first_half(b, gradient(0, 1), server)
        second_half(b, 0, 1)
        if left:
            b.servers.close()
            assert a.servers.halt() is not None
            assert "worker-1" not in servers[1].shard.store.backups
        else:
            second_half(b, 1, 1)
        a.servers.pull(a.out)
        found.append(a.params)
    close_to(found[1], found[0], 0.0)
