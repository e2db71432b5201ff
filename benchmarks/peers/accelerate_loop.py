"""Hugging Face Accelerate: its `prepare`, in one process or under torchrun.

(`accelerate launch --cpu --num_processes 2` silently starts one process; torchrun starts two.)

python benchmarks/peers/accelerate_loop.py --setting DIR --steps 12 [--bf16 --compile --fused]
torchrun --standalone --nproc-per-node 2 benchmarks/peers/accelerate_loop.py …
"""

from __future__ import annotations

from common import MAX_NORM, Rows, Stopwatch, adamw, arguments, load_model


def main() -> None:
    given = arguments()
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    accelerator = Accelerator(
        cpu=True,
        mixed_precision="bf16" if given.bf16 else None,
        dynamo_backend="inductor" if given.compile else None,
    )
    model = load_model(given)
    optimizer = adamw(model, given)
    loader = DataLoader(Rows(given), batch_size=given.rows // given.world)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    watch = Stopwatch()
    watch.start()
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        watch.step(loss.detach())
    assert accelerator.num_processes == given.world
    watch.report()
    accelerator.end_training()


if __name__ == "__main__":
    main()
