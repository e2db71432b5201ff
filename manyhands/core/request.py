"""What an exchange may ask of the network: the whole vocabulary.

A request is a value. `Wire.begin` (floor 1) carries it; `lockstep` answers it without any network.
Contributions are weighted *before* they are sent (promise 2: sums and counts), so the primitive is a sum and
not a mean: Σ wᵢ gᵢ over workers with Σ wᵢ = 1 *is* the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from manyhands.core import rng

if TYPE_CHECKING:
    from torch import Tensor

REPLICA = "replica"  # the mesh axis over which whole replicas agree
NODE = "node"  # the workers of my host
ACROSS = "across"  # the workers of my local rank on every host (hosts have equally many workers)


@dataclass(frozen=True, eq=False)
class Sum:
    """Σ over the axis of `tensor`, added in rank order, identical on every rank.

    The reply is a tensor of the same shape and type. `tensor` may be overwritten with it (no copy is
    made where the wire can avoid one), so a caller that still needs its contribution keeps its own.
    """

    tensor: Tensor
    axis: str = REPLICA


@dataclass(frozen=True, eq=False)
class Gather:
    """Everybody's `tensor`, as a list in rank order. Shapes may differ between ranks, types may not.

    `even` promises that the shapes do not differ either: the bytes then travel at once, without a round that
    tells the shapes.
    """

    tensor: Tensor
    axis: str = REPLICA
    even: bool = False


@dataclass(frozen=True, eq=False)
class Scatter:
    """Tensor i of `tensors` goes to rank i (all-to-all); the reply is what every rank had for me, in rank order.

    One tensor per rank of the axis, contiguous and of one type; what is meant for one rank has the same shape
    on every rank.
    """

    tensors: Sequence[Tensor]
    axis: str = REPLICA


@dataclass(frozen=True, eq=False)
class Swap:
    """Exchange `tensor` with one other worker, chosen by `partner` from `key`, which is equal on all ranks.

    The reply is the partner's tensor (same shape and type), or `tensor` itself for the one left over of an odd number.
    """

    tensor: Tensor
    key: int
    axis: str = REPLICA


@dataclass(frozen=True)
class Where:
    """My rank on the axis and its size, as a `Place`. Answered locally: nothing travels."""

    axis: str = REPLICA


class Place(NamedTuple):
    """A rank among `size`."""

    rank: int
    size: int


Request = Sum | Gather | Scatter | Swap | Where


def partner(rank: int, size: int, key: int) -> int:
    """The other end of `rank` in a random perfect matching of `size` ranks that depends on `key` alone.

    With an odd size one rank is its own partner.

    >>> [partner(r, 4, 0) for r in range(4)] == [partner(partner(partner(r, 4, 0), 4, 0), 4, 0) for r in range(4)]
    True
    """
    order = sorted(range(size), key=lambda r: rng.key(key, r))
    place = order.index(rank)
    other = place ^ 1
    return order[other] if other < size else rank
