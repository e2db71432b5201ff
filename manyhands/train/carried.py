"""A replica's state on its way to another worker: as a checkpoint has it, without the disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from manyhands.core.request import Sum
from manyhands.exchange.combine import is_own, leaves
from manyhands.train import exchange_state

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.train.replica import Replica

FETCH_BYTES_S = 0.3e9  # at least
PARTS = ("model", "optimizer", "exchange")


def state_of(replica: Replica) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by ``part/name``, counters). The tensors are the replica's own where they stay as they are."""
    exchange = exchange_state.alone(replica.states, replica.wire.rank, replica.method.local_state())
    still = bool(getattr(replica.method, "still", False))
    with replica.agreed(
        collective=False
    ):  # where I have gone on alone, the model is not what all agreed upon
        model = {name: t if still else t.clone() for name, t in replica.model.state_dict().items()}
    found = (model, replica.optimizer_state(), exchange)
    tensors = {
        f"{part}/{name}": tensor.detach()
        for part, named in zip(PARTS, found, strict=True)
        for name, tensor in named.items()
    }
    facts = {"steps": replica.steps, "tokens": replica.tokens, "skipped": replica.skipped}
    return tensors, {**facts, "agreements": getattr(replica.method, "agreements", 0)}


def carries(replica: Replica) -> bool:
    """Whether every worker holds all of the state, so that survivors can go on with it."""
    return hasattr(replica.method, "adopt") and not getattr(replica.method, "divided", False)


def fetch_s(replica: Replica) -> float:
    """Seconds that it takes a newcomer to get this state, between two processes of one machine or over a fast network."""
    return size_of(replica) / FETCH_BYTES_S


def size_of(replica: Replica) -> int:
    """Bytes of what `state_of` gives, roughly: parameters and two moments."""
    return 3 * sum(p.numel() * p.element_size() for _, p in replica.named)


def load(replica: Replica, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], leader: int) -> None:
    """Take what `state_of` gave on rank `leader`. What that one holds back of its own contributions stays its own.

    Nor do I keep what I held back, where I took part before and am behind: it was in my contribution to the agreement that I have
    missed, and what was sent of that, which alone would say what is left, is known at the end of a talk only. Kept, it would
    count twice; without it what was left is lost, as it is of a worker that is killed. Estimates (EF21's) owe nobody
    anything, and stay: `resum` has counted them.

    Raises:
        CheckpointError: it is another model's, optimizer's or exchange's.
    """
    named: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for full, tensor in tensors.items():
        part, _, name = full.partition("/")
        named[part][name] = tensor
    replica.load_optimizer_state(named["optimizer"])
    states = exchange_state.restore(
        replica.states, named["exchange"], rank=leader + 1, size=leader + 2, path="the state of a peer"
    )
    exchange_state.keep_estimates(replica.states, states)
    replica.states[:] = states
    replica.method.load_local_state(exchange_state.local(named["exchange"], rank=leader))
    own = replica.model.state_dict()
    with torch.no_grad():
        for name, tensor in named["model"].items():
            own[name].copy_(tensor)
    replica.steps, replica.tokens = int(facts["steps"]), int(facts["tokens"])
    replica.skipped = int(facts["skipped"])
    replica.method.restart()
    if hasattr(replica.method, "agreements"):
        replica.method.agreements = int(facts["agreements"])


def hand_over(replica: Replica, leaving: Sequence[bool]) -> None:
    """What those who leave have held back of their contributions goes to the first who stays. Collective.

    Only the sum of residuals over all workers matters (see `Agreed.state`), and it stays as it was.
    """
    heir = list(leaving).index(False)
    mine = replica.wire.rank
    handed: list[tuple[Tensor, Tensor]] = []
    for state in replica.states:
        for path, residual in leaves(state):
            if not is_own(path):
                continue
            owed = residual.clone() if leaving[mine] else torch.zeros_like(residual)
            total = replica.wire.begin(Sum(owed.reshape(-1))).wait().reshape(residual.shape)
            handed.append((residual, total))
    for residual, total in handed:  # once all of it is there: whoever is lost meanwhile changes nothing
        if mine == heir:
            residual.add_(total)
        elif leaving[mine]:
            residual.zero_()
