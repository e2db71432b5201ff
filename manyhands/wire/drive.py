"""Three ways to drive a conversation.

* `run`: one talk, blocking.
* `Interleave`: many talks in flight, advanced **by position, never by completion**, so that every rank issues the
  same sequence of requests whatever its timing.
* `lockstep`: all workers of a conversation inside one process, without any network; unequal requests raise
  `Diverged` instead of hanging. It is how the whole catalogue is tested in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from manyhands.core.errors import Diverged
from manyhands.core.request import ACROSS, Gather, Place, Request, Scatter, Sum, Swap, Where, partner
from manyhands.core.types import Agreed

if TYPE_CHECKING:
    from manyhands.core.types import Handle, Talk, Wire


def run(talk: Talk, wire: Wire) -> Agreed:
    """Drive one talk to its end. Raises `PeerLost`."""
    try:
        request = next(talk)
        while True:
            request = talk.send(wire.begin(request).wait())
    except StopIteration as end:
        return _agreed(end)


class Interleave:
    """Several talks in flight on one wire.

    `start` issues a talk's first request at once (the first that travels: `Where` is answered here); `finish` advances all
    of them, in the order of their start, one request each per round, until all have ended.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._talks: list[tuple[Talk, Handle | None, Agreed | None]] = []

    def start(self, talk: Talk) -> None:
        """Issue the talk's first request that travels."""
        self._talks.append((talk, *self._advance(talk, None)))

    def finish(self) -> list[Agreed]:
        """What was agreed, in the order of the starts. Raises `PeerLost`; then nothing may be used."""
        talks, self._talks = self._talks, []
        while any(handle is not None for _, handle, _ in talks):
            for position, (talk, handle, _) in enumerate(talks):
                if handle is not None:
                    talks[position] = (talk, *self._advance(talk, handle.wait()))
        return [agreed for _, _, agreed in talks if agreed is not None]

    def _advance(self, talk: Talk, reply: Any) -> tuple[Handle | None, Agreed | None]:
        try:
            request = talk.send(reply)
            while isinstance(request, Where):  # else what follows would not be under way before `finish`
                request = talk.send(self._wire.begin(request).wait())
            return self._wire.begin(request), None
        except StopIteration as end:
            return None, _agreed(end)


def lockstep(talks: Sequence[Talk]) -> list[Agreed]:
    """All workers' talks, rank by rank, in this process, as if on one host: across hosts each is alone.

    Raises:
        Diverged: the workers asked for different things, or some had ended and others not.
    """
    replies: list[Any] = [None] * len(talks)
    while True:
        requests: list[Request | None] = []
        ended: list[Agreed | None] = []
        for talk, reply in zip(talks, replies, strict=True):
            try:
                requests.append(talk.send(reply))
                ended.append(None)
            except StopIteration as end:
                requests.append(None)
                ended.append(_agreed(end))
        if all(agreed is not None for agreed in ended):
            return [agreed for agreed in ended if agreed is not None]
        alone = all(request is not None and request.axis == ACROSS for request in requests)
        replies = [_answer([r])[0] for r in requests] if alone else _answer(requests)


def _answer(requests: Sequence[Request | None]) -> list[Any]:
    first = requests[0]
    for rank, request in enumerate(requests):
        if first is None or request is None or _shape(request) != _shape(first):
            raise Diverged(
                f"worker 0 asked for {_words(first)}, worker {rank} for {_words(request)}",
                "in each round all workers ask for the same",
                "an exchange's requests may not depend on the data of one worker",
            )
    given: list[Any] = [request for request in requests if request is not None]
    size = len(given)
    if isinstance(first, Where):
        return [Place(rank, size) for rank in range(size)]
    if isinstance(first, Sum):
        total = given[0].tensor.clone()
        for request in given[1:]:
            total += request.tensor
        return [total.clone() for _ in given]
    if isinstance(first, Scatter):
        return [[request.tensors[rank].clone() for request in given] for rank in range(size)]
    if isinstance(first, Swap):
        return [given[partner(rank, size, first.key)].tensor.clone() for rank in range(size)]
    return [[request.tensor.clone() for request in given] for _ in given]


def _shape(request: Request) -> tuple[Any, ...]:
    if isinstance(request, Where):
        return (Where, request.axis)
    if isinstance(request, Scatter):
        return (Scatter, request.axis, *((t.dtype, tuple(t.shape)) for t in request.tensors))
    tensor = request.tensor
    if isinstance(request, Gather):  # shapes may differ between ranks, types may not
        shape = (tuple(tensor.shape) if request.even else tensor.dim(),)
        return (Gather, request.axis, request.even, tensor.dtype, *shape)
    if isinstance(request, Swap):
        return (Swap, request.axis, request.key, tensor.dtype, tuple(tensor.shape))
    return (Sum, request.axis, tensor.dtype, tuple(tensor.shape))


def _words(request: Request | None) -> str:
    if request is None:
        return "nothing (it had ended)"
    if isinstance(request, Where):
        return f"Where(axis={request.axis!r})"
    if isinstance(request, Scatter):
        return f"Scatter({[list(t.shape) for t in request.tensors]}, axis={request.axis!r})"
    return f"{type(request).__name__}({request.tensor.dtype}, {list(request.tensor.shape)}, axis={request.axis!r})"


def _agreed(end: StopIteration) -> Agreed:
    value = end.value
    if not isinstance(value, Agreed):
        raise TypeError(f"a talk must return Agreed, not {type(value).__name__}")
    return value
