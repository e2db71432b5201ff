"""The dataclass is the configuration.

One value, four spellings, one round trip: Python (`repr`), call form on the command line
(``ddp(lr=3e-4, bucket_mb=8)``), TOML tables, and the JSON of checkpoints and ``summary.json``. Nothing is
evaluated: the call form is read as a syntax tree of names and literals.

* A field made by `choice("exchanges", "all-reduce")` holds one of a registry's values; its data form is a table
  with a ``kind`` key (or the call form as a string).
* An unknown key is a `UsageError` that names the nearest one; a wrong type names the value and the rule.
* `assemble` merges layers (defaults, file, command line, ``--set``) and remembers where each value came from.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, field
from functools import cache
from typing import Any, Literal, TypeVar, Union

from manyhands.core import registry
from manyhands.core.callform import Call, parse
from manyhands.core.errors import UsageError, nearest

T = TypeVar("T")
Origins = dict[str, str]


def option(default: Any = MISSING, *, help: str, aliases: Sequence[str] = (), **more: Any) -> Any:
    """A documented field; `aliases` are further command line names (Hugging Face's, for example)."""
    metadata = {"help": help, "aliases": tuple(aliases), **more}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def choice(kind: str, default: str | None, *, help: str = "", aliases: Sequence[str] = ()) -> Any:
    """A field that holds a value from registry `kind`; `default` in call form, None for an absent value."""
    metadata = {"help": help, "aliases": tuple(aliases), "choice": kind}
    if default is None:
        return field(default=None, metadata=metadata)
    text = default
    return field(default_factory=lambda: from_text(kind, text), metadata=metadata)


# ---------------------------------------------------------------------------------------------- call form


def from_text(kind: str, text: str, where: str = "value") -> Any:
    """The value of registry `kind` that `text` spells: ``"adamw(3e-4)"``, or a `repr`."""
    parsed = parse(text, where)
    if isinstance(parsed, str):
        parsed = Call(parsed)
    if not isinstance(parsed, Call):
        raise UsageError(
            f"{where}: {text!r} is not one of the {kind}", "", nearest(str(text), registry.entries(kind))
        )
    return _build_call(kind, parsed, where)


def _build_call(kind: str, call: Call, where: str) -> Any:
    maker = _maker(kind, call.name, where)
    if not isinstance(maker, type):  # a preset: a function from keywords to a value
        return called(kind, maker, call, where)
    names = [f.name for f in dataclasses.fields(maker) if f.init]
    if len(call.args) > len(names):
        raise UsageError(
            f"{where}: {call.name} takes at most {len(names)} values", "", "name them: key=value"
        )
    data = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    return from_data(maker, data, where)


def called(kind: str, maker: Any, call: Call, where: str) -> Any:
    """What a function of the registry makes of a call. Raises `UsageError` for unknown keywords and wrong types."""
    import inspect

    parameters = inspect.signature(maker).parameters
    hints = hints_of(maker)
    if call.args:
        raise UsageError(
            f"{where}: {call.name}({', '.join(map(repr, call.args))})",
            "a preset's parameters are named",
            f"write {call.name}({next(iter(parameters), 'key')}=…)",
        )
    for key in call.kwargs:
        if key not in parameters:
            raise UsageError(
                f"{where}: {call.name} has no parameter {key!r}",
                *_belongs(kind, key) or ("", nearest(key, parameters)),
            )
    coerced = {k: coerce(hints.get(k, Any), v, f"{where}.{k}") for k, v in call.kwargs.items()}
    return maker(**coerced)


def _belongs(kind: str, key: str) -> tuple[str, str] | None:
    """(rule, remedy) for a parameter that other presets of the kind have; None where none has it."""
    import inspect

    stale = "stale" in key or key == "consistency"  # bounded(s) is how staleness is spelled
    makers = {name: registry.resolve(kind, name) for name in registry.entries(kind)}
    found = [
        name
        for name, maker in makers.items()
        if inspect.isfunction(maker)
        and ("consistency" if stale else key) in inspect.signature(maker).parameters
    ]
    if not found:
        return None
    rule = "staleness is between a server and its workers" if stale else f"it belongs to {', '.join(found)}"
    return rule, f"for example {found[0]}({'consistency=bounded(4)' if stale else f'{key}=…'})"


def _maker(kind: str, name: str, where: str) -> Any:
    known = registry.entries(kind)
    for entry_name, entry in known.items():  # a repr spells the class, not the registered name
        if entry.target.rpartition(":")[2] == name:
            return registry.resolve(kind, entry_name)
    if name.lower() == "strategy" and kind == "strategies":
        return registry.resolve_target("manyhands.strategy.base:Strategy")
    try:
        return registry.resolve(kind, name.lower())
    except UsageError as error:
        raise UsageError(f"{where}: {error.value}", error.rule, error.remedy) from None


# -------------------------------------------------------------------------------------------------- data


def to_data(value: Any, kind: str | None = None) -> Any:
    """The value as plain data (tables, lists, scalars); None fields are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        data: dict[str, Any] = {}
        if kind is not None and kind != "strategies":
            data["kind"] = registry.name_of(kind, type(value))
        for f in dataclasses.fields(value):
            item = getattr(value, f.name)
            if f.init and item is not None:
                data[f.name] = to_data(item, f.metadata.get("choice"))
        return data
    if isinstance(value, (list, tuple)):
        return [to_data(item) for item in value]
    if isinstance(value, Mapping):
        return {str(k): to_data(v) for k, v in value.items()}
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"{type(value).__name__} is not configuration data")


def from_data(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """The dataclass that `data` describes. Raises `UsageError` for unknown keys and wrong types."""
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints: dict[str, Any] = hints_of(cls)  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for raw_key, item in data.items():
        key = raw_key.replace("-", "_")
        path = f"{where}.{key}" if where else key
        if key not in fields:
            raise UsageError(
                f"unknown option {path!r}",
                f"{where or cls.__name__.lower()} has no such key",
                nearest(key, fields),
            )
        kind = fields[key].metadata.get("choice")
        values[key] = from_choice(kind, item, path) if kind else coerce(hints[key], item, path)
    missing = [
        n
        for n, f in fields.items()
        if n not in values and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise UsageError(
            f"{where or cls.__name__}: {', '.join(missing)} is missing", "it has no default", "give it"
        )
    try:
        return cls(**values)
    except UsageError as error:
        if where and not error.value.startswith(where):
            raise UsageError(f"{where}: {error.value}", error.rule, error.remedy) from None
        raise


def from_choice(kind: str, item: Any, where: str) -> Any:
    """A registry value from its data form: a table with ``kind``, a call form string, or the value itself."""
    if isinstance(item, Call):
        return _build_call(kind, item, where)
    if item is None or (dataclasses.is_dataclass(item) and not isinstance(item, type)):
        return item
    if isinstance(item, str):
        return None if item.lower() == "none" else from_text(kind, item, where)
    if isinstance(item, Mapping):
        table = dict(item)
        name = table.pop("kind", None)
        if name is None and kind == "strategies":
            name = "strategy"
        if name is None:
            raise UsageError(
                f"{where}: 'kind' is missing",
                f"it names one of the {kind}",
                nearest("", registry.entries(kind)),
            )
        if kind == "strategies" and str(name).lower() != "strategy":
            return _build_call(kind, Call(str(name), (), table), where)
        return from_data(_maker(kind, str(name), where), table, where)
    raise UsageError(f"{where}: {item!r} is not one of the {kind}", "", nearest("", registry.entries(kind)))


@cache
def hints_of(thing: Any) -> dict[str, Any]:
    """The types of a class's fields, or of a function's parameters."""
    return typing.get_type_hints(thing)


def coerce(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type, or a `UsageError` with the value and the rule. Text is parsed as data."""
    if hint is Any or hint is object:
        return value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType) and value == "" and str in args:
        return ""  # an empty text is a text: --prompt ''
    if origin in (Union, types.UnionType):
        if (value is None or (isinstance(value, str) and value.lower() in ("none", ""))) and type(
            None
        ) in args:
            return None
        others = [a for a in args if a is not type(None)]
        for i, other in enumerate(others):
            try:
                return coerce(other, value, where)
            except UsageError:
                if i == len(others) - 1:
                    raise
    if origin is Literal:
        if value in args:
            return value
        raise UsageError(
            f"{where}: {value!r}",
            f"it is one of {', '.join(map(repr, args))}",
            nearest(str(value), map(str, args)),
        )
    if origin in (tuple, list) or hint in (tuple, list):
        return _coerce_sequence(args, value, where)
    if origin in (dict, Mapping) or origin is typing.get_origin(Mapping[str, int]):
        if isinstance(value, str):
            value = parse(value, where)
        if isinstance(value, Mapping):
            return {str(k): coerce(args[1], v, f"{where}.{k}") for k, v in value.items()}
        raise UsageError(f"{where}: {value!r}", "it is a table of key = value", "")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return from_data(hint, value, where)
    return _coerce_scalar(hint, value, where)


