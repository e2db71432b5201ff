"""Updates that were left out because something was not finite: by whose doing, and in what words that is told.

Methods note them in `Replica.notes`; the loop takes them from there for the log and the ledger.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from manyhands.core.errors import ManyhandsError
from manyhands.core.membership import Seat
from manyhands.train.header import Unsound

Seats = Sequence[Seat]
ALONE = 3  # updates in a row that one worker alone has spoilt, after which it is given up; all give up after `MAX_SKIPPED`


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """An update that was not made.

    Attributes:
        step: the last global batch in it, from 0. steps: all of them.
        loss, norm: what was agreed, or of an update of one worker alone, its own.
        whose: whose sums were not finite.
        places: of an update of this worker alone, its micro-batches by step; None: no worker has made the update.
        given: what each worker gave besides its loss: "gradient", or the "change" that it has made in local steps.
        part: which part of the model it would have changed, in words; empty: all of it. The samples count in the other parts.
    """

    step: int
    loss: float
    norm: float
    whose: Unsound
    steps: Sequence[int]
    places: Mapping[int, Sequence[int]] | None = None
    part: str = ""
    given: str = "gradient"

    def why(self, seats: Seats) -> str:
        """The reason, for the ledger: alike on all workers.

        >>> seats = [Seat(id="w0", host="a"), Seat(id="w1", host="b")]
        >>> LeftOut(step=4, loss=0.5, norm=2.0, whose=Unsound((1,), ()), steps=[4]).why(seats)
        'the loss of w1 was not finite'
        """
        said = _said(self.whose, [seat.id for seat in seats], self.given)
        return f"{said} not finite" if said else "what the workers added up was not finite"

    def words(self, seats: Seats) -> str:
        """For people.

        >>> seats = [Seat(id="w0", host="a"), Seat(id="w1", host="b")]
        >>> nan = float("nan")
        >>> LeftOut(step=4, loss=nan, norm=nan, whose=Unsound((1,), ()), steps=[4]).words(seats)
        'step 5: loss nan, gradient norm nan: update skipped: the loss of w1 (rank 1, b) was not finite, in forward'
        >>> LeftOut(step=4, loss=0.5, norm=nan, whose=Unsound((), (1,)), steps=[3, 4]).words(seats)
        'steps 4 to 5: loss 0.5, gradient norm nan: update skipped: the gradient of w1 (rank 1, b) was not finite, in backward'
        """
        when = f"step {self.step + 1}"
        if len(self.steps) > 1:
            when = f"steps {min(self.steps) + 1} to {max(self.steps) + 1}"
        what = "update skipped by this worker alone" if self.places is not None else "update skipped"
        if self.part:
            what = f"update of {self.part} skipped"
        phase = "in backward" if self.given == "gradient" else "in its own steps"
        if self.whose.losses:
            phase = "in forward"
        said = _said(self.whose, _names(seats), self.given)
        by = f"{said} not finite, {phase}" if said else "every worker's own loss was finite"
        if not said and self.whose.gradients is not None:
            by = f"every worker's own {self.given} was finite, not their sum"
        return f"{when}: loss {self.loss}, gradient norm {self.norm}: {what}: {by}"


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What the others have told of themselves after `step` steps.

    Attributes:
        left_out: by rank, how many own updates it has left out since it last told.
        gradients: whose gradient of step `at` (counted from 0) was not finite, where that was not known when the update was
            left out.
    """

    step: int
    left_out: Mapping[int, int] = field(default_factory=dict)
    gradients: Sequence[int] = ()
    at: int = 0

    def words(self, seats: Seats) -> str:
        """
        >>> seats = [Seat(id="w0", host="a"), Seat(id="w1", host="b")]
        >>> Heard(step=6, left_out={1: 2}).words(seats)
        'step 6: w1 (rank 1, b) has skipped 2 own updates since the workers last spoke: not finite; its log says when'
        >>> Heard(step=6, gradients=[1], at=4).words(seats)
        'step 5: the gradient of w1 (rank 1, b) was not finite, in backward'
        """
        if self.gradients:
            said = _said(Unsound((), tuple(self.gradients)), _names(seats))
            return f"step {self.at + 1}: {said} not finite, in backward"
        names = _names(seats)
        skipped = [
            f"{names[rank]} has skipped {n} own update{'s' if n > 1 else ''}"
            for rank, n in sorted(self.left_out.items())
        ]
        return (
            f"step {self.step}: {', '.join(skipped)} since the workers last spoke: "
            "not finite; its log says when"
        )


