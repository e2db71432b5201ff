"""Lightning Fabric: its `setup`, in one process or under torchrun (whose processes it joins).

python benchmarks/peers/fabric.py --setting DIR --steps 12 [--bf16 --compile --fused]
torchrun --standalone --nproc-per-node 2 benchmarks/peers/fabric.py …
"""

from __future__ import annotations

from common import MAX_NORM, Rows, Stopwatch, adamw, arguments, load_model


def main() -> None:
    given = arguments()
    import torch
    from lightning.fabric import Fabric
    from torch.utils.data import DataLoader

    fabric = Fabric(
        accelerator="cpu",
        devices=given.world,
        strategy="ddp" if given.world > 1 else "auto",
        precision="bf16-mixed" if given.bf16 else "32-true",
    )
    fabric.launch()
    model = load_model(given)
    optimizer = adamw(model, given)
    model, optimizer = fabric.setup(torch.compile(model) if given.compile else model, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(Rows(given), batch_size=given.rows // given.world))
    watch = Stopwatch()
    watch.start()
    for batch in loader:
        loss = model(**batch).loss
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        watch.step(loss.detach())
    assert fabric.world_size == given.world
    watch.report()


if __name__ == "__main__":
    main()
