"""manyhands as a library, its workers started by its launcher: pinned, bf16, fused AdamW, caching allocator."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import harness


def worker(argument: str) -> int:
    """One worker: `argument` is what `main` says, in JSON."""
    from manyhands.core.native import enable_allocator

    enable_allocator()
    import torch

    import manyhands
    from manyhands.tasks.pretrain import Pretrain

    said = json.loads(argument)
    given = harness.Given(
        Path(said["material"]), Path(said["report"]), said["steps"], said["batch"], True, argparse.Namespace()
    )
    hands = manyhands.join(device="cpu")
    model = harness.load_model(given)
    strategy = manyhands.presets.ddp(lr=harness.LR, schedule="constant", weight_decay=harness.WEIGHT_DECAY)
    replica = hands.replicate(
        model, strategy, max_grad_norm=harness.MAX_NORM, targets_per_row=harness.LENGTH, precision="bf16"
    )
    task = Pretrain()
    forward = torch.compile(model, dynamic=False) if said["compile"] else model
    rows = torch.from_numpy(harness.load_rows(given))
    mine = given.batch // hands.size
    recorder = harness.Recorder(given.report)
    recorder.start()
    for step in range(given.steps):
        begin = step * given.batch + hands.rank * mine
        ids = rows[begin : begin + mine].long()  # [my rows, 257]
        batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}
        part = manyhands.Part(step, [(hands.rank, batch)], hands.size, given.batch, harness.SEED)
        result = replica.step(part, lambda _, batch: task.loss(forward, batch))
        recorder.step(result.loss)
    if hands.rank == 0:
        recorder.finish()
    hands.close()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    given = harness.arguments(parser, pin=False)
    from manyhands.launch.local import launch

    said = {
        "material": str(given.material.absolute()),
        "report": str(given.report.absolute()),
        "steps": given.steps,
        "batch": given.batch,
        "compile": given.options.compile,
    }
    with tempfile.TemporaryDirectory() as output:
        # one thread each, pinned to a core, as `manyhands train` has it where there is a worker for each core
        return launch(
            "peers.manyhands_loop:worker",
            json.dumps(said),
            workers=given.options.workers,
            threads=1,
            output=Path(output),
        )


if __name__ == "__main__":
    sys.exit(main())
