"""Plain PyTorch, one process: the loop of the tutorials."""

from __future__ import annotations

from contextlib import nullcontext

import harness


def main() -> None:
    given = harness.arguments()
    import torch

    model = harness.load_model(given)
    optimizer = harness.adamw(model, tuned=given.tuned)
    forward = torch.compile(model, dynamic=False) if given.tuned else model
    loader = torch.utils.data.DataLoader(harness.Dataset(given), batch_size=given.batch)
    recorder = harness.Recorder(given.report)
    recorder.start()
    for batch in loader:
        with torch.autocast("cpu", torch.bfloat16) if given.tuned else nullcontext():
            loss = forward(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), harness.MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        recorder.step(loss.item())
    recorder.finish()


if __name__ == "__main__":
    main()
