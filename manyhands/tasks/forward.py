"""Calling a model, whoever wrote it: Transformers', or with a plain ``forward(input_ids[, mask])``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel

from manyhands.core.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

_known: WeakKeyDictionary[Any, dict[str, bool]] = WeakKeyDictionary()


def logits_of(
    model: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor | None, *, dims: int
) -> Tensor:
    """The logits of a batch.

    Args:
        model: returns a tensor, an object with ``logits``, a mapping with "logits" or a tuple that begins
        with them. input_ids: [rows, len] int64.
        attention_mask: [rows, len], or None where every token counts.
        dims: 3 for [rows, len, classes], 2 for [rows, classes].

    Raises:
        ModelError: what came back has another shape.
    """
    takes = _takes(model)
    keywords: dict[str, Any] = {"use_cache": False} if takes["use_cache"] else {}
    if attention_mask is not None and takes["attention_mask"]:
        keywords["attention_mask"] = attention_mask
    out = model(input_ids=input_ids, **keywords) if takes["input_ids"] else model(input_ids, **keywords)
    if isinstance(out, (tuple, list)):
        out = out[0]
    elif not isinstance(out, torch.Tensor):
        out = out["logits"] if isinstance(out, dict) else getattr(out, "logits", out)
    expected = tuple(input_ids.shape)[: dims - 1]
    if not isinstance(out, torch.Tensor) or out.dim() != dims or tuple(out.shape[:-1]) != expected:
        found = list(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise ModelError(
            f"the model returned {found} for input_ids of shape {list(input_ids.shape)}",
            f"logits have shape [{', '.join(map(str, expected))}, classes]",
            "return the logits, or an object with .logits",
        )
    return out


def _takes(model: Callable[..., Any]) -> dict[str, bool]:
    """Which keywords the model's forward has, looked up once."""
    inner: Any = model
    while (within := _wrapped(inner)) is not None:
        inner = within
    found = _known.get(inner)
    if found is None:
        parameters = inspect.signature(getattr(inner, "forward", inner)).parameters
        found = {name: name in parameters for name in ("input_ids", "attention_mask", "use_cache")}
        _known[inner] = found
    return found


def _wrapped(model: Any) -> Any:
    """What torch.compile or PyTorch's data parallelism stands around, else None. Any model may have a part called "module"."""
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return model.module
    return getattr(model, "_orig_mod", None)