def _coerce_sequence(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if isinstance(value, str):
        item = args[0] if args else str
        value = (value,) if item is str else parse(value, where)
    if not isinstance(value, (list, tuple)):
        value = (value,)
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(coerce(args[0], v, where) for v in value)
    if args and len(value) != len(args):
        raise UsageError(f"{where}: {value!r}", f"it has {len(args)} values", "")
    return tuple(coerce(a, v, where) for a, v in zip(args, value, strict=True)) if args else tuple(value)


def _coerce_scalar(hint: Any, value: Any, where: str) -> Any:
    if getattr(value, "shape", None) == ():  # a number of NumPy's or PyTorch's
        value = value.item()
    if hint is str:
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
    elif hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "yes", "on", "1", "false", "no", "off", "0"):
            return value.lower() in ("true", "yes", "on", "1")
    elif hint in (int, float):
        number = value
        if isinstance(value, str):
            try:
                number = int(value.replace("_", "")) if hint is int else float(value)
            except ValueError:
                number = None
        if isinstance(number, float) and hint is int and number.is_integer():
            number = int(number)
        if not isinstance(number, bool) and isinstance(number, numbers.Real):  # NumPy's, too
            if hint is float and not math.isnan(number):
                return float(number)
            if hint is int and isinstance(number, numbers.Integral):
                return int(number)
    rules = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
    rule = rules.get(hint, getattr(hint, "__name__", str(hint)))
    raise UsageError(f"{where}: {value!r}", f"it must be {rule}", "")


