"""What must stay the same when a run is continued."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.core.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from manyhands.train.job import Job
    from manyhands.train.material import Material


def same_order(path: Path, before: Mapping[str, Any], job: Job, material: Material) -> None:
    """Refuse to continue with other batches than the checkpoint's (promise 1)."""
    old = before.get("job", {})
    for key in ("seed", "order", "global_batch", "micro_batch", "seq_len"):
        new = getattr(job, key)
        if new is not None and old.get(key) is not None and old[key] != new:
            raise UsageError(
                f"{key} = {new}, but {path} was written with {old[key]}",
                "a resumed run continues with the same batches",
                f"leave out --{key.replace('_', '-')}, or start a new run",
            )
    if before.get("data") not in (None, material.identity):
        raise CheckpointError(
            f"{path} was trained on other data than {', '.join(job.data)} holds now",
            "a resumed run continues with the same rows",
            "restore the data, or start a new run",
        )
