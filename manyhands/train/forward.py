"""How a forward pass is run: with faster activations, compiled, or with activations recomputed."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

from manyhands.core.errors import UsageError
from manyhands.models import causal

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


def quicken(model: torch.nn.Module) -> int:
    """Compute tanh's GELU in one pass, wherever `model` has it as a module; how many there were.

    Transformers' ``gelu_new`` (GPT-2) is eight passes over the widest activations there are. Parameters, configuration and
    what is saved stay as they are; the function is the same, rounded less often.
    """
    import torch

    from manyhands.core.compute import gelu_operator, gelu_tanh

    gelu_operator()  # made before anything is compiled

    class GeluTanh(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return gelu_tanh(x)

    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _is_gelu_tanh(child):
                setattr(parent, name, GeluTanh())
                replaced += 1
    return replaced


def _is_gelu_tanh(module: torch.nn.Module) -> bool:
    import torch

    if isinstance(module, torch.nn.GELU):
        return module.approximate == "tanh"
    kind = type(module)
    return kind.__module__ == "transformers.activations" and kind.__name__ in (
        "NewGELUActivation",
        "GELUTanh",
    )


def narrow_residual(model: torch.nn.Module) -> None:
    """Under bf16 autocast have embeddings give bf16, and so all that layers add to it (float32 otherwise: twice the traffic).

    What a layer computes of it stays as it was; each sum is rounded to 8 bits, as Megatron-LM does it by default
    (``--fp32-residual-connection`` is its option for the other).
    """
    import torch

    def narrow(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.to(torch.bfloat16) if torch.is_autocast_enabled(output.device.type) else output

    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.register_forward_hook(narrow)


def compiled(model: torch.nn.Module) -> Any:
    """The compiled model for the shape it meets first; other shapes (a last, smaller batch) run eagerly.

    Attends without masks where they say nothing (``models/causal.py``).
    """
    import torch

    faster = torch.compile(model, dynamic=False)
    maskless = causal.needs_no_mask(model)
    first: list[Any] = []

    # whoever calls it asks its signature for what it takes: a mask, for example
    @functools.wraps(model.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        shapes = [tuple(a.shape) for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        if not first:
            first.append(shapes)
        if shapes != first[0]:
            return model(*args, **kwargs)
        padded = len(args) > 1 or kwargs.get("attention_mask") is not None
        with causal.without_masks(model) if maskless and not padded else contextlib.nullcontext():
            return faster(*args, **kwargs)

    return forward
