"""Which samples the places of a ledger's steps are.

An order that is not shuffled alone goes by the classes or lengths of the samples: they are kept beside the ledger.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.train.ledger import DIRECTORY, Batches

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from manyhands.data.sample import Order

SIZES = "order.npz"
CHUNK = 1 << 20  # samples whose numbers are computed at once


def keep_sizes(output: Path, sizes: Mapping[str, Any]) -> None:
    """What an order goes by that is not shuffled alone: classes or lengths of the samples. Whoever verifies it needs them."""
    import numpy as np

    path = output / DIRECTORY / SIZES
    with contextlib.suppress(OSError):  # a full disk: places are verified all the same
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(temporary, **sizes)
        temporary.replace(path)


def read_sizes(directory: Path, n: int) -> dict[str, Any] | None:
    """What `keep_sizes` kept in a ledger's directory, of `n` samples; None: nothing of use."""
    import numpy as np

    try:
        with np.load(directory / SIZES) as kept:
            found = {name: kept[name] for name in kept.files if name in ("classes", "lengths")}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    return found if found and all(len(each) == n for each in found.values()) else None


def plain_order(batches: Batches) -> Order:
    """How many samples each step takes; where they are shuffled, which."""
    from manyhands.data.sample import Order

    return Order(batches.n, batches.global_batch, batches.seed, batches.drop_last)


def order_of(batches: Batches, directories: Iterable[Path]) -> Order | None:
    """The order of the samples; None: it goes by classes or lengths that none of the ledger's `directories` holds."""
    plain = plain_order(batches)
    if batches.order == "shuffled":
        return plain
    held = (read_sizes(directory, batches.n) for directory in sorted(directories))
    sizes = next((found for found in held if found is not None), None)
    return None if sizes is None else replace(plain, **sizes)


def samples_of_pass(
    batches: Batches, pass_: int, kept: int, order: Order | None = None
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """(position, sample numbers) of one pass over the data, in pieces of whole steps.

    Shuffled, a pass is one permutation cut into steps, so steps of k times the rows cut the same samples.
    """
    from manyhands.data.sample import Order

    if order is not None and batches.order != "shuffled":
        first = pass_ * order.steps_per_epoch
        for step in range(order.steps_per_epoch):
            yield order.seen(step), order.ids(first + step)
        return
    wide = batches.global_batch * max(1, CHUNK // batches.global_batch)
    order = Order(batches.n, wide, batches.seed)
    for i in range(order.steps_per_epoch):
        begin = i * wide
        if begin < kept:
            yield begin, order.ids(pass_ * order.steps_per_epoch + i)[: kept - begin]
