"""What an exchange may ask of the network: the whole vocabulary.

A request is a value. `Wire.begin` (floor 1) carries it; `lockstep` answers it without any network.
Contributions are weighted *before* they are sent (promise 2: sums and counts), so the primitive is a sum and
not a mean: Σ wᵢ gᵢ over workers with Σ wᵢ = 1 *is* the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

REPLICA = "replica"  # the mesh axis over which whole replicas agree


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
    """Everybody's `tensor`, as a list in rank order. Shapes may differ between ranks, types may not."""

    tensor: Tensor
    axis: str = REPLICA


Request = Sum | Gather
