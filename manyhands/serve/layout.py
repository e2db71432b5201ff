"""Where each parameter lies in the flat memory that travels, and which server keeps which parameters.

A layout orders parameters by the width of their type, wide ones first, so that each starts at a multiple of its element
in one gapless buffer of bytes; all of one type form a *group*, a flat tensor that a codec encodes at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manyhands.core.errors import UsageError
from manyhands.serve.protocol import Entry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Parameters one after another in one buffer.

    Attributes:
        entries: in the order of the buffer.
        offsets: of each entry, in bytes.
        groups: (type, begin, end in bytes) of each run of one type.
        size_bytes: of the whole.
    """

    entries: tuple[Entry, ...]
    offsets: tuple[int, ...]
    groups: tuple[tuple[str, int, int], ...]
    size_bytes: int

    @staticmethod
    def of(entries: Iterable[Entry]) -> Layout:
        """The layout of these parameters, whatever order they come in within a type."""
        given = list(entries)
        order = sorted(given, key=lambda e: (-e.width, e.dtype))
        offsets: list[int] = []
        groups: list[tuple[str, int, int]] = []
        at = 0
        for entry in order:
            if groups and groups[-1][0] == entry.dtype:
                groups[-1] = (entry.dtype, groups[-1][1], at + entry.size_bytes)
            else:
                groups.append((entry.dtype, at, at + entry.size_bytes))
            offsets.append(at)
            at += entry.size_bytes
        return Layout(tuple(order), tuple(offsets), tuple(groups), at)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Each parameter as a view of `flat` (uint8 [size_bytes])."""
        import torch

        return {
            e.name: flat[at : at + e.size_bytes].view(getattr(torch, e.dtype)).view(e.shape)
            for e, at in zip(self.entries, self.offsets, strict=True)
        }

    def flats(self, flat: Tensor) -> list[Tensor]:
        """Each group as a flat tensor of its type, a view of `flat`."""
        import torch

        return [flat[begin:end].view(getattr(torch, dtype)) for dtype, begin, end in self.groups]


def divide(entries: Sequence[Entry], servers: int) -> list[list[Entry]]:
    """Whole parameters dealt out by bytes: the largest first, each to the server that has least (LPT, Graham 1969).

    Raises:
        UsageError: there are more servers than parameters.
    """
    if servers > len(entries):
        raise UsageError(
            f"servers = {servers} for {len(entries)} parameters",
            "each server keeps at least one",
            f"give servers <= {len(entries)}",
        )
    load = [0] * servers
    owner = {}
    for entry in sorted(entries, key=lambda e: (-e.size_bytes, e.name)):
        # an empty tensor still counts, so that no server stays without a parameter
        least = min(range(servers), key=lambda s: (load[s], s))
        owner[entry.name] = least
        load[least] += max(1, entry.size_bytes)
    return [[e for e in entries if owner[e.name] == server] for server in range(servers)]
