"""From a model's name to the model: deterministic in (name, seed), fitted to the tokenizer and the task.

A name is one of

* a registered model (``manyhands list models``), a shape with fresh weights or a function;
* a directory: `from_pretrained` with the class of the task, or whatever `manyhands` saved there;
* ``config:PATH.json``: any architecture of Transformers by configuration, with fresh weights;
* ``module:function``: called with those of vocab_size, seq_len, n_labels, pad_id, eos_id, bos_id and seed
that it takes;

each with changes in call form, as in ``gpt2-nano(n_layer=4)`` or ``my_module:build(depth=3)``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.core import registry, rng
from manyhands.core.callform import Call, parse
from manyhands.core.errors import ModelError, UsageError, nearest
from manyhands.core.needs import needs_of
from manyhands.models import custom, store
from manyhands.models.describe import Description, describe, draws_random
from manyhands.models.fit import (
    Fit,
    check_fit,
    check_keys,
    check_loaded,
    check_padding,
    check_recipe,
    special_tokens,
)
from manyhands.models.presets import Preset
from manyhands.models.store import load_model, load_weights, save_model

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Description", "build", "describe", "draws_random", "load_model", "load_weights", "save_model"]

_STREAM = 0x6D6F64656C  # "model": keeps initial weights apart from the seeds of forward passes


def build(
    name: str,
    *,
    task: str,
    vocab_size: int,
    seq_len: int,
    n_labels: int | None = None,
    seed: int = 0,
    tokenizer_dir: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The model `name`, in training mode, on the CPU, in float32.

    Args:
        name: see above.
        task: its registered name; what it needs says which class of Transformers builds the model.
        vocab_size: of the tokenizer.
        seq_len: tokens of the longest row.
        n_labels: classes; for a task with labels.
        seed: of fresh weights; the same seed gives the same bits.
        tokenizer_dir: where the tokenizer is; its special tokens go into the configuration.
        overrides: changes, as in call form; these win.

    Raises:
        UsageError: an unknown name or change, or one that does not suit the task.
        ModelError: the model cannot be built or does not fit the tokenizer.
    """
    needs = needs_of(registry.resolve("tasks", task))
    if needs.labelled and (n_labels is None or n_labels < 2):
        raise UsageError(
            f"n_labels = {n_labels}", "a classifier tells at least two classes", "check the label column"
        )
    name, changes = split_call(name)
    changes = {**changes, **(overrides or {})}
    fit = Fit(
        task=task,
        needs=needs,
        vocab_size=vocab_size,
        seq_len=seq_len,
        n_labels=n_labels if needs.labelled else None,
        **special_tokens(tokenizer_dir),
    )
    rng.seed_torch(seed, _STREAM)
    model = _build(name, changes, fit, seed)
    model.train()
    return model


def check_name(name: str) -> None:
    """What can be said of a name before any work is done for it. Raises `UsageError`."""
    head, _ = split_call(name)
    known = registry.entries("models")
    if head in known or head.startswith("config:") or Path(head).is_dir():
        return
    if ":" in head:
        custom.check_function(head)
        return
    raise _unknown(name, known)


def _unknown(name: str, known: Mapping[str, Any]) -> UsageError:
    return UsageError(
        f"model = {name!r}",
        "it is neither a registered model, nor a directory, nor config:FILE.json, nor module:function",
        nearest(name, known),
    )


def split_call(name: str) -> tuple[str, dict[str, Any]]:
    """A name and its changes.

    >>> split_call("gpt2-nano(n_layer=4)")
    ('gpt2-nano', {'n_layer': 4})
    """
    if not name.endswith(")") or Path(name).exists():
        return name, {}
    head, _, rest = name.partition("(")
    call = parse(f"model({rest}", f"model {head}")
    if not isinstance(call, Call) or call.args:
        raise UsageError(f"model = {name!r}", "changes of a model are named", f"write {head}(key=value)")
    return head, dict(call.kwargs)


def _build(name: str, changes: dict[str, Any], fit: Fit, seed: int) -> nn.Module:
    known = registry.entries("models")
    if name in known:
        thing = registry.resolve("models", name)
        if isinstance(thing, Preset):
            return _from_preset(name, thing, changes, fit)
        return _from_function(name, thing, changes, fit, seed)
    if name.startswith("config:"):
        return _from_config(Path(name.removeprefix("config:")), changes, fit)
    if Path(name).is_dir():
        return _from_directory(Path(name), changes, fit)
    if ":" in name:
        return _from_function(name, custom.import_function(name), changes, fit, seed)
    raise _unknown(name, known)


# -- the four kinds


