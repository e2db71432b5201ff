"""torchft's DiLoCo (`torchft.local_sgd.DiLoCo`) over gloo: one replica group per worker, a lighthouse beside rank 0.

    RANK=… WORLD_SIZE=… MASTER_ADDR=… MASTER_PORT=… python benchmarks/peers/torchft_diloco.py --setting DIR --steps 40

Rank 0 serves the lighthouse on MASTER_PORT of MASTER_ADDR. Its gradients cannot be quantized here: torchft's int8/fp8 kernels are
Triton's, for GPUs.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

from limited import Peer, parser


def main() -> None:
    p = parser()
    p.add_argument("--every", type=int, default=32, help="inner steps between outer ones, over all fragments")
    p.add_argument("--fragments", type=int, default=1)
    p.add_argument("--delay", type=int, default=0, help="inner steps during which a fragment is under way")
    p.add_argument("--outer-lr", type=float, default=0.7)
    given = p.parse_args()
    import torch
    import torch.distributed as dist
    from torchft import Manager, ProcessGroupGloo
    from torchft.coordination import LighthouseServer
    from torchft.local_sgd import DiLoCo

    peer = Peer(given)
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    mine = os.environ.get("NETLAB_ADDRESS", address)
    lighthouse = None
    if peer.rank == 0:
        lighthouse = LighthouseServer(
            bind=f"{address}:{port}", min_replicas=peer.world, join_timeout_ms=60000
        )
    store = dist.TCPStore(mine, 0, is_master=True, wait_for_workers=False)
    patience = timedelta(seconds=600)
    manager: Any = Manager(
        pg=ProcessGroupGloo(timeout=patience),
        load_state_dict=None,
        state_dict=None,
        min_replica_size=peer.world,
        use_async_quorum=False,
        timeout=patience,
        quorum_timeout=patience,
        connect_timeout=patience,
        rank=0,
        world_size=1,
        store_addr=mine,
        store_port=store.port,
        lighthouse_addr=f"http://{address}:{port}",
        replica_id=f"worker-{peer.rank}",
        hostname=mine,
        init_sync=False,
    )
    manager.register_state_dict_fn("model", peer.model.load_state_dict, peer.model.state_dict)
    optimizer = peer.optimizer()
    fragments = split(peer.model, given.fragments)
    outer = [
        torch.optim.SGD(module.parameters(), lr=given.outer_lr, momentum=0.9, nesterov=True)
        for module in fragments
    ]
    schedule = peer.schedule(optimizer)
    with DiLoCo(
        manager,
        fragments,
        optimizer,
        outer,
        sync_every=given.every,
        pin_memory=False,
        use_bucketization=True,
        fragment_sync_delay=given.delay,
    ):
        for step in range(given.steps):
            loss = peer.loss(peer.model, step)
            loss.backward()
            peer.clip()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            peer.say(step, loss.detach())
    peer.finish()
    if peer.rank == 0:
        time.sleep(1.0)  # the others may still ask the lighthouse whether they may commit
    manager.shutdown()
    if lighthouse is not None:
        lighthouse.shutdown()


def split(model: Any, count: int) -> list[Any]:
    """A GPT-2's parameters as `count` modules of about equal numbers of blocks, embeddings with the first."""
    import torch

    if count == 1:
        return [model]
    body = model.transformer
    parts = [list(body.h[i * len(body.h) // count : (i + 1) * len(body.h) // count]) for i in range(count)]
    parts[0] = [body.wte, body.wpe, *parts[0]]
    parts[-1].append(body.ln_f)
    return [torch.nn.ModuleList(part) for part in parts]


if __name__ == "__main__":
    main()
