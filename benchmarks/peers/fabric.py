"""Lightning Fabric: one process, or several under torchrun."""

from __future__ import annotations

import os

import harness


def main() -> None:
    given = harness.arguments()
    import torch
    from lightning.fabric import Fabric

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    fabric = Fabric(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        precision="bf16-mixed" if given.tuned else "32-true",
    )
    fabric.launch()
    model = harness.load_model(given)
    optimizer = harness.adamw(model, tuned=given.tuned)
    if given.tuned:
        model = torch.compile(model, dynamic=False)  # Fabric compiles again around its own wrappers
    model, optimizer = fabric.setup(model, optimizer)
    loader = torch.utils.data.DataLoader(harness.Dataset(given), batch_size=given.batch // processes)
    loader = fabric.setup_dataloaders(loader)
    recorder = harness.Recorder(given.report)
    recorder.start()
    for batch in loader:
        loss = model(**batch).loss
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=harness.MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        recorder.step(loss.item())
    losses = torch.tensor([line["loss"] for line in recorder.lines], dtype=torch.float64)
    mean = fabric.all_reduce(losses, reduce_op="mean")
    if fabric.global_rank == 0:
        recorder.finish(mean.tolist())
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
