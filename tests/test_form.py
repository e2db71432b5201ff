"""Wires that belong to a membership epoch: real processes, killed and stopped at any moment, re-formed in place."""

from __future__ import annotations

import random
import signal
import time
from typing import Any

import pytest
import torch
from members import Job, PipeMembership

from manyhands.core.errors import PeerLost
from manyhands.core.request import Gather, Scatter, Sum, Swap
from manyhands.wire.form import form

CPU = torch.device("cpu")
TRANSPORTS = ["shared", "group"]


def _check(world: Any) -> None:
    tensor = torch.full((1000,), 2.0**world.rank)
    total = world.wire.begin(Sum(tensor)).wait()
    assert total.tolist() == [2.0**world.size - 1] * 1000, total[:3]


def _serve(membership: PipeMembership, transport: str, seed: int) -> None:
    """Form, check, then random collectives until the epoch is over; again and again."""
    closing_s = lost_s = 0.0
    while True:
        epoch = membership.next()
        begun = time.perf_counter()
        try:
            world = form(epoch, membership, device=CPU, transport=transport)
            _check(world)
        except PeerLost:
            continue
        membership.tell(
            "told", (epoch.number, world.rank, world.size, lost_s, closing_s, time.perf_counter() - begun)
        )
        choice = random.Random(seed + epoch.number)  # the same on every worker
        try:
            while True:
                _collective(world, choice)
        except PeerLost:
            begun = time.perf_counter()
            lost_s = begun - membership.over_at if membership.over.is_set() else 0.0
            world.wire.close()
            closing_s = time.perf_counter() - begun


def _collective(world: Any, choice: random.Random) -> None:
    wire, kind, numel = world.wire, choice.randrange(6), choice.choice([1, 1000, 1 << 20])
    tensor = torch.ones(numel)
    if kind == 0:
        assert float(wire.begin(Sum(tensor)).wait()[0]) == world.size
    elif kind == 1:
        handles = [wire.begin(Sum(torch.ones(numel))) for _ in range(3)]
        assert [float(h.wait()[0]) for h in handles] == [world.size] * 3
    elif kind == 2:
        assert len(wire.begin(Gather(torch.ones(numel + world.rank))).wait()) == world.size
    elif kind == 3:
        wire.begin(Scatter([torch.ones(numel)] * world.size)).wait()
    elif kind == 4:
        wire.begin(Swap(tensor, choice.randrange(100))).wait()
    else:
        wire.begin(Gather(tensor, even=True)).wait()


def _formed(job: Job, number: int) -> list[Any]:
    """What all workers of epoch `number` or a later one told, once all have."""

    def found() -> list[Any]:
        if job.epoch.number < number:
            return []
        now = [told for _, told in job.told if told[0] == job.epoch.number]
        return now if len(now) == len(job.epoch.seats) else []

    return job.until(found)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_killed_and_stopped_at_random_moments(transport: str) -> None:
    """Twenty ends of a worker, each followed by a new wire among survivors and a replacement, and a right sum."""
    choice = random.Random(7)
    with Job(_serve, transport, 7) as job:
        job.start("w0", "w1", "w2")
        _formed(job, 1)
        for turn in range(20):
            job.start(f"r{turn}")  # it waits to join
            number = job.epoch.number
            victim = choice.choice(job.epoch.seats).id
            time.sleep(choice.random() * 0.02)
            if turn % 4 == 3:
                job.kill(victim, signal.SIGSTOP)
                time.sleep(choice.random() * 0.02)
                job.evict(victim)
            else:
                job.kill(victim)
            told = _formed(job, number + 1)
            assert sorted(rank for _, rank, *_ in told) == [0, 1, 2]
