"""Replicas are bitwise equal (promise 5): compared by fingerprints, and mended by majority where one is not.

A flipped bit, in memory that corrects no errors or in a core that computes wrongly, makes one replica differ from then on.
Each worker's fingerprint has two words for each of: parameters, the state of the agreed optimizer, and what of
the exchange's state all share. More than half of the workers with equal fingerprints are right; the others are
named, and with ``--on-divergence mend`` get everything from the first of the majority. Where some hold a number that is not
finite and others do not, only these have a vote, so that two workers are enough to mend a NaN. What a wrong replica had contributed
to agreements before it was found is in everybody's parameters; that is what ``--check-every`` bounds.

Where workers compute on several kinds of device, promise 5 holds within a kind; see ``aligning.py``.
"""

from __future__ import annotations

import math
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from manyhands.core.errors import Diverged
from manyhands.core.events import Emit, Mended, ignore
from manyhands.core.hardware import device_name
from manyhands.core.request import Gather
from manyhands.exchange.combine import is_own, leaves

if TYPE_CHECKING:
    from torch import Tensor, nn

    from manyhands.core.types import Wire
    from manyhands.train.replica import Replica

    Shared = Mapping[str, Mapping[str, Tensor]]

PIECE_BYTES = 1 << 26
AGAIN = 2  # comparisons after a mending that mend once more, before replicas that differ end the job
KINDS = ("parameters", "optimizer state", "exchange state")


class Vote(NamedTuple):
    """`majority`: ranks that agree and are more than half of the votes; empty where there are none. `minority`: the others."""

    majority: tuple[int, ...]
    minority: tuple[int, ...]


def vote(fingerprints: Sequence[Sequence[int]], finite: Sequence[bool] = ()) -> Vote:
    """Who is right. Pure.

    Args:
        finite: of each, whether its numbers are; who is not has no vote where somebody is. Empty: all are.

    >>> vote([(1, 2), (1, 2), (1, 3)])
    Vote(majority=(0, 1), minority=(2,))
    >>> vote([(1,), (2,)])
    Vote(majority=(), minority=(0, 1))
    >>> vote([(1,), (2,)], finite=[False, True])
    Vote(majority=(1,), minority=(0,))
    """
    each = [tuple(f) for f in fingerprints]
    ranks = range(len(each))
    voters = [r for r in ranks if finite[r]] if any(finite) else list(ranks)
    best, votes = Counter(each[r] for r in voters).most_common(1)[0]
    if 2 * votes <= len(voters):
        return Vote((), tuple(ranks))
    right = tuple(r for r in voters if each[r] == best)
    return Vote(right, tuple(r for r in ranks if r not in right))


def check_agreement(
    replica: Replica,
    *,
    mend: bool = False,
    who: Sequence[tuple[str, str]] = (),
    emit: Emit = ignore,
    again: int = AGAIN,
) -> str:
    """Compare fingerprints over the workers; the parameters' in words. Collective, between steps.

    Args:
        mend: give the minority the majority's state, and emit `Mended`, instead of raising.
        who: (seat, host) of each rank, for messages.

    Raises:
        Diverged: some differ, and `mend` is not given, or there is no majority, or it did not help.
    """
    with replica.agreed():
        parameters = fingerprint(replica.model)
    if not replica.method.agrees:
        return words(parameters)
    shared = _shared(replica)
    mine = torch.cat([parameters, *(fingerprint_of(shared[kind].values()) for kind in KINDS[1:])])
    counts = [len(shared[kind]) for kind in KINDS]  # an optimizer's state may not have begun everywhere
    rows = _gathered(torch.cat([mine, torch.tensor([*counts, kind_of(replica.device)])]), replica.wire)
    table, kinds = [row[:-1] for row in rows], [row[-1] for row in rows]
    finite = finite_of(replica, shared, table)
    if len(set(kinds)) > 1 and shared["parameters"]:
        from manyhands.train.aligning import align

        return align(replica, shared, table, kinds, finite, mend=mend, who=who, emit=emit)
    verdict = vote(table, finite)
    if verdict.minority:
        can = mend and bool(shared["parameters"])
        refuse(replica.steps, table, range(len(table)), verdict, finite, can, who)
        begun = time.perf_counter()
        size, _ = replace(replica, shared, table, verdict, verdict.minority)
        tell(replica.steps, table, verdict.majority[0], verdict.minority, who, size, begun, emit)
        # another replica may have changed meanwhile
        return check_agreement(replica, mend=again > 0, who=who, emit=emit, again=again - 1)
    return words(parameters)


