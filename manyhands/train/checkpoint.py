"""Checkpoints: whole or absent, verified, without pickle, independent of the number of workers.

    OUTPUT/checkpoint-N/
        config.json, model.safetensors, tokenizer.json, …   loads with Transformers' from_pretrained
        training/state.json, optimizer.safetensors, exchange.safetensors
        manifest.json                                        size and sha256 of every file (or of each part, where several
                                                             workers wrote it: `manyhands.train.joint`); written last

Everything is written into a temporary directory beside it, each file is synced, then the directory is renamed. A reader
trusts only a directory whose manifest matches (`manyhands.train.manifest`, whose functions are here, too).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.core.errors import CheckpointError, UsageError
from manyhands.core.events import Emit, Saved, Warned, ignore
from manyhands.train import durable, manifest, tensors
from manyhands.train.manifest import Loaded, checkpoints, latest, load_state, resolve_resume, verify
from manyhands.train.tensors import sha256_of_parameters

if TYPE_CHECKING:
    from torch import Tensor, nn

    from manyhands.train.joint import Share

__all__ = [
    "AsyncSaver",
    "Loaded",
    "Snapshot",
    "checkpoints",
    "latest",
    "load_state",
    "resolve_resume",
    "save",
    "sha256_of_parameters",
    "snapshot",
    "verify",
]

_TEMPORARY = re.compile(r"\.checkpoint-\d+\.(\d+)\.([0-9a-f]+)-[0-9a-f]+\.tmp(\.old)?$")
_PROCESS = secrets.token_hex(4)  # tells this process from an earlier one with the same number
WEIGHTS, OPTIMIZER, EXCHANGE = (
    "model.safetensors",
    "training/optimizer.safetensors",
    "training/exchange.safetensors",
)
_TOKENIZER = re.compile(r".*token.*|vocab\.(json|txt)|merges\.txt|.*\.(model|tiktoken|jinja)")


class PartLost(CheckpointError):
    """Another worker has not written its part: the checkpoint is to be written again.

    Attributes:
        dead: it is gone; else it could not write, and rank 0 does better alone.
    """

    def __init__(self, value: str, rule: str, remedy: str, *, dead: bool) -> None:
        super().__init__(value, rule, remedy)
        self.dead = dead


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a checkpoint holds beside its tensors.

    Attributes:
        write_config: writes ``config.json`` (and its like) into a directory; reads no parameter.
        state: JSON data.
        tokenizer_dir: whose tokenizer's files it gets (read when it is written).
        taken_s: how long training waited for the copy.
    """

    step: int
    write_config: Callable[[Path], None]
    state: Mapping[str, Any]
    tokenizer_dir: Path | None
    taken_s: float

    @property
    def directory(self) -> Path | None:
        """The temporary directory, where it is there already."""
        return None

    def lost(self, seats: Collection[str]) -> bool:
        """These workers are gone; whether a part is missing now that one of them was to write. From any thread."""
        return False

    def write_tensors(self, directory: Path) -> dict[str, dict[str, Any]]:
        """The files of tensors, each synced; what the manifest says of them. Raises `OSError`, `CheckpointError`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Snapshot(Facts):
    """A CPU copy of everything that a checkpoint holds; training may go on meanwhile.

    Attributes:
        weights: by name; tied ones once.
    """

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    exchange: Mapping[str, Tensor]

    def write_tensors(self, directory: Path) -> dict[str, dict[str, Any]]:
        big: list[tuple[str, Mapping[str, Tensor], Mapping[str, str] | None]] = [
            (WEIGHTS, self.weights, {"format": "pt"}),
            (OPTIMIZER, self.optimizer, None),
        ]
        if self.exchange:
            big.append((EXCHANGE, self.exchange, None))
        files = {}
        for name, named, metadata in big:
            written = tensors.write(directory / name, named, metadata)
            files[name] = {"bytes": written.size_bytes, "sha256": written.sha256}
        return files


def snapshot(
    model: nn.Module,
    *,
    step: int,
    state: Mapping[str, Any],
    optimizer: Mapping[str, Tensor],
    exchange: Mapping[str, Tensor],
    tokenizer_dir: Path | None,
) -> Snapshot:
    """Copy model, optimizer and exchange state to host memory. Blocks for the copy only.

    Args:
        state: JSON data; a copy is kept. Raises `TypeError` where it is not.
        tokenizer_dir: whose tokenizer's files the checkpoint gets (read when it is written).
    """
    from manyhands.models.store import write_config

    start = time.perf_counter()
    return Snapshot(
        step=step,
        weights={name: _copy(tensor) for name, tensor in untied(model).items()},
        write_config=lambda directory: write_config(model, directory),
        state=json.loads(json.dumps(state)),
        optimizer={name: _copy(tensor) for name, tensor in optimizer.items()},
        exchange={name: _copy(tensor) for name, tensor in exchange.items()},
        tokenizer_dir=tokenizer_dir,
        taken_s=time.perf_counter() - start,
    )


def untied(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, tied tensors once, under their first names, as Transformers writes them."""
    seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    found = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if place in seen and tensor.numel():
            continue
        seen.add(place)
        found[name] = tensor
    return found


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def save(taken: Facts, output: Path, *, keep: int, emit: Emit = ignore) -> Path:
    """Write ``output/checkpoint-N`` durably, then drop all but the newest `keep`. Returns its path.

    A ``checkpoint-N`` that is there already is replaced; nothing is deleted before the new one is on disk.

    Raises:
        CheckpointError: it could not be written; what was saved before is untouched and nothing half-written is left.
    """
    if keep < 1:
        raise UsageError(f"keep = {keep}", "the checkpoint just written is kept", "give at least 1")
    start = time.perf_counter()
    target = output / f"checkpoint-{taken.step}"
    temporary = taken.directory or temporary_of(target)
    try:
        output.mkdir(parents=True, exist_ok=True)
        _sweep(output)
        temporary.mkdir(exist_ok=taken.directory is not None)
        size = _write(
            taken,
            temporary,
            saved_s=max([time.time(), *(manifest.saved_s(p) + 1e-3 for p in checkpoints(output))]),
        )
        durable.install(temporary, target)
    except OSError as error:
        raise durable.failure(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone when all went well
    _rotate(target, keep)
    wall_s = time.perf_counter() - start
    emit(Saved(step=taken.step, path=str(target), size_bytes=size, wall_s=wall_s, blocked_s=taken.taken_s))
    return target


def temporary_of(target: Path) -> Path:
    """Another name beside it each time, which tells whose it is."""
    return target.with_name(f".{target.name}.{os.getpid()}.{_PROCESS}-{secrets.token_hex(4)}.tmp")


def _write(taken: Facts, directory: Path, *, saved_s: float) -> int:
    """All files, each synced, the manifest last; returns the bytes written."""
    training = directory / "training"
    training.mkdir(exist_ok=taken.directory is not None)
    taken.write_config(directory)
    if taken.tokenizer_dir is not None:
        for source in sorted(taken.tokenizer_dir.iterdir()):
            if source.is_file() and _TOKENIZER.fullmatch(source.name):
                shutil.copyfile(source, directory / source.name)
    (training / "state.json").write_text(json.dumps(taken.state, indent=1) + "\n", encoding="utf-8")
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and not _later(p, directory)):
        durable.sync_file(path)
        facts = {"bytes": path.stat().st_size, "sha256": durable.sha256_of_file(path)}
        files[path.relative_to(directory).as_posix()] = facts
    files |= taken.write_tensors(directory)
    durable.sync_directory(training)
    version = manifest.FORMAT if any("parts" in facts for facts in files.values()) else 1
    content = {"format": version, "step": taken.step, "saved_s": saved_s, "files": files}
    durable.write_text(directory / manifest.MANIFEST, json.dumps(content, indent=1) + "\n")
    return sum(int(f["bytes"]) for f in files.values())


