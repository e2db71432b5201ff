"""Promise 5 for divided models: groups hold bitwise equal pieces of parameters and of the optimizer's state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from manyhands.core.errors import Diverged
from manyhands.core.request import Gather
from manyhands.train.mending import fingerprint_of

if TYPE_CHECKING:
    from manyhands.strategy.named import NamedOptimizer
    from manyhands.train.replica import Replica
    from manyhands.train.sharded_layout import Layout


def check(replica: Replica, layout: Layout, optimizer: NamedOptimizer) -> str:
    """Compare the pieces of all groups (each group has every piece once); a digest of the parameters. Collective.

    Raises:
        Diverged: on all workers alike.
    """
    state = optimizer.state_by_name()
    words = fingerprint_of(state[name] for name in sorted(state))
    mine = torch.cat([torch.tensor(layout.mesh.place), layout.fingerprint(), words])
    everyones = torch.stack(replica.wire.begin(Gather(mine, even=True)).wait())  # [workers, 3 + 2 + 2] int64
    holders: dict[tuple[int, int], int] = {}
    for rank, (group, shard, layer, *_) in enumerate(everyones.tolist()):
        first = holders.setdefault((shard, layer), rank)
        one, other = everyones[first], everyones[rank]
        if torch.equal(one[3:], other[3:]):
            continue
        what = "optimizer state" if torch.equal(one[3:5], other[3:5]) else "parameters"
        raise Diverged(
            f"worker {rank} (group {group}) holds other {what} than worker {first} (group {int(one[0])}) after step "
            f"{replica.steps}",
            "groups hold bitwise equal pieces",
            "build the model the same everywhere; if this appeared in mid-run, a machine computes wrongly",
        )
    total = everyones[:, 3:5].sum(0)  # wraps around
    return "".join(f"{int(word) & (2**64 - 1):016x}" for word in total)
