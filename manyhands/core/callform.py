"""The call form, ``name(args, key=value)``, read as data: literals, words, lists and calls. Nothing is evaluated."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manyhands.core.errors import UsageError


@dataclass(frozen=True)
class Call:
    """``name(args, key=value)`` as data."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def parse(text: str, where: str = "value") -> Any:
    """A literal, a bare word (a string) or a `Call`, read from text; nothing is evaluated.

    >>> parse("ddp(lr=3e-4, bucket_mb=8)")
    Call(name='ddp', args=(), kwargs={'lr': 0.0003, 'bucket_mb': 8})
    >>> parse("local-sgd(h=4)").name
    'local-sgd'
    """
    # registered names have hyphens; to Python's grammar they would be subtractions
    spelled = re.sub(r"(?<=[A-Za-z])-(?=[A-Za-z])", "__hyphen__", text.strip())
    spelled = re.sub(r"\basync\b", "async__word__", spelled)  # and this one a keyword
    try:
        tree = ast.parse(spelled, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise UsageError(
            f"{where}: {text!r} cannot be read ({error.args[0]})",
            "a value is a number, a word, a string, a [list] or a call such as name(key=value)",
            "put quotes around text with spaces, slashes or colons",
        ) from None
    return _node(tree, text, where)


def _node(node: ast.expr, text: str, where: str) -> Any:
    if isinstance(node, ast.Constant):
        return _spelled(node.value) if isinstance(node.value, str) else node.value
    if isinstance(node, ast.Name):
        return _unhyphen(node.id)
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_node(item, text, where) for item in node.elts)
    if isinstance(node, ast.Dict):
        keys = [_node(k, text, where) for k in node.keys if k is not None]
        return dict(zip(keys, (_node(v, text, where) for v in node.values), strict=True))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _node(node.operand, text, where)
        if isinstance(value, (int, float)):
            return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and all(k.arg for k in node.keywords):
        names = [_spelled(str(k.arg)).replace("-", "_") for k in node.keywords]
        repeated = {n for n in names if names.count(n) > 1}
        if not repeated:
            return Call(
                _unhyphen(node.func.id),
                tuple(_node(a, text, where) for a in node.args),
                {n: _node(k.value, text, where) for n, k in zip(names, node.keywords, strict=True)},
            )
    raise UsageError(
        f"{where}: {_spelled(ast.unparse(node))!r} in {text!r} is not data",
        "only literals, words, lists and calls with keywords are read; nothing is evaluated",
        "write the value itself",
    )


def _spelled(text: str) -> str:
    """As it was written."""
    return text.replace("__hyphen__", "-").replace("__word__", "")


def _unhyphen(name: str) -> Any:
    words = {
        "true": True,
        "false": False,
        "none": None,
        "null": None,
        "inf": float("inf"),
        "nan": float("nan"),
    }
    word = _spelled(name)
    return words.get(word.lower(), word)
