"""Small checkpoints, and processes for tests/test_saving.py that die, or run out of room. Run as ``python FILE NAME DIR``."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from manyhands.core.errors import CheckpointError
from manyhands.train import checkpoint

FILE_EVENTS = ("open", "os.", "shutil.", "ctypes.call_function")


def taken(step: int, width: int = 8) -> checkpoint.Snapshot:
    """A small snapshot, every number of which is `step`."""
    model = torch.nn.Linear(width, width)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)
    state = {"weight.momentum": torch.full((width, width), float(step))}
    return checkpoint.snapshot(
        model, step=step, state={"step": step}, optimizer=state, exchange=state, tokenizer_dir=None
    )


def saved(output: Path, *steps: int, keep: int = 9) -> list[Path]:
    return [checkpoint.save(taken(step), output, keep=keep) for step in steps]


def names(output: Path) -> list[str]:
    return [path.name for path in checkpoint.checkpoints(output)]


def hidden(output: Path) -> list[str]:
    return [path.name for path in output.iterdir() if path.name.startswith(".")]


def whole(path: Path) -> int:
    """The step of a checkpoint, all of whose parts are of that step."""
    from safetensors.torch import load_file

    step = int(checkpoint.verify(path)["step"])
    loaded = checkpoint.load_state(path)
    assert loaded.state == {"step": step}
    for tensors in (load_file(path / "model.safetensors"), loaded.optimizer, loaded.exchange):
        assert all((t == step).all() for t in tensors.values())
    return step


def die_everywhere(output: Path) -> None:
    """Save over checkpoint-2, and beyond it, dying at the first, second, third … file operation; report what is left.

    The report's last entry is of the process that outlived its save: then every operation was tried.
    """
    report: list[dict[str, Any]] = []
    for step in (2, 3):
        at, died = 0, True
        while died:
            at += 1
            run = output / f"{step}-{at}"
            for first in (1, 2):
                checkpoint.save(taken(first), run, keep=2)
            snapshot = taken(step)
            pid = os.fork()
            if pid == 0:
                _die_at(at)
                checkpoint.save(snapshot, run, keep=2)
                os._exit(0)
            died = os.waitpid(pid, 0)[1] == signal.SIGKILL
            left = [whole(path) for path in checkpoint.checkpoints(run)]
            newest = checkpoint.latest(run)
            checkpoint.save(taken(9), run, keep=2)
            report.append(
                {
                    "step": step,
                    "at": at,
                    "died": died,
                    "left": left,
                    "latest": newest and newest.name,
                    "names": sorted(p.name for p in run.iterdir()),
                }
            )
            shutil.rmtree(run)
    print(json.dumps(report))


def _die_at(n: int) -> None:
    count = 0

    def hook(event: str, _arguments: Any) -> None:
        nonlocal count
        if event.startswith(FILE_EVENTS):
            count += 1
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def save_for_ever(output: Path) -> None:
    """Save in the background without end, over steps 1 to 3 again and again, saying when each begins."""
    saver = checkpoint.AsyncSaver(output, keep=2)
    turn = 0
    while True:
        snapshot = taken(turn % 3 + 1, width=400)
        saver.submit(snapshot)
        print(turn, flush=True)
        turn += 1


def outgrow_the_limit(output: Path) -> None:
    """A limit on the size of files, without a full disk: what the system answers is another number (EFBIG)."""
    checkpoint.save(taken(1), output, keep=2)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        checkpoint.save(taken(2, width=400), output, keep=2)
    except CheckpointError as error:
        print(json.dumps({"error": str(error), "left": [p.name for p in output.iterdir()]}))
    checkpoint.save(taken(3), output, keep=2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {f.__name__: f for f in (die_everywhere, save_for_ever, outgrow_the_limit)}[sys.argv[1]](
        Path(sys.argv[2])
    )
