"""Causal language modelling: the loss of each next token, summed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from manyhands.core.errors import DataError
from manyhands.core.needs import TEXT, Needs
from manyhands.core.types import Summed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from manyhands.core.types import Batch


@dataclass(frozen=True)
class Pretrain:
    """Predict each token from those before it.

    A batch holds ``input_ids`` [rows, seq] and ``targets`` [rows, seq], already shifted (targets[t] is the
    token after input_ids[t]); −100 is not counted.

    Attributes:
        text: column of the text in data with columns; several, joined by a space: "title,body".
    """

    needs: ClassVar[Needs] = TEXT
    text: str = "text"

    def loss(self, model: nn.Module, batch: Batch) -> Summed:
        """Σ of the cross entropy in nats over valid targets, and their number (an int on the CPU).

        An empty batch is 0 with a graph that reaches no parameter; the model is not called.
        """
        from manyhands.tasks.loss import cross_entropy_sum, nothing, valid_count

        targets = batch["targets"]
        if targets.shape[0] == 0:
            return nothing(targets)
        logits = _logits(model, batch)
        return Summed(cross_entropy_sum(logits, targets.reshape(-1)), valid_count(targets))

    def score(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """loss_sum [], count [] and correct [] (the likeliest token is the target), float64."""
        import torch

        from manyhands.tasks.loss import IGNORED, cross_entropy_sum

        targets = batch["targets"].reshape(-1)  # [rows · seq]
        if targets.numel() == 0:
            return {key: torch.zeros((), dtype=torch.float64, device=targets.device) for key in SCORES}
        with torch.no_grad():
            logits = _logits(model, batch)
            loss_sum = cross_entropy_sum(logits, targets)
            correct = (logits.argmax(-1) == targets).sum()  # −100 is no class
        count = (targets != IGNORED).sum()
        return {key: x.double() for key, x in zip(SCORES, (loss_sum, count, correct), strict=True)}

    def metrics(self, totals: Mapping[str, Tensor], *, bytes_per_target: float) -> dict[str, float]:
        """loss (nats per token), perplexity, bits_per_byte and accuracy, from summed scores.

        ``bits_per_byte`` = loss / ln 2 / bytes_per_target, comparable between tokenizers; left out where
        `bytes_per_target` is not a positive number.

        Raises:
            DataError: there was no valid target.
        """
        loss_sum, count, correct = (float(totals[key]) for key in SCORES)
        if count == 0:
            raise DataError("0 valid targets", "a score is a mean over targets", "give more evaluation data")
        loss = loss_sum / count
        found = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
        if 0 < bytes_per_target < math.inf:
            found["bits_per_byte"] = loss / math.log(2) / bytes_per_target
        return {**found, "accuracy": correct / count}


SCORES = ("loss_sum", "count", "correct")


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    from manyhands.tasks.forward import logits_of

    logits = logits_of(model, batch["input_ids"], batch.get("attention_mask"), dims=3)
    return logits.reshape(-1, logits.shape[-1])  # [rows · seq, vocabulary]
