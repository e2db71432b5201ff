"""What rows cost each worker now, from the seconds that they took in the last steps.

For each worker the line T(b) = a + c·b is fitted to the last `WINDOW` steps: with y = T/b and x = 1/b it is y = a·x + c,
so a is a slope, taken as the weighted median of all pairs' slopes (Theil and Sen: up to 29% of the steps may be anything),
and c the median of y − a·x. A slope is known only as well as x has varied: a is multiplied with S/(S + `SHRINK`), S = Σ
(x/x̄ − 1)². Where shares never varied a is 0 and the line goes through the origin, which is right about the shares that
are (then all workers are done together, and no other proportional line says otherwise) and is mended by the next change.

A change of speed is noticed by two successive steps that are off, alike, by more than `ODD` and by three times what the
worker is usually off by: then what is remembered is scaled by that factor, so that the ratio a : c is kept. A single odd
step (a page fault storm, a checkpoint) is forgotten. How much a worker's rows have changed widens what is taken
for odd: after a first step with half the rows the same time may be all fixed cost.

A worker that gets no rows is not measured; it is trusted again little by little (its cost halves every `REST` steps, and later
after each attempt in vain), so that one that has recovered comes back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from manyhands.balance.shares import Cost

WINDOW = 12
SHRINK = 0.1
ODD = 0.15  # of ln(measured / expected)
USUAL = 0.02  # how far off steps are believed to be at first
REST = 32
LONGEST_REST = 1024
MOST_HALVINGS = 60  # of one that can take nothing (a cap of 0) and so is never tried: a cost stays positive
MOST_FIXED = 0.95  # of a step's seconds

Sample = tuple[float, float]  # rows, seconds


def fit(samples: Sequence[Sample]) -> Cost:
    """The line through (rows, seconds), each rows > 0 and seconds > 0. See the module.

    >>> fit([(8, 10.0), (8, 10.0)])
    Cost(fixed=0.0, per_row=1.25)
    """
    xs = [1.0 / rows for rows, _ in samples]
    ys = [seconds / rows for rows, seconds in samples]
    mean = math.fsum(xs) / len(xs)
    spread = math.fsum((x / mean - 1.0) ** 2 for x in xs)
    varied = max(xs) - min(xs) > 1e-6 * mean
    pairs = varied and [
        ((ys[j] - ys[i]) / (xs[j] - xs[i]), abs(xs[j] - xs[i]))
        for i in range(len(xs))
        for j in range(i)
        if abs(xs[j] - xs[i]) > 1e-6 * mean
    ]
    fixed = _weighted_median(pairs) * spread / (spread + SHRINK) if pairs else 0.0
    fixed = min(max(fixed, 0.0), MOST_FIXED * min(seconds for _, seconds in samples))
    return Cost(fixed, max(median(y - fixed * x for x, y in zip(xs, ys, strict=True)), 1e-12))


def _weighted_median(pairs: Sequence[tuple[float, float]]) -> float:
    """Of (value, weight)."""
    half, so_far = math.fsum(weight for _, weight in pairs) / 2, 0.0
    for value, weight in sorted(pairs):
        so_far += weight
        if so_far >= half:
            return value
    raise AssertionError("the weights add up to their sum")


@dataclass
class Track:
    """What is known of one worker.

    Attributes:
        samples: (rows, seconds) of the last steps, at today's speed.
        odd: the last step, if it was off.
        off: by how much steps are usually off, as |ln(measured / expected)|.
        idle: steps without rows since the last with some.
        rest: idle steps in which its cost is believed to have halved.
        warm: whether its first step, which builds kernels and fills caches, is over.
    """

    samples: list[Sample] = field(default_factory=list)
    odd: Sample | None = None
    off: float = USUAL
    idle: int = 0
    rest: int = REST
    warm: bool = False
    line: Cost = field(default=Cost(0.0, 1.0), init=False, repr=False, compare=False)  # fitted to the samples

    def __post_init__(self) -> None:
        self._fit()

    def observe(self, rows: float, seconds: float) -> bool:
        """Take one step into account; whether the speed has changed."""
        if rows <= 0 or not 0 < seconds < math.inf:
            self.idle += 1
            return False
        if not self.warm:
            self.warm = True
            return False
        tried, self.idle = self.idle, 0
        if not self.samples:
            self.samples.append((rows, seconds))
            self._fit()
            return False
        ratio = self._ratio(rows, seconds)
        nearest = min(abs(math.log(rows / known)) for known, _ in self.samples)
        if abs(ratio) <= max(ODD, 3 * self.off) + nearest:
            self._usual(rows, seconds, ratio)
            if tried:  # in vain
                self.rest = min(2 * self.rest, LONGEST_REST)
            return False
        if tried and ratio < 0:  # it has recovered: its rest is over
            self.rest = REST
            return self._change([(rows, seconds)])
        if self.odd is not None and abs(self._ratio(*self.odd) - ratio) <= max(ODD, 3 * self.off):
            return self._change([self.odd, (rows, seconds)])
        self.odd = (rows, seconds)
        self.off += 0.2 * (min(abs(ratio), 0.5) - self.off)
        return False

    def cost(self) -> Cost | None:
        """The current line; None where nothing is known."""
        if not self.samples:
            return None
        trust = 0.5 ** min(self.idle / self.rest, MOST_HALVINGS)
        return Cost(self.line.fixed * trust, self.line.per_row * trust)

    def _ratio(self, rows: float, seconds: float) -> float:
        return math.log(seconds / self.line.seconds(rows))

    def _fit(self) -> None:
        if self.samples:
            self.line = fit(self.samples)

    def _usual(self, rows: float, seconds: float, ratio: float) -> None:
        self.odd = None
        self.off += 0.2 * (abs(ratio) - self.off)
        self.samples = [*self.samples, (rows, seconds)][-WINDOW:]
        self._fit()

    def _change(self, new: list[Sample]) -> bool:
        factor = math.exp(math.fsum(self._ratio(*sample) for sample in new) / len(new))
        kept = [(rows, seconds * factor) for rows, seconds in self.samples[-WINDOW // 3 :]]
        self.samples, self.odd = [*kept, *new], None
        self._fit()
        return True

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        del data["line"]
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Track:
        samples = [(float(rows), float(seconds)) for rows, seconds in data["samples"]]
        odd = tuple(data["odd"]) if data["odd"] is not None else None
        return Track(**{**data, "samples": samples, "odd": odd})
