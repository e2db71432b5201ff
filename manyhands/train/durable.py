"""Files that are whole or absent: written under a temporary name, synced, renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from pathlib import Path

from manyhands.core.errors import CheckpointError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise failure(path, error) from error


def failure(path: Path, error: OSError) -> CheckpointError:
    """The error of a write that failed, with its remedy."""
    if error.errno in FULL:
        return CheckpointError(
            f"{path}: {error.strerror}",
            "nothing that was saved before is lost",
            "free some space, or give another --output",
        )
    return CheckpointError(
        f"{path}: {error.strerror or error}",
        "it must be possible to write there",
        "check the directory's rights",
    )


def sync_file(path: Path) -> None:
    """Force a written file to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_directory(path: Path) -> None:
    """Force a directory's entries (renames) to disk, where the system can."""
    with contextlib.suppress(OSError):
        sync_file(path)


def sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
