"""`manyhands generate RUN --prompt TEXT`: continue a prompt with a trained model."""

from __future__ import annotations

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
    p.add_argument("--top-p", "--top_p", type=float, default=0.95, metavar="X", help="nucleus (default 0.95)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default 0)")
    p.add_argument("--count", type=int, default=1, metavar="N", help="continuations to write (default 1)")
    p.add_argument(
        "--trust",
        action="store_true",
        help="call the module:function that the checkpoint names as its model's maker",
    )
    given = options.parse(p, arguments)
    for name, value, least in (("max-new-tokens", given.max_new_tokens, 1), ("count", given.count, 1)):
        if value < least:
            raise UsageError(f"--{name} {value}", f"it is at least {least}", "")
    if given.temperature < 0 or not 0 < given.top_p <= 1:
        raise UsageError(
            f"--temperature {given.temperature} --top-p {given.top_p}",
            "temperature >= 0 and 0 < top-p <= 1",
            "",
        )
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
    for i in range(given.count):
        rng.seed_torch(given.seed, i)
        text = continuation(
            model,
            path,
            given.prompt,
            new_tokens=given.max_new_tokens,
            temperature=given.temperature,
            top_p=given.top_p,
        )
        options.say(given.prompt + text)
    return 0
