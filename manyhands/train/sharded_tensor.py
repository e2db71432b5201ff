"""Layers computed by several workers together (tensor parallelism), by the plan that a Transformers model brings.

Matrices of attention and feed-forward blocks are divided by columns, then by rows, so that each block needs one sum
forward and one backward (Megatron-LM, arXiv:1909.08053, section 3). PyTorch's `parallelize_module` does the work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manyhands.core.errors import ModelError, UsageError

if TYPE_CHECKING:
    from torch import nn

VOCABULARY = ("colwise_gather_output", "colwise_rep", "embedding_rowwise")


def parallelize(model: nn.Module, mesh: Any) -> None:
    """Divide the model's layers along `mesh` (one dimension), in place.

    Raises:
        UsageError: the model has no plan, or the workers do not divide its heads.
        ModelError: its plan asks for something else than columns and rows.
    """
    from torch.distributed.tensor.parallel import parallelize_module

    size = mesh.size()
    plan = plan_of(model, size)
    found = {name: _style(name, style) for name, style in plan.items()}
    parallelize_module(model, mesh, found)


def plan_of(model: nn.Module, size: int) -> dict[str, str]:
    """How each module (by pattern) is divided among `size` workers. Raises as `parallelize` does."""
    config: Any = getattr(model, "config", None)
    base = getattr(config, "base_model_tp_plan", None) or {}
    if not base:
        raise UsageError(
            f"tensor_parallel = {size} with {type(model).__name__}",
            "a model is divided by its own plan (config.base_model_tp_plan), and this one has none",
            "use a model with a plan (llama-nano … llama-1b), or tensor_parallel = 1",
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        count = getattr(config, name, None)
        if isinstance(count, int) and count % size:
            raise UsageError(
                f"tensor_parallel = {size} with {name} = {count}",
                "each worker computes whole heads and equally many columns",
                f"give a divisor of {count}",
            )
    for name in ("attention_dropout", "resid_pdrop", "hidden_dropout"):
        if getattr(config, name, 0.0):
            raise UsageError(
                f"tensor_parallel = {size} with {name} = {getattr(config, name)}",
                "workers of one layer would not draw the random numbers that one process draws",
                f"set {name}=0, or tensor_parallel = 1",
            )
    plan = dict(getattr(model, "_tp_plan", None) or base)
    if getattr(config, "tie_word_embeddings", False) or config.vocab_size % size:
        plan = {name: style for name, style in plan.items() if style not in VOCABULARY}
    return plan


def _style(name: str, style: str) -> Any:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    if style == "colwise":
        return ColwiseParallel()
    if style == "rowwise":
        return RowwiseParallel()
    if style in ("colwise_gather_output", "colwise_rep"):
        return ColwiseParallel(output_layouts=Replicate())
    if style == "embedding_rowwise":
        return RowwiseParallel(input_layouts=Replicate())
    raise ModelError(
        f"{name} is to be divided by {style!r}",
        "manyhands divides layers by columns and rows",
        "use tensor_parallel = 1 with this model",
    )
