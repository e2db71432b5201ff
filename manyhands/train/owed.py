"""Parameters that nobody used in a step, and of which feedback has held back something of earlier steps.

A parameter that nobody used gets no gradient, so that optimizers skip it as in one process (`manyhands.train.gradients`).
But an exchange that holds something back sends a part of that in every step. If such a parameter were skipped, what was sent
would be in no update, and having been sent it would not be held back any more. So whoever still owes something of a
parameter says that it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from manyhands.exchange.combine import flush, trait

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.train.gradients import FlatGradients


def used_or_owed(
    gradients: FlatGradients,
    exchanges: Sequence[Any],
    states: Sequence[Any],
    contribution: Callable[[int], list[Tensor]],
) -> list[bool]:
    """Of each parameter, whether a pass of this step used it, or something of it is held back.

    Args:
        exchanges, states: of each conversation.
        contribution: to each of them, by position: a bucket, or its parameters one by one.
    """
    used = list(gradients.used)
    for position, state in enumerate(() if all(used) else states):
        exchange = exchanges[position]
        found = owed(exchange, state, contribution(position))
        parts: Iterable[tuple[int, Tensor | None]] = ()
        if trait(exchange, "by_tensor"):
            parts = zip(gradients.members(position), found, strict=True)
        elif found[0] is not None:
            parts = gradients.cut(position, found[0])
        for i, part in parts:
            used[i] = used[i] or (part is not None and bool(part.any()))
    return used


def owed(exchange: Any, state: Any, like: Sequence[Tensor]) -> list[Tensor | None]:
    """What is held back of contributions shaped `like`, each in its shape; None: nothing that is known to be somebody's.

    A codec without a zero holds something back of parameters that were never used, too: which that are, nobody can tell.
    """
    if trait(exchange, "fills"):
        return [None] * len(like)
    return list(flush(exchange, state, like)[0])
