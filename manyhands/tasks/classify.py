"""One label for each text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from manyhands.core.config import option
from manyhands.core.errors import DataError, UsageError
from manyhands.core.needs import LABELLED, Needs
from manyhands.core.types import Summed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from manyhands.core.types import Batch


@dataclass(frozen=True)
class Classify:
    """Predict a text's label.

    A batch holds ``input_ids`` [rows, len] padded, ``attention_mask`` [rows, len] and ``label`` [rows] (−100
    is not counted).
    """

    needs: ClassVar[Needs] = LABELLED
    text: str = option("text", help="column of the texts")
    label: str = option("label", help="column of the labels")

    def __post_init__(self) -> None:
        if not self.text or not self.label or self.text == self.label:
            raise UsageError(
                f"text = {self.text!r}, label = {self.label!r}", "they are two columns", "give both names"
            )

    def loss(self, model: nn.Module, batch: Batch) -> Summed:
        """Σ of the cross entropy in nats over labelled rows, and their number (an int on the CPU).

        An empty batch is 0 with a graph that reaches no parameter; the model is not called.
        """
        from manyhands.tasks.loss import cross_entropy_sum, nothing, valid_count

        labels = batch["label"]
        if labels.shape[0] == 0:
            return nothing(labels)
        return Summed(cross_entropy_sum(_logits(model, batch), labels), valid_count(labels))

    def score(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """loss_sum [], count [] and confusion [labels, predictions], float64.

        An empty batch has no ``confusion``, as only the model knows the classes; the sum over batches has.
        """
        import torch

        from manyhands.tasks.loss import IGNORED, cross_entropy_sum

        labels = batch["label"]
        if labels.shape[0] == 0:
            zero = torch.zeros((), dtype=torch.float64, device=labels.device)
            return {"loss_sum": zero, "count": zero.clone()}
        with torch.no_grad():
            logits = _logits(model, batch)  # [rows, classes]
            loss_sum = cross_entropy_sum(logits, labels)
        classes = logits.shape[1]
        valid = labels != IGNORED
        cell = labels[valid] * classes + logits.argmax(1)[valid]
        confusion = torch.bincount(cell, minlength=classes * classes).reshape(classes, classes)
        return {"loss_sum": loss_sum.double(), "count": valid.sum().double(), "confusion": confusion.double()}

    def metrics(self, totals: Mapping[str, Tensor], *, bytes_per_target: float) -> dict[str, float]:
        """loss (nats per text), accuracy and macro_f1, from summed scores: exact over any split.

        F1 of a class is 2·hits / (its labels + its predictions); the macro mean is over classes that occur
        among labels or predictions, as in scikit-learn. `bytes_per_target` does not matter here.

        Raises:
            DataError: there was no labelled row.
        """
        count = float(totals["count"])
        if count == 0:
            raise DataError("0 labelled rows", "a score is a mean over rows", "give more evaluation data")
        confusion = totals["confusion"].double()
        hits = confusion.diagonal()
        support = confusion.sum(0) + confusion.sum(1)  # [classes]
        occurs = support > 0
        f1 = 2.0 * hits[occurs] / support[occurs]
        return {
            "loss": float(totals["loss_sum"]) / count,
            "accuracy": float(hits.sum()) / count,
            "macro_f1": float(f1.mean()),
        }


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    from manyhands.tasks.forward import logits_of

    return logits_of(model, batch["input_ids"], batch.get("attention_mask"), dims=2)
