"""What combinators share: attributes that pass through, talks that are wrapped, states that are walked, refusals.

A combinator is an exchange that holds others as fields and wraps their talks with ``yield from``. What the step asks of
an exchange by attribute (how contributions are cut, see `manyhands.core.types.Exchange`) is answered by the inner one:

    by_tensor, bucket_mb    as for every exchange
    holds                   keeps something back between rounds, under "residual" in its state (default: False);
                            ``flush(state, like)`` then gives what is owed, to be sent otherwise, and the state after
    conserves               the sum of all that was ever agreed plus what is held is the sum of what came in (default: True)
    contracts               what it leaves out is smaller than what came in, so that held back it stays small (default: True)
    rounds_sums             the sum itself is rounded on its way, which is in nobody's ``sent`` (default: False)
    selects                 it sends some entries of a tensor and leaves out others (default: False); where that differs from
                            tensor to tensor ``selected(like)`` says it of each
    follows                 what it keeps are estimates of contributions (default: False);
                            ``renewed(delta, mean, state)`` then takes those of a round that went another way, without loss
    fills                   it has no zero: one beside other values is sent as something else, and that held back (default: False)
    accelerates             what it agrees on is a velocity, larger than the mean of contributions (default: False)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from manyhands.core.errors import UsageError
from manyhands.core.request import REPLICA, Request, Sum

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Agreed, Talk, Tensors

RESIDUAL = "residual"
DEFAULTS = {
    "by_tensor": False,
    "by_place": False,
    "by_model": False,
    "bucket_mb": math.inf,
    "holds": False,
    "conserves": True,
    "contracts": True,
    "rounds_sums": False,
    "selects": False,
    "fills": False,
    "follows": False,
    "accelerates": False,
}


def trait(exchange: Any, name: str) -> Any:
    """What `exchange` says of itself, or the default."""
    return getattr(exchange, name, DEFAULTS[name])


def passed(name: str, *fields: str) -> Any:
    """A property: the trait of the exchanges in `fields`; "any" of several, for ``conserves`` and ``contracts`` "all"."""

    def get(self: Any) -> Any:
        values = [trait(getattr(self, field), name) for field in fields or ("inner",)]
        return min(values) if name in ("conserves", "contracts", "bucket_mb") else max(values)

    return property(get)


def refuse(
    who: str,
    field: str,
    inner: Any,
    *,
    holds: bool = True,
    tensors: bool = True,
    exact: bool = False,
    kept: bool = False,
) -> None:
    """Raise `UsageError` where `inner` cannot stand in `who`.

    Args:
        holds: whether it may keep residuals of its own.
        tensors: whether it may want tensors in their own shapes.
        exact: whether what its workers sent must add up to what they agreed on.
        kept: whether what it leaves out is kept, and so must stay small, and be all that is lost.
    """
    spelled = f"{who}({field}={inner!r})"
    name = type(inner).__name__
    if not (hasattr(inner, "talk") and hasattr(inner, "init")):
        raise UsageError(spelled, f"{field} is an exchange", f"for example {who}({field}=all-reduce)")
    if trait(inner, "by_place"):
        raise UsageError(
            spelled,
            "it adds single micro-batches in one fixed order; there is no contribution to wrap",
            "use all-reduce, or the ordered exchange alone",
        )
    if trait(inner, "by_model"):
        raise UsageError(
            spelled,
            "it speaks of whole models, pair by pair; there is no sum over the workers to wrap",
            f"use {name} alone",
        )
    if not holds and trait(inner, "holds"):
        raise UsageError(
            spelled,
            f"{name} keeps what it did not send; nobody else may keep it a second time",
            f"use {name} without {who}, or {who} around what is inside",
        )
    if not tensors and trait(inner, "by_tensor"):
        raise UsageError(
            spelled,
            f"{name} needs tensors in their own shapes; {who} cuts them into flat pieces",
            "use a codec of flat tensors, such as bf16 or topk",
        )
    if kept and not trait(inner, "contracts"):
        raise UsageError(
            spelled,
            "what it leaves out may be larger than what came in: held back, it grows without end",
            f"use {name} alone, which has no bias, or with feedback what rounds to the nearest"
            if hasattr(inner, "rounding")
            else f"use {name} alone, which has no bias, or with feedback {name}(unbiased=False)"
            if hasattr(inner, "unbiased")
            else "give what is inside rounding='nearest'",
        )
    if kept and trait(inner, "rounds_sums"):
        raise UsageError(
            spelled,
            "an all-reduce in half precision rounds the sum as well as what each sends, and nobody holds back that loss",
            "use the codec bf16 or fp16, which is added in float32, or the all-reduce without feedback",
        )
    if exact and not trait(inner, "conserves"):
        averaged = getattr(inner, "average", "all") != "all"
        raise UsageError(
            spelled,
            "what its workers send does not add up to what they agree on",
            "give it average='all'" if averaged else f"use {name} without {who}",
        )


def flush(exchange: Any, state: Any, like: Tensors) -> tuple[list[Tensor | None], Any]:
    """What `exchange` owes for contributions shaped `like` (None: nothing), and its state once that is sent elsewhere."""
    if trait(exchange, "holds"):
        return exchange.flush(state, like)  # type: ignore[no-any-return]
    return [None] * len(like), state


def renewed(exchange: Any, delta: Tensors, mean: Tensors, state: Any) -> Any:
    """The state of `exchange` after a round beside it, in which all of everybody's `delta` came to `mean`."""
    return exchange.renewed(delta, mean, state) if trait(exchange, "follows") else state


