"""PyTorch's DistributedDataParallel over gloo, one process per core, under torchrun.

torchrun --standalone --nproc-per-node 2 benchmarks/peers/ddp.py --setting DIR --steps 12 [--bf16 --compile --fused]
"""

from __future__ import annotations

from common import MAX_NORM, Rows, Stopwatch, adamw, arguments, load_model


def main() -> None:
    given = arguments()
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler

    dist.init_process_group("gloo")
    model = load_model(given)
    replica = DistributedDataParallel(model, gradient_as_bucket_view=given.compile)
    forward = torch.compile(replica) if given.compile else replica
    optimizer = adamw(model, given)
    rows = Rows(given)
    loader = DataLoader(
        rows, batch_size=given.rows // given.world, sampler=DistributedSampler(rows, shuffle=False)
    )
    watch = Stopwatch()
    watch.start()
    for batch in loader:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=given.bf16):
            loss = forward(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        watch.step(loss.detach())
    watch.report()
    dist.barrier()  # else the first to end takes the store from the slower ones
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
