"""One checkpoint written by many hands: each worker copies and writes a part of the same files.

    begin       all: who has what, into which file; rank 0 makes a temporary directory; whoever sees it can take part
    divide      what only one worker has is written by it; what all have (replicas are equal) is divided by bytes
    write       each in the background: copied bytes to their places in the files, hashed and synced; then it tells so there
    assemble    rank 0 in the background: its own part; waits for the others'; the manifest; the rename

The files are byte for byte those that rank 0 would write alone (`manyhands.train.tensors`): nothing in a checkpoint tells
how many wrote it, but the manifest, which has a hash of each part in place of one of the file. So training waits for the
copy of a part, no worker's cores are taken more than another's, and divided state (ZeRO) neither travels nor has to
fit into rank 0's memory.

Only processes of rank 0's own host take part. Over a network's file system two hosts' parts that meet within a page would
overwrite each other: a client may send whole pages (Linux's NFS does). Where a worker elsewhere holds something of its own,
where devices differ in kind (not all of their state is compared), or the parts do not lie in rows, rank 0 collects and
writes everything alone.

Who dies while it writes leaves a part out. Rank 0 notices (`lost`, or there is no such process), says so, and the
checkpoint before stands until the survivors have written one together, at their next agreement.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from manyhands.train import durable, tensors
from manyhands.train.checkpoint import EXCHANGE, Facts, PartLost, temporary_of
from manyhands.train.joint_division import FILES, Holdings, Run, covers, divide, told, understood
from manyhands.train.tensors import Layout, little_endian, size_of, type_name

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.wire.world import World

PATIENCE_S = 600.0  # for a part, when rank 0 has written its own
LOOK_S = 0.02
PARTS = (
    ".parts"  # in the temporary directory: RANK.waiting until RANK.json says what was written, or RANK.failed
)


class Writer(NamedTuple):
    """Who writes a part: a process of this host."""

    rank: int
    seat: str
    pid: int


# ----------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True, kw_only=True)
class Share:
    """My part of a checkpoint: a CPU copy.

    Attributes:
        directory: the temporary one.
        pieces: by file: (where in it, the bytes), in order.
    """

    step: int
    rank: int
    directory: Path
    pieces: Mapping[str, Sequence[tuple[int, Tensor]]]
    taken_s: float = 0.0

    def write(self) -> dict[str, list[list[Any]]]:
        """By file: [begin, end, sha256] of each of my parts; neighbouring pieces are one. Raises `OSError`."""
        found: dict[str, list[list[Any]]] = {}
        for name, pieces in self.pieces.items():
            parts: list[list[Any]] = []
            with (self.directory / name).open("r+b", buffering=0) as file:
                for begin, copy in pieces:
                    data = little_endian(copy)
                    if not parts or parts[-1][1] != begin:
                        parts.append([begin, begin, hashlib.sha256()])
                    for at in range(0, len(data), tensors.CHUNK_BYTES):
                        chunk = data[at : at + tensors.CHUNK_BYTES]
                        parts[-1][2].update(chunk)
                        _write_at(file.fileno(), chunk, begin + at)
                    parts[-1][1] = begin + len(data)
                os.fsync(file.fileno())
            found[name] = [[begin, end, digest.hexdigest()] for begin, end, digest in parts]
        return found

    def tell(self) -> None:
        """Write it, and say so to rank 0. Raises `OSError` where it cannot be written and somebody still waits for it."""
        if not self.pieces:  # nobody waits for it
            return
        waiting = self.directory / PARTS / f"{self.rank}.waiting"
        try:
            found = self.write()
            said = waiting.with_suffix(".json.tmp")
            said.write_text(json.dumps(found), encoding="utf-8")
            durable.sync_file(said)
            said.rename(waiting.with_suffix(".json"))
        except OSError:
            with contextlib.suppress(FileNotFoundError):  # rank 0 has given it up, or is gone
                waiting.rename(waiting.with_suffix(".failed"))  # which takes no room on a full disk
                raise


def _write_at(descriptor: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, at)
        data, at = data[written:], at + written


@dataclass(frozen=True, kw_only=True)
class JointSnapshot(Facts):
    """Rank 0's: its own share, and how to make a checkpoint of everybody's.

    Attributes:
        others: who else writes.
        gone: seats that were lost while it is written.
        heard: ranks whose parts are there.
    """

    share: Share
    layouts: Mapping[str, Layout]
    others: Sequence[Writer]
    gone: set[str] = field(default_factory=set)
    heard: set[int] = field(default_factory=set)

    @property
    def directory(self) -> Path:
        return self.share.directory

    def lost(self, seats: Collection[str]) -> bool:
        self.gone.update(seats)
        return any(
            w.seat in seats
            and w.rank not in self.heard
            and not self._told(w).exists()
            and w.rank not in self.heard
            for w in self.others
        )

    def _told(self, other: Writer) -> Path:
        return self.directory / PARTS / f"{other.rank}.json"

    def write_tensors(self, directory: Path) -> dict[str, dict[str, Any]]:
        """The files' facts for the manifest. Raises `PartLost`, and `OSError` for what is mine."""
        for name in FILES:
            if name in self.layouts:
                os.truncate(directory / name, self.layouts[name].size_bytes)
            else:
                (directory / name).unlink()
        found = self.share.write()
        for other in self.others:
            for name, written in self._wait_for(other).items():
                found.setdefault(name, []).extend(written)
        shutil.rmtree(directory / PARTS)
        files = {}
        for name, planned in self.layouts.items():
            parts = sorted(found.get(name, []))
            if not covers(((begin, end) for begin, end, _ in parts), planned.size_bytes):
                raise AssertionError(f"{name}: the parts do not make the file")
            durable.sync_file(directory / name)
            files[name] = {"bytes": planned.size_bytes, "parts": parts}
        return files

    def _wait_for(self, other: Writer) -> dict[str, list[list[Any]]]:
        """What `other` has written."""
        path = self._told(other)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            gone = self._is_gone(other)  # before the look: what it has written it has written
            if path.exists():
                break
            why = "could not write its part (it has said why)" if path.with_suffix(".failed").exists() else ""
            if gone:
                why = "was lost while it wrote its part"
            elif time.monotonic() > deadline:
                why = f"has not written its part within {PATIENCE_S:.0f} s"
            if why:
                raise PartLost(
                    f"checkpoint-{self.step}: worker {other.rank} ({other.seat}) {why}",
                    "a checkpoint is whole or absent",
                    "the one before stands, another one is written as soon as the workers agree again",
                    dead=gone,
                )
            time.sleep(LOOK_S)
        found: dict[str, list[list[Any]]] = json.loads(path.read_text(encoding="utf-8"))
        self.heard.add(other.rank)
        return found

    def _is_gone(self, other: Writer) -> bool:
        if other.seat in self.gone:
            return True
        try:
            os.kill(other.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


def here(host: str) -> str:
    """This host (by the name that it goes by in the job), its present start, and its space of process numbers."""
    with contextlib.suppress(OSError):
        start = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{host} {start} {os.readlink('/proc/self/ns/pid')}"
    return host


# --------------------------------------------------------------------------------------------------- all at once


def begin(
    world: World,
    holdings: Holdings,
    output: Path | None,
    facts: Callable[[Iterable[str]], Facts],
    *,
    step: int,
    seats: Sequence[str],
    began: float,
) -> Share | JointSnapshot | None:
    """Copies of what I am to write; None on every worker where they cannot write together. Collective. Raises `PeerLost`.

    Args:
        output: None: I do not take part.
        facts: rank 0's other files, from the names of what the exchange keeps.
        seats: by rank.
        began: `time.perf_counter` when training paused.
    """
    directory = _prepared(output, step, world.size) if world.rank == 0 and output else None
    try:
        mine = {**told(holdings, first=world.rank == 0), "directory": directory.name if directory else ""}
        everyones = world.gather(mine)
        name, table = everyones[0]["directory"], understood(everyones)
        place = output / name if output and name else None
        seen = place is not None and sys.byteorder == "little" and _can_write(place)
        who = world.gather([seen, here(world.members[world.rank].host), os.getpid()])
        there = [rank for rank, (sees, where, _) in enumerate(who) if sees and where == who[0][1]]
        if table is None or 0 not in there or any(table.own[r] for r in range(world.size) if r not in there):
            return None
        runs = {rank: runs for rank, runs in divide(table, there).items() if runs or rank == 0}
        if len(runs) < 2:
            return None
        pieces = _copied(holdings, table.layouts, runs.get(world.rank, ()), head=world.rank == 0)
        taken_s = time.perf_counter() - began
        share = Share(step=step, rank=world.rank, directory=place or Path(), pieces=pieces, taken_s=taken_s)
        if world.rank != 0:
            return share
        others = [Writer(r, seats[r], int(who[r][2])) for r in runs if r != 0]
        rest = facts(table.layouts[EXCHANGE].places if EXCHANGE in table.layouts else ())
        whole = JointSnapshot(
            **{**rest.__dict__, "taken_s": taken_s}, share=share, layouts=table.layouts, others=others
        )
        directory = None  # it is the saver's now
        return whole
    finally:
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)


