"""PyTorch's DistributedDataParallel over gloo: as it is, with a bf16 hook, with the PowerSGD hook; or without any link.

    RANK=… WORLD_SIZE=… MASTER_ADDR=… MASTER_PORT=… python benchmarks/peers/ddp_hooks.py --setting DIR --steps 40 --hook bf16

* ``bf16``: gradients travel as bfloat16. PyTorch's own `bf16_compress_hook` fails over gloo, so it is written out here.
* ``powersgd``: PyTorch's `powerSGD_hook`, rank 4, in one bucket: with several it hangs over gloo, because its callbacks launch
  collectives in an order that differs between ranks.
* ``alone``: no DDP at all: every worker trains its share for itself, which is what no communication would reach.
"""

from __future__ import annotations

from typing import Any

from limited import Peer, parser


def bf16_hook(group, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are not its own classes
    """The mean, summed in bfloat16: half the bytes."""
    import torch
    import torch.distributed as dist

    half = bucket.buffer().to(torch.bfloat16).div_(dist.get_world_size(group))
    future = dist.all_reduce(half, group=group, async_op=True).get_future()
    return future.then(lambda _: bucket.buffer().copy_(half))


def main() -> None:
    p = parser()
    p.add_argument("--hook", choices=["none", "bf16", "powersgd", "alone"], default="none")
    p.add_argument("--powersgd-start", type=int, default=10, help="first step that is compressed")
    given = p.parse_args()
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
    from torch.nn.parallel import DistributedDataParallel

    peer = Peer(given)
    forward: Any = peer.model
    if given.hook != "alone":
        dist.init_process_group("gloo")
        one = {"bucket_cap_mb": 4096} if given.hook == "powersgd" else {}
        forward = DistributedDataParallel(peer.model, gradient_as_bucket_view=True, **one)
    if given.hook == "bf16":
        forward.register_comm_hook(dist.group.WORLD, bf16_hook)
    elif given.hook == "powersgd":
        state = powerSGD_hook.PowerSGDState(
            process_group=None, matrix_approximation_rank=4, start_powerSGD_iter=given.powersgd_start
        )
        forward.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    optimizer = peer.optimizer()
    schedule = peer.schedule(optimizer)
    for step in range(given.steps):
        loss = peer.loss(forward, step)
        loss.backward()
        peer.clip()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        peer.say(step, loss.detach())
    peer.finish()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
