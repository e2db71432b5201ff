"""What the coordinator must not forget, as JSON lines that are durable before they are told; and the way back from them."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from manyhands.coordinate.messages import epoch_of, loss_of
from manyhands.coordinate.state import State
from manyhands.coordinate.words import Rules
from manyhands.core.errors import CheckpointError, UsageError


class Journal:
    """A file that records are appended to.

    Attributes:
        records: what an earlier coordinator had written.

    Raises:
        UsageError: it cannot be written, or another coordinator uses it.
        CheckpointError: it is damaged (an incomplete last line is not: that was never told).
    """

    def __init__(self, path: Path, log: Callable[[str], None]) -> None:
        self._log, self._told = log, False
        self._lock = FileLock(f"{path}.lock", timeout=0)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except Timeout:
            raise UsageError(
                f"{path} is in use", "one coordinator keeps it", "end the other one, or give another --output"
            ) from None
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}", "the journal is written there", "") from None
        try:
            self.records = self._read(path)
        except CheckpointError:
            self.close()
            raise

    def append(self, record: Mapping[str, Any]) -> None:
        """Write and sync. A full disk is logged once: the workers, too, know their epoch."""
        line = json.dumps(record).encode() + b"\n"
        try:
            written = os.write(self._file, line)
            if written < len(line):  # the next one would stand in the same line
                os.ftruncate(self._file, os.fstat(self._file).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError as error:
            if not self._told:
                self._told = True
                self._log(f"the journal cannot be written ({error.strerror}); the job goes on without it")

    def close(self) -> None:
        os.close(self._file)
        self._lock.release()

    def _read(self, path: Path) -> list[dict[str, Any]]:
        data = path.read_bytes()
        whole, _, torn = data.rpartition(b"\n")
        if torn:
            os.ftruncate(self._file, len(data) - len(torn))
        records = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                records.append({"kind": str(record["kind"]), **record})
            except (ValueError, KeyError, TypeError):
                raise CheckpointError(
                    f"{path}, line {number} is no record",
                    "each line is a JSON object that a coordinator wrote",
                    "remove the file to begin anew: running workers come back by themselves",
                ) from None
        return records


def unfinished(path: Path, *, end: bool = False) -> dict[str, str] | None:
    """The facts of a job that the journal at `path` has no end of; None: there is none.

    Args:
        end: write that it has ended: what comes next begins anew, with epochs that are counted on.

    Raises:
        UsageError, CheckpointError: as `Journal`.
    """
    if not path.exists():
        return None
    journal = Journal(path, lambda line: None)
    try:
        facts: dict[str, str] | None = None
        for record in journal.records:
            if record["kind"] == "ended":
                facts = None
            elif record["kind"] == "fact":
                facts = {**(facts or {}), str(record["key"]): str(record["text"])}
        if end and facts is not None:
            journal.append({"kind": "ended", "code": 1, "detail": "begun anew from its checkpoint"})
        return facts
    finally:
        journal.close()


def restore(records: Iterable[Mapping[str, Any]], rules: Rules, now: float) -> State:
    """The state that the records lead to. After a job's end: a new one, whose epoch numbers go on.

    Raises:
        CheckpointError: a record has lost a part.
    """
    state = State(rules)
    try:
        for record in records:
            kind = record["kind"]
            if kind == "fact":
                state.facts[record["key"]] = record["text"]
            elif kind == "epoch":
                state.adopt(epoch_of(record), now)
            elif kind == "lost":
                state.recall(loss_of(record["loss"]))
            elif kind == "began":
                state.began = True
            elif kind == "ended":
                state = State(rules, number=state.number, before=state.number)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"a record of the journal lacks {error}",
            "a coordinator of this version wrote it",
            "remove the file to begin anew: running workers come back by themselves",
        ) from None
    return state
