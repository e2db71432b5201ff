"""How a forward pass is run: compiled, or with activations recomputed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manyhands.core.errors import UsageError

if TYPE_CHECKING:
    import torch


def checkpoint_activations(model: torch.nn.Module, name: str) -> None:
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise UsageError(
            f"gradient_checkpointing with model {name!r}",
            "only Transformers' models know where to cut",
            "leave it out, or use torch.utils.checkpoint in the model",
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]


def compiled(model: torch.nn.Module) -> Any:
    """The compiled model for the shape it meets first; other shapes (a last, smaller batch) run eagerly."""
    import torch

    faster = torch.compile(model, dynamic=False)
    first: list[Any] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        shapes = [tuple(a.shape) for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        if not first:
            first.append(shapes)
        return faster(*args, **kwargs) if shapes == first[0] else model(*args, **kwargs)

    return forward
