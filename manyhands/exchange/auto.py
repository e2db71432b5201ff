"""Auto: compress only where that is faster, which is measured and not assumed.

Of more than 200 data-centre set-ups compression beat a tuned all-reduce in six (arXiv:2103.00543): on a fast link coding
costs more time than it saves. So both are measured on the contributions themselves, in the rounds that train:

    a few rounds of the inner exchange, a few of all-reduce, each from the moment when all have arrived (a tiny gather)
    to the agreement, coding included; what counts is the slowest worker (gathered, so that all decide the same) and of
    several rounds the fastest (what else the machine did is not the link's fault)

    compress  ⟺  T(inner) < 0.95 · T(all-reduce)

Both are measured again when `every` rounds have passed, and not before the measurement is paid for: the rounds of the
slower way may cost at most `SHARE` of the time until then (but after ``MOST * every`` rounds it is done at any price). On
a slow link one all-reduce takes as long as hundreds of compressed rounds; it is then seen once, and rarely again.

Nothing is lost on switching: before an all-reduce what the inner exchange owes (its residual) is added to the
contribution, and owed no more. What is owed for half precision is in float32, so that one sum is, too. All rounds
conserve the sum, so the way may change as often as it likes.

Not seen from inside a talk is how much of it backward hides; with one bucket, as for most codecs, nothing is hidden.
"""

from __future__ import annotations

import time
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from manyhands.core.checked import checked
from manyhands.core.config import choice, option
from manyhands.core.errors import UsageError
from manyhands.core.request import Gather
from manyhands.core.types import Agreed, Exchange
from manyhands.exchange.allreduce import AllReduce, beside
from manyhands.exchange.combine import flush, passed, refuse, renewed, trait

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Talk, Tensors

INNER, ALL_REDUCE = 0, 1
SAMPLES = 2  # rounds of each way in one measurement
CLEAR = 4.0  # one all-reduce that took this many times as long as the inner exchange needs no second
GAIN = 0.95  # compression must save this much
SHARE = 0.02  # of the time until the next measurement, for the slower way's rounds
MOST = 100  # times `every`: after so many rounds it is measured again at any price

now = time.perf_counter


