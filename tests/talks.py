"""All workers' talks inside one process, on any number of hosts: `lockstep` with the axes of several hosts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from manyhands.core.request import ACROSS, NODE, Sum
from manyhands.wire import drive


def converse(
    talks: Sequence[Any],
    hosts: Sequence[int] | None = None,
    *,
    tap: Callable[[int, Any], None] | None = None,
    overwrite: bool = False,
) -> list[Any]:
    """Drive `talks`, rank by rank, to their ends.

    Args:
        hosts: which host each rank is on; default: all on one.
        tap: called with (rank, request) for each request.
        overwrite: write sums over what was given, as wires do where they can.
    """
    hosts = list(hosts) if hosts is not None else [0] * len(talks)
    ranks = range(len(talks))
    local = [sum(hosts[q] == hosts[r] for q in range(r)) for r in ranks]
    groups = {
        NODE: [[r for r in ranks if hosts[r] == h] for h in dict.fromkeys(hosts)],
        ACROSS: [[r for r in ranks if local[r] == n] for n in dict.fromkeys(local)],
    }
    replies: list[Any] = [None] * len(talks)
    while True:
        requests: list[Any] = []
        ended: list[Any] = []
        for talk, reply in zip(talks, replies, strict=True):
            try:
                requests.append(talk.send(reply))
                ended.append(None)
            except StopIteration as end:
                requests.append(None)
                ended.append(end.value)
        if all(agreed is not None for agreed in ended):
            return ended
        for rank, request in enumerate(requests):
            if tap is not None and request is not None:
                tap(rank, request)
        axes = {request.axis for request in requests if request is not None}
        replies = [None] * len(talks)
        for group in groups.get(axes.pop(), [list(ranks)]) if len(axes) == 1 else [list(ranks)]:
            for rank, reply in zip(group, drive._answer([requests[r] for r in group]), strict=True):
                if overwrite and isinstance(requests[rank], Sum) and requests[rank].tensor.is_contiguous():
                    reply = requests[rank].tensor.copy_(reply)
                replies[rank] = reply
