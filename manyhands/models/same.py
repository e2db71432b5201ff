"""Whether a saved configuration and a model say the same function: shapes alone do not tell (a number of heads, an activation)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from manyhands.models import custom, store

if TYPE_CHECKING:
    from torch import nn

# What may change: how it is trained, computed or named.
FREE_WORDS = ("drop", "initializer", "coef", "seed")
FREE = (
    *("_name_or_path", "architectures", "transformers_version", "id2label", "label2id"),
    *("dtype", "torch_dtype", "use_cache", "chunk_size_feed_forward", "bos_token_id", "eos_token_id"),
    *("output_attentions", "output_hidden_states", "return_dict"),
)


class Difference(NamedTuple):
    """A field of the configuration."""

    name: str
    saved: Any
    now: Any


def difference(model: nn.Module, directory: Path) -> Difference | None:
    """The first field by which the model of a checkpoint computes something else than `model`; None: none is known.

    Raises:
        ModelError: the checkpoint's configuration cannot be read.
    """
    saved, now = store.read_config(directory), _config(model)
    if store.is_transformers(model) and saved.get("model_type") == now.get("model_type"):
        kind: Any = type(model.config)
        with store.quiet():
            saved = _plain(kind.from_dict(saved).to_dict())  # fields that have their defaults are not written
        names = saved.keys() & now.keys()  # versions of Transformers add some
    elif "manyhands" in saved and not store.is_transformers(model):
        usual = _plain(custom.defaults_of(model))
        saved, now = {**usual, **(saved["manyhands"].get("arguments") or {})}, {**usual, **now}
        names = saved.keys() | now.keys()
    else:
        return Difference("model_type", saved.get("model_type"), now.get("model_type"))
    for name in sorted(names):
        free = name in FREE or any(word in name for word in FREE_WORDS)
        if not free and saved.get(name) != now.get(name):
            return Difference(name, saved.get(name), now.get(name))
    return None


def _config(model: nn.Module) -> dict[str, Any]:
    if store.is_transformers(model):
        config: Any = model.config
        return _plain(config.to_dict())
    return _plain((custom.recipe_of(model) or {}).get("arguments") or {})


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a file."""
    found: dict[str, Any] = json.loads(json.dumps(data, default=str))
    return found
