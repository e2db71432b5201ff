"""A model on an emulated device: each row takes a fixed time of the worker's own, so that losing a worker loses its share of
the speed, as it does where every worker has a machine. (On two cores three workers are as fast as four.)"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn


class Emulated(nn.Module):
    """Embedding, one hidden layer, logits; a training pass takes `row_s` for each row, half of it on the way forward."""

    def __init__(self, vocab_size: int, *, width: int, row_s: float) -> None:
        super().__init__()
        self.row_s = row_s
        self.table = nn.Embedding(vocab_size, width)
        self.hidden = nn.Linear(width, 4 * width)
        self.out = nn.Linear(4 * width, vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.training and input_ids.device.type != "meta":
            time.sleep(self.row_s * len(input_ids))
        hidden: Tensor = self.out(torch.tanh(self.hidden(self.table(input_ids))))  # [rows, len, vocab]
        return hidden


def emulated(*, vocab_size: int, width: int = 64, row_s: float = 0.0) -> Emulated:
    """For ``--model "faults_model:emulated(row_s=0.8)"``."""
    return Emulated(vocab_size, width=width, row_s=row_s)
