"""Checkpoints: whole or absent, verified, without pickle, independent of the number of workers.

    OUTPUT/checkpoint-N/
        config.json, model.safetensors, tokenizer.json, …   loads with Transformers' from_pretrained
        training/state.json, optimizer.safetensors, exchange.safetensors
        manifest.json                                        size and sha256 of every file; written last

Everything is written into a temporary directory beside it, each file is synced, then the directory is renamed. A reader
trusts only a directory whose manifest matches.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from manyhands.core.errors import CheckpointError
from manyhands.core.events import Emit, Saved, Warned, ignore
from manyhands.train import durable

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)$")
_TEMPORARY = re.compile(r"\.checkpoint-\d+\.(\d+)\.[0-9a-f]+\.tmp$")


@dataclass(frozen=True)
class Snapshot:
    """A CPU copy of everything that a checkpoint holds; training may go on meanwhile."""

    step: int
    weights: Mapping[str, Tensor]
    write_config: Callable[[Path], None]
    state: Mapping[str, Any]
    optimizer: Mapping[str, Tensor]
    exchange: Mapping[str, Tensor]
    tokenizer_dir: Path | None
    taken_s: float


class Loaded(NamedTuple):
    """The training state of a checkpoint."""

    state: dict[str, Any]
    optimizer: dict[str, Tensor]
    exchange: dict[str, Tensor]


def snapshot(
    model: nn.Module,
    *,
    step: int,
    state: Mapping[str, Any],
    optimizer: Mapping[str, Tensor],
    exchange: Mapping[str, Tensor],
    tokenizer_dir: Path | None,
) -> Snapshot:
    """Copy model, optimizer and exchange state to host memory. Blocks for the copy only."""
    from manyhands.models.store import write_config

    start = time.perf_counter()
    seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    weights = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if place in seen and tensor.numel():
            continue  # tied: written once, under its first name, as Transformers does
        seen.add(place)
        weights[name] = _copy(tensor)
    return Snapshot(
        step=step,
        weights=weights,
        write_config=lambda directory: write_config(model, directory),
        state=json.loads(json.dumps(state)),
        optimizer={name: _copy(tensor) for name, tensor in optimizer.items()},
        exchange={name: _copy(tensor) for name, tensor in exchange.items()},
        tokenizer_dir=tokenizer_dir,
        taken_s=time.perf_counter() - start,
    )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def save(taken: Snapshot, output: Path, *, keep: int, emit: Emit = ignore) -> Path:
    """Write ``output/checkpoint-N`` durably, then drop all but the newest `keep`. Returns its path.

    Raises:
        CheckpointError: it could not be written; what was saved before is untouched and nothing half-written is left.
    """
    start = time.perf_counter()
    target = output / f"checkpoint-{taken.step}"
    temporary = output / f".checkpoint-{taken.step}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        output.mkdir(parents=True, exist_ok=True)
        _sweep(output)
        temporary.mkdir()
        _write(taken, temporary)
        size = _seal(temporary, taken.step)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        durable.sync_directory(output)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise durable.failure(target, error) from error
        if "No space left" in str(error) or "os error 28" in str(error) or "File too large" in str(error):
            raise durable.failure(target, OSError(28, "No space left on device")) from error
        raise
    _rotate(output, keep)
    emit(
        Saved(
            step=taken.step,
            path=str(target),
            size_bytes=size,
            wall_s=time.perf_counter() - start,
            blocked_s=taken.taken_s,
        )
    )
    return target


def _write(taken: Snapshot, directory: Path) -> None:
    from safetensors.torch import save_file

    save_file(dict(taken.weights), directory / "model.safetensors", metadata={"format": "pt"})
    taken.write_config(directory)
    if taken.tokenizer_dir is not None:
        for source in sorted(taken.tokenizer_dir.iterdir()):
            if (source.is_file() and "token" in source.name) or source.name in (
                "vocab.json",
                "vocab.txt",
                "merges.txt",
            ):
                shutil.copyfile(source, directory / source.name)
    training = directory / "training"
    training.mkdir()
    (training / "state.json").write_text(json.dumps(taken.state, indent=1) + "\n")
    save_file(dict(taken.optimizer), training / "optimizer.safetensors")
    if taken.exchange:
        save_file(dict(taken.exchange), training / "exchange.safetensors")


def _seal(directory: Path, step: int) -> int:
    """Sync every file and write the manifest last; returns the bytes written."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        durable.sync_file(path)
        files[path.relative_to(directory).as_posix()] = {
            "bytes": path.stat().st_size,
            "sha256": durable.sha256_of_file(path),
        }
    durable.write_text(
        directory / MANIFEST, json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1) + "\n"
    )
    durable.sync_directory(directory / "training")
    durable.sync_directory(directory)
    return sum(int(f["bytes"]) for f in files.values())


