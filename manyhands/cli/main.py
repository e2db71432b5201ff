"""The command line: `manyhands VERB`. Verbs are imported when used, so that --help needs neither torch nor time."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence

from manyhands.core.errors import ManyhandsError, Stopped, nearest

VERBS = {
    "train": ("manyhands.cli.train", "train a model with all workers"),
    "prepare": ("manyhands.cli.prepare", "turn text into memory-mapped shards of tokens, once"),
    "evaluate": ("manyhands.cli.evaluate", "score a trained model on held-out data"),
    "generate": ("manyhands.cli.generate", "continue a prompt with a trained model"),
    "coordinate": ("manyhands.cli.coordinate", "see a job of several machines through losses and newcomers"),
    "join": ("manyhands.cli.join", "let workers of this machine take part in a running job"),
    "serve-parameters": ("manyhands.cli.serve", "keep parameters for workers of a parameter-server strategy"),
    "chaos": (
        "manyhands.cli.chaos",
        "run a job under a schedule of kills, hangs, slowdowns, …, and say what they cost",
    ),
    "ledger": (
        "manyhands.cli.ledger",
        "show which samples each step and worker used; verify that each was once",
    ),
    "list": (
        "manyhands.cli.listing",
        "names: strategies, exchanges, cadences, optimizers, tasks, models, launchers, …",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code (0; 1 failure; 2 usage; 130/143 signals)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_help())
        return 0 if given else 2
    if given[0] in ("-V", "--version"):
        from manyhands import __version__

        print(f"manyhands {__version__}")
        return 0
    if given[0] not in VERBS:
        print(f"manyhands: {given[0]!r} is not a verb; {nearest(given[0], VERBS)}", file=sys.stderr)
        return 2
    try:
        return int(importlib.import_module(VERBS[given[0]][0]).main(given[1:]))
    except ManyhandsError as error:
        print(f"manyhands: {error}", file=sys.stderr)
        return error.exit_code
    except Stopped as stopped:
        print(f"manyhands: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("manyhands: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _help() -> str:
    verbs = "\n".join(f"  {name:<16} {text}" for name, (_, text) in VERBS.items())
    return (
        "usage: manyhands VERB [options]\n\n"
        "Data-parallel training and inference of language models on the machines you have.\n\n"
        f"{verbs}\n\n"
        "`manyhands train` alone trains a small model on Python's own sources, on all cores or GPUs.\n"
        "`manyhands VERB --help` lists a verb's options. Exit codes: 0; 1 failure; 2 usage; 130, 143 signals."
    )


if __name__ == "__main__":
    sys.exit(main())