def _prepared(output: Path, step: int, size: int) -> Path | None:
    """A temporary directory with empty files; None where it cannot be made (whoever writes alone says why)."""
    directory = temporary_of(output / f"checkpoint-{step}")
    try:
        (directory / PARTS).mkdir(parents=True)
        for name in FILES:
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).touch()
        for rank in range(1, size):
            (directory / PARTS / f"{rank}.waiting").touch()
    except OSError:
        shutil.rmtree(directory, ignore_errors=True)
        return None
    return directory


def _can_write(directory: Path) -> bool:
    try:
        for name in FILES:
            os.close(os.open(directory / name, os.O_RDWR))
        return os.access(directory / PARTS, os.W_OK)
    except OSError:
        return False


def _copied(
    holdings: Holdings, layouts: Mapping[str, Layout], runs: Iterable[Run], *, head: bool
) -> dict[str, list[tuple[int, Tensor]]]:
    """Copies in host memory of my runs, with their places."""
    import torch

    found: dict[str, list[tuple[int, Tensor]]] = {}
    if head:
        for file, planned in layouts.items():
            found[file] = [(0, torch.frombuffer(bytearray(planned.head), dtype=torch.uint8))]
    for file, name, begin, end in runs:
        if begin == end:
            continue
        kept = holdings.own.get(file, {}).get(name)
        if kept is not None:
            piece, tensor = kept
            start = piece.offset[0] * size_of(type_name(tensor), piece.shape[1:]) if piece.offset else 0
        else:
            tensor, start = holdings.common[file][name], 0
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        copy = flat[begin - start : end - start].to("cpu", copy=True)
        found.setdefault(file, []).append((layouts[file].places[name] + begin, copy))
    return {file: sorted(pieces, key=lambda each: each[0]) for file, pieces in found.items()}
