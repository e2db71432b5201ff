"""The launcher's variables, in every dialect; garbage is one clear message."""

from __future__ import annotations

import pytest

from manyhands.core.environment import Env, read_env
from manyhands.core.errors import UsageError

MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_nothing_set_is_a_world_of_one() -> None:
    assert read_env({}) == Env()


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, "environment"),
        (
            {
                "RANK": "5",
                "WORLD_SIZE": "8",
                "LOCAL_RANK": "1",
                "LOCAL_WORLD_SIZE": "4",
                "TORCHELASTIC_RUN_ID": "x",
            },
            "torchrun",
        ),
        (
            {
                "OMPI_COMM_WORLD_RANK": "5",
                "OMPI_COMM_WORLD_SIZE": "8",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
            },
            "openmpi",
        ),
        (
            {
                "SLURM_PROCID": "5",
                "SLURM_NTASKS": "8",
                "SLURM_LOCALID": "1",
                "SLURM_NTASKS_PER_NODE": "4",
                "SLURM_STEP_ID": "0",
            },
            "slurm",
        ),
        ({"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}, "pmi"),
    ],
)
def test_every_dialect_says_the_same(variables: dict[str, str], launcher: str) -> None:
    env = read_env({**variables, **MASTER})
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (5, 8, 1, 4)
    assert (env.launcher, env.master_addr, env.master_port) == (launcher, "10.0.0.1", 29500)


def test_an_allocation_without_srun_is_a_world_of_one() -> None:
    assert read_env({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}) == Env()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one'"),
        ({"RANK": "0"}, "WORLD_SIZE=''"),
        ({"RANK": "2", "WORLD_SIZE": "2", **MASTER}, "ranks go from 0"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "3", **MASTER}, "local"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "99999"}, "between 1 and 65535"),
    ],
)
def test_garbage_is_one_clear_message(variables: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_env(variables)
