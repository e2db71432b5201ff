"""The k entries of largest magnitude, without sorting anything long.

`largest` (of a whole vector) guesses a threshold from a random sample, a little too low; one pass collects what reaches
it, a few percent more than k, and only that is selected from exactly. `largest_of_chunks` finds k of each chunk. On the
CPU float32 goes through ``largest.cpp`` where a compiler was found. NaN counts as infinite; of equal magnitudes the
earlier entry goes first. `largest_reference` says the same in one line, slowly.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.core import native
from manyhands.exchange.codec import wide

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 1 << 15  # below this a plain selection is as fast
BLOCK = 1 << 17  # entries that are looked at while they are in the cache
SAMPLE = 1 << 15


def largest_reference(vector: Tensor, k: int) -> Tensor:
    """Positions int64 [k], ascending, of the k entries of largest magnitude: the plain definition."""
    order = _magnitude(vector).sort(descending=True, stable=True).indices
    return order[:k].sort().values


def largest(vector: Tensor, k: int) -> Tensor:
    """Positions int64 [k], ascending, of the k entries of largest magnitude of a vector [n], k ≤ n."""
    import torch

    numel = vector.numel()
    if k >= numel or k <= 0:
        return torch.arange(min(max(k, 0), numel), device=vector.device)
    if numel < SMALL or 4 * k > numel:
        return _exactly(vector, k)
    sample = min(numel // 4, max(SAMPLE, 512 * numel // k))
    # multiples of the golden section: even over the vector, in step with no period of it
    at = (torch.arange(sample, dtype=torch.float64, device=vector.device) * 0.6180339887498949).frac_()
    seen = _magnitude(vector[(at * numel).to(torch.int64).clamp_(max=numel - 1)])
    expected = k / numel * sample
    for spread in (3.0, 12.0):
        rank = math.ceil(expected + spread * math.sqrt(expected) + 1)
        if rank > sample:
            break
        threshold = float(seen.topk(rank, sorted=False).values.amin())
        if threshold <= 0.0:  # mostly zeros: everything would be a candidate
            break
        candidates = at_least(vector, threshold)
        if candidates.numel() >= k:
            return candidates[_exactly(vector[candidates], k)]
    return _exactly(vector, k)


def largest_of_chunks(vector: Tensor, chunk: int, k: int) -> Tensor:
    """Positions int64, ascending: the `kept` (see there) entries of largest magnitude of each chunk of a vector [n]."""
    import torch

    numel = vector.numel()
    whole = numel // chunk * chunk
    rows = vector[:whole].view(-1, chunk)
    library = _library(vector)
    if k >= chunk:
        head = torch.arange(whole, device=vector.device)
    elif library is not None:
        source = rows.to(torch.float32).contiguous()
        head = torch.empty(whole // chunk * k, dtype=torch.int64)
        library.manyhands_largest_of_chunks(
            ctypes.c_void_p(source.data_ptr()),
            ctypes.c_int64(whole // chunk),
            ctypes.c_int32(chunk),
            ctypes.c_int32(k),
            ctypes.c_void_p(head.data_ptr()),
        )
    else:
        places = _magnitude(rows).topk(k, dim=1, sorted=False).indices.sort(dim=1).values  # [chunks, k]
        places += torch.arange(0, whole, chunk, device=vector.device).unsqueeze(1)
        head = places.view(-1)
    tail = largest(vector[whole:], kept(numel - whole, chunk, k))
    return torch.cat([head, tail + whole])


def kept(numel: int, chunk: int, k: int) -> int:
    """How many entries k of each `chunk` makes of a vector [n]; of an incomplete chunk as large a share, rounded up."""
    whole, rest = divmod(numel, chunk)
    return whole * min(k, chunk) + min(rest, -(-k * rest // chunk))


def at_least(vector: Tensor, threshold: float) -> Tensor:
    """Positions int64, ascending, of the entries whose magnitude is at least `threshold`, and of NaN."""
    import torch

    vector = vector.to(wide(vector.dtype))
    if vector.device.type != "cpu":
        return (~(vector.abs() < threshold)).nonzero().view(-1)
    library = _library(vector)
    if library is not None:
        source = vector.contiguous()
        where = torch.empty(vector.numel(), dtype=torch.int64)  # what is not written is not there
        count = library.manyhands_at_least(
            ctypes.c_void_p(source.data_ptr()),
            ctypes.c_int64(vector.numel()),
            ctypes.c_float(threshold),
            ctypes.c_int64(vector.numel()),
            ctypes.c_void_p(where.data_ptr()),
        )
        return where[:count].clone()
    found = []
    size = torch.empty(BLOCK, dtype=vector.dtype)
    below = torch.empty(BLOCK, dtype=torch.bool)
    for begin in range(0, vector.numel(), BLOCK):
        block = vector[begin : begin + BLOCK]
        out = below[: block.numel()]
        torch.lt(torch.abs(block, out=size[: block.numel()]), threshold, out=out)
        found.append(out.logical_not_().nonzero().view(-1).add_(begin))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


@lru_cache
def _kernels() -> ctypes.CDLL | None:
    try:
        library = native.kernels(Path(__file__).with_suffix(".cpp"))
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError):
        return None
    library.manyhands_at_least.restype = ctypes.c_int64
    return library


def _library(vector: Tensor) -> ctypes.CDLL | None:
    """The compiled loops, where they serve: magnitudes that float32 holds, in host memory."""
    return _kernels() if vector.device.type == "cpu" and vector.dtype.itemsize <= 4 else None


def _magnitude(vector: Tensor) -> Tensor:
    return vector.abs().nan_to_num_(nan=math.inf, posinf=math.inf)


def _exactly(vector: Tensor, k: int) -> Tensor:
    """`largest` of a short vector, 0 < k: a selection instead of a sort; ties by place, the same on any device."""
    size = _magnitude(vector)
    least = size.topk(k, sorted=False).values.amin()
    above = size > least
    ties = (size == least).nonzero().view(-1)
    above[ties[: k - int(above.sum())]] = True
    return above.nonzero().view(-1)
