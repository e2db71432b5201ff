"""Command line options made from dataclass fields: one flag a field, Hugging Face's names as aliases.

argparse only splits the line; types, names and rules are the dataclass's own (`manyhands.core.config`).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from manyhands.core.errors import UsageError, nearest

# Hugging Face's names for parts of the strategy: option -> (path, help)
SHORTHANDS = {
    "--learning-rate": ("strategy.main.lr", "the optimizer's rate"),
    "--lr": ("strategy.main.lr", "the same"),
    "--weight-decay": ("strategy.main.weight_decay", "the optimizer's weight decay"),
    "--warmup-ratio": ("strategy.main.schedule.warmup", "share of the steps that warm up"),
    "--warmup-steps": ("strategy.main.schedule.warmup", "steps that warm up"),
}


class Parser(argparse.ArgumentParser):
    """argparse with our errors: exit code 2, the value, the rule, the nearest match."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, "", f"see `{self.prog} --help`")


def add_fields(parser: argparse.ArgumentParser, cls: type, *, only: Sequence[str] | None = None) -> None:
    """A flag for each field of `cls` (or those in `only`)."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if only is not None and f.name not in only:
            continue
        names = [f.name, *f.metadata.get("aliases", ())]
        flags = list(
            dict.fromkeys(spelling for n in names for spelling in (f"--{n.replace('_', '-')}", f"--{n}"))
        )
        shown = f.metadata.get("help", "").replace("%", "%%")
        if hints[f.name] is bool:
            group = parser.add_mutually_exclusive_group()
            group.add_argument(
                *flags, dest=f.name, nargs="?", const="true", default=None, metavar="yes|no", help=shown
            )
        elif typing.get_origin(hints[f.name]) is tuple and "float" not in str(hints[f.name]):
            parser.add_argument(
                *flags, dest=f.name, nargs="+", action="extend", default=None, metavar="X", help=shown
            )
        else:
            parser.add_argument(
                *flags, dest=f.name, default=None, metavar=_metavar(hints[f.name]), help=shown
            )


def _metavar(hint: Any) -> str:
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, choices))
    text = str(hint)
    for word, shown in (("int", "N"), ("float", "X")):
        if word in text:
            return shown
    return "VALUE"


def add_changes(parser: argparse.ArgumentParser) -> None:
    """``--set KEY=VALUE`` and the shorthands."""
    parser.add_argument(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change any part, as in strategy.outer.lr=6e-4; repeatable",
    )
    for flag, (path, text) in SHORTHANDS.items():
        spellings = dict.fromkeys((flag, flag[:2] + flag[2:].replace("-", "_")))
        parser.add_argument(
            *spellings,
            dest=f"shorthand {flag}",
            default=None,
            metavar="X",
            help=f"{text} ({path})",
        )


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse; an unknown option names the nearest one."""
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        word = unknown[0].split("=")[0]
        what = "option" if word.startswith("-") else "argument"
        remedy = nearest(word, known) if what == "option" else f"see `{parser.prog} --help`"
        raise UsageError(
            f"unknown {what} {word!r}",
            "",
            remedy if "did you mean" in remedy else f"see `{parser.prog} --help`",
        )
    return options


def layers(options: argparse.Namespace, names: Sequence[str]) -> list[tuple[str, Mapping[str, Any]]]:
    """The command line's layers for `assemble`: flags, then shorthands, then --set."""
    given = vars(options)
    found: list[tuple[str, Mapping[str, Any]]] = []
    for name in names:
        if given.get(name) is not None:
            found.append((f"--{name.replace('_', '-')}", {name: given[name]}))
    said: dict[str, str] = {}
    for flag, (path, _) in SHORTHANDS.items():
        value = given.get(f"shorthand {flag}")
        if value is None:
            continue
        if path in said:
            raise UsageError(f"{said[path]} and {flag} are both given", "both say the same", "leave one out")
        said[path] = flag
        _check_warmup(flag, value)
        found.append((flag, {path: value}))
    for change in given.get("changes", []):
        key, separator, value = change.partition("=")
        if not separator or not key:
            raise UsageError(
                f"--set {change}", "it has the form KEY=VALUE", "for example --set strategy.outer.lr=6e-4"
            )
        found.append((f"--set {key}", {key: value}))
    return found


def _check_warmup(flag: str, value: str) -> None:
    """`Warmup` is one number, a share below 1 and steps from there on: each flag takes its own kind."""
    rules: dict[str, tuple[str, Callable[[float], bool]]] = {
        "--warmup-ratio": ("a share of the steps is at least 0 and below 1", lambda x: 0 <= x < 1),
        "--warmup-steps": ("it is a whole number of steps", lambda x: x >= 0 and x == int(x)),
    }
    if flag in rules:
        rule, holds = rules[flag]
        try:
            fine = math.isfinite(float(value)) and holds(float(value))
        except ValueError:
            fine = False
        if not fine:
            other = "--warmup-steps" if flag == "--warmup-ratio" else "--warmup-ratio"
            raise UsageError(f"{flag} {value}", rule, f"{other} gives the other kind")


def say(text: str) -> None:
    """A line to standard output; a closed pipe is not an error."""
    try:
        print(text)
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(0) from None