def _rotate(output: Path, keep: int) -> None:
    """Keep the newest `keep`; the one just written is among them."""
    for path in checkpoints(output)[:-keep]:
        doomed = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        with contextlib.suppress(OSError):
            path.rename(doomed)  # half-deleted, it must not look like a checkpoint
            shutil.rmtree(doomed)


def _sweep(output: Path) -> None:
    """Remove temporary directories whose writer has ended."""
    for path in output.iterdir():
        match = _TEMPORARY.match(path.name)
        if match and not _alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def checkpoints(output: Path) -> list[Path]:
    """All checkpoint directories of an output, oldest first, verified or not."""
    if not output.is_dir():
        return []
    found = [
        (int(m[1]), path) for path in output.iterdir() if (m := _NAME.match(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint all of whose files match it.

    Raises:
        CheckpointError: a file is missing, truncated or edited; names it and the previous good checkpoint.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        files = manifest["files"].items()
    except (OSError, ValueError, KeyError, AttributeError):
        raise _refused(path, f"{path / MANIFEST} is missing or not a manifest") from None
    for name, facts in files:
        file = path / name
        if not file.is_file():
            raise _refused(path, f"{file} is missing")
        size = file.stat().st_size
        if size != facts["bytes"]:
            raise _refused(path, f"{file} has {size:,} bytes, its manifest says {facts['bytes']:,}")
        found = durable.sha256_of_file(file)
        if found != facts["sha256"]:
            raise _refused(
                path, f"{file} was changed (sha256 {found[:12]}…, its manifest says {facts['sha256'][:12]}…)"
            )
    return manifest


def _refused(path: Path, what: str) -> CheckpointError:
    good = next((p for p in reversed(checkpoints(path.parent)) if p != path and _is_good(p)), None)
    remedy = (
        f"--resume {good} continues from the newest good one"
        if good
        else "no other good checkpoint is beside it"
    )
    return CheckpointError(what, "a checkpoint is used only as it was written", remedy)


def _is_good(path: Path) -> bool:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        return all(
            (path / name).stat().st_size == facts["bytes"]
            and durable.sha256_of_file(path / name) == facts["sha256"]
            for name, facts in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def resolve_resume(value: str, output: Path) -> Path:
    """The checkpoint that `value` names: a checkpoint itself, or the newest of an output directory.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(value)
    if _NAME.match(path.name) and path.is_dir():
        return path
    found = checkpoints(path)
    if found:
        return found[-1]
    what = f"{path} holds no checkpoint" if path.is_dir() else f"{path} does not exist"
    raise CheckpointError(
        what,
        "a run's directory holds checkpoint-N",
        f"give the --output of a run ({output} has none)" if output != path else "",
    )


def load_state(path: Path) -> Loaded:
    """The training state of a checkpoint (verify it first). Raises `CheckpointError`."""
    from safetensors.torch import load_file

    training = path / "training"
    try:
        state = json.loads((training / "state.json").read_text())
        exchange = training / "exchange.safetensors"
        return Loaded(
            state,
            load_file(training / "optimizer.safetensors"),
            load_file(exchange) if exchange.exists() else {},
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{training}: {error}", "a checkpoint that can be continued holds training state", ""
        ) from None


def sha256_of_parameters(tensors: Mapping[str, Tensor]) -> str:
    """``parameters_sha256``: over names in order, each with its type, shape and little-endian bytes."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


class AsyncSaver:
    """Writes checkpoints on a thread of its own while training goes on; one at a time, in order.

    A save that fails is reported at once as `Warned` and training goes on; `wait` raises it.
    """

    def __init__(self, output: Path, keep: int, emit: Emit = ignore) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._output, self._keep, self._emit = output, keep, emit
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._failure: CheckpointError | None = None
        self._pending: Any = None

    def submit(self, taken: Snapshot) -> None:
        """Start writing; waits first for an earlier one (two copies in memory are enough)."""
        if self._pending is not None:
            self._pending.result()
        self._pending = self._pool.submit(self._save, taken)

    def wait(self) -> None:
        """Return when all is durable. Raises the `CheckpointError` of the last save if it failed."""
        if self._pending is not None:
            self._pending.result()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def _save(self, taken: Snapshot) -> None:
        try:
            save(taken, self._output, keep=self._keep, emit=self._emit)
            self._failure = None
        except CheckpointError as failure:
            self._failure = failure
            self._emit(Warned(message=str(failure), where=f"checkpoint-{taken.step}"))
