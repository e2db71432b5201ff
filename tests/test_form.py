"""Wires that belong to a membership epoch: real processes, killed and stopped at any moment, re-formed in place."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from members import Job, PipeMembership

from manyhands.core.config import from_text
from manyhands.core.errors import PeerLost, UsageError
from manyhands.core.membership import Epoch, Membership, Seat
from manyhands.core.request import ACROSS, NODE, Gather, Scatter, Sum, Swap
from manyhands.wire.drive import run
from manyhands.wire.form import _reached_at, form
from manyhands.wire.group import GroupWire
from manyhands.wire.shared import SharedWire
from manyhands.wire.solo import Solo
from manyhands.wire.watch import Watch

CPU = torch.device("cpu")
TRANSPORTS = ["shared", "group"]
SOON_S = 20.0  # far from the timeouts of a wait that nobody interrupts


def _check(world: Any) -> None:
    tensor = torch.full((1000,), 2.0**world.rank)
    total = world.wire.begin(Sum(tensor)).wait()
    assert total.tolist() == [2.0**world.size - 1] * 1000, total[:3]


def _serve(membership: PipeMembership, transport: str) -> None:
    """Form, check, then random collectives until the epoch is over; again and again."""
    last: dict[str, Any] = {"lost_s": 0.0, "closing_s": 0.0}
    while True:
        epoch = membership.next()
        try:
            world = form(epoch, membership, device=CPU, transport=transport)
            _check(world)
        except PeerLost:
            continue  # the next wire closes what this one left
        membership.tell("told", {"epoch": epoch.number, "rank": world.rank, **last})
        choice = random.Random(epoch.number)  # the same on every worker
        buffer = world.wire.buffer(1 << 18, torch.float32)
        done = 0
        try:
            while True:
                _collective(world, choice, buffer)
                done += 1
        except PeerLost:
            begun = time.perf_counter()
            last = {"of": epoch.number, "done": done, "torn": getattr(world.wire, "torn", None)}
            last["lost_s"] = begun - membership.over_at if membership.over.is_set() else 0.0
            world.wire.close()
            last["closing_s"] = time.perf_counter() - begun


def _collective(world: Any, choice: random.Random, buffer: torch.Tensor) -> None:
    wire, kind, numel = world.wire, choice.randrange(7), choice.choice([1, 1000, 1 << 20])
    if kind == 0:
        assert float(wire.begin(Sum(torch.ones(numel))).wait()[0]) == world.size
    elif kind == 1:
        buffer.fill_(1.0)
        assert float(wire.begin(Sum(buffer)).wait()[-1]) == world.size
    elif kind == 2:
        assert len(wire.begin(Gather(torch.ones(numel + world.rank))).wait()) == world.size
    elif kind == 3:
        wire.begin(Scatter([torch.ones(numel)] * world.size)).wait()
    elif kind == 4:
        wire.begin(Swap(torch.ones(numel), choice.randrange(100))).wait()
    elif kind == 5:
        wire.begin(Gather(torch.ones(numel), even=True)).wait()
    else:  # several in flight
        handles = [wire.begin(Gather(torch.ones(numel), even=True)) for _ in range(3)]
        assert [len(h.wait()) for h in handles] == [world.size] * 3


def _formed(job: Job, number: int) -> list[dict[str, Any]]:
    """What all workers of epoch `number` or a later one told, once all have."""

    def found() -> list[Any]:
        now = [told for _, told in job.told if told["epoch"] == job.epoch.number >= number]
        return now if len(now) == len(job.epoch.seats) else []

    return job.until(found)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_killed_and_stopped_at_random_moments(transport: str) -> None:
    """Ends of a worker, each followed by a new wire among survivors and a replacement, and a right sum."""
    choice = random.Random(7)
    with Job(_serve, transport) as job:
        job.start("w0", "w1", "w2")
        _formed(job, 1)
        for turn in range(10):
            job.start(f"r{turn}")  # it waits to join
            number = job.epoch.number
            victim = choice.choice(job.epoch.seats).id
            time.sleep(choice.random() * 0.02)
            if turn % 3 == 2:
                job.kill(victim, signal.SIGSTOP)
                time.sleep(choice.random() * 0.02)
                job.evict(victim)
            else:
                job.kill(victim)
            told = _formed(job, number + 1)
            assert sorted(t["rank"] for t in told) == [0, 1, 2]
            assert max(t["lost_s"] for t in told) < SOON_S
            assert max(t["closing_s"] for t in told) < SOON_S
            survivors = [t for t in told if t.get("of") == number]
            if transport == "shared":
                assert len({(t["done"], t["torn"]) for t in survivors}) <= 1, "all or none have a reply"


def _axes(membership: PipeMembership) -> None:
    while True:
        epoch = membership.next()
        try:
            world = form(epoch, membership, device=CPU)
            assert world.kind == "gloo"
            for turn in range(1 << 20):
                for axis, size in ((ACROSS, 2), (NODE, 2), ("replica", 4)):
                    tensor = torch.ones(1 << (turn % 18))
                    assert float(world.wire.begin(Sum(tensor, axis)).wait()[0]) == size
                if turn == 0:
                    membership.tell("told", {"epoch": epoch.number})
        except PeerLost:
            world.wire.close()


def test_axes_of_two_hosts_end_with_the_epoch() -> None:
    hosts = {"a0": "a", "b0": "b", "a1": "a", "b1": "b", "a2": "a", "b2": "b", "a3": "a"}
    with Job(_axes) as job:
        job.start("a0", "b0", "a1", "b1", hosts=hosts)
        _formed(job, 1)
        for turn, (victim, newcomer) in enumerate([("a0", "a2"), ("b1", "b2"), ("a1", "a3")]):
            job.start(newcomer, hosts=hosts)
            number = job.epoch.number
            job.kill(victim, signal.SIGSTOP if turn else signal.SIGKILL)
            if turn:
                job.evict(victim)
            _formed(job, number + 1)


def _levels(membership: PipeMembership) -> None:
    """Rounds of exchanges of two levels: the sum is exact, and with a lossy codec nothing is lost but by who is."""
    exact, lossy = (
        from_text("exchanges", text) for text in ("hierarchical", "error-feedback(hierarchical(int8))")
    )
    owed = lossy.init([torch.zeros(600)])
    while True:
        epoch = membership.next()
        try:
            world = form(epoch, membership, device=CPU)
            for turn in range(1 << 20):
                powers = [torch.full((600,), 2.0**world.rank)]
                found = run(exact.talk(powers, exact.init(powers)), world.wire)
                assert found.mean[0].tolist() == [2.0**world.size - 1] * 600
                given = torch.randn(600, generator=torch.Generator().manual_seed(turn + 7 * world.rank))
                came = world.wire.begin(Sum(given + owed["residual"][0])).wait()
                agreed = run(lossy.talk([given.clone()], owed), world.wire)
                left = world.wire.begin(Sum(agreed.state["residual"][0].clone())).wait()
                torch.testing.assert_close(agreed.mean[0] + left, came, rtol=1e-4, atol=1e-4)
                owed = agreed.state
                if turn == 2:
                    membership.tell("told", {"epoch": epoch.number, "as": world.wire.flattened})
        except PeerLost:
            world.wire.close()


def test_hosts_made_unequal_exchange_as_one_level() -> None:
    hosts = {"a0": "a", "b0": "b", "a1": "a", "b1": "b", "b2": "b", "b3": "b"}
    with Job(_levels) as job:
        job.start("a0", "b0", "a1", "b1", hosts=hosts)
        assert [told["as"] for told in _formed(job, 1)] == [""] * 4
        job.kill("b1")
        assert [told["as"] for told in _formed(job, 2)] == ["hosts with [2, 1] workers"] * 3
        job.start("b2", hosts=hosts)
        job.kill("b0")
        assert [told["as"] for told in _formed(job, 3)] == ["hosts with [2, 1] workers"] * 3
        job.start("b3", hosts=hosts)
        job.suspect()
        assert [told["as"] for told in _formed(job, 4)] == [""] * 4


def _unequal(membership: PipeMembership) -> None:
    world = form(membership.next(), membership, device=CPU)
    with pytest.raises(UsageError, match=r"hosts with \[2, 1\] workers"):
        world.wire.begin(Sum(torch.ones(1), NODE))
    membership.tell("told", {"epoch": 1})
    membership.over.wait()  # were all to ask for the next epoch, this one might be over before the test looks


def test_a_job_does_not_begin_with_unequal_hosts() -> None:
    with Job(_unequal) as job:
        job.start("a0", "a1", "b0", hosts={"a0": "a", "a1": "a", "b0": "b"})
        _formed(job, 1)


def _stop_at_the_door(membership: PipeMembership, transport: str) -> None:
    while True:
        epoch = membership.next()
        if membership.me.id == "w1":
            while not membership.facts():
                time.sleep(0.001)  # rank 0 is about to meet us
            membership.tell("told", {"epoch": epoch.number, "stopped": True})
            os.kill(os.getpid(), signal.SIGSTOP)
        if membership.me.id == "w2" and epoch.number == 1:
            membership.over.wait()  # so that it has begun fewer meetings than the others
        try:
            _check(form(epoch, membership, device=CPU, transport=transport))
            membership.tell("told", {"epoch": epoch.number})
        except PeerLost:
            waited_s = time.perf_counter() - membership.over_at
            membership.tell("told", {"epoch": -1, "lost_s": waited_s})


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_meeting_ends_with_the_epoch(transport: str) -> None:
    with Job(_stop_at_the_door, transport) as job:
        job.start("w0", "w1", "w2")
        job.until(lambda: any(told.get("stopped") for _, told in job.told))
        job.evict("w1")
        _formed(job, 2)
        late = [told["lost_s"] for _, told in job.told if "lost_s" in told]
        assert all(lost_s < SOON_S for lost_s in late)


def _many_epochs(membership: PipeMembership, transport: str) -> None:
    kept = torch.zeros(1)
    for _ in range(50):
        epoch = membership.next()
        world = form(epoch, membership, device=CPU, transport=transport)
        _check(world)
        buffer = world.wire.buffer(1 << 16, torch.float32)
        world.wire.begin(Sum(buffer.fill_(1.0))).wait()
        assert float(kept.sum()) in (0.0, world.size * kept.numel())  # of the wire before, which is closed
        world.wire.close()
        kept = buffer
        kept.add_(0.0)
        if epoch.number in (10, 50):
            del world
            membership.tell("told", {"epoch": epoch.number, "held": _held()})
    membership.next()


def _held() -> dict[str, int]:
    deadline = time.monotonic() + 10  # threads that watch an old wire look five times a second
    while threading.active_count() > 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    with open("/proc/self/maps") as file:
        maps = sum("memfd:manyhands" in line or "/dev/shm/manyhands" in line for line in file)
    files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_there(fd)]
    return {
        "maps": maps,
        "memory files": sum("memfd" in name for name in files),
        "sockets": sum("socket" in name for name in files),
        "threads": len(os.listdir("/proc/self/task")),
    }


def _is_there(fd: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{fd}")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_fifty_epochs_leave_nothing_behind(transport: str) -> None:
    with Job(_many_epochs, transport) as job:
        job.start("w0", "w1")
        told = job.until(lambda: (x := [t for _, t in job.told if t["epoch"] == 50]) and len(x) == 2 and x)
        early = [t["held"] for _, t in job.told if t["epoch"] == 10]
        for held in (t["held"] for t in told):
            # of the groups left last one may be kept: its threads had no processor in time to be seen at rest
            kept = {"threads": 2, "sockets": 1}
            most = {what: max(e[what] for e in early) + kept.get(what, 0) for what in held}
            assert all(held[what] <= most[what] for what in held), (early, held)


def _shard(membership: PipeMembership) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    while True:
        epoch = membership.next()
        world = form(epoch, membership, device=CPU, transport="group")
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 3 * 8)
        fully_shard(model, mesh=init_device_mesh("cpu", (world.size,)))
        try:
            for turn in range(1 << 20):
                model(torch.ones(1, 8)).sum().backward()
                assert dist.get_world_size() == world.size
                if turn == 2:
                    membership.tell(
                        "told",
                        {"epoch": epoch.number, "weight": float(model.weight.grad.full_tensor().sum())},
                    )
                    if epoch.number == 1 and membership.me.id == "w2":
                        os.kill(os.getpid(), signal.SIGKILL)
        except RuntimeError as error:  # from within PyTorch
            assert isinstance(world.wire, GroupWire)
            lost = world.wire.lost(error)
            assert isinstance(lost, PeerLost)
            world.wire.close()


def test_sharded_models_use_each_new_default_group() -> None:
    with Job(_shard) as job:
        job.start("w0", "w1", "w2")
        told = _formed(job, 2)
        assert [t["weight"] for t in told] == [3 * 8.0 * 24] * 2


class _Nobody:
    """A membership that nothing happens in."""

    me = Seat(id="a", host="here")
    over = threading.Event()


def test_what_cannot_be_joined_is_refused() -> None:
    two_hosts = Epoch(number=1, seats=(Seat(id="a", host="here"), Seat(id="b", host="there")))
    with pytest.raises(UsageError, match="shared memory"):
        form(two_hosts, _Nobody(), device=CPU, transport="shared")  # type: ignore[arg-type]


def test_one_member_is_alone_and_wires_say_whether_they_are_lazy() -> None:
    world = form(Epoch(number=1, seats=(_Nobody.me,)), _Nobody(), device=CPU)  # type: ignore[arg-type]
    assert (world.kind, world.size) == ("solo", 1)
    assert (Solo.lazy, SharedWire.lazy, GroupWire.lazy) == (True, True, False)


def test_a_blocking_call_is_left_behind() -> None:
    over, release = threading.Event(), threading.Event()
    said: list[Any] = []
    watch = Watch(over, lambda rank, detail: said.append((rank, detail)), (4, 7))
    assert watch.call(lambda: 5, "here") == 5
    with pytest.raises(KeyError):
        watch.call(lambda: {}["x"], "here")
    threading.Timer(0.05, over.set).start()
    with pytest.raises(PeerLost, match="during there"):
        watch.call(release.wait, "there")
    release.set()
    assert watch.failed("here", 1, "x").rank == 7
    assert said == [], "the epoch is over: everybody knows"
    over.clear()
    assert watch.among([1]).failed("here", 0, "x").rank == 7
    assert said == [(7, "here: x")]


@pytest.mark.parametrize(
    ("address", "one_host", "reached"),
    [
        ("10.0.0.3:7001", False, "10.0.0.3"),
        ("[fd00::3]:7001", False, "fd00::3"),
        ("", False, ""),
        ("127.0.0.1:7001", False, ""),
        ("[::1]:7001", False, ""),
        ("127.0.0.1:7001", True, "127.0.0.1"),
    ],
)
def test_gloo_is_told_where_this_host_is_reached(address: str, one_host: bool, reached: str) -> None:
    """By itself it takes what the host's name leads to, which on many machines is 127.0.1.1."""
    me = SimpleNamespace(me=Seat(id="w0", host="h", address=address))
    assert _reached_at(cast(Membership, me), one_host=one_host) == reached
