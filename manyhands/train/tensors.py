"""Named tensors as bytes: the safetensors format, hashed while it is written, and the digest of parameters.

The format (https://huggingface.co/docs/safetensors, "Format"): 8 bytes with the header's length, a JSON header with each
tensor's type, shape and place, then the bytes, little-endian, without holes. Reading is left to the `safetensors`
package. Writing is done here for three reasons: the hash costs no second reading, a full disk is an `OSError` with its
number, and the lock of the interpreter is free while bytes are hashed and written, so that training goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from manyhands.core.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BYTES = 1 << 22  # small enough that the bytes just hashed are written from the cache
ALIGN_BYTES = 8  # of the header's end, as the format asks
TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


class Written(NamedTuple):
    """What a finished file holds."""

    size_bytes: int
    sha256: str


class Layout(NamedTuple):
    """Where everything is in a file before it is written, so that several may write it at once.

    Attributes:
        head: the first bytes: the header's length and the header.
        places: by name: where in the file its elements begin, in the file's order.
        size_bytes: of the whole file.
    """

    head: bytes
    places: Mapping[str, int]
    size_bytes: int


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Written:
    """Write CPU `tensors` to `path`, durably, as a safetensors file.

    Raises:
        OSError: it cannot be written.
        CheckpointError: a tensor's type has no name in the format.
    """
    planned = layout({n: (type_name(t), tuple(t.shape)) for n, t in tensors.items()}, metadata)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in _chunks(planned.head, [tensors[name] for name in planned.places]):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        return Written(file.tell(), digest.hexdigest())


def type_name(tensor: Tensor) -> str:
    """Such as "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def size_of(kind: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of type `kind`, such as "float32"."""
    import torch

    dtype: torch.dtype = getattr(torch, kind)
    return torch.Size(shape).numel() * dtype.itemsize


def layout(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> Layout:
    """The file of tensors of these types and shapes, in whatever order they are named. Raises as `write` does.

    >>> list(layout({"a": ("float16", [3]), "b": ("float32", [2])}).places)
    ['b', 'a']
    """
    # wide types first: every tensor then starts at a multiple of its element's size
    names = sorted(tensors, key=lambda name: (-size_of(tensors[name][0], ()), name))
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begins: dict[str, int] = {}
    begin = 0
    for name in names:
        kind, shape = tensors[name]
        if kind not in TYPES:
            raise CheckpointError(
                f"{name} is of type {kind}",
                f"a safetensors file holds {', '.join(sorted(TYPES))}",
                "keep it in one of these types",
            )
        end = begin + size_of(kind, shape)
        entries[name] = {"dtype": TYPES[kind], "shape": list(shape), "data_offsets": [begin, end]}
        begins[name] = begin
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGN_BYTES)
    head = len(text).to_bytes(8, "little") + text
    return Layout(head, {name: len(head) + at for name, at in begins.items()}, len(head) + begin)


def _chunks(header: bytes, tensors: list[Tensor]) -> Iterator[bytes | memoryview]:
    yield header
    for tensor in tensors:
        data = little_endian(tensor)
        for begin in range(0, len(data), CHUNK_BYTES):
            yield data[begin : begin + CHUNK_BYTES]


def little_endian(tensor: Tensor) -> memoryview:
    """The elements of a CPU tensor in order, as bytes, least significant first; without a copy where possible."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    if sys.byteorder == "big":  # reverse each element's bytes: [elements, width]
        flat = flat.view(torch.uint8).reshape(flat.numel(), -1).flip(1).reshape(-1)
    bytes_: Any = flat.view(torch.uint8).numpy()
    return memoryview(bytes_)


def sha256_of_parameters(tensors: Mapping[str, Tensor]) -> str:
    """``parameters_sha256``: over the names in order, each with its type, shape and little-endian bytes.

    Each tensor adds ``NAME\\0TYPE\\0SHAPE\\0`` in UTF-8 (``torch.float32``, ``[2, 3]``) and its elements' bytes. The
    digest depends on no device, no order of the mapping and no strides.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu")
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(little_endian(tensor))
    return digest.hexdigest()
