"""Every wire gives the same answers, over real processes."""

from __future__ import annotations

import itertools
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import warm
from fleet import Fleet

from manyhands.core.errors import Diverged, PeerLost
from manyhands.core.request import ACROSS, NODE, Gather, Place, Scatter, Sum, Swap, Where, partner
from manyhands.exchange.allreduce import AllReduce
from manyhands.exchange.ordered import Ordered, Tree
from manyhands.wire import segment
from manyhands.wire.drive import Interleave, lockstep, run
from manyhands.wire.shared import SharedWire
from manyhands.wire.solo import Solo

TRANSPORTS = ["shared", "group"]
SIZES = [2, 3]


def _data(rank: int, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank + 100 * numel)).to(dtype)


def _sums(world: Any, numels: list[int], dtype: torch.dtype, registered: bool) -> list[list[float]]:
    out = []
    for numel in numels:
        tensor = _data(world.rank, numel, dtype)
        if registered:
            buffer = world.wire.buffer(numel + 32, dtype)
            buffer[16 : 16 + numel] = tensor
            tensor = buffer[16 : 16 + numel]
        out.append(world.wire.begin(Sum(tensor)).wait().tolist())
    return out


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("registered", [False, True])
def test_sum_is_equal_everywhere_and_right(
    fleets: Any, transport: str, size: int, dtype: torch.dtype, registered: bool
) -> None:
    numels = [1, 3, 1000, 300_001]
    answers = fleets(size, transport).run(_sums, numels, dtype, registered)
    for numel, *each in zip(numels, *answers, strict=True):
        assert all(other == each[0] for other in each), "replicas must agree bitwise"
        exact = sum(_data(rank, numel, dtype).double() for rank in range(size))
        tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-6}.get(dtype, 1e-12)
        torch.testing.assert_close(
            torch.tensor(each[0], dtype=torch.float64), exact, rtol=tolerance, atol=tolerance
        )


def _gathers(world: Any) -> list[list[Any]]:
    uneven = torch.arange(world.rank * 1000 * 3, dtype=torch.float64).reshape(-1, 3)
    big = torch.full((700_000 + world.rank,), float(world.rank))
    scalar = torch.tensor(world.rank, dtype=torch.int32)
    replies = []
    for tensor in (uneven, big, scalar):
        parts = world.wire.begin(Gather(tensor)).wait()
        replies.append([(list(p.shape), str(p.dtype), float(p.double().sum())) for p in parts])
    return replies


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("size", SIZES)
def test_gather_keeps_shapes_types_and_order(fleets: Any, transport: str, size: int) -> None:
    for uneven, big, scalar in fleets(size, transport).run(_gathers):
        for rank in range(size):
            rows = rank * 1000
            assert uneven[rank] == ([rows, 3], "torch.float64", sum(range(rows * 3)))
            assert big[rank] == ([700_000 + rank], "torch.float32", float(rank) * (700_000 + rank))
            assert scalar[rank] == ([], "torch.int32", float(rank))


def _others(world: Any) -> list[Any]:
    wire, rank, size = world.wire, world.rank, world.size
    parts = [torch.full((700_000 + 3 * to,), 10.0 * rank + to) for to in range(size)]
    scattered = wire.begin(Scatter(parts)).wait()
    even = wire.begin(Gather(torch.full((300_001,), rank, dtype=torch.int16), even=True)).wait()
    swaps = [wire.begin(Swap(torch.full((400_000,), float(rank)), key)).wait() for key in range(4)]
    empty = wire.begin(Scatter([torch.empty(0) for _ in range(size)])).wait()
    return [
        [(list(t.shape), float(t.double().mean())) for t in scattered],
        [(t.numel(), int(t[-1])) for t in even],
        [float(t.mean()) for t in swaps],
        [t.numel() for t in empty],
        tuple(wire.begin(Where()).wait()),
        tuple(wire.begin(Where(NODE)).wait()),
        tuple(wire.begin(Where(ACROSS)).wait()),
        float(wire.begin(Sum(torch.ones(5), NODE)).wait().sum()),
        float(wire.begin(Sum(torch.ones(5), ACROSS)).wait().sum()),
    ]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("size", SIZES)
def test_scatter_swap_and_axes(fleets: Any, transport: str, size: int) -> None:
    for rank, answer in enumerate(fleets(size, transport).run(_others)):
        scattered, even, swaps, empty, *rest = answer
        assert scattered == [([700_000 + 3 * rank], 10.0 * sender + rank) for sender in range(size)]
        assert even == [(300_001, sender) for sender in range(size)]
        assert swaps == [float(partner(rank, size, key)) for key in range(4)]
        assert empty == [0] * size
        assert rest == [(rank, size), (rank, size), (0, 1), 5.0 * size, 5.0]
        assert Place(rank, size) == (rank, size)


