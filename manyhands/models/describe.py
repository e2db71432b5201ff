"""What a model holds and costs, and whether its forward pass draws random numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Description:
    """Sizes of a model.

    Attributes:
        parameters: all of them; tied ones once.
        trainable: those that training changes.
        non_embedding: without embedding tables (tokens and positions), tied to a head or not.
        flops_per_token: of forward and backward together, for one token of a row of `seq_len`: 6·N + 12·L·d·s
            (arXiv:2204.02311, appendix B). N counts the parameters that are multiplied with: all but
            embedding tables that are only looked up. L·d is layers times the width of attention (heads · head
            size), s is `seq_len`; the term is left out where the model has no Transformers configuration.
            Recomputation is not counted.
        seq_len: s.
    """

    parameters: int
    trainable: int
    non_embedding: int
    flops_per_token: float
    seq_len: int


def describe(model: nn.Module, *, seq_len: int) -> Description:
    """Count `model` for rows of `seq_len` tokens."""
    from torch import nn

    sizes = {id(p): p.numel() for p in model.parameters()}
    tables: set[int] = set()
    multiplied: set[int] = set()
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            tables.add(id(module.weight))
        elif isinstance(module, nn.Linear):
            multiplied.add(id(module.weight))
    total = sum(sizes.values())
    looked_up = sum(sizes.get(i, 0) for i in tables - multiplied)
    return Description(
        parameters=total,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        non_embedding=total - sum(sizes.get(i, 0) for i in tables),
        flops_per_token=6.0 * (total - looked_up) + 12.0 * _attention_width(model) * seq_len,
        seq_len=seq_len,
    )


def _attention_width(model: nn.Module) -> int:
    """Σ over layers of heads · head size; 0 where it is not known."""
    config: Any = getattr(model, "config", None)
    layers, heads = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    width = getattr(config, "hidden_size", None)
    if not isinstance(layers, int) or not isinstance(heads, int) or not isinstance(width, int):
        return 0
    head = getattr(config, "head_dim", None)
    return layers * heads * (head if isinstance(head, int) else width // heads)


HEADS = re.compile("summary_|classif")  # options of heads in configurations


def draws_random(model: nn.Module) -> bool:
    """Whether training draws random numbers in the forward pass: any dropout above zero.

    Looks at dropout modules and at every number of the model's configuration that is named after dropout,
    jitter or noise, but not at those of heads (a GPT-2 without one still says summary_first_dropout = 0.1), which are modules
    where they are there; calls of `torch.nn.functional.dropout` with a rate of their own are seen only in traced models.
    A model that sets an attribute ``draws_random`` says it itself.
    """
    said = getattr(model, "draws_random", None)
    if isinstance(said, bool):
        return said
    for module in model.modules():
        if "Dropout" in type(module).__name__ and _positive(getattr(module, "p", 0)):
            return True
        if _positive(getattr(module, "dropout", 0)):  # nn.MultiheadAttention, nn.LSTM …
            return True
    config: Any = getattr(model, "config", None)
    fields = config.to_dict() if hasattr(config, "to_dict") else {}
    named = (
        value for key, value in fields.items() if re.search("drop|jitter|noise", key) and not HEADS.match(key)
    )
    return any(map(_positive, named))


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
