"""From a job to running workers: join where a launcher's variables are set, else start them here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.core import config, hardware
from manyhands.core.environment import read_env
from manyhands.core.errors import CheckpointError, UsageError
from manyhands.launch.claim import claimed, in_use, make_fresh
from manyhands.train.job import Job
from manyhands.train.manifest import check_fresh, checkpoints, run_of
from manyhands.train.order import BY_DEVICE, Order

if TYPE_CHECKING:
    from manyhands.launch.control import Elastic
    from manyhands.launch.served import ServerProcesses

Layer = tuple[str, Mapping[str, Any]]
ENTRY = "manyhands.train.worker:main"
AUTO = "auto"  # of resume
RESUME_AUTO = "--resume auto"  # as the origin of the output that it means
EXCLUDES = (("steps", "epochs"), ("epochs", "steps"), ("reproducible", "device_batch"))


def workers_of(job: Job) -> int:
    """How many workers the job will have."""
    env = read_env()
    if env.launcher != "none":
        return env.world_size
    return workers_here(job)


def workers_here(job: Job) -> int:
    """How many workers this machine gets, whoever has started this process."""
    if job.workers is not None:
        return job.workers
    if job.shares is not None:
        return len(job.shares)
    gpus = hardware.gpu_count() if job.device != "cpu" else 0
    return gpus + (job.device == "mixed") if gpus else hardware.core_count()


def start(job: Job, origins: Mapping[str, str]) -> int:
    """Run the job; returns the exit code."""
    if job.device == "mixed" and read_env().launcher == "none" and not hardware.gpu_count():
        raise UsageError(
            "device = 'mixed'",
            "PyTorch sees no GPU here",
            "leave it out: workers with GPUs may join all the same",
        )
    check_names(job)
    job = placed(job, origins)
    output, env = Path(job.output), read_env()
    owner = env.launcher == "none" or (
        env.rank == 0 and env.coordinator is None
    )  # a coordinator owns it itself
    with claimed(output) if owner else contextlib.nullcontext():
        if owner:
            make_fresh(output, job.resume, job.sinks)
        else:
            check_fresh(output, job.resume)
        return begin(ENTRY, Order(job, dict(origins), time.time()).to_json(), job)


def check_names(job: Job) -> None:
    """What the workers would find wrong only when the data are prepared. Raises `UsageError`."""
    from manyhands.core.registry import resolve
    from manyhands.models.build import check_name
    from manyhands.train.material import data_spec

    if job.model != "auto":
        check_name(job.model)
    for name in job.sinks:
        resolve("sinks", name)
    data_spec(job, job.data, "byte")
    if job.tokenizer != "auto":
        from manyhands.data.tokenize import parse

        parse(job.tokenizer)


def placed(job: Job, origins: Mapping[str, str]) -> Job:
    """Where no output was given: the default one, or the first of output-2, output-3, … that no run has yet."""
    path, number = Path(job.output), 1
    alone = read_env().launcher == "none"  # else each rank asks, and rank 0 may hold it already
    while "output" not in origins and (any(path.glob("checkpoint-*")) or (alone and in_use(path))):
        number += 1
        path = Path(f"{job.output}-{number}")
    return dataclasses.replace(job, output=str(path))


def begin(entry: str, argument: str, job: Job) -> int:
    """Run `entry` on the job's workers, as the job's launcher does; returns the exit code."""
    from manyhands.launch.launchers import chosen

    return chosen(job)(entry, argument, job)


# What a worker imports until its first step, or as the first one: it has them ready. Of the models any one will do: what is
# slow, they have in common. pyarrow imports pandas, where there is one, for its first array.
WARM = (
    *("torch", "torch._dynamo", "torch.distributed.tensor", "safetensors.torch", "tokenizers"),
    *("grpc", "grpc._channel", "pandas", "tomli_w"),
    *("fsspec.implementations.local", "rich.console", "rich.table"),
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.loss.loss_utils",
    *("manyhands.coordinate.client", "manyhands.data.prepare", "manyhands.models.build"),
    *("manyhands.strategy.optimizers", "manyhands.strategy.presets", "manyhands.tasks.pretrain"),
    *(
        "manyhands.balance.balancer",
        "manyhands.wire.form",
        "manyhands.wire.transfer",
        "manyhands.tasks.forward",
    ),
    *(
        f"manyhands.train.{name}"
        for name in (
            *("worker", "parts", "loop", "material", "enlist", "crew", "replica", "synchronous", "session"),
            *("explain", "ledger", "sinks", "summary", "terminal", "evaluate", "generate", "balancing"),
            *("resume", "voice"),
        )
    ),
)


def elastic_of(job: Job) -> Elastic | None:
    """How the job goes on when workers are lost; None: it does not. Raises `UsageError`: gRPC is absent."""
    workers = workers_of(job)
    if job.min_workers > workers:
        raise UsageError(
            f"min_workers = {job.min_workers} with {workers} workers",
            "the job begins with all of its workers",
            f"give --workers {job.min_workers} or more, or a smaller --min-workers",
        )
    if job.elastic == "off" or workers < 2:
        return None
    from manyhands.core.rpc import grpc_module
    from manyhands.launch.control import Elastic

    grpc_module()
    return Elastic(
        restarts=job.restarts,
        min_workers=job.min_workers,
        hang_s=job.hang_s,
        stuck_s=job.stuck_s,
        shared=job.shares_memory,
        warm=WARM,
    )


def servers_of(job: Job) -> ServerProcesses | None:
    """The parameter servers that the job's workers will need beside them. Raises `UsageError`: gRPC is absent."""
    from manyhands.placement.served import Served

    placement = job.strategy.placement
    if not isinstance(placement, Served) or placement.address:
        return None
    from manyhands.core.rpc import grpc_module
    from manyhands.launch.served import ServerProcesses

    grpc_module()
    return ServerProcesses(placement, Path(job.output), hang_s=job.hang_s)