Note = LeftOut | Heard


@dataclass
class Spoilt:
    """How many updates in a row were left out because of me, and of nobody else: each worker counts its own.

    All know alike whom a header has named. Whoever is named alone leaves between two steps, as with any failure, and the others
    do that step without it: so one broken device does not end a job whose other workers compute well.

    Attributes:
        times: how many; last: the last step in them; given: what of mine was not finite.
        others: the seats whose numbers were.
    """

    times: int = 0
    last: int = -1
    given: str = ""
    others: frozenset[str] = frozenset()

    def hear(self, notes: Iterable[Note], rank: int, seats: Seats) -> None:
        """What was noted since the last time by me, `rank` of `seats`."""
        for note in notes:
            named, steps, given = _named(note)
            if not named:
                continue
            if named != {rank} or len(seats) < 2:
                self.forget()
            elif min(steps) > self.last:  # else another part of the model in steps that are counted already
                self.times = self.times + 1 if min(steps) == self.last + 1 else 1
                self.last, self.given = max(steps), given
                self.others = frozenset(seat.id for i, seat in enumerate(seats) if i != rank)

    def forget(self) -> None:
        """Somebody else was named, too, or what was wrong has been put right."""
        self.times, self.last = 0, -1

    def leave(self, rank: int, seats: Seats) -> None:
        """Raises `ManyhandsError` where I am to be given up: not where nobody of those who were finite is there any more."""
        if self.times < ALONE or not any(seat.id in self.others for seat in seats):
            return
        raise ManyhandsError(
            f"{_names(seats)[rank]} is given up after step {self.last + 1}: its {self.given} were not finite in {self.times} "
            "updates in a row, while the others' were",
            "an update needs everybody's numbers to be finite, and the others can go on without this worker",
            "look at its device and memory, and at the data of these steps",
        )


def _named(note: Note) -> tuple[set[int], Sequence[int], str]:
    """(ranks whose numbers were not finite, in an update of which steps, what of theirs); nobody where one has judged itself."""
    if isinstance(note, Heard):
        return set(note.gradients), (note.at,), "gradients"
    if note.places is not None:
        return set(), (), ""
    whose = note.whose
    given = "losses" if whose.losses else f"{note.given}s"
    return {*whose.losses, *(whose.gradients or ())}, note.steps or (note.step,), given


def own(rank: int, *, loss_is_finite: bool) -> Unsound:
    """Of one worker alone."""
    return Unsound((), (rank,)) if loss_is_finite else Unsound((rank,), ())


def _said(whose: Unsound, names: Sequence[str], given: str = "gradient") -> str:
    """The first cause: a loss that is not finite makes such gradients."""
    kind, ranks = ("loss", whose.losses) if whose.losses else (given, whose.gradients or ())
    if not ranks:
        return ""
    many = len(ranks) > 1
    plural = f"{kind}{'es' if kind == 'loss' else 's'}" if many else kind
    return f"the {plural} of {', '.join(_at(names, ranks))} {'were' if many else 'was'}"


def _at(names: Sequence[str], ranks: Iterable[int]) -> list[str]:
    return [names[rank] if rank < len(names) else f"rank {rank}" for rank in ranks]


def _names(seats: Seats) -> list[str]:
    return [f"{seat.id} (rank {rank}, {seat.host})" for rank, seat in enumerate(seats)]
