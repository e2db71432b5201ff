"""How a server applies pushes: what its job told it, and the push itself, both read from headers with every field checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manyhands.core import config
from manyhands.core.errors import UsageError
from manyhands.placement.served import bound_of
from manyhands.serve.protocol import Garbage

N_LOAD = 5  # figures of a push about its worker's time


@dataclass(frozen=True)
class Rules:
    """A job's method.

    Attributes:
        bound: steps that a worker may be ahead of the slowest: 0 synchronous, None without bound.
        accumulate: pushes that make one update.
        discard: pushes staler than this many updates are dropped; None: none.
        compensation: λ of DC-ASGD; 0: off.
        max_norm: of a gradient, clipped to it; infinity: never.
        total: length of the schedule in its unit, or None.
        optimizer: an `OptimizerSpec`.
        codec: of pushes, or None for raw numbers.
        alone: no other server keeps a part, so the norm of the whole gradient is known here.
        whole: sync: a round is one of all workers, or of none: when one leaves, or falls silent, the others meet anew.
    """

    bound: int | None
    accumulate: int
    discard: int | None
    compensation: float
    max_norm: float
    total: float | None
    optimizer: Any
    codec: Any
    alone: bool
    whole: bool

    @staticmethod
    def read(data: Any) -> Rules:
        """From the data form that `manyhands.train.served` sends. Raises `Garbage` or `UsageError`."""
        if not isinstance(data, Mapping):
            raise Garbage("a job without rules", "its header says how pushes are applied", "")
        discard, total = data.get("discard"), data.get("total")
        codec = data.get("codec")
        read = config.from_choice("exchanges", codec, "codec") if codec is not None else None
        if read is not None and not callable(getattr(read, "decode", None)):
            raise UsageError(f"codec = {codec}", "a push is encoded by a codec", "")
        return Rules(
            bound=bound_of(str(data.get("consistency", "sync"))),
            accumulate=max(1, integer(data, "accumulate", 1)),
            discard=None if discard is None else integer(data, "discard"),
            compensation=number(data, "compensation", 0.0),
            max_norm=number(data, "max_norm", math.inf),
            total=None if total is None else number(data, "total"),
            optimizer=config.from_choice("optimizers", data.get("optimizer"), "optimizer"),
            codec=read,
            alone=bool(data.get("alone", True)),
            whole=bool(data.get("whole", False)),
        )

    @property
    def sync(self) -> bool:
        return self.bound == 0

    def factor(self, progress: float, tokens: int) -> float:
        """The schedule's factor after `progress` global batches and `tokens` targets."""
        schedule = self.optimizer.schedule
        if schedule is None:
            return 1.0
        done = tokens if getattr(schedule, "unit", "steps") == "tokens" else progress
        return float(schedule.factor(float(done), self.total or math.inf))


@dataclass(frozen=True)
class Push:
    """One worker's contribution to one step.

    Attributes:
        step: the worker's own, from 0; it names the global batch.
        version: of the parameters at which the gradient was taken.
        share: rows of the part over rows of the global batch.
        nominal: the payload is Σ ∇(loss sum) / nominal.
        norm: of the mean gradient of this part over all servers; used where pushes are applied one by one.
        used: for each of the server's parameters in the layout's order, whether it has a gradient.
        load: what the worker has done so far: (seconds computing, rows, seconds waiting for data, for others, moving bytes).
            Totals, so that whoever hears some of them late, or twice, miscounts nothing. Empty: it does not tell.
    """

    member: str
    step: int
    version: int
    share: float
    nominal: float
    loss: float
    count: int
    norm: float
    used: str
    stop: int
    save: bool
    change: bool
    load: tuple[float, ...] = ()

    @staticmethod
    def read(data: Mapping[str, Any], n_parameters: int) -> Push:
        """From a header. Raises `Garbage`."""
        used = str(data.get("used", ""))
        if len(used) != n_parameters or set(used) - {"0", "1"}:
            raise Garbage(f"a push of {len(used)} parameters", f"this server keeps {n_parameters}", "")
        push = Push(
            member=name(data),
            step=integer(data, "step"),
            version=integer(data, "version"),
            share=number(data, "share"),
            nominal=number(data, "nominal"),
            loss=number(data, "loss"),
            count=integer(data, "count"),
            norm=number(data, "norm", math.nan),
            used=used,
            stop=integer(data, "stop", 0),
            save=bool(data.get("save", False)),
            change=bool(data.get("change", False)),
            load=_load(data),
        )
        if not (0 <= push.share <= 1 and 0 < push.nominal < math.inf):
            raise Garbage(f"a push of share {push.share}, nominal {push.nominal}", "0 … 1, and positive", "")
        return push

    def header(self) -> dict[str, Any]:
        """For the log, from which `read` makes the same push; what it says of time is of no use later."""
        return {name: value for name, value in vars(self).items() if name != "load"}


def _load(data: Mapping[str, Any]) -> tuple[float, ...]:
    """What a push says of its worker's time. Raises `Garbage`."""
    found = data.get("load")
    if found is None:
        return ()
    numbers = found if isinstance(found, list) else []
    if len(numbers) != N_LOAD or not all(type(x) in (int, float) and 0 <= x < math.inf for x in numbers):
        raise Garbage(f"load = {str(found)[:80]}", f"it is {N_LOAD} finite numbers that are not negative", "")
    return tuple(float(x) for x in numbers)


def name(data: Mapping[str, Any]) -> str:
    """The member that a header names. Raises `Garbage`."""
    found = data.get("member")
    if not isinstance(found, str) or not 0 < len(found) <= 200:
        raise Garbage(f"a member called {str(found)[:80]!r}", "a name has 1 to 200 characters", "")
    return found


def integer(data: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number that is not negative. Raises `Garbage`."""
    value = data.get(key, default)
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise Garbage(f"{key} = {str(value)[:80]}", "it is a whole number and not negative", "")
    return value


def number(data: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number, which may be infinite or NaN. Raises `Garbage`."""
    value = data.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Garbage(f"{key} = {str(value)[:80]}", "it is a number", "")
    return float(value)
