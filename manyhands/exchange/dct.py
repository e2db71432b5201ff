"""DCT top-k: the strongest frequencies of each block of a matrix (DeMo: Peng, Quesnelle and Kingma 2024, arXiv:2411.19870).

A matrix is cut into blocks of about 64 × 64, a vector into pieces of 64; each is transformed by the orthonormal DCT-II, as
a product with a fixed matrix, and its k coefficients of largest magnitude travel: values, and positions at 2 + log₂(4096 / k)
bits (`sparse`). What all senders sent is added in rank order, so that replicas cannot drift, and transformed back.

DeMo (algorithm 1) is ``ErrorFeedback(DctTopK(average="senders"), decay=0.999)`` under an outer optimizer that takes the sign:
its momentum m ← β m + g, m ← m − IDCT(sent) *is* the residual. With ``average="all"`` what was sent adds up to the mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from manyhands.core.checked import checked
from manyhands.core.errors import UsageError
from manyhands.core.request import Gather, Where
from manyhands.core.types import Agreed
from manyhands.exchange import sparse
from manyhands.exchange.codec import wide
from manyhands.exchange.largest import largest_of_chunks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from manyhands.core.types import Talk, Tensors

FEW = 32  # up to so many coefficients of a block are transformed back one by one


class Grid(NamedTuple):
    """How a matrix [n, m] is cut: `down` × `across` blocks of `height` × `width`, with zeros beyond its edges."""

    n: int
    m: int
    down: int
    across: int
    height: int
    width: int

    @property
    def blocks(self) -> int:
        return self.down * self.across


@dataclass(frozen=True, kw_only=True)
@checked
class DctTopK:
    """Send the k largest DCT coefficients of each block.

    Args:
        block: side of the square blocks that matrices [n, m] (a tensor's first dimension and the rest) are cut into, and
            length of the pieces of vectors. Dimensions are cut evenly, so a block may be smaller.
        k: coefficients of a full block; of a smaller one as large a share, at least one.
        values: how they travel: fp32, bf16, or a sign and a level in 8, 4 or 2 bits.
        average: ``all`` workers (whoever does not send a coefficient counts as 0), or the ``senders`` of each alone (DeMo). Then
            the mean is more than what was sent, so a residual is not an exact account.
    """

    by_tensor: ClassVar[bool] = True
    block: int = 64
    k: int = 8
    values: sparse.Values = "fp32"
    average: sparse.Average = "all"

    def __post_init__(self) -> None:
        if self.block < 1:
            raise UsageError(f"block = {self.block}", "a block has a side of at least one entry", "try 64")
        if not 0 < self.k <= self.block**2:
            raise UsageError(
                f"k = {self.k}", f"a block of side {self.block} has {self.block**2} coefficients", "try 8"
            )

    @property
    def conserves(self) -> bool:
        """Whether Σ of `sent` over workers is `mean`."""
        return self.average == "all"

    @property
    def fills(self) -> bool:
        """Whether a zero that is selected may come out as something else: two bits have none."""
        return self.values == "int2"

    def init(self, like: Tensors) -> Any:
        return ()

    def talk(self, delta: Tensors, state: Any) -> Talk:
        import torch

        _, size = yield Where()
        groups = self._groups([t.shape for t in delta])
        if not groups:
            return Agreed(list(delta), list(delta), state)
        exact = [_widest([delta[i] for i, _ in members]) for members in groups]
        payloads = [
            self._encode([delta[i] for i, _ in members], [g for _, g in members], dtype)
            for members, dtype in zip(groups, exact, strict=True)
        ]
        lengths = [p.numel() for p in payloads]
        everyones = [torch.cat(payloads)] if size == 1 else (yield Gather(torch.cat(payloads), even=True))
        parts = list(zip(*(torch.split(p, lengths) for p in everyones), strict=True))  # [group][worker]
        sent: list[Tensor] = [t.detach() for t in delta]  # empty ones stay
        mean = list(sent)
        for members, dtype, mine, everybodys in zip(groups, exact, payloads, parts, strict=True):
            grids = [g for _, g in members]
            own = self._decode([mine], grids, dtype)
            whole = own if size == 1 else self._decode(everybodys, grids, dtype)
            for (i, _), one, all_ in zip(members, own, whole, strict=True):
                sent[i] = one.reshape(delta[i].shape).to(delta[i].dtype)
                mean[i] = all_.reshape(delta[i].shape).to(delta[i].dtype)
        return Agreed(mean, sent, state)

    def size_bytes(self, shapes: Sequence[Sequence[int]]) -> int:
        """Bytes of one worker's payload for tensors of these shapes."""
        total = 0
        for members in self._groups(shapes):
            _, area, count = self._extent([g for _, g in members])
            total += sparse.packed_bytes(area, count, self.values)
        return total

    def _groups(self, shapes: Sequence[Sequence[int]]) -> list[list[tuple[int, Grid]]]:
        """Which tensors (by position) have blocks of one size, and are worked on together; empty ones are in none."""
        groups: dict[tuple[int, int], list[tuple[int, Grid]]] = {}
        for i, shape in enumerate(shapes):
            n, m = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
            if n * m:
                down, across = -(-n // self.block), -(-m // self.block)
                grid = Grid(n, m, down, across, -(-n // down), -(-m // across))
                groups.setdefault((grid.height, grid.width), []).append((i, grid))
        return list(groups.values())

    def _extent(self, grids: Sequence[Grid]) -> tuple[int, int, int]:
        """Coefficients kept of each block, of all blocks of a group, and how many of those are kept."""
        area, blocks = grids[0].height * grids[0].width, sum(g.blocks for g in grids)
        share = min(area, max(1, round(self.k * area / self.block**2)))
        return share, area * blocks, share * blocks

    def _encode(self, tensors: Tensors, grids: Sequence[Grid], dtype: torch.dtype) -> Tensor:
        """Bytes of the strongest coefficients of tensors of one group."""
        coefficients = transform(blocked(tensors, grids, dtype)).view(-1)
        share, area, _ = self._extent(grids)
        where = largest_of_chunks(coefficients, grids[0].height * grids[0].width, share)
        return sparse.pack(sparse.Entries(where, coefficients[where]), area, self.values)

    def _decode(self, payloads: Tensors, grids: Sequence[Grid], dtype: torch.dtype) -> list[Tensor]:
        """The matrices [n, m] of a group that everybody's bytes come to."""
        share, area, count = self._extent(grids)
        height, width = grids[0].height, grids[0].width
        parts = [sparse.unpack(p, area, count, self.values, dtype) for p in payloads]
        if share * len(parts) > FEW:
            whole = sparse.total(parts, area, dtype, self.average)
            return unblocked(restore(whole.view(-1, height, width)), grids)
        if self.average == "senders" and len(parts) > 1:
            parts = sparse.by_senders(parts, area)
        return unblocked(restore_few(parts, share, height, width), grids)


# ----------------------------------------------------------------------------------------------- transform


@lru_cache(maxsize=64)
def basis(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal DCT-II as a matrix: row u is frequency u. [size, size]"""
    import torch

    place, frequency = torch.arange(size, dtype=torch.float64), torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(torch.outer(frequency, 2 * place + 1) * (math.pi / (2 * size))) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.to(device, dtype)


def transform(blocks: Tensor) -> Tensor:
    """Coefficients of blocks [b, height, width]."""
    down = basis(blocks.shape[1], blocks.dtype, blocks.device)
    across = basis(blocks.shape[2], blocks.dtype, blocks.device)
    return down @ (blocks @ across.T)


def restore(coefficients: Tensor) -> Tensor:
    """Blocks of coefficients [b, height, width]: the inverse of `transform`."""
    down = basis(coefficients.shape[1], coefficients.dtype, coefficients.device)
    across = basis(coefficients.shape[2], coefficients.dtype, coefficients.device)
    return down.T @ (coefficients @ across)


def restore_few(parts: Sequence[sparse.Entries], share: int, height: int, width: int) -> Tensor:
    """Blocks [b, height, width] of `share` coefficients of each block from each part, as a sum of outer products."""
    import torch

    where = torch.cat([p.where.view(-1, share) for p in parts], 1) % (height * width)  # [b, parts * share]
    values = torch.cat([p.values.view(-1, share) for p in parts], 1)
    down, across = basis(height, values.dtype, values.device), basis(width, values.dtype, values.device)
    columns = down[where // width] * values.unsqueeze(2)  # [b, parts * share, height]
    return columns.transpose(1, 2) @ across[where % width]


def blocked(tensors: Tensors, grids: Sequence[Grid], dtype: torch.dtype) -> Tensor:
    """The tensors of a group in blocks: [b, height, width], zero beyond the edges."""
    import torch

    height, width = grids[0].height, grids[0].width
    result = torch.empty(sum(g.blocks for g in grids), height, width, dtype=dtype, device=tensors[0].device)
    for tensor, grid, part in zip(
        tensors, grids, torch.split(result, [g.blocks for g in grids]), strict=True
    ):
        matrix = tensor.detach().reshape(grid.n, grid.m)
        rows, columns = grid.down * height - grid.n, grid.across * width - grid.m
        if rows or columns:
            matrix = torch.nn.functional.pad(matrix, (0, columns, 0, rows))
        cut = matrix.view(grid.down, height, grid.across, width).transpose(1, 2)
        part.view(grid.down, grid.across, height, width).copy_(cut)
    return result


def unblocked(blocks: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """The inverse of `blocked`: matrices [n, m]."""
    import torch

    result = []
    for grid, part in zip(grids, torch.split(blocks, [g.blocks for g in grids]), strict=True):
        cut = part.view(grid.down, grid.across, grid.height, grid.width).transpose(1, 2)
        whole = cut.reshape(grid.down * grid.height, grid.across * grid.width)
        result.append(whole[: grid.n, : grid.m])
    return result


def _widest(tensors: Tensors) -> torch.dtype:
    import torch

    dtype = wide(tensors[0].dtype)
    for tensor in tensors:
        dtype = torch.promote_types(dtype, wide(tensor.dtype))
    return dtype
