"""Micro-batches added in one fixed tree: the same bits for any number of workers.

Floating-point addition is not associative, so a sum depends on who adds what first. Here the contribution of each
*micro-batch* is a leaf of one binary tree over the places of the global batch, and additions happen along that tree
only. A worker folds its contiguous leaves into the largest complete subtrees it owns (at most 2·log₂ M of them),
everybody gathers everybody's subtrees and finishes the tree in the same way.

Node (level, index) covers places [index·2^level, (index+1)·2^level) that exist; where the right half is wholly beyond
the last place the node is its left half, so any number of leaves makes one tree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from manyhands.core.checked import checked
from manyhands.core.errors import Diverged, UsageError
from manyhands.core.request import Gather
from manyhands.core.types import Agreed

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Talk, Tensors

Node = tuple[int, int]


class Tree:
    """Folds leaves of the tree as they come, keeping only complete subtrees.

    Args:
        leaves: how many places the global batch has.
    """

    def __init__(self, leaves: int) -> None:
        self.leaves = leaves
        self.nodes: dict[Node, Tensor] = {}

    def add(self, node: Node, value: Tensor) -> None:
        """Put a subtree's sum in and fold upwards as far as complete subtrees go. Keeps `value`."""
        level, index = node
        while (1 << level) < self.leaves:
            sibling = (level, index ^ 1)
            if (sibling[1] << level) >= self.leaves:  # nothing exists there: promoted as it is
                level, index = level + 1, index >> 1
                continue
            if sibling not in self.nodes:
                break
            other = self.nodes.pop(sibling)
            value = other.add_(value) if index & 1 else value.add_(other)  # left + right
            level, index = level + 1, index >> 1
        self.nodes[level, index] = value

    def root(self) -> Tensor:
        """The whole sum. Raises `Diverged` if a place is missing."""
        if len(self.nodes) != 1 or (1 << next(iter(self.nodes))[0]) < self.leaves:
            raise Diverged(
                f"the tree over {self.leaves} micro-batches ends in nodes {sorted(self.nodes)}",
                "each micro-batch contributes exactly once",
                "",
            )
        return next(iter(self.nodes.values()))


@dataclass(frozen=True, kw_only=True)
@checked
class Ordered:
    """Add micro-batches in one fixed tree (`--reproducible`).

    `delta` is not a sum but this worker's subtrees: ``[nodes int64 [k, 3], values [k, n]]``, where a row of ``nodes``
    is (level, index, leaves of the whole tree).

    Args:
        chunk_mb: subtrees are gathered in pieces of about this many MiB, which bounds the memory.
    """

    by_place: ClassVar[bool] = True
    chunk_mb: float = 16.0

    def __post_init__(self) -> None:
        if not 0 < self.chunk_mb < math.inf:
            raise UsageError(
                f"chunk_mb = {self.chunk_mb}", "a chunk holds at least one element", "give a positive size"
            )

    def init(self, like: Tensors) -> Any:
        return ()

    def talk(self, delta: Tensors, state: Any) -> Talk:
        import torch

        nodes, values = delta  # [k, 3], [k, n]
        everyones = yield Gather(nodes)
        leaves = max(int(part[0, 2]) for part in everyones if len(part))
        numel = values.shape[1]
        total = torch.empty(numel, dtype=values.dtype, device=values.device)
        step = max(1, int(self.chunk_mb * (1 << 20)) // values.element_size())
        for begin in range(0, numel, step):
            chunks = yield Gather(values[:, begin : begin + step].clone())
            tree = Tree(leaves)
            for part, chunk in zip(everyones, chunks, strict=True):
                for (level, index, _), value in zip(part.tolist(), chunk.unbind(0), strict=True):
                    tree.add((level, index), value)
            total[begin : begin + step] = tree.root()
        return Agreed([total], [values], state)
