"""PyTorch's DistributedDataParallel on gloo, under torchrun."""

from __future__ import annotations

from contextlib import nullcontext

import harness


def main() -> None:
    given = harness.arguments()
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler

    dist.init_process_group("gloo")
    # tuned: gradients live in the buckets, without a copy
    model = DistributedDataParallel(harness.load_model(given), gradient_as_bucket_view=given.tuned)
    optimizer = harness.adamw(model, tuned=given.tuned)
    forward = torch.compile(model, dynamic=False) if given.tuned else model
    dataset = harness.Dataset(given)
    sampler = DistributedSampler(dataset, shuffle=False)
    loader = DataLoader(dataset, batch_size=given.batch // dist.get_world_size(), sampler=sampler)
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
    losses = torch.tensor([line["loss"] for line in recorder.lines], dtype=torch.float64)
    dist.all_reduce(losses)
    if dist.get_rank() == 0:
        recorder.finish((losses / dist.get_world_size()).tolist())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
