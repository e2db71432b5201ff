"""The count sketch of a vector, at the speed of a copy (Charikar, Chen and Farach-Colton 2002, "Finding frequent items").

    S[j, h_j(i)] += s_j(i) x_i          linear: the sum of sketches is the sketch of the sum
    x̂_i = median_j s_j(i) S[j, h_j(i)]

The vector is cut into blocks as long as a row of the sketch; in row j, block b is turned by a random shift and given a
random sign: ``h_j(b C + o) = (o + shift_jb) mod C``, ``s_j = sign_jb``. Two entries of different blocks meet in a bucket
with probability 1/C and then with independent signs, two of one block never: pairwise as good as the random
functions of the paper (the same expectation and no more variance for each entry), but all memory is read in order.
Errors of neighbours are correlated, which the bounds for single entries do not notice.

On the CPU float32 goes through ``sketch.cpp`` where a compiler was found. Estimates are the same bits either way.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.core import native
from manyhands.exchange.codec import wide

if TYPE_CHECKING:
    from torch import Tensor

FEWEST = 64  # columns: with fewer a sketch tells nothing
TILE = 1 << 15  # entries that are worked on while they are in the cache


@dataclass(frozen=True)
class Sketch:
    """The hash functions of one sketch.

    Args:
        numel: length of the vectors.
        rows: how many independent estimates; odd.
        columns: buckets of a row, C.
        key: of the hash functions.
    """

    numel: int
    rows: int
    columns: int
    key: int

    def of(self, vector: Tensor) -> Tensor:
        """S(x) of a vector [n]: [rows, columns], of half precision in float32."""
        import torch

        # two rows side by side, so that a turned block stays in one piece
        double = torch.zeros(self.rows, 2 * self.columns, dtype=wide(vector.dtype), device=vector.device)
        shifts, signs = self._turns()
        library = _kernels() if vector.device.type == "cpu" and double.dtype is torch.float32 else None
        if library is not None:
            self._call(library.manyhands_sketch, vector.to(torch.float32).contiguous(), double)
            return double[:, : self.columns] + double[:, self.columns :]
        for begin, end, block, place in self._tiles():
            part = vector[begin:end]
            for row in range(self.rows):
                at = place + shifts[row][block]
                double[row, at : at + end - begin].add_(part, alpha=signs[row][block])
        return double[:, : self.columns] + double[:, self.columns :]

    def estimate(self, sketch: Tensor) -> Tensor:
        """x̂ [n], in the type of the sketch [rows, columns], which is finite."""
        import torch

        double = torch.cat([sketch, sketch], 1)
        result = torch.empty(self.numel, dtype=sketch.dtype, device=sketch.device)
        library = _kernels() if sketch.device.type == "cpu" and sketch.dtype is torch.float32 else None
        if library is not None and self.rows in (1, 3, 5):
            self._call(library.manyhands_estimate, double, result)
            return result
        buffer = torch.empty(self.rows + 1, TILE, dtype=sketch.dtype, device=sketch.device)
        shifts, signs = self._turns()
        for begin, end, block, place in self._tiles():
            lanes = list(buffer[:, : end - begin].unbind(0))
            for row in range(self.rows):
                at = place + shifts[row][block]
                torch.mul(double[row, at : at + end - begin], signs[row][block], out=lanes[row])
            _median(lanes, result[begin:end])
        return result

    def estimate_reference(self, sketch: Tensor) -> Tensor:
        """The definition: x̂ [n] by gathering every bucket."""
        import torch

        where = torch.arange(self.numel, device=sketch.device)
        _, signs = self._turns()
        sign = torch.tensor(signs, device=sketch.device, dtype=sketch.dtype)[:, where // self.columns]
        return (sketch.gather(1, self.buckets(where)) * sign).median(0).values

    def buckets(self, where: Tensor) -> Tensor:
        """h_j(i) of positions int64 [k]: [rows, k]."""
        import torch

        shifts = torch.tensor(self._turns()[0], device=where.device)
        return (where % self.columns + shifts[:, where // self.columns]) % self.columns

    def _call(self, loop: Any, source: Tensor, result: Tensor) -> None:
        """Run one of the compiled loops from `source` to `result`."""
        import torch

        shifts, signs = self._turns()
        turns, factors = torch.tensor(shifts), torch.tensor(signs, dtype=torch.float32)
        loop(
            ctypes.c_void_p(source.data_ptr()),
            ctypes.c_int64(self.numel),
            ctypes.c_int64(self.rows),
            ctypes.c_int64(self.columns),
            ctypes.c_void_p(turns.data_ptr()),
            ctypes.c_void_p(factors.data_ptr()),
            ctypes.c_void_p(result.data_ptr()),
        )

    def _turns(self) -> tuple[list[list[int]], list[list[int]]]:
        """Shift in [0, columns) and sign of each block in each row."""
        import torch

        blocks = -(-self.numel // self.columns)
        generator = torch.Generator().manual_seed(self.key >> 1)
        shifts = torch.randint(self.columns, (self.rows, blocks), generator=generator)
        signs = torch.randint(2, (self.rows, blocks), generator=generator) * 2 - 1
        return shifts.tolist(), signs.tolist()

    def _tiles(self) -> list[tuple[int, int, int, int]]:
        """The vector in pieces that stay within a block: begin, end, the block, the place in it."""
        return [
            (start, min(start + TILE, stop), block, start - begin)
            for block, begin in enumerate(range(0, self.numel, self.columns))
            for stop in [min(begin + self.columns, self.numel)]
            for start in range(begin, stop, TILE)
        ]


def shape(numel: int, rows: int, compression: float) -> tuple[int, int]:
    """Rows and columns of a sketch that is `compression` times smaller than a vector [n].

    A row has at least `FEWEST` columns; where the sketch would then be no smaller, (1, n): the vector itself, turned.
    """
    columns = max(FEWEST, math.ceil(numel / (rows * compression)))
    return (rows, columns) if rows * columns < numel else (1, max(1, numel))


@lru_cache
def _kernels() -> ctypes.CDLL | None:
    try:
        return native.kernels(Path(__file__).with_suffix(".cpp"))
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError):
        return None


def _median(lanes: list[Tensor], out: Tensor) -> None:
    """The middle of all but the last of `lanes` (an odd number of tensors [n], which change) into `out` [n].

    A network of minima and maxima. The last lane is room to work in.
    """
    import torch

    *values, spare = lanes
    count = len(values)
    if count == 1:
        out.copy_(values[0])
        return
    if count == 3:  # max(min(a, b), min(max(a, b), c))
        a, b, c = values
        torch.minimum(a, b, out=spare)
        torch.maximum(a, b, out=a)
        torch.minimum(a, c, out=a)
        torch.maximum(a, spare, out=out)
        return
    for turn in range(count):  # odd-even transposition sort
        for i in range(turn % 2, count - 1, 2):
            torch.minimum(values[i], values[i + 1], out=spare)
            torch.maximum(values[i], values[i + 1], out=values[i + 1])
            values[i], spare = spare, values[i]
    out.copy_(values[count // 2])
