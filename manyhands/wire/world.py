"""Who takes part, and which wire joins them. Facts of the launcher come in as values, never from the environment."""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, TCPStore

from manyhands.core.errors import PeerLost, UsageError
from manyhands.core.request import Gather
from manyhands.wire.group import GroupWire
from manyhands.wire.shared import SharedWire
from manyhands.wire.solo import Solo

if TYPE_CHECKING:
    from manyhands.core.types import Wire


MEET_S = 300.0  # for all workers to come to a store
LOOK_S = 0.02


@dataclass(frozen=True)
class Member:
    """One worker's facts, as it tells them to the others."""

    rank: int
    host: str
    device: str


@dataclass(frozen=True)
class World:
    """All workers of a job and the wire between them.

    Attributes:
        members: in rank order.
        kind: "solo", "shared memory", "nccl" or "gloo", for the plan.
    """

    wire: Wire
    members: tuple[Member, ...]
    kind: str

    @property
    def rank(self) -> int:
        return self.wire.rank

    @property
    def size(self) -> int:
        return self.wire.size

    def gather(self, value: Any) -> list[Any]:
        """Everybody's JSON value, in rank order."""
        data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        parts = self.wire.begin(Gather(data)).wait()
        return [json.loads(bytes(part.tolist())) for part in parts]


def connect(
    *,
    rank: int,
    size: int,
    local_size: int,
    device: torch.device,
    store_path: str | None,
    master: tuple[str, int] | None,
    agent_store: bool,
    transport: str = "auto",
    timeout_s: float = 1800.0,
    host: str | None = None,
) -> World:
    """Meet the other workers and choose the wire.

    Args:
        store_path: a file through which the workers of one host meet (our own launcher: no port at all).
        master: host and port of a TCP store (torchrun and its like).
        agent_store: whether somebody else already serves that port (torchrun's agent).
        transport: "auto", "shared" (one host only) or "group" (gloo or NCCL).
        host: what this host is called; workers of equal names share memory. Default: its host name.
    """
    host = host or socket.gethostname()
    me = Member(rank, host, str(device))
    if size == 1:
        return World(Solo(str(device)), (me,), "solo")
    store = _store(rank, size, store_path, master, agent_store, timeout_s)
    members = _meet(store, me, size)
    kind = kind_of(members, transport, one_host=local_size == size)
    if kind == "shared memory":
        return World(SharedWire(store, rank, size, timeout_s=timeout_s), members, kind)
    return World(
        GroupWire(
            store,
            rank,
            size,
            device=device,
            nccl=kind == "nccl",
            timeout_s=timeout_s,
            nodes=nodes_of(members),
        ),
        members,
        kind,
    )


def kind_of(members: Sequence[Member], transport: str, *, one_host: bool = True) -> str:
    """Which wire joins them: "solo", "shared memory", "nccl" or "gloo".

    Args:
        transport: "auto", "shared" or "group".
        one_host: whether members with the same host's name are known to be on one.

    Raises:
        UsageError: they cannot be joined by that transport.
    """
    if len(members) == 1:
        return "solo"
    near = one_host and len(hosts(members)) == 1 and all(m.device == "cpu" for m in members)
    if transport == "shared" and not near:
        raise UsageError(
            "transport = 'shared'",
            "shared memory joins CPU workers of one host",
            "use transport = 'group' or 'auto'",
        )
    if transport != "group" and near:
        return "shared memory"
    gpus = {(m.host, m.device) for m in members if m.device.startswith("cuda")}
    return "nccl" if len(gpus) == len(members) else "gloo"


def nodes_of(members: Sequence[Member]) -> list[int]:
    """Which host each member is on, as numbers from 0."""
    names = hosts(members)
    return [names.index(m.host) for m in members]


def _store(
    rank: int,
    size: int,
    path: str | None,
    master: tuple[str, int] | None,
    agent_store: bool,
    timeout_s: float,
) -> Any:
    if path is not None:
        return FileStore(str(Path(path) / "store"), size)
    if master is None:
        raise UsageError(
            f"worker {rank} of {size} has nowhere to meet the others",
            "MASTER_ADDR and MASTER_PORT name the place",
            "set them, or start the job with torchrun",
        )
    address, port = master
    try:
        store = TCPStore(
            address,
            port,
            size,
            is_master=rank == 0 and not agent_store,
            timeout=timedelta(seconds=min(timeout_s, MEET_S)),
            wait_for_workers=False,
        )
    except (RuntimeError, dist.DistError) as error:
        raise PeerLost(0, f"meeting at {address}:{port}", str(error).split("\n")[0]) from error
    ours = PrefixStore("manyhands", store)
    return _met_anew(ours, rank, size, timeout_s) if agent_store else ours


def _met_anew(store: Any, rank: int, size: int, timeout_s: float) -> Any:
    """This meeting's own part of an agent's store, which keeps what workers have said that it has started anew since then.

    How often it has done so differs between the agents of several hosts. So each worker says a word of its own, and waits
    until whoever is rank 0 now has answered that very word.
    """
    if rank:
        word = secrets.token_hex(8)
        store.set(f"here/{rank}", word)
        try:
            meeting = store.get(f"met/{word}").decode()
        except (RuntimeError, dist.DistError) as error:
            raise PeerLost(0, "meeting", str(error).split("\n")[0]) from error
        store.set(f"{meeting}/{rank}", "")
        return PrefixStore(meeting, store)
    meeting, missing, answered = secrets.token_hex(8), set(range(1, size)), set()
    deadline = time.monotonic() + min(timeout_s, MEET_S)
    while missing:
        for other in sorted(missing):
            if store.check([f"{meeting}/{other}"]):
                missing.discard(other)
            elif (
                store.check([f"here/{other}"])
                and (word := store.get(f"here/{other}").decode()) not in answered
            ):
                answered.add(word)  # it may be of one that is gone
                store.set(f"met/{word}", meeting)
        if missing and time.monotonic() > deadline:
            raise PeerLost(min(missing), "meeting", f"it has not come within {min(timeout_s, MEET_S):.0f} s")
        time.sleep(LOOK_S if missing else 0.0)
    return PrefixStore(meeting, store)


def _meet(store: Any, me: Member, size: int) -> tuple[Member, ...]:
    store.set(f"member/{me.rank}", json.dumps([me.host, me.device]))
    members = []
    for rank in range(size):
        try:
            host, device = json.loads(store.get(f"member/{rank}"))
        except (RuntimeError, dist.DistError) as error:
            raise PeerLost(rank, "meeting", str(error).split("\n")[0]) from error
        members.append(Member(rank, host, device))
    return tuple(members)


def hosts(members: Sequence[Member]) -> list[str]:
    """Distinct host names, in order of first appearance."""
    return list(dict.fromkeys(m.host for m in members))
