"""What is on disk: the checkpoints of an output, the newest, whether each is whole; refused by name where it is not.

The *newest* checkpoint is the one saved last, which need not have the highest step: a run that was resumed from an
earlier one has left the later ones behind.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from manyhands.core.errors import CheckpointError, UsageError
from manyhands.train import durable

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 2  # 1: no file has parts; both are read
MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-([0-9]+)")


class Loaded(NamedTuple):
    """The training state of a checkpoint."""

    state: dict[str, Any]
    optimizer: dict[str, Tensor]
    exchange: Mapping[str, Tensor]


def checkpoints(output: Path) -> list[Path]:
    """All checkpoint directories of an output, the newest last, verified or not."""
    if not output.is_dir():
        return []
    found = [
        (saved_s(path), int(m[1]), path)
        for path in output.iterdir()
        if (m := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, _, path in sorted(found)]


def run_of(value: str) -> Path:
    """The output directory of the run that `value` names: as it is, or of the checkpoint that it is.

    >>> run_of("runs/one/checkpoint-4"), run_of("runs/one")
    (PosixPath('runs/one'), PosixPath('runs/one'))
    """
    path = Path(value)
    named = path if path.name not in ("", "..") else Path(os.path.abspath(path))  # "." has no name of its own
    return named.parent if _NAME.fullmatch(named.name) or (named / MANIFEST).is_file() else path


def goes_on(output: Path, resume: str | None) -> bool:
    """Whether the run that is resumed, if any, is the one of `output`."""
    return resume is not None and run_of(resume).resolve() == output.resolve()


def check_fresh(output: Path, resume: str | None = None) -> None:
    """Raises `UsageError` where checkpoints of another run than the one that is resumed are in `output`."""
    if checkpoints(output) and not goes_on(output, resume):
        raise UsageError(
            f"{output} already holds checkpoints of another run",
            "a run does not mix with an earlier one",
            f"continue it with --resume {output}, or give another --output",
        )


def check_alike(output: Path, steps: Sequence[int]) -> None:
    """Raises `UsageError` where workers have found checkpoints of different steps (-1: none)."""
    if len(set(steps)) > 1:
        found = ", ".join(f"worker {k} {f'step {s}' if s >= 0 else 'none'}" for k, s in enumerate(steps))
        raise UsageError(
            f"workers have found different checkpoints ({found})",
            "all continue from the same one",
            f"put {output} on a file system that all machines share",
        )


def saved_s(path: Path) -> float:
    """When a checkpoint was saved; where its manifest cannot say, the directory's own time (it may be the newest)."""
    try:
        return float(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["saved_s"])
    except (OSError, ValueError, KeyError, TypeError):
        try:
            return path.stat().st_mtime
        except OSError:
            return 0.0


def latest(output: Path) -> Path | None:
    """The newest checkpoint of an output that is whole, or None."""
    return next((path for path in reversed(checkpoints(output)) if fault(path) is None), None)


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint all of whose files match it.

    Raises:
        CheckpointError: a file is missing, truncated, edited or added; names it and the previous good checkpoint.
    """
    wrong = fault(path)
    if wrong is not None:
        raise _refused(path, wrong)
    manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def fault(path: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, naming the file, what was expected and what was found; None: it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, step = manifest["format"], int(manifest["step"])
        files = {name: (int(facts["bytes"]), _parts(facts)) for name, facts in manifest["files"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return f"{path / MANIFEST} is missing or not a manifest"
    if version not in (1, FORMAT):
        return f"{path / MANIFEST} has format {version}, this version reads up to {FORMAT}"
    named = _NAME.fullmatch(path.absolute().name)
    if named and int(named[1]) != step:
        return f"{path / MANIFEST} says step {step}, the directory's name says {named[1]}"
    for name, (size, parts) in files.items():
        file = path / name
        try:
            found_size = file.stat().st_size
            if found_size != size:
                return f"{file} has {found_size:,} bytes, its manifest says {size:,}"
            wrong = next(filter(None, (_changed(file, *part) for part in parts)), None) if hashes else None
        except FileNotFoundError:
            return f"{file} is missing"
        except OSError as error:
            return f"{file} cannot be read ({error.strerror})"
        if wrong:
            return wrong
    return next(
        (f"{path / name} is not in its manifest" for name in _present(path) if name not in files), None
    )


def _parts(facts: Mapping[str, Any]) -> list[tuple[int, int, str]]:
    """(begin, end, sha256) of each part that one worker wrote; they make up the file. Raises `ValueError`, `KeyError`."""
    size = int(facts["bytes"])
    if "parts" not in facts:
        return [(0, size, str(facts["sha256"]))]
    parts = [(int(begin), int(end), str(digest)) for begin, end, digest in facts["parts"]]
    edges = [0, *(end for _, end, _ in parts)]
    if [begin for begin, _, _ in parts] != edges[:-1] or edges[-1] != size:
        raise ValueError("the parts do not make the file")
    return parts


def _changed(file: Path, begin: int, end: int, digest: str) -> str | None:
    """Raises `OSError`."""
    found = durable.sha256_of_file(file, begin, end)
    if found == digest:
        return None
    return f"{file} was changed (sha256 {found[:12]}…, its manifest says {digest[:12]}…)"


def _present(path: Path) -> list[str]:
    """What a loader might read: an added index or adapter would change what `from_pretrained` returns."""
    return sorted(
        name
        for file in path.rglob("*")
        if file.is_file() and not file.name.startswith(".")
        if (name := file.relative_to(path).as_posix()) != MANIFEST
    )


def _refused(path: Path, what: str) -> CheckpointError:
    parent = path.parent if path.name else path.absolute().parent
    good = next(
        (p for p in reversed(checkpoints(parent)) if p.name != path.absolute().name and fault(p) is None),
        None,
    )
    remedy = (
        f"the newest good one is {good}: --resume {good} continues from it"
        if good
        else "no other good checkpoint is beside it"
    )
    return CheckpointError(what, "a checkpoint is used only as it was written", remedy)


def resolve_resume(value: str, output: Path) -> Path:
    """The checkpoint that `value` names: a checkpoint itself, or the newest of an output directory. Verify it next.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(value)
    if path.is_dir() and (_NAME.fullmatch(path.absolute().name) or (path / MANIFEST).is_file()):
        return path
    found = checkpoints(path)
    if found:
        return found[-1]
    what = f"{path} holds no checkpoint" if path.is_dir() else f"{path} does not exist"
    beside = next((p for p in (output, path.parent) if checkpoints(p)), None)
    remedy = f"give {checkpoints(beside)[-1]}" if beside else "give the --output of a run that has saved"
    raise CheckpointError(what, "a run's directory holds checkpoint-N", remedy)


def load_state(path: Path) -> Loaded:
    """The training state of a checkpoint (verify it first). Raises `CheckpointError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from manyhands.train.exchange_state import Stored

    training = path / "training"
    try:
        state = json.loads((training / "state.json").read_text(encoding="utf-8"))
        return Loaded(
            state,
            load_file(training / "optimizer.safetensors"),
            Stored(training / "exchange.safetensors"),  # everybody's: read as it is needed
        )
    except (OSError, ValueError, SafetensorError) as error:
        what = f"{training}: {error}"
        rule = "a checkpoint that can be continued holds training state"
        raise CheckpointError(what, rule, "give a checkpoint-N that manyhands wrote") from None