def refuse(
    step: int,
    table: Sequence[Sequence[int]],
    ranks: Sequence[int],
    verdict: Vote,
    finite: Sequence[bool],
    mend: bool,
    who: Sequence[tuple[str, str]],
) -> None:
    """Raises `Diverged` where the minority of these ranks cannot, or shall not, be mended."""
    names = {rank: _name(rank, who) + ("" if finite[rank] else ", not finite") for rank in ranks}
    if not verdict.majority:
        raise _no_majority(step, [names[r] for r in ranks], [table[r] for r in ranks])
    if not mend:
        raise _minority(step, names, table, verdict)


def tell(
    step: int,
    table: Sequence[Sequence[int]],
    source: int,
    mended: Sequence[int],
    who: Sequence[tuple[str, str]],
    size_bytes: int,
    begun: float,
    emit: Emit,
) -> None:
    """Emit a `Mended` for each of these ranks."""
    for rank in mended:
        seat, host = who[rank] if who else (f"worker {rank}", "")
        emit(
            Mended(
                seat=seat,
                rank=rank,
                host=host,
                step=step,
                what=_what(table, rank, source),
                source=who[source][0] if who else f"worker {source}",
                size_bytes=size_bytes,
                wall_s=time.perf_counter() - begun,
            )
        )


def agree_at_start(model: nn.Module, wire: Wire) -> None:
    """All workers have built the same model. Collective. Raises `Diverged`."""
    table = _gathered(fingerprint(model), wire)
    for rank, other in enumerate(table):
        if other != table[0]:
            raise Diverged(
                f"the initial parameters of worker {rank} differ from worker 0's",
                "replicas are bitwise equal",
                "build the model the same everywhere",
            )


def same_parameters(replica: Replica, who: Sequence[tuple[str, str]]) -> str:
    """The parameters' fingerprint in words, which is everybody's. Collective. Raises `Diverged`."""
    with replica.agreed():
        mine = fingerprint(replica.model)
    table = _gathered(mine, replica.wire)
    if any(row != table[0] for row in table):
        raise _no_majority(replica.steps, [_name(rank, who) for rank in range(len(table))], table)
    return words(mine)


# -- what all share


