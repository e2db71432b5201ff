"""Memory that processes of one host share: made by one, found by the others, freed by itself.

On Linux a segment is an anonymous file (memfd): it has no name that could be left behind, no limit but memory (a container's
/dev/shm often has 64 MB), and others map it through the maker's ``/proc/PID/fd``. Elsewhere it is a temporary file,
unlinked once all have mapped it. A mapping lives as long as a tensor or array refers to it.
"""

from __future__ import annotations

import mmap
import os
import secrets
import tempfile
from pathlib import Path


class Segment:
    """A new segment of zeros.

    Args:
        size_bytes: at least 1 is made.

    Attributes:
        place: what others `find` it by, until it is `settled`.

    Raises:
        OSError: there is not that much memory (now, not when it is written to).
    """

    def __init__(self, size_bytes: int) -> None:
        size_bytes = max(1, size_bytes)
        self._unlink = ""
        if hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir():
            fd = os.memfd_create("manyhands", os.MFD_CLOEXEC)
            path = f"/proc/{os.getpid()}/fd/{fd}"
        else:
            path = self._unlink = str(_directory() / f"manyhands-{os.getpid()}-{secrets.token_hex(8)}")
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._fd = fd
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, size_bytes)
            else:  # macOS
                os.ftruncate(fd, size_bytes)
            self.mapped: mmap.mmap = mmap.mmap(fd, size_bytes)
            self.place = f"{path} {os.fstat(fd).st_ino} {size_bytes}"
        except BaseException:
            self.settled()
            raise

    def settled(self) -> None:
        """All have mapped it."""
        os.close(self._fd)
        if self._unlink:
            os.unlink(self._unlink)


def find(place: str) -> mmap.mmap:
    """Map another process's segment. Raises `OSError` where that process is gone."""
    path, inode, size_bytes = place.rsplit(" ", 2)
    fd = os.open(path, os.O_RDWR)
    try:
        found = os.fstat(fd)
        if (found.st_ino, found.st_size) != (int(inode), int(size_bytes)):
            raise FileNotFoundError(f"{path} is another file now")
        return mmap.mmap(fd, int(size_bytes))
    finally:
        os.close(fd)


def state_of(pid: int) -> str:
    """What a process of this host does: "gone", "stopped", or "" (alive, or unknown: outside of Linux)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except PermissionError:
        pass
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            letter = file.read().rpartition(b")")[2].split()[0]
    except OSError:
        return ""
    return {b"Z": "gone", b"X": "gone", b"T": "stopped", b"t": "stopped"}.get(letter, "")


def _directory() -> Path:
    shm = Path("/dev/shm")
    return shm if shm.is_dir() and os.access(shm, os.W_OK) else Path(tempfile.gettempdir())
