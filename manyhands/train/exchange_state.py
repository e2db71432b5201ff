"""The exchange's state in checkpoints: everybody's residuals, for any number of workers that continue.

In ``training/exchange.safetensors`` a leaf is called ``<bucket>.<path>``, for example ``0.inner.round``. Leaves under a key
"residual" are one worker's own and there once for each: ``0.residual.0@2`` is worker 2's. Only their sum over workers
matters (promise 4), so worker j of M takes Σ of those of the ranks i ≡ j (mod M): its own if as many workers continue,
and whatever their number the sum is what it was.

An inner optimizer's state is each worker's, too, and kept as ``local.<name>@<rank>``. Moments are no sums: worker j of M
continues with those of rank j, or of j modulo the number there were.

Collecting is collective. After an interruption rank 0 saves alone (`alone`): the others' residuals are then missing,
which ``state.json`` says (`record`) and a run that continues tells (`missing`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from manyhands.core.errors import CheckpointError
from manyhands.core.request import Gather, Scatter, Sum
from manyhands.exchange.combine import RESIDUAL, is_own, leaves

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Wire

LOCAL = "local"
PIECE_BYTES = 1 << 26  # residuals travel in pieces: only rank 0's host memory holds everybody's


# ------------------------------------------------------------------------------------------------ saving


def collect(
    states: Sequence[Any], wire: Wire, local: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Everybody's state as flat named tensors, on rank 0; empty on all others. Collective. Raises `PeerLost`.

    Args:
        states: of each bucket, as `Exchange.init` and `Agreed.state` give them.
        local: an inner optimizer's state, by name.
    """
    named = _collect_local(local or {}, wire)
    for name, leaf, own in named_leaves(states):
        if own:
            for rank, part in enumerate(_to_first(leaf, wire)):
                named[f"{name}@{rank}"] = part
        elif wire.rank == 0:
            named[name] = leaf
    return named


