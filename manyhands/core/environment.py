"""What a launcher says in environment variables: read here and nowhere else, and passed on as a value.

Ours sets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE and MANYHANDS_STORE. torchrun and its like set the first four with
MASTER_ADDR and MASTER_PORT. Where RANK is absent the variables of Slurm, Open MPI and MPICH/Intel MPI are understood.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TextIO

from manyhands.core import streams
from manyhands.core.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Env:
    """One worker's place, as its launcher tells it.

    Attributes:
        launcher: "none" (a world of one), "manyhands", "torchrun", "slurm", "openmpi", "pmi" or "environment".
        store: directory in which the workers of one host meet; ours alone.
        agent_store: whether the launcher's agent serves MASTER_PORT already (torchrun).
        host: what to call this host instead of its host name ($MANYHANDS_HOST): for containers that share a name, and
            to treat parts of one machine as several.
        coordinator: ``host:port`` of the job's coordinator ($MANYHANDS_COORDINATOR); None: the job has none.
        token_file: file with its token ($MANYHANDS_TOKEN_FILE).
        fingerprint: of its certificate ($MANYHANDS_FINGERPRINT); None: without TLS.
        seat: this process's id in the job ($MANYHANDS_SEAT).
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    store: str | None = None
    master_addr: str | None = None
    master_port: int | None = None
    agent_store: bool = False
    launcher: str = "none"
    host: str | None = None
    coordinator: str | None = None
    token_file: str | None = None
    fingerprint: str | None = None
    seat: str | None = None


# launcher -> (rank, world size, local rank, local world size)
_NAMES = {
    "environment": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "openmpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    "pmi": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


def read_env(variables: Mapping[str, str] | None = None) -> Env:
    """The launcher's facts. Raises `UsageError` where they are garbage or contradict each other."""
    env = os.environ if variables is None else variables
    for launcher, names in _NAMES.items():
        if names[0] not in env:
            continue
        if launcher == "slurm" and (
            env.get("SLURM_STEP_ID", "") in ("", "4294967290") or names[1] not in env
        ):
            continue  # inside an allocation, but not started by srun
        return _read(env, launcher, names)
    return Env()


def _read(env: Mapping[str, str], launcher: str, names: tuple[str, str, str, str]) -> Env:
    rank_name, size_name, local_name, local_size_name = names
    rank = _number(env, rank_name)
    size = _number(env, size_name)
    local_size = _number(env, local_size_name, default=1 if launcher == "environment" else size)
    local_rank = _number(env, local_name, default=rank % max(1, local_size))
    if size < 1 or not 0 <= rank < size:
        raise UsageError(
            f"{rank_name}={rank} with {size_name}={size}",
            "ranks go from 0 to the world size less one",
            "correct the launcher",
        )
    if not 0 <= local_rank < max(1, local_size) or local_size > size:
        raise UsageError(
            f"{local_name}={local_rank} with {local_size_name}={local_size} of {size}",
            "local ranks go from 0 to the local size less one",
            "correct the launcher",
        )
    store = env.get("MANYHANDS_STORE")
    address = env.get("MASTER_ADDR")
    port = _number(env, "MASTER_PORT", default=0) or None
    if size > 1 and store is None and (address is None or port is None):
        raise UsageError(
            f"{launcher} started {size} workers, but MASTER_ADDR or MASTER_PORT is not set",
            "the workers meet at that address",
            "export MASTER_ADDR=<host of rank 0> MASTER_PORT=<a free port>",
        )
    if port is not None and not 0 < port < 65536:
        raise UsageError(f"MASTER_PORT={port}", "a port is between 1 and 65535", "choose a free one")
    agent = "TORCHELASTIC_RUN_ID" in env
    name = "manyhands" if store is not None else "torchrun" if agent else launcher
    return Env(
        rank=rank,
        world_size=size,
        local_rank=local_rank,
        local_world_size=local_size,
        store=store,
        master_addr=address,
        master_port=port,
        agent_store=agent and env.get("TORCHELASTIC_USE_AGENT_STORE", "False").lower() == "true",
        launcher=name,
        host=env.get("MANYHANDS_HOST") or None,
        coordinator=env.get("MANYHANDS_COORDINATOR") or None,
        token_file=env.get("MANYHANDS_TOKEN_FILE") or None,
        fingerprint=env.get("MANYHANDS_FINGERPRINT") or None,
        seat=env.get("MANYHANDS_SEAT") or None,
    )


def _number(env: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    text = env.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text.split("(")[0])
    except ValueError:
        raise UsageError(
            f"{name}={text!r}", "it is a whole number", "unset RANK and its like to run without a launcher"
        ) from None


@lru_cache(maxsize=1)
def console() -> TextIO:
    """Where the job's display goes: the launcher's terminal (our launcher hands down its file number), else stdout."""
    number = os.environ.get("MANYHANDS_CONSOLE")
    if number is None:
        return sys.stdout
    return streams.lossy(int(number), encoding=sys.stdout.encoding or "utf-8")


def told_by_launcher(seat: str) -> bool:
    """Whether the launcher itself tells of this worker's loss, so that the display need not.

    $MANYHANDS_TOLD is how the names of the launcher's own workers begin; without it the display tells of all.
    """
    prefix = os.environ.get("MANYHANDS_TOLD")
    return prefix is not None and re.fullmatch(rf"{re.escape(prefix)}\d+(-\d+)?", seat) is not None


def pass_rows() -> int | None:
    """The most rows of a forward pass, where this worker's predecessor was killed for memory ($MANYHANDS_PASS_ROWS)."""
    text = os.environ.get("MANYHANDS_PASS_ROWS")
    return int(text) if text else None


def forks_wanted() -> bool:
    """Whether a launcher may fork its workers from one process (``MANYHANDS_FORK=1``)."""
    return os.environ.get("MANYHANDS_FORK") == "1"


def chaos_directory() -> str | None:
    """Where workers say what a test of faults must know of them ($MANYHANDS_CHAOS); None: nobody asks."""
    return os.environ.get("MANYHANDS_CHAOS") or None
