"""`manyhands list KIND [--names]`."""

from __future__ import annotations

from collections.abc import Sequence

from manyhands.cli import options
from manyhands.core import registry
from manyhands.core.errors import UsageError, nearest


def main(arguments: Sequence[str]) -> int:
    p = options.Parser(
        prog="manyhands list", description="Names and one line of help each.", allow_abbrev=False
    )
    p.add_argument("kind", help=", ".join(registry.REGISTRY))
    p.add_argument("--names", action="store_true", help="names alone, one a line")
    given = options.parse(p, arguments)
    if given.kind not in registry.REGISTRY:
        raise UsageError(f"{given.kind!r} is not a kind of thing", "", nearest(given.kind, registry.REGISTRY))
    names = list(registry.entries(given.kind))
    width = max(map(len, names), default=0)
    for name in names:
        options.say(name if given.names else f"{name:<{width}}  {registry.help_of(given.kind, name)}")
    return 0
