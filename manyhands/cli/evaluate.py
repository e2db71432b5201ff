"""`manyhands evaluate RUN [--data …]`: a trained model's scores, computed by all workers."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from manyhands.cli import options
from manyhands.core import config
from manyhands.core.errors import UsageError
from manyhands.train.job import Job

FIELDS = (
    *("data", "format", "encoding", "document", "quoting", "on_error", "eval_fraction", "device_batch"),
    *("launcher", "workers", "device", "threads", "transport", "precision", "cache"),
)

READING = ("format", "encoding", "document", "quoting")
TRAINING = (  # how the run trained says nothing of how it is scored
    *("strategy", "reproducible", "min_workers", "restarts", "hang_s", "stuck_s", "elastic", "lost_round"),
    *("inner_steps", "on_divergence", "check_every", "balance", "micro_batch"),
    *("eval_every", "save_every", "log_every", "prompt"),
)


def _of_scoring(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name not in TRAINING}


def _check_used(given: argparse.Namespace) -> None:
    """With data of their own. Raises `UsageError` for an option that would say nothing of them."""
    if given.data is None:
        return
    if given.eval_fraction is not None:
        raise UsageError(
            f"--eval-fraction {given.eval_fraction} with --data",
            "all of the data that are given is scored",
            "leave out --eval-fraction",
        )
    from manyhands.data.source import check_used

    check_used(given.data, {name: getattr(given, name) for name in READING})


def main(arguments: Sequence[str]) -> int:
    import tempfile

    from manyhands.launch.job import begin, resumed_layer
    from manyhands.train.manifest import run_of

    p = options.Parser(
        prog="manyhands evaluate",
        description="Score a trained model. Without --data: on the rows that its run held out.",
        allow_abbrev=False,
    )
    p.add_argument("run", help="an output directory or one of its checkpoints")
    p.add_argument("--json", dest="json_file", metavar="FILE", help="write the scores there as JSON, too")
    p.add_argument(
        "--trust",
        action="store_true",
        help="call the module:function that the checkpoint names as its model's maker",
    )
    options.add_fields(p, Job, only=FIELDS)
    given = options.parse(p, arguments)
    if not Path(given.run).exists():
        raise UsageError(
            f"{given.run} does not exist", "a run is an output directory of train", "check the path"
        )
    stack = options.layers(given, FIELDS)
    run = run_of(given.run)
    _check_used(given)
    with tempfile.TemporaryDirectory(prefix="manyhands-") as scratch:
        own = [(name, _of_scoring(data)) for name, data in resumed_layer([("", {"resume": given.run})])]
        layers = [*own, *stack]
        layers.append(("evaluate", {"resume": given.run, "output": str(run / "evaluate"), "report_to": ()}))
        if given.data is not None:  # all of the given data is scored
            layers.append(("evaluate", {"eval_data": given.data, "data": given.data, "eval_fraction": 0.0}))
        job, _origins = config.assemble(Job, layers)
        result = Path(scratch) / "scores.json"
        argument = json.dumps(
            {
                "job": config.to_data(job),
                "result": str(result),
                "given": given.data is not None,
                "trust": given.trust,
            }
        )
        with contextlib.redirect_stdout(
            sys.stderr
        ):  # warnings and progress: the figures alone are the output
            code = begin("manyhands.train.scoring:main", argument, job)
        if code == 0 and result.exists():
            scores = json.loads(result.read_text())
            for name, value in scores.items():
                options.say(f"{name:<16} {value:.6g}" if isinstance(value, float) else f"{name:<16} {value}")
            if given.json_file:
                from manyhands.train.durable import write_json

                write_json(Path(given.json_file), scores)
    return code
