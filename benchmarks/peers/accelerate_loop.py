"""Hugging Face Accelerate: one process, or several under torchrun."""

from __future__ import annotations

import harness


def main() -> None:
    given = harness.arguments()
    import torch
    from accelerate import Accelerator
    from accelerate.utils import TorchDynamoPlugin

    tuned = {
        "mixed_precision": "bf16",
        "dynamo_plugin": TorchDynamoPlugin(backend="inductor", dynamic=False),
    }
    accelerator = Accelerator(cpu=True, **(tuned if given.tuned else {}))
    model = harness.load_model(given)
    optimizer = harness.adamw(model, tuned=given.tuned)
    # whole batches go to the processes in turn: together they are the global batch
    loader = torch.utils.data.DataLoader(
        harness.Dataset(given), batch_size=given.batch // accelerator.num_processes
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    recorder = harness.Recorder(given.report)
    recorder.start()
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), harness.MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        recorder.step(loss.item())
    losses = torch.tensor([line["loss"] for line in recorder.lines], dtype=torch.float64)
    mean = accelerator.reduce(losses, "mean")
    if accelerator.is_main_process:
        recorder.finish(mean.tolist())
    accelerator.end_training()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
