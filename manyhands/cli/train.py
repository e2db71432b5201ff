"""`manyhands train [JOB.toml] [options]`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from manyhands.cli import options
from manyhands.core import config
from manyhands.core.errors import UsageError
from manyhands.train.job import Job


def parser() -> argparse.ArgumentParser:
    p = options.Parser(
        prog="manyhands train",
        description="Train a language model with all workers. Without options: a small one, on Python's own sources.",
        allow_abbrev=False,
    )
    p.add_argument("file", nargs="?", help="the job as a TOML file, whose keys are the options below")
    options.add_fields(p, Job)
    options.add_changes(p)
    p.add_argument("--bf16", action="store_true", help="the same as --precision bf16")
    p.add_argument("--fp16", action="store_true", help="the same as --precision fp16")
    p.add_argument(
        "--gradient-accumulation-steps",
        "--gradient_accumulation_steps",
        dest="accumulate",
        type=int,
        metavar="N",
        help="with --per-device-train-batch-size: the global batch is their product times the workers",
    )
    return p


def main(arguments: Sequence[str]) -> int:
    from manyhands.launch.job import start

    given = options.parse(parser(), arguments)
    job, origins = assemble(given)
    return start(job, origins)


def assemble(given: argparse.Namespace) -> tuple[Job, config.Origins]:
    """The job and where each value came from: defaults, a resumed run's, the file's, the command line's."""
    from manyhands.launch.job import continued, lowest_layers, told_once, workers_of

    names = [f.name for f in dataclasses.fields(Job)]
    lines = options.layers(given, names)
    if given.bf16 or given.fp16:
        if any("precision" in data for _, data in lines) or (given.bf16 and given.fp16):
            raise UsageError("precision is given twice", "it is said once", "leave out --bf16 and --fp16")
        lines.append(("--bf16", {"precision": "bf16"}) if given.bf16 else ("--fp16", {"precision": "fp16"}))
    file: list[tuple[str, Mapping[str, Any]]] = []
    if given.file is not None:
        file.append((given.file, config.read_toml(given.file)))
    stack = continued([*file, *lines])
    below = [*lowest_layers(stack), *stack[: len(file)]]
    job, origins = config.assemble(Job, told_once(below, stack[len(file) :]))
    if job.eval_data and job.eval_fraction and origins.get("eval_fraction", "").startswith("--"):
        raise UsageError(  # also of the default, which the job itself lets pass: a run's config.toml has it
            f"eval_fraction = {job.eval_fraction} with eval_data",
            "held-out rows come from one of them",
            "leave out --eval-fraction",
        )
    if given.accumulate is not None:
        twice = origins.get("global_batch", "").startswith(("--global-batch", "--set "))
        if twice or job.device_batch is None:
            raise UsageError(
                f"--gradient-accumulation-steps {given.accumulate}",
                "it says the global batch as a product with --per-device-train-batch-size",
                "give --global-batch alone; accumulation follows from it",
            )
        product = given.accumulate * job.device_batch * workers_of(job)
        job = dataclasses.replace(job, global_batch=product)
        origins["global_batch"] = "--gradient-accumulation-steps × --per-device-train-batch-size × workers"
    return job, origins
