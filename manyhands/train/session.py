"""From the environment to a joined world, and from a replica to disk and back: shared by the API and the main job."""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from manyhands.core.environment import Env, read_env
from manyhands.core.errors import CheckpointError, ManyhandsError, UsageError
from manyhands.models.store import write_config
from manyhands.train import checkpoint, exchange_state, joint
from manyhands.train.joint_division import Holdings
from manyhands.train.sharded_pieces import Piece
from manyhands.wire.world import World, connect

if TYPE_CHECKING:
    from manyhands.train.replica import Replica


def choose_device(device: str, env: Env) -> torch.device:
    """This worker's device: a GPU of its own where there is one, else the CPU. Raises `UsageError`.

    Args:
        device: "auto", "cpu", "cuda" (several workers may share one), or "mixed" (those without one of their own take the CPU).
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not available:
        raise UsageError(
            "device = 'cuda'", "PyTorch sees no GPU here", "use --device cpu, or install a CUDA build"
        )
    if device == "cpu" or not available or (device == "mixed" and env.local_rank >= available):
        return torch.device("cpu")
    return torch.device("cuda", env.local_rank % available)


def transport_for(placement: Any, transport: str) -> str:
    """The transport that a placement needs, where it needs one. Raises `UsageError` where another was given."""
    needed = (
        "group"
        if getattr(placement, "needs_group", False)
        else "shared"
        if getattr(placement, "needs_shared_memory", False)
        else None
    )
    if needed is None or transport == needed:
        return transport
    if transport != "auto":
        raise UsageError(
            f"transport = {transport!r} with placement = {placement!r}",
            f"this placement needs transport {needed!r}",
            "leave out --transport",
        )
    return needed


def connect_from_environment(*, device: str = "auto", transport: str = "auto") -> tuple[World, torch.device]:
    """Join as the launcher's variables say."""
    env = read_env()
    chosen = choose_device(device, env)
    world = connect(
        rank=env.rank,
        size=env.world_size,
        local_size=env.local_world_size,
        device=chosen,
        store_path=env.store,
        master=(env.master_addr, env.master_port) if env.master_addr and env.master_port else None,
        agent_store=env.agent_store,
        transport=transport,
        host=env.host,
    )
    return world, chosen


