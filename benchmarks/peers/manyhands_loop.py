"""manyhands as a library, for people with their own loop: in one process or under torchrun.

python benchmarks/peers/manyhands_loop.py --setting DIR --steps 12 [--bf16 --compile]
torchrun --standalone --nproc-per-node 2 benchmarks/peers/manyhands_loop.py …
"""

from __future__ import annotations

import json
from typing import Any

from common import LR, MAX_NORM, WEIGHT_DECAY, Stopwatch, arguments, load_model


class PreparedRows:
    """The shared rows under their numbers in the prepared data: the order of `share` then is that of rows.npy."""

    bytes_per_target = 1.0

    def __init__(self, given: Any) -> None:
        import numpy as np

        self._rows = np.load(given.setting / "rows.npy", mmap_mode="r")
        self._place = {int(number): place for place, number in enumerate(np.load(given.setting / "ids.npy"))}
        self._len = json.loads((given.setting / "setting.json").read_text())["data_rows"]

    def __len__(self) -> int:
        return int(self._len)

    def take(self, ids: Any) -> dict[str, Any]:
        import torch

        block = torch.from_numpy(self._rows[[self._place[int(i)] for i in ids]].astype("int64"))  # [n, 257]
        return {"input_ids": block[:, :-1].contiguous(), "targets": block[:, 1:].contiguous()}


def main() -> None:
    given = arguments()
    import torch

    import manyhands
    from manyhands.tasks.pretrain import Pretrain

    seed = json.loads((given.setting / "setting.json").read_text())["seed"]
    hands = manyhands.join(device="cpu")
    model = load_model(given)
    replica = hands.replicate(
        torch.compile(model) if given.compile else model,
        manyhands.presets.ddp(lr=LR, weight_decay=WEIGHT_DECAY, schedule="constant"),
        max_grad_norm=MAX_NORM,
        targets_per_row=256,
        precision="bf16" if given.bf16 else "fp32",
    )
    watch = Stopwatch()
    watch.start()
    for part in hands.share(PreparedRows(given), global_batch=given.rows, seed=seed):
        result = replica.step(part, loss=Pretrain().loss)
        watch.step(result.loss)
        if replica.steps == given.steps:
            break
    watch.report(averaged=True)
    hands.close()


if __name__ == "__main__":
    main()
