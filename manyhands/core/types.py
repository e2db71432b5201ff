"""The protocols that hold the house together. Types only: nothing here runs."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from manyhands.core.request import Request

    Batch = Mapping[str, Tensor]
    Tensors = Sequence[Tensor]


class Agreed(NamedTuple):
    """What a finished conversation leaves.

    Attributes:
        mean: identical on every replica: Σ of the contributions, which come already weighted.
        sent: my own contribution, as the others decoded it: Σ over workers of `sent` is `mean`, to rounding.
        state: carried to my next round: a pytree (dicts, lists, tuples) of tensors, checkpointed and resharded. Leaves
            under a dict key "residual" are this worker's own, and only their *sum* over workers matters (a changed
            world size redistributes it); all other leaves are equal on every worker.
    """

    mean: Tensors
    sent: Tensors
    state: Any


if TYPE_CHECKING:
    Talk = Generator[Request, Any, Agreed]


@runtime_checkable
class Exchange(Protocol):
    """What the replicas say to each other. A frozen value; all state is passed in and returned.

    Optional class attributes tell how contributions are cut (see `manyhands.train.gradients`): ``by_tensor = True`` asks
    for tensors in their own shapes (low rank, DCT), default: one flat tensor per bucket; ``by_place = True``: see
    `manyhands.exchange.ordered`. ``bucket_mb`` is the size of a bucket; without it everything is one bucket.
    """

    def init(self, like: Tensors) -> Any:
        """The state before the first round, for contributions shaped like `like`."""
        ...

    def talk(self, delta: Tensors, state: Any) -> Talk:
        """One conversation: yields requests, is sent the replies, returns `Agreed`. Touches no parameter."""
        ...


class Handle(Protocol):
    """A request on its way."""

    def wait(self) -> Any:
        """The reply. Raises `PeerLost`."""
        ...


class Counters(Protocol):
    """What a wire has counted since its start: seconds and payload bytes of this worker."""

    communicate_s: float
    idle_s: float
    sent_bytes: int
    received_bytes: int


class Wire(Protocol):
    """How requests travel: a process group, shared memory, a loop in one process."""

    rank: int
    size: int

    @property
    def traffic(self) -> Counters: ...

    def begin(self, request: Request) -> Handle: ...

    def buffer(self, numel: int, dtype: Any) -> Tensor:
        """A zeroed flat tensor placed where this wire sends from without a copy."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Cadence(Protocol):
    """When the replicas speak. Steps are counted from 1; every answer is a pure function of the step."""

    @property
    def fragments(self) -> int:
        """Into how many parts the parameters are cut, each with exchanges of its own."""
        ...

    @property
    def delay(self) -> int:
        """Steps between the start of an exchange and its use."""
        ...

    def due(self, step: int) -> bool:
        """Whether an exchange starts after `step`."""
        ...

    def starts(self, step: int) -> Sequence[int]:
        """The fragments whose exchange starts after `step`."""
        ...

    def finishes(self, step: int) -> Sequence[int]:
        """The fragments whose exchange ends after `step`; starts of the same step come first."""
        ...


@runtime_checkable
class Placement(Protocol):
    """Where parameters, gradients and optimizer state live.

    Optional class attributes: ``needs_group = True``: PyTorch's process group must carry it; ``needs_shared_memory =
    True``: all workers are CPUs of one host; ``exchanges = False``: nothing is exchanged (an exchange would be ignored,
    and so is refused).
    """

    @property
    def method(self) -> str | None:
        """``module:class`` of the worker's side; None: cadence and inner optimizer decide."""
        ...


class Summed(NamedTuple):
    """A loss as a sum and a count, never a mean (promise 2).

    Attributes:
        loss_sum: Σ of the loss over the valid targets; a scalar tensor with a graph.
        count: how many valid targets that was.
    """

    loss_sum: Tensor
    count: int | Tensor  # type: ignore[assignment]  # the field's standard name, though tuples have a method of it


class Rows(Protocol):
    """A map-style set of training rows, read by whoever needs them (rank-local, memory-mapped).

    Where reading draws random numbers it has ``take_at(ids, seed, step, begin)``, too: rows `begin` and after of the global
    batch of `step`, the same whoever reads them.
    """

    def __len__(self) -> int: ...

    def take(self, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        """Rows `ids` as one batch: tensors whose first dimension is ``len(ids)``."""
        ...

    @property
    def bytes_per_target(self) -> float:
        """UTF-8 bytes of text per target token, for bits per byte."""
        ...


@runtime_checkable
class Task(Protocol):
    """What is learnt: how a batch becomes a loss, and how predictions are scored.

    An optional class attribute ``needs`` says which rows, model and tokenizer it is for (`manyhands.core.needs`).
    """

    def loss(self, model: nn.Module, batch: Batch) -> Summed:
        """The training loss of one batch, as a sum and a count."""
        ...

    def score(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Additive float64 scores of one batch (sums, counts, confusion counts): Σ over batches and workers."""
        ...

    def metrics(self, totals: Mapping[str, Tensor], *, bytes_per_target: float) -> dict[str, float]:
        """Figures from the summed scores: exact over any split."""
        ...


class Sink(Protocol):
    """Somewhere that events go: terminal, file, TensorBoard."""

    def __call__(self, event: Any) -> None: ...

    def close(self) -> None: ...


Ids = Iterable[int]
