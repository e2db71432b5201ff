"""`manyhands generate RUN --prompt TEXT`: continue a prompt with a trained model."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from manyhands.cli import options
from manyhands.core import rng
from manyhands.core.errors import UsageError


def main(arguments: Sequence[str]) -> int:
    p = options.Parser(
        prog="manyhands generate", description="Continue a prompt with a trained model.", allow_abbrev=False
    )
    p.add_argument("run", help="an output directory or one of its checkpoints")
    p.add_argument("--prompt", required=True, help="what the text starts with")
    p.add_argument(
        "--max-new-tokens",
        "--max_new_tokens",
        type=int,
        default=128,
        metavar="N",
        help="at most (default 128)",
    )
    p.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="0: the likeliest token (default 0.8)"
    )
    p.add_argument("--top-p", "--top_p", type=float, metavar="X", help="nucleus (default 0.95)")
    p.add_argument("--seed", type=int, metavar="N", help="of the sampling (default 0)")
    p.add_argument("--count", type=int, metavar="N", help="continuations to write (default 1)")
    p.add_argument(
        "--trust",
        action="store_true",
        help="call the module:function that the checkpoint names as its model's maker",
    )
    given = options.parse(p, arguments)
    top_p, seed, count = _sampling(given)
    from manyhands.models.build import load_model
    from manyhands.train import checkpoint
    from manyhands.train.generate import continuation

    path = checkpoint.resolve_resume(given.run, Path(given.run))
    checkpoint.verify(path)
    model = load_model(path, trust=given.trust)
    if not getattr(model, "can_generate", lambda: False)():  # Transformers' own, not any `generate`
        raise UsageError(
            f"{path} holds a {type(model).__name__}", "it does not continue text", "give a language model"
        )
    for i in range(count):
        rng.seed_torch(seed, i)
        text = continuation(
            model,
            path,
            given.prompt,
            new_tokens=given.max_new_tokens,
            temperature=given.temperature,
            top_p=top_p,
        )
        options.say(given.prompt + text)
    return 0


def _sampling(given: argparse.Namespace) -> tuple[float, int, int]:
    """(top-p, seed, count). Raises `UsageError`."""
    for name, value in (("max-new-tokens", given.max_new_tokens), ("count", given.count)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}", "it is at least 1", "")
    if not 0 <= given.temperature < math.inf:
        raise UsageError(f"--temperature {given.temperature}", "it is at least 0, and finite", "")
    if given.top_p is not None and not 0 < given.top_p <= 1:
        raise UsageError(f"--top-p {given.top_p}", "it is a share: above 0, at most 1", "")
    if given.temperature == 0:
        for name in ("top-p", "seed", "count"):
            if (value := getattr(given, name.replace("-", "_"))) is not None:
                raise UsageError(
                    f"--{name} {value} with --temperature 0",
                    "the likeliest token is taken each time: nothing is drawn, and all continuations are the same",
                    f"leave out --{name}, or give a temperature above 0",
                )
    top_p = 0.95 if given.top_p is None else given.top_p
    return top_p, given.seed or 0, given.count or 1
