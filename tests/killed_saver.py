"""Run as a program: forks writers that save without pause, and kills each at a random moment (test_checkpoint)."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from manyhands.train import checkpoint


def snapshot(step: int) -> checkpoint.Snapshot:
    """A model whose every element says its step."""
    model = nn.Linear(64, 64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)
    moments = {"weight.exp_avg": torch.full((64, 64), float(step))}
    return checkpoint.snapshot(
        model, step=step, state={"step": step}, optimizer=moments, exchange={}, tokenizer_dir=None
    )


def save_without_pause(output: Path, told: int) -> None:
    found = checkpoint.checkpoints(output)
    step = int(found[-1].name.partition("-")[2]) if found else 0
    while True:
        step += 1
        for _ in range(2):  # the second one replaces the first
            checkpoint.save(snapshot(step), output, keep=2)
        os.write(told, b".")


def main(output: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    round_s = 0.05
    for _ in range(kills):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            save_without_pause(output, write)
        os.close(write)
        begin = time.monotonic()
        os.read(read, 1)  # it is saving
        round_s = time.monotonic() - begin
        time.sleep(rng.random() * round_s)  # the moment of the kill is the experiment
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        for path in checkpoint.checkpoints(output):
            checkpoint.verify(path)
        print(len(checkpoint.checkpoints(output)), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)  # no thread pool: it would not live on in a forked process
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
