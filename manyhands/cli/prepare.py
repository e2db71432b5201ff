"""`manyhands prepare [JOB.toml] [options]`: the data part of a training job, ahead of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from manyhands.cli import options
from manyhands.core import config, hardware
from manyhands.core.signals import Interrupts
from manyhands.train.job import Job

FIELDS = [
    "task",
    "data",
    "eval_data",
    "format",
    "encoding",
    "document",
    "quoting",
    "on_error",
    "model",
    "tokenizer",
    "workers",
    "cache",
]


def main(arguments: Sequence[str]) -> int:
    import sys

    from manyhands.train.material import prepare_job
    from manyhands.train.sinks import Terminal, fan_out

    p = options.Parser(
        prog="manyhands prepare",
        description="Turn text into memory-mapped shards of tokens; `train` with the same data options finds them.",
        allow_abbrev=False,
    )
    p.add_argument("file", nargs="?", help="a job's TOML file")
    options.add_fields(p, Job, only=FIELDS)
    given = options.parse(p, arguments)
    layers = [(given.file, config.read_toml(given.file))] if given.file is not None else []
    job, _ = config.assemble(
        Job, [*layers, *options.layers(given, [f.name for f in dataclasses.fields(Job)])]
    )
    terminal = Terminal(sys.stdout)
    try:
        with Interrupts() as interrupts, interrupts.phase("prepare", interruptible=True):
            train, held_out = prepare_job(
                job, processes=job.workers or hardware.core_count(), emit=fan_out([terminal])
            )
    finally:
        terminal.close()
    for prepared in (train, held_out):
        if prepared is not None:
            options.say(str(prepared.directory))
    return 0
