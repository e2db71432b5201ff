"""Attention without a mask, where a token sees itself and all before it and nothing else is hidden.

Kernels that know this from a flag skip half of the work; given the mask as a tensor they cannot (on an H100 a fifth of a step of
GPT-2 goes into it). Run eagerly, Transformers looks whether a mask says more than the flag; while compiling it cannot
look and always makes one. Rows of packed text are never padded, so here it is known beforehand.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "manyhands_causal"  # of the attention, among those of Transformers
TRIED, LEAST = 32, 4  # most and least tokens of the row on which both are compared
CLOSE = 1e-4


@functools.cache
def _register() -> bool:
    """Whether Transformers knows our attention: its own, told of no mask."""
    try:
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
    except ImportError:
        return False

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> Any:
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    AttentionInterface.register(NAME, attend)
    return True


def needs_no_mask(model: torch.nn.Module) -> bool:
    """Whether `model`, on rows without padding, computes the same without masks; tried on a short row.

    Args:
        model: whole (not sharded), on any device. Its training mode and the random state are left as they are.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa" or not _is_plain(config) or not _register():
        return False
    length = min(
        TRIED, *(getattr(config, name, None) or TRIED for name in ("max_position_embeddings", "vocab_size"))
    )
    return length >= LEAST and _computes_the_same(model, length)


@contextlib.contextmanager
def without_masks(model: torch.nn.Module) -> Iterator[None]:
    """What is traced within attends without masks. For a model that `needs_no_mask`."""
    config: Any = model.config
    usual = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = usual


def _is_plain(config: Any) -> bool:
    """Whether it is a text model all of whose layers see all that is before a token: a short row would not show a window."""
    if getattr(config, "sub_configs", None) or getattr(config, "vocab_size", None) is None:
        return False
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return kinds == {"full_attention"} and not any(limits)


def _computes_the_same(model: torch.nn.Module, length: int) -> bool:
    import torch

    weight = next(model.parameters())
    ids = torch.arange(length, device=weight.device).unsqueeze(0)  # no two alike
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            usual = model(input_ids=ids, use_cache=False).logits
            with without_masks(model):
                ours = model(input_ids=ids, use_cache=False).logits
    except Exception:  # whatever another architecture asks for: it keeps its masks
        return False
    finally:
        for module, mode in training.items():
            module.training = mode
    scale = float(usual.abs().max())
    return bool(((ours - usual).abs() <= CLOSE * scale).all())