def _from_preset(name: str, preset: Preset, changes: dict[str, Any], fit: Fit) -> nn.Module:
    if fit.needs.head == "AutoModelForCausalLM" and not preset.causal:
        raise UsageError(
            f"model = {name!r} for task {fit.task}",
            f"its architecture ({preset.model_type}) sees the words that it would have to predict",
            "choose another (manyhands list models)",
        )
    shape = {"max_position_embeddings": fit.seq_len, **preset.config, "vocab_size": fit.vocab_size}
    return _fresh(name, preset.model_type, shape, changes, fit)


def _from_config(path: Path, changes: dict[str, Any], fit: Fit) -> nn.Module:
    if path.is_dir():
        path = path / store.CONFIG
    try:
        shape = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {error}", "config: names a JSON file", "check the path") from None
    if not isinstance(shape, dict) or not isinstance(shape.get("model_type"), str):
        raise ModelError(
            f"{path} has no 'model_type'", "it says which architecture of Transformers it is", "add it"
        )
    shape = {"vocab_size": fit.vocab_size, **shape}
    for key in ("architectures", "transformers_version", "auto_map", "dtype", "torch_dtype"):
        shape.pop(key, None)
    return _fresh(str(path), shape.pop("model_type"), shape, changes, fit)


def _from_directory(path: Path, changes: dict[str, Any], fit: Fit) -> nn.Module:
    import torch
    import transformers

    if "manyhands" in store.read_config(path):
        if changes:
            raise UsageError(
                f"changes {', '.join(changes)} of the saved model {path}",
                "it is loaded as it was made",
                "leave them out",
            )
        check_recipe(store.read_config(path)["manyhands"].get("arguments") or {}, fit, str(path))
        return load_model(path)
    with _as_model_error(f"{path}"):
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    _change(config, changes, str(path))
    check_fit(config, fit, str(path))
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = fit.pad_id
    if fit.n_labels is not None and config.num_labels != fit.n_labels:
        config.num_labels = fit.n_labels
    # whatever type the configuration names: weights that are finer must not be rounded to it
    model, loading = store.from_pretrained(
        _head(fit), path, config=config, **{store.type_key(): torch.float32}
    )
    check_loaded(model, loading, path, fit)
    check_padding(model, fit, str(path))
    return model.float()


def _from_function(name: str, function: Any, changes: dict[str, Any], fit: Fit, seed: int) -> nn.Module:
    offered = {
        "vocab_size": fit.vocab_size,
        "seq_len": fit.seq_len,
        "n_labels": fit.n_labels,
        "bos_id": fit.bos_id,
        "eos_id": fit.eos_id,
        "pad_id": fit.pad_id,
        "seed": seed,
    }
    heads = getattr(function, "heads", None)
    if heads is not None and fit.needs.head not in heads:
        raise UsageError(
            f"model = {name!r} for task {fit.task}",
            f"it stands for {', '.join(heads)}, and the task needs {fit.needs.head}",
            "choose another (manyhands list models)",
        )
    return custom.make(name, function, offered, changes)


# -- how


def _fresh(name: str, model_type: str, shape: dict[str, Any], changes: dict[str, Any], fit: Fit) -> nn.Module:
    """A Transformers model of this configuration with fresh weights."""
    import transformers

    special = {"bos_token_id": fit.bos_id, "eos_token_id": fit.eos_id, "pad_token_id": fit.pad_id}
    labels = {"num_labels": fit.n_labels} if fit.n_labels is not None else {}
    with _as_model_error(f"{name} ({model_type})"):
        default = transformers.AutoConfig.for_model(model_type)
        names = getattr(default, "attribute_map", {})
        check_keys(default, changes, name)
        fields = {names.get(k, k): v for k, v in {**shape, **special, **labels}.items()}
        fields.update({names.get(k, k): v for k, v in changes.items()})
        config = transformers.AutoConfig.for_model(model_type, **fields)
    check_fit(config, fit, name)
    with _as_model_error(f"{name} ({model_type})"), store.quiet():
        model: nn.Module = _head(fit).from_config(config)
    check_padding(model, fit, name)
    return model.float()


def _head(fit: Fit) -> Any:
    """The class of Transformers that the task names."""
    import transformers

    if not hasattr(transformers, fit.needs.head):
        raise UsageError(
            f"head = {fit.needs.head!r} of task {fit.task}",
            "it is one of Transformers' Auto classes, as AutoModelForCausalLM",
            "correct the task's needs",
        )
    return getattr(transformers, fit.needs.head)


@contextmanager
def _as_model_error(what: str) -> Iterator[None]:
    """Transformers' complaint about a configuration, as ours."""
    try:
        yield
    except (ModelError, UsageError):
        raise
    except Exception as error:  # each architecture has its own kinds
        first = next((line for line in str(error).split("\n") if line.strip()), type(error).__name__)
        raise ModelError(
            f"{what} cannot be built: {first}",
            "Transformers refuses this configuration",
            "change what it names",
        ) from error


def _change(config: Any, changes: Mapping[str, Any], name: str) -> None:
    check_keys(config, changes, name)
    for key, value in changes.items():
        setattr(config, key, value)