def alone(states: Sequence[Any], rank: int, local: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What `collect` gives of one worker's state, without asking the others."""
    named = {(f"{name}@{rank}" if own else name): leaf for name, leaf, own in named_leaves(states)}
    return named | {f"{LOCAL}.{name}@{rank}": tensor for name, tensor in (local or {}).items()}


def mine(
    states: Sequence[Any], rank: int, local: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Under the names that `collect` gives them: what all have alike, and what is this worker's own."""
    everybodys: dict[str, Tensor] = {}
    own = {f"{LOCAL}.{name}@{rank}": tensor.detach() for name, tensor in local.items()}
    for name, leaf, is_mine in named_leaves(states):
        if is_mine:
            own[f"{name}@{rank}"] = leaf
        else:
            everybodys[name] = leaf
    return everybodys, own


def record(named: Iterable[str], size: int) -> dict[str, Any]:
    """For ``state.json``: how many workers there were, and whose residuals `named` has (all of them if nobody has any)."""
    kept = sorted({int(rank) for bucket, _, rank in map(_split, named) if rank and bucket != LOCAL})
    return {"workers": size, "residuals_of": kept or list(range(size))}


def named_leaves(states: Sequence[Any]) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, leaf, whether it is one worker's own)."""
    for bucket, state in enumerate(states):
        for path, leaf in leaves(state):
            if any("." in part or "@" in part for part in path):
                raise CheckpointError(
                    f"exchange state {path}", "names in it have neither . nor @", "rename it"
                )
            yield ".".join((str(bucket), *path)), leaf.detach(), is_own(path)


def _collect_local(local: Mapping[str, Tensor], wire: Wire) -> dict[str, Tensor]:
    """Everybody's inner optimizer on rank 0. A worker that had nothing to do yet may have less than others."""
    facts = {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in local.items()}
    data = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    everyones = [json.loads(bytes(part.tolist())) for part in wire.begin(Gather(data)).wait()]
    named: dict[str, Tensor] = {}
    for name, (shape, kind) in sorted({n: f for facts in everyones for n, f in facts.items()}.items()):
        mine = local.get(name)
        if mine is None:
            mine = torch.zeros(shape, dtype=getattr(torch, kind))
        for rank, part in enumerate(_to_first(mine.detach(), wire)):
            if name in everyones[rank]:
                named[f"{LOCAL}.{name}@{rank}"] = part
    return named


def _split(name: str) -> tuple[str, str, str]:
    """``0.residual.0@2`` as bucket, path and rank."""
    whole, _, rank = name.rpartition("@") if "@" in name else (name, "", "")
    bucket, _, path = whole.partition(".")
    return bucket, path, rank


def _to_first(leaf: Tensor, wire: Wire) -> list[Tensor]:
    """Everybody's `leaf` in host memory, in rank order, on rank 0; nothing on the others."""
    if wire.size == 1:
        return [leaf]
    flat = leaf.contiguous().reshape(-1)
    nothing = flat[:0]
    whole = [torch.empty(flat.numel(), dtype=leaf.dtype) for _ in range(wire.size if wire.rank == 0 else 0)]
    step = PIECE_BYTES // leaf.element_size()
    for begin in range(0, flat.numel(), step):
        piece = flat[begin : begin + step]
        parts = wire.begin(Scatter([piece] + [nothing] * (wire.size - 1))).wait()
        for target, part in zip(whole, parts if wire.rank == 0 else (), strict=True):
            target[begin : begin + step] = part
    return [w.reshape(leaf.shape) for w in whole]


# --------------------------------------------------------------------------------------------- restoring


def restore(
    states: Sequence[Any], named: Mapping[str, Tensor], *, rank: int, size: int, path: Path | str
) -> list[Any]:
    """The states that worker `rank` of `size` continues with. Not collective.

    Args:
        states: as this run's exchange has them at its start; they say what must be there, and where.
        named: what `collect` gave, of any number of workers (`Stored` reads it from a file as it is needed).
        path: the checkpoint, for messages.

    Raises:
        CheckpointError: it is of another exchange, or its buckets were cut otherwise.
    """
    wanted = {name: (leaf, own) for name, leaf, own in named_leaves(states)}
    holders: dict[str, dict[int, str]] = {}
    for name in named:
        plain, _, holder = name.rpartition("@") if "@" in name else (name, "", "")
        if plain.startswith(f"{LOCAL}."):
            continue
        holders.setdefault(plain, {})[int(holder or 0)] = name
    if (
        not holders
    ):  # of an exchange that keeps nothing, such as all-reduce: nothing is lost by beginning anew
        return list(states)
    shapes = {plain: _shape(named, next(iter(names.values()))) for plain, names in holders.items()}
    _fits({name: tuple(leaf.shape) for name, (leaf, _) in wanted.items()}, shapes, path)
    found: dict[str, Tensor] = {}
    for name, (leaf, own) in wanted.items():
        if not own:
            found[name] = named[name].to(leaf.device)
            continue
        total = torch.zeros_like(leaf, device="cpu")
        mine = [n for holder, n in sorted(holders[name].items()) if holder % size == rank]
        for stored in mine:
            # one residual is taken over bit by bit, a negative zero included
            total = named[stored].clone() if len(mine) == 1 else total + named[stored]
        found[name] = total.to(leaf.device)
    return [_rebuilt(state, (str(bucket),), found) for bucket, state in enumerate(states)]


def resum(states: Sequence[Any], wire: Wire) -> None:
    """What an exchange keeps as the sum of everybody's residuals (EF21's ``agreed``), of the workers there are now. Collective.

    Whoever was lost has taken its own along: what it had agreed with the others would stay in the sum for ever.
    """
    for state in states:
        for own, everyones in _sums(state):
            everyones.copy_(wire.begin(Sum(own.reshape(-1).clone())).wait().reshape(everyones.shape))


def keep_estimates(mine: Sequence[Any], states: Sequence[Any]) -> None:
    """My own of what an exchange keeps the sum of, into `states`, which have that sum."""
    for old, new in zip(mine, states, strict=True):
        for (own, _), (target, _) in zip(_sums(old), _sums(new), strict=True):
            target.copy_(own)


def _sums(state: Any) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(state, Mapping):
        if {RESIDUAL, "agreed"} <= state.keys():
            yield from zip(state[RESIDUAL], state["agreed"], strict=True)
        for item in state.values():
            yield from _sums(item)
    elif isinstance(state, (list, tuple)):
        for item in state:
            yield from _sums(item)


def local(named: Mapping[str, Tensor], *, rank: int) -> dict[str, Tensor]:
    """The inner optimizer's state that worker `rank` continues with, by name; empty if none was kept."""
    found = [name for name in named if name.startswith(f"{LOCAL}.")]
    ranks = sorted({int(name.rpartition("@")[2]) for name in found})
    if not ranks:
        return {}
    holder = rank if rank in ranks else ranks[rank % len(ranks)]
    return {
        name.rpartition("@")[0].removeprefix(f"{LOCAL}."): named[name]
        for name in found
        if name.rpartition("@")[2] == str(holder)
    }


def missing(state: Mapping[str, Any]) -> str | None:
    """What a run that continues from ``state.json`` = `state` must be told of lost residuals; None: nothing is lost."""
    facts = state.get("exchange") or {}
    size, kept = int(facts.get("workers", 0)), set(facts.get("residuals_of", ()))
    lost = [rank for rank in range(size) if rank not in kept]
    if not lost:
        return None
    who = f"worker {lost[0]}" if len(lost) == 1 else f"workers {', '.join(map(str, lost))}"
    return (
        f"the checkpoint was written by worker 0 alone, after an interruption: what {who} of {size} had held back "
        "of earlier contributions is missing, and training continues without it"
    )


class Stored(Mapping[str, "Tensor"]):
    """The tensors of a safetensors file, each read when it is asked for. An absent file holds none.

    Raises:
        CheckpointError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._file: Any = None
        if path.exists():
            try:
                self._file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                rule = "it holds the exchange's state"
                raise CheckpointError(f"{path}: {error}", rule, "give another checkpoint") from None
        self._names: list[str] = list(self._file.keys()) if self._file else []

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        return tuple(self._file.get_slice(name).get_shape())


def _shape(named: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    return named.shape(name) if isinstance(named, Stored) else tuple(named[name].shape)


def _fits(wanted: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]], path: Path | str) -> None:
    if wanted == given:
        return
    paths = [{_split(name)[1] for name in names} for names in (wanted, given)]
    if paths[0] == paths[1]:
        counts = [len({_split(name)[0] for name in names}) for names in (given, wanted)]
        unlike = next(n for n in sorted(given) if wanted.get(n) != given[n])
        here = f"{list(wanted[unlike])} here" if unlike in wanted else "absent here"
        raise CheckpointError(
            f"{path}: the exchange's state is of {counts[0]} buckets, this run has {counts[1]}"
            f" ({unlike} is {list(given[unlike])} there, {here})",
            "what was held back belongs to the buckets it was held back from",
            "continue with the same bucket_mb and the same model",
        )
    names = sorted(set(wanted) ^ set(given))
    raise CheckpointError(
        f"{path}: the exchange's state {', '.join(names[:3])} {'is unknown' if names[0] in given else 'is missing'}",
        "a checkpoint continues with the exchange it was written with",
        "give the same --strategy",
    )


def _rebuilt(state: Any, path: tuple[str, ...], found: Mapping[str, Tensor]) -> Any:
    """A pytree like `state` with the leaves of `found`."""
    if isinstance(state, Mapping):
        return {key: _rebuilt(item, (*path, str(key)), found) for key, item in state.items()}
    if isinstance(state, (list, tuple)):
        items = [_rebuilt(item, (*path, str(i)), found) for i, item in enumerate(state)]
        return type(state)(*items) if hasattr(state, "_fields") else type(state)(items)
    return None if state is None else found[".".join(path)]
