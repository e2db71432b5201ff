"""Models on disk: safetensors and JSON, never pickle.

A model of Transformers is written with its own `save_pretrained`, so plain
``AutoModelForCausalLM.from_pretrained`` loads it. Any other module becomes ``model.safetensors`` and a
``config.json`` that says how it was made::

    {"manyhands": {"model": "tutorial", "arguments": {"vocab_size": 10000, "n_labels": 2}}}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.core import registry
from manyhands.core.errors import ModelError
from manyhands.models import custom

if TYPE_CHECKING:
    from torch import nn

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def is_transformers(model: nn.Module) -> bool:
    """Whether Transformers can load what `model.save_pretrained` writes."""
    return hasattr(model, "save_pretrained") and type(model).__module__.startswith("transformers.")


def save_model(model: nn.Module, directory: str | Path) -> None:
    """Write `model` into `directory` (made if need be). Tied weights are written once.

    Raises:
        ModelError: the arguments that made the model are not JSON.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    if is_transformers(model):
        with quiet():
            model.save_pretrained(path)  # type: ignore[operator]
        return
    write_config(model, path)
    from safetensors.torch import save_model as save_safetensors

    save_safetensors(model, str(path / WEIGHTS), metadata={"format": "pt"})


def type_key() -> str:
    """What Transformers calls the type of weights, as an option and in a configuration: "dtype" from 4.56 on."""
    from transformers import PretrainedConfig

    return "dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype"


def write_config(model: nn.Module, directory: Path) -> None:
    """The ``config.json`` alone, of either kind."""
    if is_transformers(model):
        config: Any = model.config
        # as the model's own save_pretrained says, too; what it was loaded from may have been of half precision
        config.architectures = [type(model).__name__]
        setattr(config, type_key(), model.dtype)
        config.save_pretrained(directory)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(directory)  # type: ignore[union-attr,operator]
        return
    recipe = custom.recipe_of(model) or {"model": None}
    try:
        text = json.dumps({"manyhands": recipe}, indent=2, sort_keys=True)
    except TypeError as error:
        raise ModelError(
            f"the arguments of {recipe['model']} cannot be written ({error})",
            "a checkpoint says in JSON how its model was made",
            "make the model from numbers, strings and lists",
        ) from None
    (directory / CONFIG).write_text(text + "\n", encoding="utf-8")


def load_model(directory: str | Path, *, trust: bool = False) -> nn.Module:
    """The model that `save_model` wrote, in evaluation mode.

    Args:
        trust: also call a ``module:function`` that the checkpoint names. It is code of this machine, called
        with the
            checkpoint's arguments; registered models need no trust.

    Raises:
        ModelError: there is no model, it is damaged, or it needs code that is not trusted.
    """
    path = Path(directory)
    config = read_config(path)
    model = (
        _remake(path, config["manyhands"], trust)
        if "manyhands" in config
        else _from_transformers(path, config)
    )
    model.eval()
    return model


def loading_line(directory: Path) -> str:
    """The line of Python that loads what `save_model` wrote; empty where only its maker can. Raises `ModelError`."""
    config, at = read_config(directory), json.dumps(str(directory))
    recipe = config.get("manyhands")
    if recipe is not None:
        name = recipe.get("model")
        trust = ", trust=True" if name and ":" in name else ""
        return f"import manyhands; model = manyhands.load({at}{trust})" if name else ""
    from transformers.models.auto import modeling_auto as auto

    names = config.get("architectures") or ["AutoModel"]
    kinds = {
        "AutoModelForCausalLM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForSequenceClassification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    kind = next((kind for kind, known in kinds.items() if names[0] in known.values()), names[0])
    return f"from transformers import {kind}; model = {kind}.from_pretrained({at})"


def load_weights(model: nn.Module, directory: str | Path) -> None:
    """The weights alone, into a model of the same architecture. Raises `ModelError` where they do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_model as load_safetensors

    try:
        load_safetensors(model, str(Path(directory) / WEIGHTS))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ModelError(
            f"{directory}/{WEIGHTS}: {error}",
            "its tensors fit the model",
            "load it into the model it was saved from",
        ) from None


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` as data. Raises `ModelError` where it is absent or not JSON."""
    path = directory / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{directory} holds no {CONFIG}",
            "a saved model has one",
            "give the directory of a model or checkpoint",
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {error}", "it is a JSON object", "take another copy of it") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} is not a JSON object", "", "take another copy of it")
    return found


def _remake(path: Path, recipe: dict[str, Any], trust: bool) -> nn.Module:
    name = recipe.get("model")
    if not isinstance(name, str):
        raise ModelError(
            f"{path} holds the weights of a model that was made outside manyhands",
            "only its maker knows its code",
            "build it and call manyhands.load(directory, into=model)",
        )
    if ":" in name:
        if not trust:
            raise ModelError(
                f"{path} names the function {name!r} of its model",
                "code is called only where it is trusted",
                "if you trust it, give --trust (in Python: trust=True)",
            )
        function = custom.import_function(name)
    else:
        function = registry.resolve("models", name)
    model = custom.make(name, function, {}, recipe.get("arguments", {}))
    load_weights(model, path)
    return model


def _from_transformers(path: Path, config: dict[str, Any]) -> nn.Module:
    import transformers

    names = config.get("architectures") or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise ModelError(
            f"{path}: architectures = {names}",
            f"Transformers {transformers.__version__} knows none of them",
            "install the Transformers version that wrote it",
        )
    return from_pretrained(cls, path)[0]


def from_pretrained(cls: Any, path: Path, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """`cls.from_pretrained` of a local directory, quietly, safetensors only; and what did not fit."""
    from safetensors import SafetensorError

    try:
        with quiet():
            model, loading = cls.from_pretrained(
                path, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        first = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{path} cannot be loaded as {cls.__name__}: {first}",
            "weights are in safetensors files that fit config.json",
            "save it again with save_pretrained",
        ) from error
    return model, loading


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers without bars and reports; what matters of them becomes a `ModelError`."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
