"""The tutorial's text classifier: embedding 10,000 × 300, mean over the text, 256 ReLU units, classes.

Small enough to read in a minute and quick enough for a test; the bag of words forgets their order, and still
tells good film reviews from bad ones three times in four.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TutorialClassifier(nn.Module):
    """Texts to logits of `n_labels` classes.

    Args:
        vocab_size: rows of the embedding; the tokenizer's.
        n_labels: classes.
        width: of an embedding.
        hidden: units between the mean and the classes.
        dropout: of the mean and of the hidden units. 0.5, unlike the presets: a few thousand texts are seen
        many times.
    """

    heads = ("AutoModelForSequenceClassification",)  # what it stands for

    def __init__(
        self,
        vocab_size: int = 10_000,
        n_labels: int = 2,
        *,
        width: int = 300,
        hidden: int = 256,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.hidden = nn.Linear(width, hidden)
        self.classifier = nn.Linear(hidden, n_labels)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.embedding.weight, std=0.02)  # PyTorch's 1.0 drowns what a few epochs teach

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[rows, len] ids and mask (0: padding) -> [rows, n_labels]; an empty text has mean zero."""
        mask = attention_mask.to(self.embedding.weight.dtype)
        shares = mask / mask.sum(1, keepdim=True).clamp(min=1.0)  # [rows, len], each row sums to 1
        mean = F.embedding_bag(
            input_ids, self.embedding.weight, per_sample_weights=shares, mode="sum"
        )  # [rows, width]
        inner = torch.relu(self.hidden(self.dropout(mean)))
        logits: Tensor = self.classifier(self.dropout(inner))
        return logits
