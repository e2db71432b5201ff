"""How a worker gets into a job: into a fixed world by its launcher's variables, or into a changing one by a coordinator."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manyhands.core.environment import read_env
from manyhands.core.errors import ManyhandsError, PeerLost
from manyhands.train import session
from manyhands.wire.solo import Solo
from manyhands.wire.world import Member, World

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from manyhands.core.membership import Epoch, Membership
    from manyhands.train.job import Job
    from manyhands.wire.transfer import Offer


FETCHES = 3  # that fail, before a worker ends: each ends an epoch, and the job with the sixth that nobody is to blame for


@dataclass(frozen=True)
class Enlisted:
    """A worker that a coordinator knows.

    Attributes:
        join: makes the world of an epoch.
        fetch: gets a peer's state, and says as long as it comes that it does.
    """

    membership: Membership
    offer: Offer
    join: Callable[[Epoch], World]
    fetch: Callable[[str, int, Callable[[], None]], tuple[dict[str, Tensor], dict[str, Any]]]

    def close(self) -> None:
        """Nobody gets anything from me any more."""
        self.offer.close()


def device_of(job: Job) -> torch.device:
    """This worker's device, with threads and kernels as the job wants them."""
    import torch

    if job.reproducible:
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(job.threads or 1)  # the order of additions inside a kernel depends on it
    elif job.threads is not None:
        torch.set_num_threads(job.threads)
    return session.choose_device(job.device, read_env())


def enlist(job: Job, device: torch.device) -> Enlisted | None:
    """Report to the coordinator; None where the launcher named none. Raises what the coordinator says."""
    env = read_env()
    if env.coordinator is None or env.token_file is None:
        return None
    from manyhands.coordinate.client import connect_from_env
    from manyhands.core import tls
    from manyhands.core.membership import Seat
    from manyhands.wire.form import form
    from manyhands.wire.transfer import Offer, fetch

    token = tls.read_token(env.token_file)
    offer = Offer(token, toward=env.coordinator)
    host = env.host or socket.gethostname()
    seat = Seat(
        id=env.seat or f"w{env.rank}", host=host, device=str(device), pid=os.getpid(), address=offer.address
    )
    membership = connect_from_env(seat)
    assert membership is not None
    transport = session.transport_for(job.strategy.placement, job.transport)

    missed = 0  # attempts to fetch the state, in a row

    def join(epoch: Epoch) -> World:
        return form(epoch, membership, device=device, transport=transport)

    def get(
        address: str, version: int, moved: Callable[[], None]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        nonlocal missed
        moved()  # to wait for the offer belongs to it
        try:
            found = fetch(address, token, version, over=membership.over, moved=moved)
        except PeerLost as lost:
            missed += not membership.over.is_set()  # else somebody else was lost meanwhile
            if missed < FETCHES:
                raise
            raise ManyhandsError(
                f"the job's state cannot be fetched from {address}: {lost} ({missed} times in a row)",
                "who takes part needs it, and the others wait for that",
                "see to the network between these hosts, and join again",
            ) from lost
        missed = 0
        return found

    return Enlisted(membership, offer, join, get)


def alone(device: torch.device) -> World:
    """A world of one, in which a newcomer gets ready."""
    return World(Solo(str(device)), (Member(0, socket.gethostname(), str(device)),), "solo")
