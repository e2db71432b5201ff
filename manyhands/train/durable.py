"""Files and directories that are whole or absent: written under a temporary name, synced, renamed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyhands.core.errors import CheckpointError
from manyhands.core.streams import FULL

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def write_json(path: Path, data: Any) -> None:
    """`data` as JSON; numbers that are not finite as null, which every reader takes. Raises `CheckpointError`."""
    write_text(path, json.dumps(_finite(data), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, durably. Raises `CheckpointError` with the reason; the old file stays then."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise failure(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # absent when all went well
            temporary.unlink()


def failure(path: Path, error: OSError) -> CheckpointError:
    """The error of a write that failed, with its remedy."""
    if error.errno in FULL:
        return CheckpointError(
            f"{path}: {error.strerror}",
            "nothing that was saved before is lost",
            "free some space, or give another --output",
        )
    met = f"{error.filename}: " if error.filename and str(error.filename) != str(path) else ""
    return CheckpointError(
        f"{path}: {met}{error.strerror or error}",
        "it must be possible to write there",
        "check the directory's rights",
    )


def install(temporary: Path, target: Path) -> None:
    """Rename a finished directory to `target`; one that is there already is replaced, without a moment with neither.

    Where the system cannot exchange two names (others than Linux, some network file systems), the moment is that
    between two renames. Raises `OSError`; then the old `target` is where it was.
    """
    if not target.exists():
        temporary.rename(target)
    elif not _exchange(temporary, target):
        aside = temporary.with_name(f"{temporary.name}.old")
        target.rename(aside)
        try:
            temporary.rename(target)
        except OSError:
            aside.rename(target)
            raise
        aside.rename(temporary)
    sync_directory(target.parent)
    shutil.rmtree(temporary, ignore_errors=True)  # what was there before, if anything


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once; False where that is not to be had."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    return bool(rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0)


def sync_file(path: Path) -> None:
    """Force a written file to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_directory(path: Path) -> None:
    """Force a directory's entries (renames) to disk, where the system can."""
    try:
        sync_file(path)
    except OSError as error:
        if error.errno in (errno.EIO, *FULL):  # a disk that fails, not a system that cannot sync directories
            raise


def sha256_of_file(path: Path, begin: int = 0, end: int | None = None) -> str:
    """The hexadecimal digest of a file's bytes, or of those from `begin` to `end`. Raises `OSError`."""
    digest, left = hashlib.sha256(), math.inf if end is None else end - begin
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        while left and (chunk := file.read(int(min(left, 1 << 22)))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()
