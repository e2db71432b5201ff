"""Who starts a job's workers: a launcher, chosen by name (``--launcher``), a third party's by an entry point.

A launcher is a function of (entry, argument, job): it has `entry` (``module:function``) run with `argument` on each of the
job's workers, waits for them, and returns the exit code of the whole: 0, 2 for usage, 128 + signal after SIGINT or SIGTERM, else
1. It gives each worker RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and
starts it as ``python -m manyhands.launch.child ENTRY ARGUMENT``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.core import registry
from manyhands.core.environment import read_env
from manyhands.core.errors import UsageError

if TYPE_CHECKING:
    from manyhands.train.job import Job

    Launcher = Callable[[str, str, Job], int]


def chosen(job: Job) -> Launcher:
    """The launcher of a job. A process that is a worker already joins the others, whoever has started it. Raises `UsageError`."""
    launcher, name = read_env().launcher, job.launcher.lower()
    if launcher != "none":
        if name == "local":
            raise UsageError(
                "launcher = 'local' where RANK is set",
                f"this process is a worker that {launcher} has started",
                "leave out --launcher, or unset RANK and its like",
            )
        return joined
    if name == "torchrun":
        raise UsageError(
            "launcher = 'torchrun' where RANK is not set",
            "torchrun is what starts this command",
            "begin with torchrun --nproc-per-node N -m manyhands train …",
        )
    found: Launcher = registry.resolve("launchers", "local" if name == "auto" else job.launcher)
    return found


def joined(entry: str, argument: str, job: Job) -> int:
    """Be one of the workers that another launcher has started, in this process."""
    env = read_env()
    if job.workers is not None and job.workers != env.world_size:
        raise UsageError(
            f"workers = {job.workers}, but {env.launcher} started {env.world_size}",
            "the launcher decides how many workers there are",
            "leave out --workers",
        )
    from manyhands.launch.environment import join

    return join(entry, argument)


def locally(entry: str, argument: str, job: Job) -> int:
    """New processes on this machine, watched and replaced."""
    from manyhands.launch.job import elastic_of, servers_of, workers_of
    from manyhands.launch.local import launch

    return launch(
        entry,
        argument,
        workers=workers_of(job),
        output=Path(job.output),
        threads=1 if job.reproducible else job.threads,
        servers=servers_of(job),
        elastic=elastic_of(job),
    )
