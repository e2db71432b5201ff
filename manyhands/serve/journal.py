"""What survives a server: snapshots, and a log of what happened since the newest one.

    STATE/snapshot-N/state.json, tensors.safetensors     whole or absent (renamed into place)
    STATE/log-N                                          events after snapshot N, in order

Recovery loads the newest snapshot N and replays log-N, log-N+1, … (a later log without its snapshot: the server died
while it wrote that one). `durability` says what the log holds when a push is acknowledged:

* ``each``: the push. It survives every death of the process; a loss of power may take the last second.
* ``synced``: the push, forced to disk (fdatasync). It survives a loss of power as well, at the disk's speed.
* ``interval``: members alone. Pushes since the last snapshot are lost with the process; nothing is written for a push.

A record is a length, a CRC-32 and the bytes of one framed message; a torn one at the end, never acknowledged, is
left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from manyhands.core.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

Durability = Literal["each", "synced", "interval"]
Level = Literal["member", "state", "push"]  # an event of membership, of what pushes did, or a push itself
_RECORD = struct.Struct("<IIQ")  # header's length, CRC-32 of header and payload, payload's length
_CHUNK = 8 << 20


class Journal:
    """Snapshots and logs in one directory; a lock file keeps a second server out.

    Args:
        directory: made where it is absent.
    """

    def __init__(self, directory: Path, durability: Durability) -> None:
        self.directory, self.durability = directory, durability
        self.log_bytes = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = (directory / "lock").open("w")
        except OSError as error:
            raise CheckpointError(
                f"{directory}: {error.strerror}", "a server keeps its state there", ""
            ) from None
        _lock_alone(self._lock, directory)
        for rest in directory.glob(".*.tmp*"):
            shutil.rmtree(rest, ignore_errors=True)
        self._number = max([0, *self._numbers("snapshot-"), *self._numbers("log-")])
        self._log: Any = None

    def recover(self) -> tuple[dict[str, Any], dict[str, Tensor], list[Path]] | None:
        """State, tensors and the logs to replay; None where nothing was kept. Raises `CheckpointError`."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        numbers = self._numbers("snapshot-")
        if not numbers:
            return None
        newest = max(numbers)
        path = self.directory / f"snapshot-{newest}"
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            tensors = load_file(path / "tensors.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: {error}", "a snapshot is as it was written", "give an empty --state to begin anew"
            ) from None
        logs = [self.directory / f"log-{n}" for n in sorted(self._numbers("log-")) if n >= newest]
        return state, tensors, logs

    def rotate(self) -> int:
        """Begin a new log; the caller takes its snapshot of the same moment and hands it to `install`.

        Raises:
            CheckpointError: it cannot be made; the old one goes on.
        """
        from manyhands.train import durable

        path = self.directory / f"log-{self._number + 1}"
        try:
            log = path.open("ab", buffering=0)
            if self.durability == "synced":  # what is forced to disk in it must be found there
                durable.sync_directory(self.directory)
        except OSError as error:
            raise durable.failure(path, error) from error
        if self._log is not None:
            self._log.close()
        self._log, self._number, self.log_bytes = log, self._number + 1, 0
        return self._number

    def record(self, header: Mapping[str, Any], payload: memoryview | None, level: Level) -> None:
        """Append an event, as `durability` says. Raises `CheckpointError` (a full disk)."""
        if self._log is None or (level != "member" and self.durability == "interval"):
            return
        text = json.dumps(header, separators=(",", ":")).encode()
        body = payload if payload is not None else memoryview(b"")
        crc = zlib.crc32(body, zlib.crc32(text))
        try:
            if (
                self._log.seek(0, os.SEEK_END) != self.log_bytes
            ):  # what an earlier failure left could not be cut
                self._log.truncate(self.log_bytes)
            _write_all(self._log, memoryview(_RECORD.pack(len(text), crc, len(body)) + text))
            _write_all(self._log, body)
            if level == "push" and self.durability == "synced":
                _sync(self._log.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._log.truncate(self.log_bytes)
            raise CheckpointError(
                f"{self._log.name}: {error.strerror}",
                "a push is kept before it is acknowledged",
                "free some space",
            ) from None
        self.log_bytes += _RECORD.size + len(text) + len(body)

    def install(self, number: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write snapshot `number` durably, then drop older ones and their logs. Raises `CheckpointError`."""
        from manyhands.train import durable
        from manyhands.train.tensors import write

        target = self.directory / f"snapshot-{number}"
        temporary = self.directory / f".snapshot-{number}.tmp"
        try:
            temporary.mkdir()
            write(temporary / "tensors.safetensors", tensors)
            (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
            durable.sync_file(temporary / "state.json")
            durable.install(temporary, target)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise durable.failure(target, error) from error
        for kind in ("snapshot-", "log-"):
            for old in self._numbers(kind):
                if old < number:
                    self._drop(self.directory / f"{kind}{old}")

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
        self._lock.close()

    def _drop(self, path: Path) -> None:
        if path.is_dir():
            doomed = path.with_name(f".{path.name}.tmp")
            with contextlib.suppress(OSError):
                path.rename(doomed)  # half-deleted, it must not look like a snapshot
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def _numbers(self, prefix: str) -> list[int]:
        names = [p.name.removeprefix(prefix) for p in self.directory.glob(f"{prefix}*")]
        return [int(n) for n in names if n.isdigit()]


def replayed(
    logs: Sequence[Path], tell: Callable[[str], None] = lambda line: None
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """The events of these logs in order: (header, payload as uint8). Leaves out, and tells of, a log's torn end."""
    import torch

    for path in logs:
        with path.open("rb") as file:
            whole, end = 0, os.fstat(file.fileno()).st_size
            while True:
                head = file.read(_RECORD.size)
                if len(head) < _RECORD.size:
                    break
                length, crc, size = _RECORD.unpack(head)
                left = end - file.tell()
                if not length or length + size > left:  # zeros: a file grown before a loss of power
                    break
                text = file.read(length)
                payload = torch.empty(size, dtype=torch.uint8)
                array: Any = payload.numpy()
                if size:
                    file.readinto(memoryview(array))
                if zlib.crc32(memoryview(array) if size else b"", zlib.crc32(text)) != crc:
                    break
                whole = file.tell()
                yield json.loads(text), payload
            if whole < end:
                tell(f"{path.name}: its last {end - whole:,} bytes are torn, and left out")


def _write_all(file: Any, data: memoryview) -> None:
    at = 0
    while at < len(data):
        at += file.write(data[at : at + _CHUNK])


def _sync(fd: int) -> None:
    getattr(os, "fdatasync", os.fsync)(fd)


def _lock_alone(file: Any, directory: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: nobody guards it
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise CheckpointError(
            f"{directory} is in use by another server", "one server writes there", "give another --state"
        ) from None
