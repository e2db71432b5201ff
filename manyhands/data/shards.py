"""Token shards: uncompressed Arrow IPC streams, memory-mapped, readable by pyarrow and `datasets.Dataset.from_file`.

A text shard has one column ``tokens``; a labelled one ``input_ids`` (lists) and ``label`` (text). A shard is one record batch; its
name is the beginning of its content's sha256. It is written under a temporary name, synced and renamed: never half of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from manyhands.core.errors import DataError
from manyhands.core.streams import FULL

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHARD_TOKENS = 16 << 20


def write_tokens(directory: Path, tokens: NDArray[Any]) -> str:
    """Write one text shard; returns its file name."""
    import pyarrow as pa

    return _write(directory, pa.record_batch([pa.array(tokens)], names=["tokens"]))


def write_labelled(
    directory: Path, tokens: NDArray[Any], lengths: NDArray[np.int64], labels: Sequence[str]
) -> str:
    """Write one labelled shard of rows with `lengths`, their tokens on end; returns its file name."""
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))
    return _write(
        directory, pa.record_batch([lists, pa.array(list(labels), pa.string())], names=["input_ids", "label"])
    )


def _write(directory: Path, batch: Any) -> str:
    import pyarrow as pa

    temporary = directory / f".{os.getpid()}.{os.urandom(4).hex()}.tmp"
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        with temporary.open("rb") as file:
            name = _name(file)
            os.fsync(file.fileno())
        temporary.replace(directory / name)
        return name
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise failure(directory, error) from error


def _name(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return f"{digest.hexdigest()[:24]}.arrow"


def stamp(path: Path) -> list[int]:
    """[size, time of the last change]: what a changed file hardly keeps."""
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns]


def verified(directory: Path, names: Sequence[str], stamps: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """The shards' stamps now; those that are not as they were are read, and must still be what their names say.

    Raises:
        DataError: a shard is missing or was changed.
    """
    found: dict[str, list[int]] = {}
    for name in names:
        path, wrong = directory / name, ""
        if not path.is_file():
            wrong = "is missing"
        elif name not in found:
            found[name] = stamp(path)
            if found[name] != stamps.get(name):
                with path.open("rb") as file:
                    wrong = "" if _name(file) == name else "was changed after it was written"
        if wrong:
            raise DataError(
                f"{path} {wrong}", "a preparation is used only whole", f"delete {directory}; it is made anew"
            )
    return found


def failure(path: Path, error: OSError) -> DataError:
    """The error of a cache that cannot be written."""
    if error.errno in FULL:
        return DataError(
            f"{path}: {error.strerror}",
            "what was prepared before is kept and used again",
            "free some space, or give another --cache",
        )
    return DataError(
        f"{path}: {error.strerror or error}", "it must be possible to write there", "give another --cache"
    )


def open_tokens(path: Path) -> NDArray[Any]:
    """A text shard's tokens, memory-mapped."""
    tokens: NDArray[Any] = _open(path).column(0).to_numpy(zero_copy_only=True)
    return tokens


def open_labelled(path: Path) -> tuple[NDArray[np.int32], NDArray[Any], Any]:
    """(offsets, flat tokens, labels: an Arrow array of strings) of a labelled shard, memory-mapped."""
    batch = _open(path)
    lists = batch.column(0)
    return (
        lists.offsets.to_numpy(zero_copy_only=True),
        lists.values.to_numpy(zero_copy_only=True),
        batch.column(1),
    )


def _open(path: Path) -> Any:
    import pyarrow as pa

    try:
        return pa.ipc.open_stream(pa.memory_map(str(path))).read_next_batch()
    except (OSError, StopIteration, pa.ArrowInvalid) as error:
        raise DataError(
            f"{path}: {str(error) or 'it is empty'}".splitlines()[0],
            "a prepared shard is used only whole",
            "delete that directory; it is made anew",
        ) from error