def _later(path: Path, directory: Path) -> bool:
    """Whether it is of those that several workers write at this moment."""
    name = path.relative_to(directory).as_posix()
    return name in (WEIGHTS, OPTIMIZER, EXCHANGE) or name.startswith(".")


def _rotate(newest: Path, keep: int) -> None:
    """Keep `newest` and the `keep` - 1 saved before it; a damaged one takes no place of a whole one."""
    kept = 1
    for path in reversed(checkpoints(newest.parent)):
        if path == newest:
            continue
        if kept < keep:
            kept += manifest.fault(path, hashes=False) is None
            continue
        doomed = temporary_of(path)
        with contextlib.suppress(OSError):
            path.rename(doomed)  # half-deleted, it must not look like a checkpoint
            shutil.rmtree(doomed)


def _sweep(output: Path) -> None:
    """Remove temporary directories whose writer has ended."""
    for path in output.iterdir():
        match = _TEMPORARY.match(path.name)
        mine = match and match[2] == _PROCESS and match[1] == str(os.getpid())
        if match and not mine and not _alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid != os.getpid()  # my number, but not my token: an earlier process, in a container for example


class AsyncSaver:
    """Writes snapshots on a thread of its own, one at a time, in order; emits `Saved` when each is durable.

    A save that fails (a full disk) is reported at once as `Warned` and training goes on with what was saved before;
    `wait`, which a job calls at its end, raises the failure of the last save. One that succeeds later mends it.
    Where another worker's part is what fails nothing is raised: `incomplete` asks for another save.

    Attributes:
        output: the run's directory.
        incomplete: what is to be the newest checkpoint lacks another worker's part.
        alone: another worker could not write its part: the next is written by rank 0 alone.
    """

    def __init__(self, output: Path, keep: int, emit: Emit = ignore) -> None:
        self.output, self._keep, self._emit = output, keep, emit
        self._pool: ThreadPoolExecutor | None = None
        self._failure: CheckpointError | None = None
        self._pending: Future[None] | None = None
        self._writing: Facts | None = None
        self.incomplete = self.alone = False

    def submit(self, taken: Facts | Share) -> None:
        """Start writing. Waits first for an earlier one (two copies in memory are enough); that counts as blocked.

        Args:
            taken: a checkpoint, or on other workers than rank 0 the part that they write of one.
        """
        start = time.perf_counter()
        self._drain()
        waited_s = time.perf_counter() - start
        self.incomplete = False
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        if isinstance(taken, Facts):
            self._writing = dataclasses.replace(taken, taken_s=taken.taken_s + waited_s)
            self._pending = self._pool.submit(self._save, self._writing)
        else:
            self._pending = self._pool.submit(self._tell, taken)

    def lost(self, seats: Collection[str]) -> None:
        """These workers are gone: what they have not written of what is being saved will not come."""
        writing = self._writing
        if writing is not None and writing.lost(seats):
            self.incomplete = True

    def settle(self) -> None:
        """Return when nothing is being written, whatever has come of it."""
        self._drain()

    def wait(self) -> None:
        """Return when all is durable. Raises the `CheckpointError` of the last save if it failed."""
        self._drain()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """End the thread after what it is writing. Raises nothing: `wait` first to learn of a failure."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        self._pool = None

    def _drain(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()  # raises what is not a CheckpointError: a defect, not a disk

    def _save(self, taken: Facts) -> None:
        try:
            save(taken, self.output, keep=self._keep, emit=self._emit)
            self._failure, self.alone = None, False
        except CheckpointError as failure:
            if isinstance(failure, PartLost):
                self._failure, self.incomplete, self.alone = None, True, not failure.dead
            else:
                self._failure = failure
            for error in (failure, failure.__cause__, failure.__context__):
                if error is not None:
                    error.with_traceback(None)  # whose frames hold the copy
            self._emit(Warned(message=str(failure), where=f"checkpoint-{taken.step}"))
        finally:
            self._writing = None  # the copy

    def _tell(self, part: Share) -> None:
        try:
            part.tell()
        except OSError as error:
            failure = durable.failure(self.output / f"checkpoint-{part.step}", error)
            self._emit(
                Warned(message=str(failure), where=f"worker {part.rank}'s part of checkpoint-{part.step}")
            )