def _two_hosts(rank: int, directory: str, answers: Any) -> None:
    from manyhands.wire.world import connect

    world = connect(
        rank=rank,
        size=4,
        local_size=2,
        device=torch.device("cpu"),
        store_path=directory,
        master=None,
        agent_store=False,
        timeout_s=60.0,
        host=f"host{rank // 2}",
    )
    tensor = torch.full((1000,), 2.0**rank)
    sums = [
        float(world.wire.begin(Sum(tensor.clone(), axis)).wait()[0]) for axis in (ACROSS, NODE, "replica")
    ]
    answers.put((rank, world.kind, sums))
    world.wire.begin(Sum(tensor)).wait()
    world.wire.close()


def test_axes_of_two_hosts(tmp_path: Any) -> None:
    """Four real processes that say they are two hosts: shared memory within, sockets across."""
    context = warm.context()
    answers = context.Queue()
    workers = [context.Process(target=_two_hosts, args=(r, str(tmp_path), answers)) for r in range(4)]
    for worker in workers:
        worker.start()
    got = sorted(answers.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert got == [
        (0, "gloo", [5.0, 3.0, 15.0]),
        (1, "gloo", [10.0, 3.0, 15.0]),
        (2, "gloo", [5.0, 12.0, 15.0]),
        (3, "gloo", [10.0, 12.0, 15.0]),
    ]


def _many_talks(world: Any) -> list[list[float]]:
    talks = Interleave(world.wire)
    exchange = AllReduce()
    buffer = world.wire.buffer(64, torch.float32)
    for i in range(4):
        piece = buffer[16 * i : 16 * i + 16]
        piece[:] = float(world.rank + i)
        talks.start(exchange.talk([piece], ()))
    return [agreed.mean[0].tolist() for agreed in talks.finish()]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_interleaved_talks_advance_by_position(fleets: Any, transport: str) -> None:
    for answer in fleets(3, transport).run(_many_talks):
        assert answer == [[float(0 + 1 + 2 + 3 * i)] * 16 for i in range(4)]


def _world_gather(world: Any) -> list[Any]:
    return list(world.gather({"rank": world.rank, "name": "é" * world.rank}))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_json_values_are_gathered(fleets: Any, transport: str) -> None:
    expected = [{"rank": r, "name": "é" * r} for r in range(3)]
    assert fleets(3, transport).run(_world_gather) == [expected] * 3


def _until_lost(world: Any, victim: int) -> str:
    tensor = world.wire.buffer(1 << 16, torch.float32)
    for _ in range(3):
        world.wire.begin(Sum(tensor)).wait()
    if world.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        while True:
            world.wire.begin(Sum(tensor)).wait()
    except PeerLost as lost:
        return f"{lost.rank}"


def test_a_killed_peer_is_noticed_and_named() -> None:
    fleet = Fleet(3, "shared")
    try:
        for pipe in fleet._pipes:
            pipe.send((_until_lost, (1,)))
        for rank in (0, 2):
            assert fleet._pipes[rank].poll(60)
            assert fleet._pipes[rank].recv() == ("ok", "1")
    finally:
        fleet.close()


def test_who_gave_up_is_not_blamed() -> None:
    """Rank 0 gave up because of rank 2, who never comes; rank 1 waits for both."""
    facts: dict[str, str] = {}

    class Board:
        def set(self, key: str, text: str) -> None:
            facts[key] = text

        def get(self, key: str) -> str:
            while key not in facts:
                os.sched_yield()
            return facts[key]

    with ThreadPoolExecutor(3) as pool:
        wires = list(pool.map(lambda rank: SharedWire(Board(), rank, 3), range(3)))
    wires[0]._control[0, 0], wires[1]._timeout_s = -1, 0.1
    with pytest.raises(PeerLost, match="worker 2 was lost"):
        wires[1].barrier()


def test_without_anonymous_files_memory_is_shared_all_the_same(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS."""
    for name in ("memfd_create", "posix_fallocate"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(segment, "_directory", lambda: tmp_path)
    made = segment.Segment(5000)
    found = segment.find(made.place)
    found[4999:] = b"x"
    made.settled()
    assert made.mapped[4999:] == b"x"
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_in_shared_memory(fleets: Any) -> None:
    fleet = fleets(2, "shared")
    fleet.run(_sums, [1000], torch.float32, True)
    pids = {str(p.pid) for p in fleet.processes}
    left = [n for n in os.listdir("/dev/shm") if n.startswith("manyhands-") and n.split("-")[1] in pids]
    assert left == []


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("precision", ["as-is", "bf16", "fp16", "fp32"])
def test_all_reduce_in_lockstep(size: int, precision: Any) -> None:
    exchange = AllReduce(precision=precision)
    deltas = [[_data(rank, 100), _data(rank, 7)] for rank in range(size)]
    agreed = lockstep([exchange.talk([d.clone() for d in delta], ()) for delta in deltas])
    for i in range(2):
        exact = sum(delta[i].double() for delta in deltas)
        assert all(torch.equal(a.mean[i], agreed[0].mean[i]) for a in agreed)
        tolerance = {"bf16": 2e-2, "fp16": 3e-3}.get(precision, 1e-6)
        torch.testing.assert_close(agreed[0].mean[i].double(), exact, rtol=tolerance, atol=tolerance * size)
        for rank, a in enumerate(agreed):
            torch.testing.assert_close(a.sent[i], deltas[rank][i], rtol=tolerance, atol=tolerance)


def test_unequal_requests_raise_instead_of_hanging() -> None:
    exchange = AllReduce()
    with pytest.raises(Diverged, match="worker 0 asked for Sum"):
        lockstep([exchange.talk([torch.zeros(3)], ()), exchange.talk([torch.zeros(4)], ())])
    with pytest.raises(Diverged, match="nothing"):
        lockstep([exchange.talk([torch.zeros(3)], ()), exchange.talk([], ())])


@pytest.mark.parametrize("leaves", [1, 2, 3, 5, 8, 13, 18])
def test_the_tree_gives_the_same_bits_for_every_split(leaves: int) -> None:
    numel = 1000
    values = [_data(i, numel) * 10.0**i for i in range(leaves)]

    def whole(splits: list[range]) -> torch.Tensor:
        deltas = []
        for places in splits:
            tree = Tree(leaves)
            for place in places:
                tree.add((0, place), values[place].clone())
            keys = torch.tensor([[lv, ix, leaves] for lv, ix in tree.nodes], dtype=torch.int64).reshape(-1, 3)
            rows = torch.stack(list(tree.nodes.values())) if tree.nodes else torch.empty(0, numel)
            deltas.append([keys, rows])
        exchange = Ordered(chunk_mb=0.001)
        agreed = lockstep([exchange.talk(d, ()) for d in deltas])
        assert all(torch.equal(a.mean[0], agreed[0].mean[0]) for a in agreed)
        return agreed[0].mean[0]

    reference = whole([range(leaves)])
    for cuts in ([0, leaves], [leaves // 2], [leaves // 3, leaves // 2], [0, 0, 1], list(range(leaves))):
        edges = [0, *cuts, leaves]
        assert torch.equal(whole([range(a, b) for a, b in itertools.pairwise(edges)]), reference)


def test_a_missing_place_is_found() -> None:
    tree = Tree(3)
    tree.add((0, 0), torch.ones(1))
    tree.add((0, 2), torch.ones(1))
    with pytest.raises(Diverged, match="exactly once"):
        tree.root()


def test_solo_answers_itself() -> None:
    tensor = torch.ones(3)
    assert torch.equal(run(AllReduce().talk([tensor], ()), Solo()).mean[0], tensor)


def _long_messages(world: Any) -> bool:
    """Every kind of message that is cut into pieces, whose last one is shorter."""
    wire, numel = world.wire, 5_000_003

    def of(rank: int) -> torch.Tensor:
        return torch.arange(numel, dtype=torch.int32) * (rank + 1)

    even = wire.begin(Gather(of(wire.rank), even=True))
    uneven = wire.begin(Gather(of(wire.rank)[: numel - wire.rank]))
    scattered = wire.begin(Scatter([of(10 * wire.rank + to) for to in range(wire.size)]))
    good = all(torch.equal(part, of(r)) for r, part in enumerate(even.wait()))
    good &= all(torch.equal(part, of(r)[: numel - r]) for r, part in enumerate(uneven.wait()))
    good &= all(torch.equal(part, of(10 * r + wire.rank)) for r, part in enumerate(scattered.wait()))
    swapped = wire.begin(Swap(of(wire.rank), 0)).wait()
    return good and torch.equal(swapped, of(partner(wire.rank, wire.size, 0)))


@pytest.mark.parametrize("size", SIZES)
def test_long_messages_arrive_whole(fleets: Any, size: int) -> None:
    assert fleets(size, "group").run(_long_messages) == [True] * size