STEPS = 600  # of the built-in job: about two minutes on two cores with bf16 units
STEPS_A_CORE = 75  # as long on cores without


def built_in() -> Iterator[tuple[str, str, Any]]:
    """The built-in job's own values: (option, whence, value). Its length is the same where several machines have to agree on it."""
    where = "the built-in job"
    yield "strategy", where, "ddp(lr=3e-3)"
    cores, steps = hardware.core_count(), STEPS
    if read_env().launcher == "none" and not (hardware.gpu_possible() or hardware.cpu_has_bf16()):
        steps = min(STEPS, STEPS_A_CORE * max(2, cores))
        where += (
            f", shortened: {cores} core{'s' if cores > 1 else ''} without bf16 units" if steps < STEPS else ""
        )
    yield "steps", where, steps


def lowest_layers(layers: Sequence[Layer]) -> list[Layer]:
    """What lies below the given layers: a resumed run's configuration, or the built-in job's where no data is named."""
    resumed = resumed_layer(layers)
    if resumed:
        return resumed
    given = {key.split(".")[0] for _, data in layers for key in data}
    if "data" in given or "task" in given:
        return []
    return [
        (where, {key: value})
        for key, where, value in built_in()
        if key not in given and not (key == "steps" and "epochs" in given)
    ]


def told_once(stack: Sequence[Layer], together: Sequence[Layer] = ()) -> list[Layer]:
    """All layers, where one that gives the length in one unit, or asks for the fixed order, takes back what excludes it from below.

    Args:
        together: the highest ones, of one command: they say one thing, and take back nothing from each other.
    """
    found: list[Layer] = []
    gone = _excluded({name: value for _, data in together for name, value in data.items()})
    for source, data in reversed(stack):
        found.append((source, {name: value for name, value in data.items() if name not in gone}))
        gone |= _excluded(data)
    return [*found[::-1], *together]


def _excluded(data: Mapping[str, Any]) -> set[str]:
    """The options that do not go with what `data` gives, and that it does not give itself."""
    given = {name for name, value in data.items() if value not in (None, False, "false", "no", "none")}
    return {other for name, other in EXCLUDES if name in given and other not in data}


def continued(layers: Sequence[Layer]) -> list[Layer]:
    """`layers` with what ``resume = "auto"`` means here: the output, where it holds a checkpoint; else nothing."""
    resume, output = _last(layers, "resume"), _last(layers, "output")
    if resume == AUTO:
        output = output or Job.output
        found = output if checkpoints(Path(output)) else None
        told = [(source, {**data, "resume": found} if "resume" in data else data) for source, data in layers]
        return [*told, (RESUME_AUTO, {"output": output})]
    return list(layers)


def _last(layers: Sequence[Layer], key: str) -> Any:
    """The value of a key in the highest layer that gives one."""
    return next((data[key] for _, data in reversed(layers) if data.get(key)), None)


def resumed_layer(layers: Sequence[Layer]) -> list[Layer]:
    """The configuration of the run that `resume` names, as the lowest layer: a resumed job needs no other option."""
    resume = _last(layers, "resume")
    if resume is None:
        return []
    output = run_of(str(resume))
    try:
        data = config.read_toml(str(output / "config.toml"))
    except UsageError:
        raise CheckpointError(
            f"{resume} is not a run of manyhands",
            "a run's directory holds config.toml and checkpoint-N",
            "give --resume the --output of an earlier run",
        ) from None
    data.pop("workers", None)  # another number of workers is welcome
    data.pop("shares", None)
    data.pop("launcher", None)  # and another launcher
    if data.get("device") == "mixed":  # each worker derives for its device what these say of the first one's
        for name in BY_DEVICE:
            data.pop(name, None)
    if data.get("device_batch") and data.get("micro_batch", 0) > data["device_batch"]:
        data["device_batch"] = data["micro_batch"]  # what an early release's passes had, whatever it said
    data["output"] = str(output)
    return [(f"{output}/config.toml", data)]


def run(job: Job | Mapping[str, Any] | None = None, /, **options: Any) -> dict[str, Any]:
    """Run a whole training job, as `manyhands train` does, and return its summary.

    Args:
        job: a `Job`, or its data form; further keyword options override it: ``run(data="corpus/*.txt", steps=100)``.

    Returns:
        What ``OUTPUT/summary.json`` holds.

    Raises:
        UsageError: the job cannot be.
        WorkerFailed: a worker failed; what it said was printed on standard error, and is in its log.
    """
    from manyhands.core.errors import WorkerFailed

    given: list[Layer] = []
    if job is not None:
        given.append(("job", config.to_data(job) if isinstance(job, Job) else job))
    layers = continued([*given, *((name, {name: value}) for name, value in options.items())])
    below = [*lowest_layers(layers), *layers[: len(given)]]
    made, origins = config.assemble(Job, told_once(below, layers[len(given) :]))
    made = placed(made, origins)
    code = start(made, {"output": "chosen", **origins})
    if code != 0:
        raise WorkerFailed(
            f"the job ended with exit code {code}",
            "0 is success",
            f"see the first failure above and {made.output}/logs",
        )
    summary: dict[str, Any] = json.loads((Path(made.output) / "summary.json").read_text())
    return summary
