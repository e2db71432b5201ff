"""A plain PyTorch loop in one process.

python benchmarks/peers/plain.py --setting DIR --steps 12 [--bf16 --compile --fused]
"""

from __future__ import annotations

from common import MAX_NORM, Rows, Stopwatch, adamw, arguments, load_model


def main() -> None:
    given = arguments()
    import torch

    model = load_model(given)
    optimizer = adamw(model, given)
    loader = torch.utils.data.DataLoader(Rows(given), batch_size=given.rows)
    forward = torch.compile(model) if given.compile else model
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


if __name__ == "__main__":
    main()
