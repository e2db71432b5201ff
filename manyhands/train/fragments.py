"""Parts of the parameters that are exchanged as one, with their anchors and the buffers that travel."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from manyhands.core.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from manyhands.core.types import Handle, Wire
    from manyhands.train.header import Header
    from manyhands.wire.drive import Interleave

LAYER = re.compile(r"\.(\d+)\.")


@dataclass
class Flight:
    """An exchange on its way."""

    fragment: Fragment
    talks: Interleave
    header: Handle
    nominal: float
    told_nominal: int
    targets: float
    sums: list[float]
    step: int


@dataclass(frozen=True)
class Told:
    """What the workers told each other: mean loss since they last spoke, targets that full batches would have had.

    `lost`: what was agreed was not finite, and was left out.
    """

    loss: float
    nominal: int
    header: Header
    lost: bool


@dataclass
class Fragment:
    """Some of the parameters, with anchors (as of the last agreement) and the flat buffers that travel."""

    names: list[str]
    params: list[nn.Parameter]
    anchors: list[nn.Parameter]
    flats: list[Tensor]
    views: list[Tensor]
    targets: float = 0.0
    nominal: float = 0.0
    drifted: bool = False
    flight: Flight | None = None
    met: int = 0  # the steps whose work is in the anchors
    heard: int = 0  # the same of which everybody is known to have done its part
    places: list[tuple[int, int]] = field(default_factory=list)  # (flat, offset) of each view

    @staticmethod
    def make(named: Sequence[tuple[str, nn.Parameter]], wire: Wire) -> Fragment:
        names, params = [n for n, _ in named], [p for _, p in named]
        anchors = [torch.nn.Parameter(p.detach().clone()) for p in params]
        flats: list[Tensor] = []
        places: dict[int, tuple[int, int]] = {}
        for dtype in dict.fromkeys(p.dtype for p in params):
            offset = 0
            for i, p in enumerate(params):
                if p.dtype is dtype:
                    places[i] = (len(flats), offset)
                    offset += p.numel()
            flats.append(wire.buffer(offset, dtype))
        order = [places[i] for i in range(len(params))]
        views = [
            flats[flat][at : at + p.numel()].view(p.shape)
            for (flat, at), p in zip(order, params, strict=True)
        ]
        return Fragment(names, params, anchors, flats, views, places=order)

    def measure(self, weight: float) -> None:
        """Δ = weight · (anchor − parameters) into the buffers."""
        with torch.no_grad():
            for view, anchor, param in zip(self.views, self.anchors, self.params, strict=True):
                torch.sub(anchor, param, out=view)
                if weight != 1.0:
                    view.mul_(weight)

    def anchor_flats(self) -> list[Tensor]:
        """The anchors laid out as the buffers are."""
        laid = [torch.empty_like(flat) for flat in self.flats]
        for (flat, at), anchor in zip(self.places, self.anchors, strict=True):
            laid[flat][at : at + anchor.numel()] = anchor.detach().reshape(-1)
        return laid

    def shaped(self, means: Sequence[Tensor], *, by_tensor: bool) -> list[Tensor]:
        """What was agreed, per parameter."""
        if by_tensor:
            return list(means)
        return [
            means[flat][at : at + p.numel()].view(p.shape)
            for (flat, at), p in zip(self.places, self.params, strict=True)
        ]

    def mix(self, keep: float) -> None:
        """θ ← keep·θ + (1 − keep)·anchor."""
        with torch.no_grad():
            for anchor, param in zip(self.anchors, self.params, strict=True):
                if keep:
                    param.lerp_(anchor, 1.0 - keep)
                else:
                    param.copy_(anchor)
        self.drifted = self.drifted or keep > 0

    def rest(self) -> None:
        """Counted from here on."""
        self.targets = self.nominal = 0.0
        self.drifted = False

    def begin(self, steps: int) -> None:
        """The anchors, as they are, stand for so many steps; nothing is in flight."""
        self.rest()
        self.flight, self.met, self.heard = None, steps, steps


def split(named: Sequence[tuple[str, nn.Parameter]], fragments: int) -> list[list[tuple[str, nn.Parameter]]]:
    """Cut the parameters into `fragments` parts, each of which travels at once.

    Layers are dealt out in turn (the strided pattern of arXiv:2501.18512, section 2.2). What is no layer and larger than
    any (an embedding) comes before them, and each goes to whichever part is smallest: so that no part is much larger than
    the others.

    Raises:
        UsageError: there are fewer tensors than fragments.
    """
    if fragments > len(named):
        raise UsageError(
            f"fragments = {fragments} for a model of {len(named)} tensors",
            "each fragment holds at least one",
            f"give fragments <= {len(named)}",
        )
    parts: list[list[tuple[str, nn.Parameter]]] = [[] for _ in range(fragments)]
    sizes = [0] * fragments
    layers: dict[int, list[tuple[str, nn.Parameter]]] = {}
    rest: list[list[tuple[str, nn.Parameter]]] = []
    for name, param in named:
        found = LAYER.search(name)
        layers.setdefault(int(found[1]), []).append((name, param)) if found else rest.append([(name, param)])
    ordered = [layers[i] for i in sorted(layers)]
    largest = max(map(_numel, ordered), default=0)
    rest.sort(key=lambda unit: -_numel(unit))
    before = [unit for unit in rest if _numel(unit) > largest]
    for unit in [*before, *ordered, *rest[len(before) :]]:
        smallest = min(range(fragments), key=lambda i: (sizes[i], i))
        parts[smallest].extend(unit)
        sizes[smallest] += _numel(unit)
    while not all(parts):  # fewer layers than fragments: take from the fullest
        empty = next(i for i, part in enumerate(parts) if not part)
        fullest = max(range(fragments), key=lambda i: len(parts[i]))
        parts[empty].append(parts[fullest].pop())
    return parts


def _numel(unit: Sequence[tuple[str, nn.Parameter]]) -> int:
    return sum(param.numel() for _, param in unit)
