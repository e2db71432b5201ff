"""Text streams into files whose disk may fill up: what cannot be written is lost, and who writes does not fail by it."""

from __future__ import annotations

import errno
import io
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Lossy(io.FileIO):
    """A file that takes everything."""

    def write(self, data: ReadableBuffer) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in FULL:
                raise
            return memoryview(data).nbytes  # kept, it would be tried again, with what has been written of it


def lossy(number: int, *, encoding: str = "utf-8") -> TextIO:
    """A stream of whole lines into an open file, by its number, which stays open."""
    raw = _Lossy(number, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors="replace", line_buffering=True)