def autocast_for(precision: str, device_type: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """The context of forward passes for a precision: bf16 and fp16 by autocast, fp32 and fp64 plain."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if precision in dtypes:
        return lambda: torch.autocast(device_type, dtype=dtypes[precision])
    if precision not in ("fp32", "fp64"):
        raise UsageError(f"precision = {precision!r}", "it is fp32, bf16, fp16 or fp64", "")
    return contextlib.nullcontext


def exchange_named(replica: Replica, *, collective: bool = True) -> dict[str, torch.Tensor]:
    """The state of the exchange and of inner optimizers as flat named tensors: everybody's on rank 0, or mine."""
    local = replica.method.local_state()
    if collective:
        return exchange_state.collect(replica.states, replica.wire, local)
    return exchange_state.alone(replica.states, replica.wire.rank, local)


def snapshot_of(
    replica: Replica, state: dict[str, Any], tokenizer: Path | None, *, collective: bool = True
) -> checkpoint.Snapshot | None:
    """On rank 0 a CPU copy of everything a checkpoint holds, else None; training may go on.

    Args:
        collective: whether all workers call it; without, None where the state is divided among them.
    """
    if not collective and getattr(replica.method, "divided", False):
        return None
    own = getattr(replica.method, "snapshot", None)
    if own is not None:
        taken: checkpoint.Snapshot | None = own(state, tokenizer)
        return taken
    optimizer = replica.optimizer_state()
    exchange = exchange_named(replica, collective=collective)
    facts: dict[str, Any] = {"step": replica.steps, "tokens": replica.tokens, "skipped": replica.skipped}
    if exchange:
        facts["exchange"] = exchange_state.record(exchange, replica.wire.size)
    with replica.agreed(collective=collective):
        if replica.wire.rank != 0:
            return None
        return checkpoint.snapshot(
            replica.model,
            step=replica.steps,
            state={**state, **facts},
            optimizer=optimizer,
            exchange=exchange,
            tokenizer_dir=tokenizer,
        )


def joint_of(
    world: World,
    replica: Replica,
    state: dict[str, Any],
    tokenizer: Path | None,
    output: Path | None,
    *,
    seats: Sequence[str],
) -> joint.Share | joint.JointSnapshot | None:
    """My part of a checkpoint that the workers write together; None where they cannot. Collective.

    Args:
        state: of rank 0.
        output: where checkpoints go; the workers may or may not see the same directory there. None: this one does not take
            part (on rank 0: nobody does).
        seats: by rank.
    """
    began = time.perf_counter()
    method, kinds = replica.method, {member.device.partition(":")[0] for member in world.members}
    if world.size == 1 or len(kinds) > 1 or not getattr(method, "joint", False):
        return None
    own: dict[str, dict[str, tuple[Piece, torch.Tensor]]] = getattr(method, "pieces", dict)()
    common: dict[str, Mapping[str, torch.Tensor]] = {}
    if checkpoint.OPTIMIZER not in own:
        common[checkpoint.OPTIMIZER] = replica.optimizer_state()
    of_exchange = checkpoint.EXCHANGE not in own
    if of_exchange:
        common[checkpoint.EXCHANGE], mine = exchange_state.mine(
            replica.states, world.rank, method.local_state()
        )
        own[checkpoint.EXCHANGE] = {
            name: (Piece.all_of(name, tensor), tensor) for name, tensor in mine.items()
        }

    def facts(exchange: Iterable[str]) -> checkpoint.Facts:
        counters: dict[str, Any] = {
            "step": replica.steps,
            "tokens": replica.tokens,
            "skipped": replica.skipped,
        }
        names = list(exchange)
        if names and of_exchange:
            counters["exchange"] = exchange_state.record(names, world.size)
        return checkpoint.Facts(
            step=replica.steps,
            write_config=getattr(method, "write_config", functools.partial(write_config, replica.model)),
            state=json.loads(json.dumps({**state, **counters})),
            tokenizer_dir=tokenizer,
            taken_s=0.0,
        )

    divided = checkpoint.WEIGHTS in own  # then `agreed` would put the whole model together on every worker
    with contextlib.nullcontext() if divided else replica.agreed():
        if not divided:
            common[checkpoint.WEIGHTS] = checkpoint.untied(replica.model)
        return joint.begin(
            world,
            Holdings(common, own),
            output,
            facts,
            step=replica.steps,
            seats=seats,
            began=began,
        )


def whole_weights(replica: Replica, *, collective: bool = True) -> Mapping[str, torch.Tensor] | None:
    """The state dict under all its names; None where it is divided and is not put together on this worker."""
    whole = getattr(replica.method, "whole_weights", None)
    if whole is None:
        return replica.model.state_dict()
    found: Mapping[str, torch.Tensor] | None = whole() if collective else None
    return found


def save_replica(world: World, replica: Replica, directory: Path, *, tokenizer: Any = None) -> Path:
    """Rank 0 writes ``directory/checkpoint-N``; returns when it is durable, on every rank.

    Raises:
        CheckpointError: it could not be written, on every rank.
    """
    replica.meet()
    replica.check_agreement()
    error: ManyhandsError | None = None
    with _tokenizer_dir(tokenizer if world.rank == 0 else None) as found:
        taken = snapshot_of(replica, {}, found)
        if taken is not None:
            try:
                checkpoint.save(taken, directory, keep=1 << 30)
            except ManyhandsError as failure:
                error = failure
    said = world.gather(str(error) if error else "")[0]
    if error is not None:
        raise error
    if said:
        raise CheckpointError(said)
    return directory / f"checkpoint-{replica.steps}"


@contextlib.contextmanager
def _tokenizer_dir(tokenizer: Any) -> Iterator[Path | None]:
    """A directory with the tokenizer's files: the one given, or what its `save_pretrained` writes."""
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        yield Path(tokenizer) if tokenizer else None
        return
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        yield Path(temporary)


def restore_replica(replica: Replica, path: Path, *, verified: bool = False) -> int:
    """Parameters, optimizer, counters; checked before anything is touched. Returns the step to continue with.

    Args:
        path: a checkpoint, or an output directory (its newest one).
        verified: its files were compared with their hashes before.

    Raises:
        CheckpointError: it is not as it was written, or of another model, optimizer or exchange.
    """
    found = checkpoint.resolve_resume(str(path), path)
    if not verified:
        checkpoint.verify(found)
    own = getattr(replica.method, "restore", None)
    if own is not None:
        own(found)
        replica.check_agreement()
        return replica.steps
    loaded = checkpoint.load_state(found)
    try:
        steps, tokens = int(loaded.state["step"]), int(loaded.state["tokens"])
    except KeyError as key:
        raise CheckpointError(
            f"{found}/training/state.json has no {key}",
            "a checkpoint that can be continued says how far it is",
            "give a checkpoint-N that manyhands wrote",
        ) from None
    weights = _read_parameters(replica.model, found)
    rank, size = replica.wire.rank, replica.wire.size
    states = exchange_state.restore(replica.states, loaded.exchange, rank=rank, size=size, path=found)
    local = exchange_state.local(loaded.exchange, rank=rank)
    replica.load_optimizer_state(loaded.optimizer)  # refuses what does not fit, too
    replica.method.load_local_state(local)
    _copy_parameters(replica.model, weights)
    replica.states[:] = states
    if exchange_state.missing(loaded.state):
        exchange_state.resum(replica.states, replica.wire)
    replica.steps, replica.tokens = steps, tokens
    replica.skipped = int(loaded.state.get("skipped", 0))
    replica.method.restart()
    replica.check_agreement()
    return replica.steps


def load_parameters(model: torch.nn.Module, path: Path) -> None:
    """The parameters of a verified checkpoint into `model`, in place.

    Raises:
        CheckpointError: other names or shapes; then `model` is as it was.
    """
    _copy_parameters(model, _read_parameters(model, path))


def _copy_parameters(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _read_parameters(model: torch.nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, which fit `model`. Raises `CheckpointError` where they do not."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path / "model.safetensors")
    except (OSError, SafetensorError) as error:
        what = f"{path / 'model.safetensors'}: {error}"
        raise CheckpointError(what, "a checkpoint holds the model's tensors", "give another one") from None
    own = model.state_dict()
    missing = {names[0] for names in _same_memory(own) if not any(name in tensors for name in names)}
    wrong = sorted(missing) or sorted(set(tensors) - set(own))
    if wrong:
        raise CheckpointError(
            f"{path}: parameters {', '.join(wrong[:3])} {'are missing' if missing else 'are unknown'}",
            "a checkpoint continues with the model it was written for",
            "give the same --model",
        )
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(tensor.shape)}, the model's has {list(own[name].shape)}",
                "a checkpoint continues with the model it was written for",
                "give the same --model",
            )
    return tensors


def _same_memory(own: dict[str, torch.Tensor]) -> list[list[str]]:
    """The names of a state dict, those of tied parameters together: one of them is in the file."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in own.items():
        groups.setdefault(tensor.data_ptr() if tensor.numel() else name, []).append(name)
    return list(groups.values())