# ------------------------------------------------------------------------------------------------ layers


def assemble(cls: type[T], layers: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[T, Origins]:
    """Merge `(origin, data)` layers, later ones winning, into one value and the origin of each key.

    A layer's keys may be dotted paths (``strategy.outer.lr``); a table merges with an earlier table, anything
    else replaces.
    """
    merged: dict[str, Any] = {}
    origins: Origins = {}
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for origin, data in layers:
        for raw, item in data.items():
            path = raw.replace("-", "_").split(".")
            if path[0] not in fields:
                raise UsageError(
                    f"unknown option {raw!r} ({origin})", "no such key", nearest(path[0], fields)
                )
            kind = fields[path[0]].metadata.get("choice")
            if len(path) > 1:
                _set_path(cls, merged, path, item, kind, raw)
            elif isinstance(item, Mapping) and kind and "kind" not in item and path[0] in merged:
                for key, inner in item.items():
                    _set_path(cls, merged, [path[0], key], inner, kind, f"{raw}.{key}")
            else:
                merged[path[0]] = to_data(from_choice(kind, item, raw), kind) if kind else item
                for known in [o for o in origins if o.startswith(path[0] + ".")]:
                    del origins[known]
            origins[".".join(path)] = origin
    return from_data(cls, merged), origins


def _set_path(
    cls: type, merged: dict[str, Any], path: list[str], item: Any, kind: str | None, raw: str
) -> None:
    if path[0] not in merged:  # expand the default so that one of its parts can be changed
        f = next(f for f in dataclasses.fields(cls) if f.name == path[0])
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        merged[path[0]] = to_data(default, kind)
    table, kinds = merged[path[0]], _kinds(cls)
    if kind == "strategies" and path[1] == "main" and isinstance(table, dict):  # the optimizer that trains
        path = [path[0], "inner" if table.get("inner") else "outer", *path[2:]]
    for depth, key in enumerate(path[1:-1], 1):
        kinds = _kinds_within(table, kind)
        kind = kinds.get(key)
        if kind and isinstance(table, dict) and isinstance(table.get(key), str):  # call form, given before
            table[key] = to_data(from_choice(kind, table[key], raw), kind)
        if not isinstance(table, dict) or not isinstance(table.get(key), dict):
            here = ".".join(path[:depth])
            known = (
                [k for k, v in table.items() if isinstance(v, dict) or k in kinds]
                if isinstance(table, dict)
                else []
            )
            raise UsageError(f"unknown option {raw!r}", f"{here} has no part {key!r}", nearest(key, known))
        table = table[key]
    if not isinstance(table, dict):
        raise UsageError(
            f"unknown option {raw!r}", f"{'.'.join(path[:-1])} has no parts", f"set {path[0]} itself"
        )
    if path[-1] == "kind":  # another thing: what was said of the old one does not hold for it
        table.clear()
    table[path[-1]] = item


def _kinds(cls: type) -> dict[str, str]:
    """Which fields of a dataclass hold a registry's values, and which registry's."""
    return {f.name: f.metadata["choice"] for f in dataclasses.fields(cls) if "choice" in f.metadata}


def _kinds_within(table: Any, kind: str | None) -> dict[str, str]:
    """`_kinds` of what a data table of registry `kind` describes; nothing where that is unknown."""
    if kind is None or not isinstance(table, dict):
        return {}
    name = "strategy" if kind == "strategies" else table.get("kind")
    maker = _maker(kind, str(name), kind) if name else None
    return _kinds(maker) if isinstance(maker, type) and dataclasses.is_dataclass(maker) else {}


def to_toml(value: Any) -> str:
    """The effective configuration as a TOML document that `read_toml` and `assemble` read back to an equal value."""
    import tomli_w

    return tomli_w.dumps(to_data(value))


def read_toml(path: str) -> dict[str, Any]:
    """A TOML file as data. Raises `UsageError` with the file, line and rule."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib  # type: ignore[import-not-found,no-redef]
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist", "a job is a TOML file", "check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}", "a job is a TOML file", "see https://toml.io") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "a job is a readable TOML file", "") from None
