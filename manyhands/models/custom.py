"""Models that are any `nn.Module`: made by calling ``module:function`` (or a registered one), and made again
from the recipe that a checkpoint keeps."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.core.errors import ModelError, UsageError, nearest

if TYPE_CHECKING:
    from torch import nn

RECIPE = "manyhands_recipe"  # attribute of a model: how it was made
DEFAULTS = "manyhands_defaults"  # of the same: arguments that are not in the recipe


def import_function(name: str) -> Callable[..., Any]:
    """What ``module:function`` names; modules of the working directory are found too.

    Raises:
        UsageError: there is no such module or attribute.
    """
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # as `python -m` would have it
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # the module is there and needs another one
        raise UsageError(
            f"model = {name!r}: there is no module {error.name!r}",
            "module:function names an importable Python module",
            "run in the directory that holds it, or install it",
        ) from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [n for n in vars(found) if not n.startswith("_")]
            raise UsageError(f"model = {name!r}: {module_name} has no {part!r}", "", nearest(part, public))
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(
            f"model = {name!r} is not callable", "it is a function that returns an nn.Module", ""
        )
    make: Callable[..., Any] = found
    return make


def check_function(name: str) -> None:
    """As `import_function`, without running the module: that it is there, and defines what is named.

    Raises:
        UsageError: there is no such module or attribute.
    """
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        spec = importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise UsageError(
            f"model = {name!r}: there is no module {module_name!r}",
            "module:function names an importable Python module",
            "run in the directory that holds it, or install it",
        )
    if spec.origin is None or not spec.origin.endswith(".py"):
        return
    try:
        names = _defined(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
    except (OSError, SyntaxError, ValueError):  # whoever imports it will say it better
        return
    if names is not None and attribute.split(".")[0] not in names:
        public = [n for n in names if not n.startswith("_")]
        raise UsageError(
            f"model = {name!r}: {module_name} has no {attribute!r}", "", nearest(attribute, public)
        )


def _defined(module: ast.Module) -> set[str] | None:
    """All names that a module's source could define, those inside its functions among them; None: only running it would tell."""
    names: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.Name):
            names.add(node.id)
    return None if names & {"*", "__getattr__", "globals", "exec", "setattr"} else names


def make(
    name: str, function: Callable[..., Any], offered: Mapping[str, Any], changes: Mapping[str, Any]
) -> nn.Module:
    """Call `function` with those of `offered` that it takes and all of `changes`; remember how.

    Args:
        name: how the function is spelled in configurations.
        offered: values that the job knows (vocab_size, seq_len, n_labels …); None values are not offered.
        changes: the user's own keywords.

    Raises:
        UsageError: a keyword of `changes` is not a parameter.
        ModelError: what came back is not an nn.Module.
    """
    from torch import nn

    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in changes:
            if key not in parameters:
                raise UsageError(f"{name} has no parameter {key!r}", "", nearest(key, parameters))
    arguments = {k: v for k, v in offered.items() if k in parameters and v is not None} | dict(changes)
    model = function(**arguments)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{name} returned a {type(model).__name__}",
            "a model is a torch.nn.Module",
            "return the module itself",
        )
    model.__dict__[RECIPE] = {"model": name, "arguments": arguments}
    model.__dict__[DEFAULTS] = {k: p.default for k, p in parameters.items() if p.default is not p.empty}
    return model


def recipe_of(model: nn.Module) -> dict[str, Any] | None:
    """How `make` made this model; None where something else did."""
    found = model.__dict__.get(RECIPE)
    return dict(found) if found else None


def defaults_of(model: nn.Module) -> dict[str, Any]:
    """The arguments that `make`'s function has when they are not given."""
    return dict(model.__dict__.get(DEFAULTS, {}))