def shared_of(replica: Replica, optimizer_state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What `Method.shared` gives where the model holds the agreed parameters: the live tensors, by kind and name."""
    return {
        KINDS[0]: dict(replica.model.state_dict()),
        KINDS[1]: dict(optimizer_state),
        KINDS[2]: exchange_shared(replica.states),
    }


def exchange_shared(states: Sequence[Any]) -> dict[str, Tensor]:
    """The leaves of an exchange's state that are equal on every worker."""
    return {
        f"{bucket}.{'.'.join(path)}": leaf
        for bucket, state in enumerate(states)
        for path, leaf in leaves(state)
        if not is_own(path)
    }


def _shared(replica: Replica) -> Shared:
    """Empty where the method does not say: then only parameters are compared, and nothing can be mended."""
    found = getattr(replica.method, "shared", None)
    return found() if found is not None else {kind: {} for kind in KINDS}


def replace(
    replica: Replica, shared: Shared, table: Sequence[Sequence[int]], verdict: Vote, wrong: Sequence[int]
) -> tuple[int, float]:
    """Overwrite the minority's shared tensors with the first majority rank's. Collective.

    Args:
        wrong: those of the minority whose own way since the last agreement is not to be kept.

    Returns:
        (how many bytes that was, ‖mine before − theirs‖ / ‖theirs‖ of the parameters; 0 for the majority).
    """
    wire, source = replica.wire, verdict.majority[0]
    late, size, apart, whole = wire.rank in verdict.minority, 0, 0.0, 0.0
    forget = getattr(replica.method, "mended", None)
    keep = getattr(replica.method, "keep_way", None) if wire.rank not in wrong else None
    after = keep() if late and keep is not None else forget
    everywhere = [
        kind for i, kind in enumerate(KINDS) if len({row[2 * len(KINDS) + i] for row in table}) == 1
    ]
    with torch.no_grad():
        for kind in everywhere:
            for tensor in shared[kind].values():
                flat = tensor.detach().contiguous().reshape(-1)
                nothing = flat[:0]
                for begin in range(0, flat.numel(), max(1, PIECE_BYTES // flat.element_size())):
                    piece = flat[begin : begin + max(1, PIECE_BYTES // flat.element_size())]
                    sent = wire.begin(Gather(piece if wire.rank == source else nothing)).wait()[source]
                    size += piece.numel() * piece.element_size()
                    if late:
                        theirs = sent.to(piece.device)
                        if kind == KINDS[0] and piece.is_floating_point():
                            apart += float((piece.double() - theirs.double()).square().sum())
                            whole += float(theirs.double().square().sum())
                        piece.copy_(theirs)
                if late and flat.data_ptr() != tensor.data_ptr():  # it was not contiguous
                    tensor.copy_(flat.reshape(tensor.shape))
    if late and after is not None:
        after()
    return size, math.sqrt(apart / whole) if whole else 0.0


def finite_of(replica: Replica, shared: Shared, table: Sequence[Sequence[int]]) -> list[bool]:
    """Of each rank, whether all that it shares is finite; of none, where nobody's is. Collective where fingerprints differ."""
    if all(row == table[0] for row in table):
        return [True] * len(table)
    tensors = [tensor.detach() for named in shared.values() for tensor in named.values()]
    looked = [t.isfinite().all() for t in tensors if t.is_floating_point() or t.is_complex()]
    told = _gathered(torch.tensor([int(all(bool(each) for each in looked))]), replica.wire)
    found = [bool(row[0]) for row in told]
    return found if any(found) else [True] * len(table)


# -- words


def _name(rank: int, who: Sequence[tuple[str, str]]) -> str:
    return f"worker {rank} ({who[rank][0]} on {who[rank][1]})" if who else f"worker {rank}"


def _what(table: Sequence[Sequence[int]], rank: int, right: int) -> str:
    """Which kinds differ."""
    kinds = [
        kind
        for i, kind in enumerate(KINDS)
        if table[rank][2 * i : 2 * i + 2] != table[right][2 * i : 2 * i + 2]
    ]
    return " and ".join([", ".join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds)


def _minority(step: int, names: Mapping[int, str], table: Sequence[Sequence[int]], verdict: Vote) -> Diverged:
    wrong = ", ".join(f"{names[r]}: {_what(table, r, verdict.majority[0])}" for r in verdict.minority)
    verb, right = "differs" if len(verdict.minority) == 1 else "differ", len(verdict.majority)
    whose = f"{right} others'" if right > 1 else "other's"
    return Diverged(
        f"after step {step} {wrong} {verb} from the {whose}",
        "replicas are bitwise equal",
        "that machine computes or remembers wrongly: leave it out, and --resume from the last checkpoint; "
        "--on-divergence mend goes on with the majority's state",
    )


def _no_majority(step: int, names: Sequence[str], table: Sequence[Sequence[int]]) -> Diverged:
    what = _what(table, next(r for r in range(len(table)) if table[r] != table[0]), 0)
    return Diverged(
        f"after step {step} the {what} of {', '.join(names)} differ, and no majority says which are right",
        "replicas are bitwise equal, and mending takes more than half of the workers on one side",
        "--resume from the last checkpoint, on three or more workers if it happens again",
    )


# -- fingerprints


def fingerprint(model: nn.Module) -> Tensor:
    """Two 64-bit words that change with any bit of any parameter or persistent buffer: [2] int64."""
    return fingerprint_of(model.state_dict().values())


def fingerprint_of(tensors: Iterable[Tensor]) -> Tensor:
    """Word sums of the raw bits, and the same weighted by position: [2] int64.

    Wrap-around arithmetic, so order of addition and number of threads do not matter. Any single flipped bit changes
    both words.
    """
    plain = torch.zeros((), dtype=torch.int64)
    placed = torch.zeros((), dtype=torch.int64)
    sums = [(bits.sum(dtype=torch.int64), bits[::7].sum(dtype=torch.int64)) for bits in map(_bits, tensors)]
    for i, (word, some) in enumerate(
        sums
    ):  # after all sums were begun: a GPU is asked once, not between them
        whole = word.cpu()
        plain += whole
        placed += whole * (2 * i + 1) + (some.cpu() << 20)
    return torch.stack([plain, placed])


def kind_of(device: torch.device) -> int:
    """A number for all devices that compute alike."""
    return zlib.crc32(device_name(str(device)).encode()) if device.type != "cpu" else 0


def words(mine: Tensor) -> str:
    """A fingerprint for people and comparisons."""
    return f"{int(mine[0]) & (2**64 - 1):016x}{int(mine[1]) & (2**64 - 1):016x}"


def _gathered(mine: Tensor, wire: Wire) -> list[list[int]]:
    return [[int(word) for word in each] for each in wire.begin(Gather(mine, even=True)).wait()]


def _bits(tensor: Tensor) -> Tensor:
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().reshape(-1)
    if flat.dtype is torch.bool or flat.is_complex():
        flat = flat.to(torch.uint8) if flat.dtype is torch.bool else torch.view_as_real(flat).reshape(-1)
    return flat.view(ints[flat.element_size()])