def selected(exchange: Any, like: Tensors) -> list[bool]:
    """Of each contribution, whether `exchange` sends some of its entries and leaves out others."""
    if hasattr(exchange, "selected"):
        found: list[bool] = exchange.selected(like)
        return found
    return [trait(exchange, "selects")] * len(like)


def named(exchange: Any, names: Sequence[str]) -> Any:
    """`exchange` for contributions that are the tensors of parameters `names`, in this order, in their own shapes.

    Whoever chooses by name (a method ``named``) learns the names, however deep inside; all else stays as it is.
    """
    if hasattr(exchange, "named"):
        return exchange.named(names)
    if not dataclasses.is_dataclass(exchange) or isinstance(exchange, type):
        return exchange
    inner = {f.name: getattr(exchange, f.name) for f in dataclasses.fields(exchange)}
    inner = {name: value for name, value in inner.items() if hasattr(value, "talk")}
    told = {name: named(value, names) for name, value in inner.items()}
    return changed(exchange, told) if any(told[n] is not inner[n] for n in told) else exchange


def check_names(exchange: Any, names: Sequence[str]) -> None:
    """Raises `UsageError` where somebody inside would choose by name and none of all the model's has it."""
    if hasattr(exchange, "check_names"):
        exchange.check_names(names)
    if dataclasses.is_dataclass(exchange) and not isinstance(exchange, type):
        for field in dataclasses.fields(exchange):
            if hasattr(inner := getattr(exchange, field.name), "talk"):
                check_names(inner, names)


def changed(exchange: Any, fields: Mapping[str, Any]) -> Any:
    """`exchange` with other `fields`, which keeps the names that it was told."""
    found = dataclasses.replace(exchange, **fields)
    names = getattr(exchange, "_names", None)
    return found if names is None else found.named(names)


# ------------------------------------------------------------------------------------------------ talks


def protected(talk: Talk) -> Talk:
    """`talk`, in which no wire overwrites what it was given or says that it sent: each `Sum` is asked of a copy.

    A lossless talk's ``sent`` is the very tensor that it asked the sum of, and that need not be one of the caller's:
    `ByTensor` packs small ones into a tensor of its own.
    """
    reply: Any = None
    while True:
        try:
            request = talk.send(reply)
        except StopIteration as end:
            agreed: Agreed = end.value
            return agreed
        if isinstance(request, Sum):
            request = dataclasses.replace(request, tensor=request.tensor.clone())
        reply = yield request


def addressed(talk: Talk, axis: str) -> Talk:
    """`talk`, held on `axis` instead of among all replicas."""
    reply: Any = None
    while True:
        try:
            request: Request = talk.send(reply)
        except StopIteration as end:
            agreed: Agreed = end.value
            return agreed
        reply = yield dataclasses.replace(request, axis=axis) if request.axis == REPLICA else request


# -------------------------------------------------------------------------------------- several as one


def packed(tensors: Tensors) -> list[Tensor]:
    """Flat tensors that hold all of `tensors`: one per type, in order of first appearance (of one alone its own memory)."""
    import torch

    kinds = dict.fromkeys(t.dtype for t in tensors)
    of_each = [[t.reshape(-1) for t in tensors if t.dtype is kind] for kind in kinds]
    return [flat[0] if len(flat) == 1 else torch.cat(flat) for flat in of_each]


def unpacked(flats: Tensors, like: Tensors) -> list[Tensor]:
    """The inverse of `packed`, for tensors shaped like `like`: views of `flats`."""
    import torch

    kinds = dict.fromkeys(t.dtype for t in like)
    found: dict[int, Tensor] = {}
    for kind, flat in zip(kinds, flats, strict=True):
        places = [i for i, t in enumerate(like) if t.dtype is kind]
        parts = torch.split(flat, [like[i].numel() for i in places])
        found.update((i, part.reshape(like[i].shape)) for i, part in zip(places, parts, strict=True))
    return [found[i] for i in range(len(like))]


# ----------------------------------------------------------------------------------------------- states


def leaves(state: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """The tensors of a state with their paths (keys of dicts, positions in lists and tuples), in a fixed order."""
    if isinstance(state, Mapping):
        for key in state:
            yield from leaves(state[key], (*path, str(key)))
    elif isinstance(state, Sequence):
        for i, item in enumerate(state):
            yield from leaves(item, (*path, str(i)))
    elif state is not None:
        yield path, state


def is_own(path: Sequence[str]) -> bool:
    """Whether a leaf is one worker's own, of which only the sum over workers matters."""
    return RESIDUAL in path


def storage(tensor: Tensor) -> int:
    """Where a tensor's memory begins: equal for views of one buffer. An empty tensor has a place of its own."""
    return tensor.untyped_storage().data_ptr() or id(tensor)


def minus(kept: Tensor, sent: Tensor, users: set[int]) -> Tensor:
    """kept − sent; in the memory of `kept` where no other tensor (`users`: their `storage`) needs it."""
    return kept.sub(sent) if storage(kept) in users else kept.sub_(sent)