@dataclass(frozen=True)
@checked
class Auto:
    """All-reduce, or `inner` where measurement says that it is faster.

    State, equal on all workers: ``round``; ``next``, the round in which measuring begins; ``samples`` and ``seconds`` of
    [inner, all-reduce] in this measurement; ``compress``, what was decided; ``owes``, whether anything may be held back.

    Args:
        inner: any exchange that adds contributions; lossy ones under error-feedback.
        every: rounds from one measurement to the next, at least.
        bucket_mb: as for all-reduce, which this is on a fast link. Each bucket is measured and decided by itself.
    """

    by_tensor = passed("by_tensor")
    holds = passed("holds")
    conserves = passed("conserves")
    contracts = passed("contracts")
    rounds_sums = passed("rounds_sums")
    fills = passed("fills")
    selects = passed("selects")
    follows = passed("follows")
    accelerates = passed("accelerates")

    inner: Exchange = choice("exchanges", "error-feedback(int8)", help="where it is faster than all-reduce")
    _: KW_ONLY
    every: int = option(500, help="rounds from one measurement to the next, at least")
    bucket_mb: float = option(25.0, help="size of a bucket in MiB")

    def __post_init__(self) -> None:
        refuse("auto", "inner", self.inner)
        if trait(self.inner, "holds") and not hasattr(self.inner, "flush"):
            raise UsageError(
                f"auto(inner={self.inner!r})",
                "what it holds back must be sent before an all-reduce, and it has no flush(state, like)",
                "use auto(error-feedback(...))",
            )
        if trait(self.inner, "accelerates"):
            raise UsageError(
                f"auto(inner={self.inner!r})",
                "it agrees on a velocity, and all-reduce on gradients: on a fast link the optimizer would be another",
                "use auto(error-feedback(topk))",
            )
        if isinstance(self.inner, AllReduce) and self.inner.precision == "as-is":
            raise UsageError(
                f"auto(inner={self.inner!r})", "it chooses between all-reduce and another", "use all-reduce"
            )
        for name in ("every", "bucket_mb"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} = {getattr(self, name)}", "it is positive", "give a larger value")

    def init(self, like: Tensors) -> Any:
        import torch

        whole, exact = torch.int64, torch.float64
        return {
            "round": torch.zeros((), dtype=whole),
            "next": torch.zeros((), dtype=whole),
            "samples": torch.zeros(2, dtype=whole),
            "seconds": torch.zeros(2, dtype=exact),
            "compress": torch.ones((), dtype=torch.bool),
            "owes": torch.zeros((), dtype=torch.bool),
            "inner": self.inner.init(like),
        }

    def talk(self, delta: Tensors, state: Any) -> Talk:
        if int(state["round"]) < int(state["next"]):
            agreed = yield from self._by(INNER if state["compress"] else ALL_REDUCE, delta, state)
            return Agreed(agreed.mean, agreed.sent, {**agreed.state, "round": state["round"] + 1})
        way = INNER if int(state["samples"][INNER]) < SAMPLES else ALL_REDUCE
        yield from _slowest(0.0)  # all have arrived
        begun = now()
        agreed = yield from self._by(way, delta, state)
        seconds = yield from _slowest(now() - begun)
        after = {**agreed.state, **_measured(state, way, seconds), "round": state["round"] + 1}
        return Agreed(agreed.mean, agreed.sent, self._decided(after))

    def renewed(self, delta: Tensors, mean: Tensors, state: Any) -> Any:
        """The inner exchange's estimates after a round that went another way."""
        return {**state, "inner": renewed(self.inner, delta, mean, state["inner"])}

    def flush(self, state: Any, like: Tensors) -> tuple[list[Tensor | None], Any]:
        """What the inner exchange owes, to be sent without loss, and the state after that."""
        owed, inner = flush(self.inner, state["inner"], like)
        return owed, {**state, "inner": inner}

    def _by(self, way: int, delta: Tensors, state: Any) -> Talk:
        """One round of either; the state's ``inner`` and ``owes`` follow."""
        import torch

        if way == INNER:
            agreed = yield from self.inner.talk(delta, state["inner"])
            return Agreed(
                agreed.mean,
                agreed.sent,
                {**state, "inner": agreed.state, "owes": torch.ones((), dtype=torch.bool)},
            )
        inner, offered = state["inner"], list(delta)
        if state["owes"]:
            owed, inner = flush(self.inner, inner, delta)
            for i, more in enumerate(owed):
                if more is None:
                    continue
                if more.dtype is offered[i].dtype:
                    # in place, as the sum will be: a wire adds its own buffers without a copy
                    offered[i].add_(more)
                else:  # rounded to half precision, something would be owed by nobody
                    offered[i] = more.add(offered[i])
        agreed = yield from beside(self.inner, offered, inner)
        return Agreed(
            [m.to(d.dtype) for m, d in zip(agreed.mean, delta, strict=True)],
            agreed.sent,
            {**state, "inner": agreed.state, "owes": torch.zeros((), dtype=torch.bool)},
        )

    def _decided(self, state: Any) -> Any:
        """Once both ways are known: the faster one, and when to measure again."""
        import torch

        counts, seconds = state["samples"].tolist(), state["seconds"].tolist()
        clear = counts[ALL_REDUCE] and seconds[ALL_REDUCE] > CLEAR * seconds[INNER]
        if counts[INNER] < SAMPLES or (counts[ALL_REDUCE] < SAMPLES and not clear):
            return state
        compress = seconds[INNER] < GAIN * seconds[ALL_REDUCE]
        best, other = min(seconds), max(seconds)
        slower_rounds = counts[ALL_REDUCE if compress else INNER]
        paid = slower_rounds * (other - best) / (SHARE * best) if best > 0 else 0.0
        wait = max(self.every, min(int(paid), MOST * self.every))
        return {
            **state,
            "compress": torch.tensor(compress),
            "next": state["round"] + wait,
            "samples": torch.zeros_like(state["samples"]),
        }


def _slowest(seconds: float) -> Any:
    """The largest of everybody's `seconds`."""
    import torch

    everyones = yield Gather(torch.tensor([seconds], dtype=torch.float64), even=True)
    return max(float(t) for t in everyones)


def _measured(state: Any, way: int, seconds: float) -> dict[str, Tensor]:
    """Counts and times with one more round of `way`."""
    counts, times = state["samples"].clone(), state["seconds"].clone()
    times[way] = seconds if counts[way] == 0 else min(seconds, float(times[way]))
    counts[way] += 1
    return {"samples": counts, "seconds": times}
