"""`manyhands join HOST:PORT --token-file FILE`: workers of this machine take part in a job that runs or waits elsewhere."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from manyhands.cli import options
from manyhands.core import hardware
from manyhands.core.errors import UsageError


def main(arguments: Sequence[str]) -> int:
    from manyhands.launch.control import CONTACT, Elastic, Joined, Remote
    from manyhands.launch.job import ENTRY, WARM, workers_here
    from manyhands.launch.local import launch
    from manyhands.train.anchor import anchored
    from manyhands.train.order import Order

    given = options.parse(_parser(), arguments)
    for name, least in (("workers", 1), ("threads", 1), ("restarts", 0)):
        value = getattr(given, name)
        if value is not None and value < least:
            raise UsageError(f"--{name} {value}", f"it is at least {least}", "")
    contact = Path(given.job) / CONTACT
    began = ""  # where the job was started, if that is on this machine
    logs = None if given.output is None else Path(given.output).absolute()
    if contact.exists():  # on the same machine
        for option in ("token_file", "fingerprint"):
            if (value := getattr(given, option)) is not None:
                raise UsageError(
                    f"--{option.replace('_', '-')} {value} with {given.job}",
                    f"{contact} says how to reach that job",
                    "leave it out, or give HOST:PORT",
                )
        found = json.loads(contact.read_text(encoding="utf-8"))
        address, token_file, fingerprint = (found[n] for n in ("address", "token_file", "fingerprint"))
        began = found.get("directory", "")
    else:
        address, token_file, fingerprint = given.job, given.token_file, given.fingerprint or ""
        host, separator, port = address.rpartition(":")
        if not separator or not host or not port.isdigit():
            raise UsageError(
                f"{address!r} is no job",
                f"a job is HOST:PORT of its coordinator, or the output directory, where {CONTACT} is while it runs",
                "give what `manyhands coordinate` printed",
            )
        if token_file is None:
            raise UsageError(
                "no --token-file", "a job takes those who know its token", "give --token-file FILE"
            )
    name = f"{hardware.hostname()}-{os.getpid()}"
    remote = Remote(address=address, token_file=token_file, fingerprint=fingerprint, name=name)
    told = Joined(remote)
    try:
        argument = told.fact("job", "order")
    finally:
        told.close()
    if not argument:
        print("manyhands: the job is done: there is nothing left to do", file=sys.stderr, flush=True)
        return 0
    order = Order.from_json(argument)
    job = order.job
    if began and (anchored(job) != job or not Path(job.output).is_absolute()):
        _go_to(began)
    alone = dataclasses.replace(job, workers=given.workers, shares=None, min_workers=1)
    workers = workers_here(alone)  # srun and its like say how often this command is run
    output = logs or Path(job.output)
    restarts = given.restarts if given.restarts is not None else job.restarts
    elastic = Elastic(restarts=restarts, hang_s=job.hang_s, warm=WARM)
    who = "1 worker joins" if workers == 1 else f"{workers} workers join"
    print(f"manyhands: {who} {address}; logs: {output}/logs", file=sys.stderr, flush=True)
    if job.reproducible and given.threads not in (None, 1):
        raise UsageError(
            f"--threads {given.threads} for a reproducible job",
            "the order of additions inside a kernel depends on how many threads there are: each worker has one",
            "leave out --threads",
        )
    threads = 1 if job.reproducible else given.threads or job.threads
    argument = dataclasses.replace(order, job=dataclasses.replace(job, threads=threads)).to_json()
    return launch(
        ENTRY, argument, workers=workers, output=output, threads=threads, elastic=elastic, remote=remote
    )


def _go_to(directory: str) -> None:
    """Where the job was started: its relative paths begin there."""
    try:
        os.chdir(directory)
    except OSError as error:
        raise UsageError(
            f"{directory}: {error.strerror}",
            "the job's relative paths begin there, where it was started",
            "join by HOST:PORT from a directory in which the job's paths hold",
        ) from None


def _parser() -> options.Parser:
    p = options.Parser(
        prog="manyhands join",
        description="Let workers of this machine take part in a job that runs, or waits, elsewhere. "
        "Ctrl-C lets them leave; the job goes on.",
        epilog="A job with parameter servers needs their token's file here, too, at the path that the job gives. Exit codes: those "
        "of `manyhands train`.",
        allow_abbrev=False,
    )
    p.add_argument(
        "job", metavar="JOB", help="HOST:PORT of its coordinator, or its output directory on this machine"
    )
    p.add_argument("--token-file", "--token_file", metavar="FILE", help="the job's token")
    p.add_argument(
        "--fingerprint", metavar="sha256:…", help="of the coordinator's certificate; none: without TLS"
    )
    p.add_argument("--workers", type=int, metavar="N", help="default: one per core or GPU")
    p.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="of each worker; default: the job's, else the cores divided among them",
    )
    p.add_argument(
        "--restarts", type=int, metavar="N", help="replacements for each lost worker; default: the job's"
    )
    p.add_argument("--output", metavar="DIR", help="of the logs here; default: the job's")
    return p
