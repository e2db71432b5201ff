"""From the environment to a joined world, and from a replica to disk and back: shared by the API and the main job."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from manyhands.core.environment import Env, read_env
from manyhands.core.errors import CheckpointError, UsageError
from manyhands.train import checkpoint
from manyhands.wire.world import World, connect

if TYPE_CHECKING:
    from manyhands.train.replica import Replica


def choose_device(device: str, env: Env) -> torch.device:
    """This worker's device: a GPU of its own where there is one, else the CPU. Raises `UsageError`."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not available:
        raise UsageError(
            "device = 'cuda'", "PyTorch sees no GPU here", "use --device cpu, or install a CUDA build"
        )
    if device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", env.local_rank % available)


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


def exchange_state(replica: Replica) -> dict[str, torch.Tensor]:
    """The exchange's state as flat named tensors, world-free."""
    flat: dict[str, torch.Tensor] = {}
    for bucket, state in enumerate(replica.states):
        leaves, _ = torch.utils._pytree.tree_flatten(state)
        for i, leaf in enumerate(leaves):
            flat[f"{bucket}.{i}"] = leaf
    return flat


def snapshot_of(replica: Replica, state: dict[str, Any], tokenizer: Path | None) -> checkpoint.Snapshot:
    """A CPU copy of everything a checkpoint holds; training may go on."""
    return checkpoint.snapshot(
        replica.model,
        step=replica.steps,
        state={**state, "step": replica.steps, "tokens": replica.tokens, "skipped": replica.skipped},
        optimizer=replica.optimizer.state_by_name(),
        exchange=exchange_state(replica),
        tokenizer_dir=tokenizer,
    )


def save_replica(world: World, replica: Replica, directory: Path, *, tokenizer: Any = None) -> Path:
    """Rank 0 writes ``directory/checkpoint-N``; returns when it is durable, on every rank. Raises `CheckpointError`."""
    replica.check_agreement()
    path = directory / f"checkpoint-{replica.steps}"
    error = ""
    if world.rank == 0:
        try:
            if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
                import tempfile

                with tempfile.TemporaryDirectory() as temporary:
                    tokenizer.save_pretrained(temporary)
                    checkpoint.save(snapshot_of(replica, {}, Path(temporary)), directory, keep=1 << 30)
            else:
                checkpoint.save(
                    snapshot_of(replica, {}, Path(tokenizer) if tokenizer else None), directory, keep=1 << 30
                )
        except CheckpointError as failure:
            error = str(failure)
    error = world.gather(error)[0]
    if error:
        raise CheckpointError(error)
    return path


def restore_replica(replica: Replica, path: Path) -> int:
    """Parameters, optimizer, counters; checked before anything is touched. Returns the step to continue with."""
    found = checkpoint.resolve_resume(str(path), path)
    loaded = checkpoint.load_state(found)
    load_parameters(replica.model, found)
    replica.optimizer.load_state_by_name(loaded.optimizer)
    replica.steps = int(loaded.state["step"])
    replica.tokens = int(loaded.state["tokens"])
    replica.skipped = int(loaded.state.get("skipped", 0))
    _load_exchange(replica, loaded.exchange)
    replica.check_agreement()
    return replica.steps


def load_parameters(model: torch.nn.Module, path: Path) -> None:
    """The parameters of a verified checkpoint into `model`, in place. Raises `CheckpointError` on other names or shapes."""
    from safetensors.torch import load_file

    index = path / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if index.exists()
        else ["model.safetensors"]
    )
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors.update(load_file(path / file))
    own = dict(model.named_parameters()) | dict(model.state_dict().items())
    missing = {n for n in model.state_dict() if n not in tensors} - _tied(model)
    unknown = set(tensors) - set(own)
    if missing or unknown:
        raise CheckpointError(
            f"{path}: parameters {sorted(missing or unknown)[:3]} {'are missing' if missing else 'are unknown'}",
            "a checkpoint continues with the model it was written for",
            "give the same --model",
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            if own[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{path}: {name} has shape {list(tensor.shape)}, the model's has {list(own[name].shape)}",
                    "they must be equal",
                    "",
                )
            own[name].copy_(tensor)


def _tied(model: torch.nn.Module) -> set[str]:
    """Names of the state dict whose storage also has an earlier name."""
    seen: dict[int, str] = {}
    tied: set[str] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen and tensor.numel():
            tied |= {name, seen[tensor.data_ptr()]}
        seen.setdefault(tensor.data_ptr(), name)
    return tied


def _load_exchange(replica: Replica, flat: dict[str, torch.Tensor]) -> None:
    for bucket, state in enumerate(replica.states):
        leaves, spec = torch.utils._pytree.tree_flatten(state)
        loaded = [flat[f"{bucket}.{i}"].to(leaf.device) for i, leaf in enumerate(leaves)]
        replica.states[bucket] = torch.utils._pytree.tree_unflatten(loaded, spec)
