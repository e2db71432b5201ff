"""Local steps: each worker trains on its own share, and from time to time the ways they went are averaged.

    θᵢ ← inner optimizer on my share of each global batch (see manyhands.train.inner)       every step
    Δᵢ = anchor − θᵢ ;  Δ = exchange(Σ wᵢ Δᵢ) ;  anchor ← outer(anchor, Δ) ;  θᵢ ← anchor    when the cadence says

with wᵢ = my valid targets / everybody's since the last agreement. One loop for local SGD (outer SGD of rate 1),
SlowMo and DiLoCo (outer momentum; arXiv:2311.08105 algorithm 1), Streaming DiLoCo (fragments, in flight for some steps,
mixing: arXiv:2501.18512), MuLoCo (Muon inside) and SparseLoCo (top-k with decayed error feedback); with pairs in
`manyhands.train.pairs`.

Contributions are weighted with my targets / nominal and the agreement is multiplied by nominal / Σ targets, as gradients
are, so that the weights need no round of their own. Between agreements nothing is said at all: a request to stop
or to save is heard at the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from manyhands.core.errors import ManyhandsError
from manyhands.core.request import Gather
from manyhands.exchange.combine import named
from manyhands.train.fragments import Flight, Fragment, Told, split
from manyhands.train.header import Header, Unsound, Wishes
from manyhands.train.inner import InnerSteps
from manyhands.train.leftout import LeftOut
from manyhands.train.mending import shared_of
from manyhands.train.method import MAX_SKIPPED, Part, StepResult
from manyhands.train.norm import is_finite, norm_of
from manyhands.wire.drive import Interleave

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Agreed
    from manyhands.strategy.base import Strategy
    from manyhands.train.method import Loss
    from manyhands.train.replica import Replica


class LocalSteps:
    """See the module. All workers call every method at the same steps."""

    agrees: ClassVar[bool] = True
    joint: ClassVar[bool] = True

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        strategy = replica.strategy
        self._cadence, self._exchange = strategy.cadence, strategy.exchange
        whole = self._cadence.fragments == 1 and not self._cadence.delay and not strategy.keep_local
        self.comes_to_rest = self.agrees and whole
        self.meets_first = not self.comes_to_rest
        self.drops = self.comes_to_rest and replica.lost_round == "drop"
        self.inner = InnerSteps(replica, strategy.inner or strategy.outer)
        groups = split(replica.named, self._cadence.fragments)
        self._fragments = [Fragment.make(group, replica.wire) for group in groups]
        anchors = [pair for f in self._fragments for pair in zip(f.names, f.anchors, strict=True)]
        self.outer = strategy.outer.build(anchors, replica.device.type)
        self._exchanges = [named(self._exchange, f.names) for f in self._fragments]
        told = zip(self._exchanges, self._fragments, strict=True)
        self.states: list[Any] = [e.init(self._contribution(f)) for e, f in told]
        self._sums = [0.0, 0.0]  # loss and targets since the workers last spoke
        self._exact, self._since = 0, 0  # job's targets up to the last agreement, nominal ones since
        self._lost_in_a_row = 0
        self.agreements = 0  # a peer may be lost when some have the last one already
        self._held: dict[int, list[int]] = {}  # what I have computed since then: places by step

    @staticmethod
    def extra_bytes(strategy: Strategy, own: float) -> float:
        """See `manyhands.train.state_bytes`: anchors."""
        del strategy, own
        return 4.0

    @property
    def committed(self) -> int:
        return min(f.heard for f in self._fragments)

    @property
    def settled(self) -> int:
        """How many steps' work is in my anchors; where pairs agree, not everybody may have come so far."""
        return min(f.met for f in self._fragments)

    @property
    def at_rest(self) -> bool:
        return not any(f.flight or f.drifted for f in self._fragments)

    def step(self, part: Part, loss: Loss, wishes: Wishes) -> StepResult:
        replica = self._replica
        nominal = float(part.rows * replica.per_row)
        done = self.inner.compute(part, loss, nominal)
        self._held.setdefault(part.step, []).extend(done.places)
        done.require()
        norm, lr, skipped = math.nan, 0.0, False
        if self.inner.due(part.pace):
            norm, lr, skipped = self._inner_step()
        replica.steps += 1
        self._since += int(nominal)
        replica.tokens = self._exact + self._since
        for fragment in self._fragments:
            fragment.drifted = True
            fragment.nominal += nominal
        loss_sum, count = (0.0, 0.0) if skipped else (done.loss_sum, done.count)
        for i in self._cadence.starts(replica.steps):
            self._start(i, wishes)
        told: Told | None = None
        for i in self._cadence.finishes(replica.steps):
            told = self._finish(i) or told
        mean = loss_sum / count if count else math.nan
        if told is None:
            return StepResult(
                mean, int(nominal), part.rows, norm, lr, skipped, 0, False, int(count), agreed=False
            )
        header, skipped = told.header, skipped or told.lost
        return StepResult(
            told.loss,
            int(nominal) + header.count - told.nominal,
            part.rows,
            norm,
            lr,
            skipped,
            header.stop,
            header.save,
            int(count),
            change=header.change,
            work=header.work,
            spent=header.spent,
        )

    def meet(self) -> None:
        """Everything in flight arrives, every fragment that has drifted is exchanged."""
        for i, fragment in enumerate(self._fragments):
            if fragment.flight:
                self._finish(i)
        for i, fragment in enumerate(self._fragments):
            if fragment.drifted:
                self._start(i, Wishes())
                self._finish(i, keep_local=0.0)

    @contextmanager
    def agreed(self, *, collective: bool = True) -> Iterator[None]:
        """The anchors; where only pairs agree, their mean over all workers (if all can take part: `collective`)."""
        own = [p.detach().clone() for _, p in self._replica.named]
        self._adopt()
        try:
            yield
        finally:
            with torch.no_grad():
                for (_, p), value in zip(self._replica.named, own, strict=True):
                    p.copy_(value)

    def shared(self) -> dict[str, dict[str, Tensor]]:
        """What all replicas hold alike, by kind: anchors, the outer optimizer, and the exchange's part."""
        found = shared_of(self._replica, self.outer.state_by_name())
        anchors = {n: a for f in self._fragments for n, a in zip(f.names, f.anchors, strict=True)}
        return {**found, "parameters": {name: anchor.detach() for name, anchor in anchors.items()}}

    def mended(self) -> None:
        """My anchors were replaced: what I had gone from the old ones is dropped."""
        self._adopt()

    def keep_way(self) -> Callable[[], None]:
        """Note how far my parameters have gone from their anchors; what is returned goes as far from what these are then."""
        pairs = [pair for f in self._fragments for pair in zip(f.params, f.anchors, strict=True)]
        ways = [param.detach() - anchor for param, anchor in pairs]

        def go() -> None:
            with torch.no_grad():
                for (param, anchor), way in zip(pairs, ways, strict=True):
                    torch.add(anchor, way, out=param)

        return go

    def optimizer_state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.outer.state_by_name()
        return found

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        self.outer.load_state_by_name(state)

    def local_state(self) -> dict[str, Tensor]:
        """The inner optimizer's."""
        return dict(self.inner.optimizer.state_by_name())

    def load_local_state(self, state: Mapping[str, Tensor]) -> None:
        self.inner.optimizer.load_state_by_name(state)

    def restart(self) -> None:
        with torch.no_grad():
            for fragment in self._fragments:
                for anchor, param in zip(fragment.anchors, fragment.params, strict=True):
                    anchor.copy_(param)
                fragment.begin(self._replica.steps)
        self._exact, self._since, self._sums, self._held = self._replica.tokens, 0, [0.0, 0.0], {}
        self.inner.forget()

    def rewind(self) -> dict[int, list[int]]:
        """My own way since the last agreement stays; others walk the rest of what the lost had to do, or nobody does (`drops`).

        Where fragments agree at different times, or only pairs do, there is no common point to go on from: everybody falls
        back to the anchors, and what was computed since then is dropped.
        """
        replica = self._replica
        if not self.comes_to_rest:
            self.inner.forget()
            self._adopt()
            for fragment in self._fragments:
                fragment.begin(replica.steps)
            replica.tokens = self._exact + self._since
            self._exact, self._since, self._sums, self._held = replica.tokens, 0, [0.0, 0.0], {}
            return {}
        if self.inner.pending:  # what I have computed is in my parameters, and stays there
            self._inner_step()
        (fragment,) = self._fragments
        if fragment.flight is not None:
            self._sums = [a + b for a, b in zip(self._sums, fragment.flight.sums, strict=True)]
            self._exact -= fragment.flight.told_nominal
            fragment.targets += fragment.flight.targets
            fragment.flight, fragment.drifted = None, True
        fragment.nominal, self._since = 0.0, 0  # counted again as the steps go by again
        replica.steps, replica.tokens = fragment.met, self._exact
        return {step: list(places) for step, places in self._held.items()}

    def adopt(self, other: LocalSteps) -> None:
        with torch.no_grad():
            for mine, theirs in zip(self._fragments, other._fragments, strict=True):
                for anchor, old in zip(mine.anchors, theirs.anchors, strict=True):
                    anchor.copy_(old)
                mine.targets, mine.drifted = theirs.targets, theirs.drifted
                mine.met, mine.heard = theirs.met, theirs.heard
        self._sums, self._exact, self._held = other._sums, other._exact, other._held
        self.agreements = other.agreements
        self.states[:] = other.states
        self.load_optimizer_state(other.optimizer_state())
        self.load_local_state(other.local_state())

    def close(self) -> None:
        self.inner.close()

    def _inner_step(self) -> tuple[float, float, bool]:
        """An inner step with what was added up: (gradient norm, rate, skipped)."""
        norm, lr, skipped, (loss_sum, count) = self.inner.step()
        self._sums[0] += loss_sum
        self._sums[1] += count
        for fragment in self._fragments:
            fragment.targets += count
        return norm, lr, skipped

    # -- agreements

    def _contribution(self, fragment: Fragment) -> list[Tensor]:
        return list(fragment.views) if getattr(self._exchange, "by_tensor", False) else list(fragment.flats)

    @property
    def _speaks(self) -> bool:
        """Whether there is anything to exchange: a codec rounds even alone, as it does among others."""
        return True

    def _measure(self, i: int) -> Sequence[float]:
        """Put my contribution to fragment `i` into its buffers; what else everybody must know of it."""
        fragment = self._fragments[i]
        fragment.measure(fragment.targets / (fragment.nominal or 1.0))
        return ()

    def _start(self, i: int, wishes: Wishes) -> None:
        if self.inner.pending:  # the end came before the round's
            self._inner_step()
        fragment = self._fragments[i]
        more = [fragment.targets, *self._measure(i)]
        finite = is_finite(norm_of(fragment.flats))
        row = Header.row(self._sums[0], self._sums[1], wishes, self._replica.work, more, finite=finite)
        header = self._replica.wire.begin(Gather(row, even=True))
        talks = Interleave(self._replica.wire)
        if self._speaks:
            talks.start(self._exchanges[i].talk(self._contribution(fragment), self.states[i]))
        fragment.flight = Flight(
            fragment,
            talks,
            header,
            fragment.nominal,
            self._since,
            fragment.targets,
            list(self._sums),
            self._replica.steps,
        )
        self._exact += self._since  # corrected when the header arrives
        self._since = 0
        self._sums = [0.0, 0.0]
        fragment.rest()

    def _finish(self, i: int, keep_local: float | None = None) -> Told | None:
        """The outer step of fragment `i`; None where nothing was in flight (just resumed)."""
        fragment, replica = self._fragments[i], self._replica
        flight = fragment.flight
        if flight is None:
            return None
        found = flight.talks.finish()
        told = self._heard(flight)
        steps, held = range(fragment.met, flight.step), self._held
        fragment.flight, fragment.met, self._held = None, flight.step, {}
        keep = replica.strategy.keep_local if keep_local is None else keep_local
        lost = self._settle(i, flight, found, told, keep)
        self.agreements += 1
        if lost:
            self._note_lost(i, steps, told, held)
        return self._told(flight, told, lost=lost)

    def _heard(self, flight: Flight) -> Header | None:
        """Everybody's sums of an exchange; None where nobody waits for them."""
        return Header.of(torch.stack(flight.header.wait()))

    def _settle(
        self, i: int, flight: Flight, found: Sequence[Agreed], told: Header | None, keep_local: float
    ) -> bool:
        """The outer step with what arrived, from which I go on; whether it was not finite, and so is left out."""
        fragment, (agreed,) = self._fragments[i], found
        targets = 1.0 if told is None else float(told.more[:, 0].sum())
        scale = 1.0 if told is None else flight.nominal / targets if targets else math.nan
        means = fragment.shaped(agreed.mean, by_tensor=getattr(self._exchange, "by_tensor", False))
        norm = norm_of(means) * scale
        finite = is_finite(norm)
        if finite:
            self._outer_step(fragment, means, scale)
        if finite or told is None:  # the round draws the next pairs: everybody's, though a pair was lost
            self.states[i] = agreed.state
        fragment.mix(keep_local)
        lost = bool(targets) and not finite
        self._count_lost(lost, norm)
        return lost

    def _note_lost(self, i: int, steps: range, told: Header | None, held: dict[int, list[int]]) -> None:
        """A round was thrown away: everybody's, or where pairs agree mine (`held`)."""
        many, mine = len(self._fragments), None if told is not None else held
        note = LeftOut(
            step=steps.stop - 1,
            loss=told.loss_sum / told.count if told is not None and told.count else math.nan,
            norm=math.nan,
            whose=told.unsound if told is not None else Unsound((), ()),
            steps=steps,
            places=mine,
            part=f"fragment {i + 1} of {many}" if many > 1 else "",
            given="change",
        )
        self._replica.notes.append(note)

    def _told(self, flight: Flight, told: Header | None, *, lost: bool) -> Told | None:
        """What is known of everybody's steps, once `told` has come."""
        assert told is not None
        return self._take_in(flight, told, (), lost=lost)

    def _take_in(self, flight: Flight, told: Header, late: Sequence[int], *, lost: bool) -> Told:
        """Everybody's sums; `late`: whose gradients were not finite, where only now it is known."""
        self._replica.hear(told.left_out, late, at=flight.step - 1)
        flight.fragment.heard = flight.step
        self._exact += told.count - flight.told_nominal
        self._replica.tokens = self._exact + self._since
        return Told(told.loss_sum / told.count if told.count else math.nan, flight.told_nominal, told, lost)

    def _count_lost(self, lost: bool, norm: float) -> None:
        """Everybody falls back to the anchor when what was agreed is not finite. Raises where that goes on and on."""
        self._lost_in_a_row = self._lost_in_a_row + 1 if lost else 0
        self._replica.skipped += lost
        if self._lost_in_a_row > MAX_SKIPPED:
            raise ManyhandsError(
                f"{self._lost_in_a_row} successive agreements were not finite, the last of norm {norm}",
                "an update needs finite numbers",
                "lower the learning rate, or look at the data of these steps",
            )

    def _outer_step(self, fragment: Fragment, means: Sequence[Tensor], scale: float) -> None:
        for anchor, mean in zip(fragment.anchors, means, strict=True):
            anchor.grad = mean.reshape(anchor.shape).to(anchor.dtype) * scale
        factor, _ = self._replica.rate(self._replica.strategy.outer)
        self.outer.set_lr(factor)
        self.outer.step()  # the other fragments have no gradient, and so do not move
        for anchor in fragment.anchors:
            anchor.grad = None

    def _adopt(self) -> None:
        with torch.no_grad():
            for fragment in self._fragments:
                for anchor, param in zip(fragment.anchors, fragment.params, strict=True):
                    param.copy_(anchor)
