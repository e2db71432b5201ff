"""What a task needs besides itself: of which kind its rows are, and which models it is for.

A task says it in a class attribute ``needs``; everybody else asks `needs_of` and knows no task by its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from manyhands.core.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The defaults are those of a causal language model over running text.

    Attributes:
        labelled: rows are texts with a label each (``input_ids``, ``attention_mask``, ``label``), and the model tells
            classes; else rows are windows of packed text (``input_ids``, ``targets``). A task's field ``text`` names
            the columns of the text, a field ``label`` that of the label.
        head: the class of Transformers that builds, and loads, the model. What a ``module:function`` returns is its own.
        tokenizer, model: where the job names none.
        continues: whether a run shows a continuation of --prompt at its end.
    """

    labelled: bool = False
    head: str = "AutoModelForCausalLM"
    tokenizer: str = "bpe:4096"
    model: str = "gpt2-micro"
    continues: bool = True


TEXT = Needs()
LABELLED = Needs(
    labelled=True,
    head="AutoModelForSequenceClassification",
    tokenizer="word:10000",
    model="tutorial",
    continues=False,
)


def needs_of(task: Any) -> Needs:
    """What a task, or its class, says; one that says nothing is labelled where it has a field ``label``. Raises `UsageError`."""
    fields = getattr(task, "__dataclass_fields__", {})
    needs = getattr(task, "needs", LABELLED if "label" in fields else TEXT)
    if not isinstance(needs, Needs):
        raise UsageError(
            f"needs = {needs!r} of a task", "it is a manyhands.core.needs.Needs", "take its TEXT or LABELLED"
        )
    return needs
