"""What a worker and a parameter server say to each other: one framing for every request and reply.

A call is a stream of messages in either direction. The first is the *opening*:

    4 bytes   magic "MHP1"
    4 bytes   length of the header in bytes, little-endian; at most `HEADER_BYTES`
    8 bytes   length of the payload in bytes, little-endian
    header    a JSON object in UTF-8; the message ends with it

The payload follows in messages of at most `CHUNK_BYTES`: raw little-endian numbers, nothing else. Nothing is pickled, and
nothing is allocated for a payload whose length the receiver did not expect. Whatever does not fit is `Garbage`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

from manyhands.core.errors import ManyhandsError

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"MHP1"
CHUNK_BYTES = 1 << 20
HEADER_BYTES = 4 << 20  # a model of 30,000 tensors describes itself in this
MESSAGE_BYTES = HEADER_BYTES + (64 << 10)  # what the transport may accept at most
PAYLOAD_BYTES = 1 << 42
METHOD = "/manyhands.Parameters/Call"
_OPENING = struct.Struct("<4sIQ")
TYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")


class Garbage(ManyhandsError):
    """Bytes that are no message of this protocol, or none that was expected here."""


class Entry(NamedTuple):
    """One tensor of a payload."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        n = 1
        for length in self.shape:
            n *= length
        return n

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return _width(self.dtype)

    @property
    def size_bytes(self) -> int:
        return self.numel * self.width


class Opening(NamedTuple):
    """A header, and how many bytes of payload follow it."""

    header: dict[str, Any]
    size_bytes: int


def messages(header: Mapping[str, Any], payload: Sequence[memoryview] = ()) -> Iterator[bytes]:
    """A request or reply as the messages that carry it; `payload` is sent as the concatenation of its parts.

    Raises:
        Garbage: the header is too long; at once, not when the messages are read.
    """
    text = json.dumps(header, separators=(",", ":"), allow_nan=True).encode()
    if len(text) > HEADER_BYTES:
        raise Garbage(
            f"a header of {len(text):,} bytes",
            f"it has at most {HEADER_BYTES:,}",
            "a model of so many tensors needs more parameter servers",
        )
    first = _OPENING.pack(MAGIC, len(text), sum(len(part) for part in payload)) + text
    return itertools.chain((first,), _chunks(payload))


def _chunks(payload: Sequence[memoryview]) -> Iterator[bytes]:
    waiting: list[memoryview] = []
    size = 0
    for part in payload:
        begin = 0
        while begin < len(part):
            piece = part[begin : begin + CHUNK_BYTES - size]
            begin += len(piece)
            waiting.append(piece)
            size += len(piece)
            if size == CHUNK_BYTES:
                yield b"".join(waiting)
                waiting, size = [], 0
    if size:
        yield b"".join(waiting)


def opening(stream: Iterator[bytes]) -> Opening:
    """Read the first message. Raises `Garbage`."""
    first = next(stream, None)
    if first is None:
        raise Garbage("a call without a message", "it opens with a header", "")
    if len(first) < _OPENING.size:
        raise Garbage(f"an opening of {len(first)} bytes", f"it has at least {_OPENING.size}", "")
    magic, length, size = _OPENING.unpack_from(first)
    if magic != MAGIC:
        raise Garbage(f"an opening with {magic!r}", f"it begins with {MAGIC!r}", "speak manyhands' protocol")
    if length > HEADER_BYTES or length != len(first) - _OPENING.size:
        raise Garbage(
            f"a header said to have {length:,} bytes in a message of {len(first):,}",
            f"a header ends its message and has at most {HEADER_BYTES:,} bytes",
            "",
        )
    if size > PAYLOAD_BYTES:
        raise Garbage(f"a payload said to have {size:,} bytes", f"it has at most {PAYLOAD_BYTES:,}", "")
    try:
        header = json.loads(first[_OPENING.size :])
    except ValueError as error:
        raise Garbage(f"a header that is not JSON ({error})", "", "") from None
    if not isinstance(header, dict):
        raise Garbage(f"a header that is a {type(header).__name__}", "it is a JSON object", "")
    return Opening(header, size)


def receive(
    stream: Iterator[bytes],
    out: memoryview,
    *,
    writing: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
) -> None:
    """Fill `out` with the payload; exactly that many bytes must come. Raises `Garbage`.

    Args:
        writing: entered for each message's bytes, and may raise: they are not written then.
    """
    at = 0
    for message in stream:
        if not message or len(message) > CHUNK_BYTES or at + len(message) > len(out):
            raise Garbage(
                f"a message of {len(message):,} bytes after {at:,} of {len(out):,}",
                f"a payload comes in messages of 1 to {CHUNK_BYTES:,} bytes and ends where its opening said",
                "",
            )
        with writing():
            out[at : at + len(message)] = message
        at += len(message)
    if at != len(out):
        raise Garbage(f"a payload of {at:,} bytes", f"its opening said {len(out):,}", "")


def nothing_more(stream: Iterator[bytes]) -> None:
    """The stream ends here. Raises `Garbage`."""
    if next(stream, None) is not None:
        raise Garbage("a payload", "this request has none", "")


# ---------------------------------------------------------------------------------------------- tensors


def described(tensors: Mapping[str, Tensor]) -> tuple[list[Any], list[memoryview]]:
    """Named CPU tensors as a header's list and the payload's parts."""
    from manyhands.train.tensors import little_endian

    entries = [[name, _name(t), list(t.shape)] for name, t in tensors.items()]
    return entries, [little_endian(t) for t in tensors.values()]


def entries_of(raw: Any) -> list[Entry]:
    """A header's list of tensors, checked. Raises `Garbage`."""
    if not isinstance(raw, list):
        raise Garbage("a header without a list of tensors", "", "")
    entries = []
    for item in raw:
        if not (isinstance(item, list) and len(item) == 3 and isinstance(item[0], str)):
            raise Garbage(f"a tensor said to be {str(item)[:80]}", "it is [name, type, shape]", "")
        name, dtype, shape = item
        if dtype not in TYPES:
            raise Garbage(f"a tensor of type {str(dtype)[:40]!r}", f"one of {', '.join(TYPES)}", "")
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
            raise Garbage(f"a tensor of shape {str(shape)[:80]}", "lengths are whole numbers", "")
        entries.append(Entry(name, dtype, tuple(shape)))
    if len({e.name for e in entries}) != len(entries):
        raise Garbage("two tensors of one name", "names are unique", "")
    return entries


def carved(entries: Iterable[Entry], payload: Tensor) -> dict[str, Tensor]:
    """The tensors that `entries` describe, from a payload (uint8) that holds them one after another: copies."""
    import torch

    found = {}
    at = 0
    for entry in entries:
        piece = payload[at : at + entry.size_bytes].clone()
        dtype: torch.dtype = getattr(torch, entry.dtype)
        found[entry.name] = (
            piece.view(dtype).reshape(entry.shape) if entry.numel else torch.empty(entry.shape, dtype=dtype)
        )
        at += entry.size_bytes
    return found


def buffer(size_bytes: int) -> tuple[Tensor, memoryview]:
    """Room for a payload: a uint8 tensor and the same memory as a view to write into."""
    import torch

    room = torch.empty(size_bytes, dtype=torch.uint8)
    return room, view(room)


def view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous uint8 tensor."""
    array: Any = tensor.numpy()
    return memoryview(array)


def entry_of(name: str, tensor: Tensor) -> Entry:
    """How a payload describes `tensor`."""
    return Entry(name, _name(tensor), tuple(tensor.shape))


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _width(dtype: str) -> int:
    import torch

    return int(getattr(torch, dtype).itemsize)
