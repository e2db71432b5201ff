"""The wire of one membership epoch: formed by its members, left when it is over, formed anew in the same process.

    while True:
        epoch = membership.next()
        world = form(epoch, membership, device=device)
        try:
            ...  # every wait for a peer raises PeerLost once `membership.over` is set
        except PeerLost:
            world.wire.close()  # waits for nobody

Members find each other by one small fact of rank 0, published under the epoch's number: where its memory is, or the address of
its store. Nothing of an earlier epoch can be met by mistake.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch._C._distributed_c10d import TCPStore

from manyhands.core.membership import fact_of
from manyhands.wire.group import GroupWire
from manyhands.wire.shared import SharedWire
from manyhands.wire.solo import Solo
from manyhands.wire.watch import Watch
from manyhands.wire.world import Member, World, hosts, kind_of, nodes_of

if TYPE_CHECKING:
    from manyhands.core.membership import Epoch, Membership

MEET_S = 60.0  # members of an epoch are all alive and on their way


def form(
    epoch: Epoch,
    membership: Membership,
    *,
    device: torch.device,
    transport: str = "auto",
    timeout_s: float = 1800.0,
) -> World:
    """Meet exactly the members of `epoch` and build the wire between them. Ranks are the epoch's.

    Args:
        device: this worker's, as its seat says.
        transport: "auto", "shared" (CPUs of one host only) or "group" (gloo or NCCL). A group becomes PyTorch's default one.
        timeout_s: how long a wait for a living member may take.

    Raises:
        PeerLost: the epoch ended meanwhile, or a member cannot be reached (the membership is told).
        UsageError: `transport` cannot join these members; or somebody else made a default process group.
    """
    rank, size = epoch.rank_of(membership.me.id), len(epoch.seats)
    members = tuple(Member(r, seat.host, seat.device) for r, seat in enumerate(epoch.seats))
    kind = kind_of(members, transport)
    if kind == "solo":
        return World(Solo(str(device)), members, kind)
    watch = Watch.of(membership, epoch)
    board = _Board(membership, epoch.number)
    if kind == "shared memory":
        return World(SharedWire(board, rank, size, timeout_s=timeout_s, watch=watch), members, kind)
    one_host = len(hosts(members)) == 1
    wire = GroupWire(
        _store(epoch, membership, board, watch, one_host=one_host),
        rank,
        size,
        device=device,
        nccl=kind == "nccl",
        timeout_s=timeout_s,
        nodes=nodes_of(members),
        watch=watch,
        uneven=epoch.number > 1,  # the job has begun: a change of its workers is no reason to end it
        address=_reached_at(membership, one_host=one_host),
    )
    return World(wire, members, kind)


class _Board:
    """Facts of an epoch, told and awaited through the membership."""

    def __init__(self, membership: Membership, epoch: int) -> None:
        self._membership, self._epoch = membership, epoch

    def set(self, key: str, text: str) -> None:
        self._membership.publish(fact_of(self._epoch, key), text)

    def get(self, key: str) -> str:
        return self._membership.lookup(fact_of(self._epoch, key), MEET_S)


def _store(epoch: Epoch, membership: Membership, board: _Board, watch: Watch, *, one_host: bool) -> Any:
    """A store of this epoch alone, served by rank 0 on a free port."""
    phase, patience = "meeting", timedelta(seconds=MEET_S)
    mine = epoch.seats[0].id == membership.me.id
    try:
        if mine:
            host = "127.0.0.1" if one_host else _address_of_mine(membership)
            store = watch.call(
                lambda: TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience), phase
            )
            board.set("address", f"{host}:{store.port}")
            return store
        host, _, port = board.get("address").rpartition(":")
        return watch.call(
            lambda: TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=patience),
            phase,
        )
    except RuntimeError as error:
        raise watch.failed(phase, None if mine else 0, str(error).split("\n")[0]) from error


def _address_of_mine(membership: Membership) -> str:
    """Where workers of other hosts reach this one: where its seat says that it hands out its state, else its name."""
    return _reached_at(membership, one_host=False) or socket.gethostname()


def _reached_at(membership: Membership, *, one_host: bool) -> str:
    """Empty where that is not known: the coordinator, on this host, was named by its loopback address."""
    host = membership.me.address.rpartition(":")[0].strip("[]")
    return "" if not one_host and (host.startswith("127.") or host == "::1") else host
