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
from collections.abc import Iterator, Mapping
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


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Written:
    """Write CPU `tensors` to `path`, durably, as a safetensors file.

    Raises:
        OSError: it cannot be written.
        CheckpointError: a tensor's type has no name in the format.
    """
    # wide types first: every tensor then starts at a multiple of its element's size
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in _chunks(_header(tensors, names, metadata), [tensors[name] for name in names]):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        return Written(file.tell(), digest.hexdigest())


def _header(tensors: Mapping[str, Tensor], names: list[str], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name in names:
        tensor = tensors[name]
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in TYPES:
            raise CheckpointError(
                f"{name} is of type {kind}",
                f"a safetensors file holds {', '.join(sorted(TYPES))}",
                "keep it in one of these types",
            )
        end = begin + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": TYPES[kind], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGN_BYTES)
    return len(text).to_bytes(8, "little") + text


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
