"""The worker's side of a strategy: what `Replica.step` hands over to, and what methods have in common.

    Synchronous   gradients agree at every step                      train/synchronous.py
    DelayedSteps  the same, used one step later                      train/delayed.py
    LocalSteps    an inner optimizer; the way since the last         train/local.py
                  agreement is what is exchanged
    PairSteps     the same, exchanged in pairs                       train/pairs.py
    ForecastSteps own steps, which agreed ones made of several       train/forecast.py
                  steps' gradients replace
    Hogwild       one copy of the parameters, no locks               train/hogwild.py

A placement may name a method of its own (``Placement.method``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from manyhands.core import rng
from manyhands.core.errors import OutOfMemory, PeerLost
from manyhands.train.memory import Torn, split_on_oom, tell_launcher
from manyhands.train.reading import Reading, Stopwatch, summed_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from manyhands.core.types import Summed
    from manyhands.train.gradients import FlatGradients
    from manyhands.train.header import Wishes
    from manyhands.train.replica import Replica

    Batch = Mapping[str, Tensor]
    Loss = Callable[[nn.Module, Batch], "Summed | tuple[Tensor, int | Tensor]"]

MAX_SKIPPED = 10


@dataclass(frozen=True)
class Part:
    """My part of one global batch.

    Attributes:
        step: which global batch, from 0.
        micro_batches: (first place in the global batch, batch) of each forward pass, in order; empty where this worker
            has nothing to do.
        n_places: micro-batches in the whole global batch.
        rows: rows in the whole global batch.
        seed: with step and place, the source of every random number.
        spans: which places each forward pass covers; empty: each covers one.
        pace: my share of this batch over the largest worker's; 1 where local steps take no notice of shares.
        divisible: whether a pass may be run in pieces: no fixed order of additions is promised.
    """

    step: int
    micro_batches: Sequence[tuple[int, Batch]]
    n_places: int
    rows: int
    seed: int
    spans: Sequence[range] = ()
    divisible: bool = False
    pace: float = 1.0

    def places(self, i: int) -> range:
        """The places of micro-batches that forward pass `i` covers."""
        first = self.micro_batches[i][0]
        return self.spans[i] if self.spans else range(first, first + 1)


@dataclass(frozen=True)
class StepResult:
    """One step.

    Attributes:
        loss: Σ loss / Σ valid targets over the whole global batch (since the last agreement, where `agreed`).
        target_tokens: Σ valid targets; between agreements those of a full global batch.
        grad_norm: before clipping; between agreements this worker's.
        lr: the rate used.
        skipped: the update was left out because a gradient was not finite.
        stop: nonzero when a worker was asked to stop (the signal's number).
        save: a worker asked for a checkpoint after this step.
        own_tokens: valid targets of this worker's part.
        agreed: the workers have spoken in this step, so `loss` is everybody's; else this worker's.
        change: somebody waits to join or to leave: the set of workers changes after this step.
        check: somebody asks for a comparison of the replicas.
        work: (seconds in forward and backward, rows) of every rank since the last agreement; empty where nobody told.
        spent: (seconds until its rows were there, waiting for others, moving bytes) of every rank, up to its header.
        late: the gradient's norm is still on its way from a GPU; asked for by `settled`, once.
    """

    loss: float
    target_tokens: int
    rows: int
    grad_norm: float
    lr: float
    skipped: bool
    stop: int
    save: bool
    own_tokens: int
    agreed: bool = True
    change: bool = False
    check: bool = False
    work: tuple[tuple[float, float], ...] = field(default=(), compare=False)
    spent: tuple[tuple[float, float, float], ...] = field(default=(), compare=False)
    late: Callable[[], float] | None = field(default=None, compare=False)

    def settled(self) -> StepResult:
        """With its norm, and whether the update was left out, once the device has come to that. Raises as `step` does."""
        if self.late is None:
            return self
        norm = self.late()
        skipped = not math.isfinite(norm)
        return replace(self, grad_norm=norm, skipped=skipped, lr=0.0 if skipped else self.lr, late=None)


class Method(Protocol):
    """How a replica's step becomes an agreed update.

    Attributes:
        agrees: after `meet` (and whenever `at_rest`) all workers' parameters are bitwise equal.
        comes_to_rest: `at_rest` is reached by itself after each exchange, so that a checkpoint can wait for it.
        skips_alike: (optional) an update that is left out is left out by every worker.
        saves_alone: (optional) the agreed parameters are there at any time, so that after an interruption one worker can save
            them though the method is not at rest.
        joint: (optional) the workers may write a checkpoint together (see `manyhands.train.joint`): whatever goes into it is alike
            on all of them, or ``pieces`` (by file and name) says what is mine; ``write_config`` where the model's own does not do.
        still: (optional) nothing that others may need moves before a step's agreement.
        meets_first: (optional) an agreed change of workers would lose what lies between agreements: it is preceded by `meet`.
        settled: (optional) as `committed`, by this worker's own agreements, where not everybody may have come so far.
        agreements: (optional) how many this worker has taken part in; it may have some that others lack when one is lost.
        alone: (optional) workers do not wait for each other, and each tells the ledger for itself.
        applied: (optional) after `rewind`, of which steps each rank's work is in the parameters whatever becomes of it.
        unused: (optional) places of this worker's last step that no update has used, by rule.
        across: (optional) the wire along which the exchange speaks, where that is not between all workers.
        states: of the exchange, one for each of its conversations.
    """

    agrees: bool
    comes_to_rest: bool
    states: list[Any]

    @property
    def committed(self) -> int:
        """How many steps' work is in the agreed parameters."""
        ...

    @property
    def at_rest(self) -> bool:
        """The model holds the agreed parameters and nothing is in flight."""
        ...

    def step(self, part: Part, loss: Loss, wishes: Wishes) -> StepResult:
        """Forward, backward, and what the strategy asks for. Every worker calls it, also with an empty part."""
        ...

    def meet(self) -> None:
        """Come to rest now. Collective."""
        ...

    def agreed(self, *, collective: bool = True) -> AbstractContextManager[Any]:
        """Inside it the model holds the agreed parameters (to evaluate or save them).

        collective: whether all workers enter it; without, the method does as well as it can alone.
        """
        ...

    def optimizer_state(self) -> dict[str, Tensor]:
        """The state of the optimizer of agreed updates, by name (see `NamedOptimizer.state_by_name`)."""
        ...

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises `CheckpointError` where it is another optimizer's."""
        ...

    def local_state(self) -> dict[str, Tensor]:
        """This worker's own state at rest (an inner optimizer's), by name; empty for most methods."""
        ...

    def load_local_state(self, state: Mapping[str, Tensor]) -> None: ...

    def restart(self) -> None:
        """The parameters were replaced (a checkpoint was loaded): begin from them."""
        ...

    def rewind(self) -> dict[int, list[int]]:
        """Somebody was lost: go back to the last agreement, keeping whatever can still be used. Not collective.

        Counters are those of the last agreement afterwards. Returns what this worker has computed since then and still
        holds: places of micro-batches by step, which nobody is to compute again.
        """
        ...

    def adopt(self, other: Any) -> None:
        """Take over from `other`, the rewound method of this replica in the last set of workers."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Sums:
    """What `accumulate` did.

    Attributes:
        loss_sum, count: over the valid targets of my micro-batches.
        places: which micro-batches that were.
        whole: all of them; else the set of workers changed meanwhile.
    """

    loss_sum: float
    count: float
    places: Sequence[int]
    whole: bool = True

    def require(self) -> Sums:
        """Itself. Raises `PeerLost` where it is not whole."""
        if not self.whole:
            raise PeerLost(None, "forward", "the set of workers has changed")
        return self


def accumulate(
    replica: Replica,
    gradients: FlatGradients,
    part: Part,
    loss: Loss,
    nominal: float,
    *,
    announce: bool = True,
    fresh: bool = True,
    by_place: Callable[[int], None] | None = None,
) -> Sums:
    """Run my micro-batches: Σ ∇loss / `nominal` is in `gradients` afterwards. Ends early when the set of workers changes.

    A pass that finds no memory is run in pieces (`manyhands.train.memory`).

    Args:
        announce: complete buckets are announced during the last backward.
        fresh: begin a new sum; False: go on adding to that of the last call.
        by_place: called with each micro-batch's place; its gradients then stand alone in the buckets.

    Raises:
        ManyhandsError: memory ran out, and the passes cannot be cut or done again.
        OutOfMemory: a successor may have smaller ones; the launcher knows.
    """
    while True:
        try:
            return _accumulate(replica, gradients, part, loss, nominal, announce, fresh, by_place)
        except Torn as torn:
            if not fresh or gradients.announced:
                followed = tell_launcher(torn.rows, divisible=part.divisible) and replica.over is not None
                raise OutOfMemory(
                    f"memory ran out in a backward of {torn.rows} rows whose gradients are added to others already: {torn}",
                    "such a sum cannot be taken back",
                    "" if followed else f"give --device-batch {replica.fits.most}",
                ) from None


def _accumulate(
    replica: Replica,
    gradients: FlatGradients,
    part: Part,
    loss: Loss,
    nominal: float,
    announce: bool,
    fresh: bool,
    by_place: Callable[[int], None] | None,
) -> Sums:
    if fresh:
        gradients.start()
    said: list[Reading] = []  # each pass's loss sum and count, known while its backward still runs
    places: list[int] = []
    whole, begun = True, time.perf_counter()
    keeps = getattr(replica.method, "keeps_sums", False) and replica.method.committed == replica.steps
    for i, (place, batch) in enumerate(part.micro_batches):
        if replica.interrupted:
            whole = False
            break
        final = i == len(part.micro_batches) - 1
        last = final and announce and by_place is None
        if keeps:
            spent_s, left = time.perf_counter() - begun, len(part.micro_batches) - i
            replica.tell_left(0.0 if final else spent_s / max(1, i) * left)
        replica.tell_pass()
        stopwatch = Stopwatch(replica.device)

        def run(piece: Batch, begin: int, final: bool, last: bool = last, place: int = place) -> Reading:
            rng.seed_torch(part.seed, part.step, place, *([begin] if begin else []))
            gradients.start_micro_batch(last=last and final, separate=by_place is not None)
            with replica.autocast():
                summed = summed_of(loss(replica.forward, piece))
            found = Reading.of(summed.loss_sum.detach().double(), summed.count)
            (summed.loss_sum / nominal).backward()  # type: ignore[no-untyped-call]
            return found

        said += split_on_oom(
            run,
            batch,
            replica.fits,
            divisible=part.divisible and by_place is None,
            untouched=lambda: not gradients.arrived,
        )
        if by_place is not None:
            by_place(place)
        places.extend(part.places(i))
        replica.work.stop(stopwatch, rows_of(batch))
    loss_sum = count = 0.0
    for reading in said:
        more, n = reading.values()
        loss_sum += more
        count += n
    # who stands still from here on waits for who has not come so far
    replica.tell_phase("step", replica.steps)
    return Sums(loss_sum, count, places, whole)


def rows_of(batch: Any) -> int:
    """Rows of a batch, in whatever form a user's own loop has it."""
    first = next(iter(batch.values()), ()) if isinstance(batch, Mapping) else batch
    return len(first)
