"""By tensor: one exchange for large tensors, another for small ones, or for those of some role.

Biases, gains and other small tensors cost little and matter much: they are sent whole while matrices are compressed
(the practice of deep gradient compression, arXiv:1712.01887, and PowerSGD, arXiv:1905.13727). Embeddings and heads, whose
gradients are of another kind than those of the matrices between them, can be named.
"""

from __future__ import annotations

from copy import copy
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from manyhands.core.checked import checked
from manyhands.core.config import choice, option
from manyhands.core.errors import UsageError
from manyhands.core.names import check_patterns, check_some_match, is_named
from manyhands.core.types import Agreed, Exchange
from manyhands.exchange.combine import (
    flush,
    named,
    packed,
    passed,
    refuse,
    renewed,
    selected,
    trait,
    unpacked,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from manyhands.core.types import Talk, Tensors


@dataclass(frozen=True)
@checked
class ByTensor:
    """`large` for tensors of at least `numel` values and `dims` dimensions that are not named `apart`, `small` for all others.

    Small tensors travel together, as one flat tensor per type, unless `small` wants them in their own shapes. Large ones
    are exchanged one by one: a sparsifier chooses within each.

    Args:
        large, small: any exchanges.
        numel: fewer values: small.
        dims: fewer dimensions: small. 2: matrices are large, vectors small.
        apart: patterns of the parts of a parameter's name: such a parameter is small, whatever its size.
    """

    by_tensor: ClassVar[bool] = True
    bucket_mb = passed("bucket_mb", "large", "small")
    holds = passed("holds", "large", "small")
    conserves = passed("conserves", "large", "small")
    contracts = passed("contracts", "large", "small")
    rounds_sums = passed("rounds_sums", "large", "small")
    fills = passed("fills", "large", "small")
    selects = passed("selects", "large", "small")
    follows = passed("follows", "large", "small")
    accelerates = passed("accelerates", "large", "small")

    large: Exchange = choice("exchanges", "int8", help="for large tensors")
    _: KW_ONLY
    small: Exchange = choice("exchanges", "all-reduce", help="for small tensors")
    numel: int = option(4096, help="fewer values are small")
    dims: int = option(0, help="fewer dimensions are small")
    apart: tuple[str, ...] = option(
        (),
        help="parameters with a module of such a name (patterns) are small, too: ['wte', '*embed*', 'lm_head']",
    )
    _names: ClassVar[tuple[str, ...] | None] = None  # of the tensors; see `named`

    def __post_init__(self) -> None:
        refuse("by-tensor", "large", self.large)
        refuse("by-tensor", "small", self.small)
        check_patterns("by-tensor(apart)", self.apart)
        for name in ("numel", "dims"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} = {getattr(self, name)}", "it is not negative", "give 0 or more")

    def check_names(self, names: Sequence[str]) -> None:
        """Raises `UsageError` where `apart` sets none of all the model's parameters apart."""
        check_some_match("by-tensor(apart)", self.apart, names)

    def named(self, names: Sequence[str]) -> ByTensor:
        """This, for the tensors of parameters `names`."""
        told = copy(self)
        object.__setattr__(told, "_names", tuple(names))
        return told

    def init(self, like: Tensors) -> Any:
        small, large = self._parts(like)
        of_small, of_large = self._told(small, large)
        return {
            "large": of_large.init([like[i] for i in large]),
            "small": of_small.init(self._packed([like[i] for i in small])),
        }

    def talk(self, delta: Tensors, state: Any) -> Talk:
        small, large = self._parts(delta)
        shorts = [delta[i] for i in small]
        of_small, of_large = self._told(small, large)
        first = yield from of_small.talk(self._packed(shorts), state["small"])
        second = yield from of_large.talk([delta[i] for i in large], state["large"])
        places = [*small, *large]
        mean = dict(zip(places, [*self._unpacked(first.mean, shorts), *second.mean], strict=True))
        sent = dict(zip(places, [*self._unpacked(first.sent, shorts), *second.sent], strict=True))
        return Agreed(
            [mean[i] for i in range(len(delta))],
            [sent[i] for i in range(len(delta))],
            {"large": second.state, "small": first.state},
        )

    def flush(self, state: Any, like: Tensors) -> tuple[list[Tensor | None], Any]:
        """What both parts owe, to be sent without loss with the next contribution, and the state after that."""
        small, large = self._parts(like)
        shorts = [like[i] for i in small]
        together = self._packed(shorts)
        of_small, of_large = self._told(small, large)
        short, after_short = flush(of_small, state["small"], together)
        long, after_long = flush(of_large, state["large"], [like[i] for i in large])
        owed: list[Tensor | None] = [None] * len(like)
        if any(t is not None for t in short):
            filled = [p.new_zeros(p.shape) if t is None else t for t, p in zip(short, together, strict=True)]
            for i, tensor in zip(small, self._unpacked(filled, shorts), strict=True):
                owed[i] = tensor
        for i, piece in zip(large, long, strict=True):
            owed[i] = piece
        return owed, {"large": after_long, "small": after_short}

    def renewed(self, delta: Tensors, mean: Tensors, state: Any) -> Any:
        """Both parts' estimates after a round that went another way."""
        small, large = self._parts(delta)
        shorts, short_means = ([of[i] for i in small] for of in (delta, mean))
        longs, long_means = ([of[i] for i in large] for of in (delta, mean))
        of_small, of_large = self._told(small, large)
        return {
            "large": renewed(of_large, longs, long_means, state["large"]),
            "small": renewed(of_small, self._packed(shorts), self._packed(short_means), state["small"]),
        }

    def selected(self, like: Tensors) -> list[bool]:
        """Of each tensor, whether some of its entries are sent and others not."""
        small, large = self._parts(like)
        _, of_large = self._told(small, large)
        found = dict(zip(large, selected(of_large, [like[i] for i in large]), strict=True))
        return [found.get(i, trait(self.small, "selects")) for i in range(len(like))]

    def _parts(self, tensors: Tensors) -> tuple[list[int], list[int]]:
        """Positions of the small and of the large tensors."""
        apart = self._apart(len(tensors))
        large = [
            i
            for i, t in enumerate(tensors)
            if t.numel() >= self.numel and t.dim() >= self.dims and not apart[i]
        ]
        return sorted(set(range(len(tensors))) - set(large)), large

    def _told(self, small: Sequence[int], large: Sequence[int]) -> tuple[Any, Any]:
        """The exchanges of the small and of the large tensors, which learn their names where those are known."""
        if self._names is None:
            return self.small, self.large
        return named(self.small, [self._names[i] for i in small]), named(
            self.large, [self._names[i] for i in large]
        )

    def _apart(self, count: int) -> list[bool]:
        """Of each tensor, whether its name sets it apart."""
        if not self.apart:
            return [False] * count
        if self._names is None or len(self._names) != count:
            raise UsageError(
                f"by-tensor(apart={list(self.apart)}) for {count} tensors without names",
                "it chooses by the names of the parameters, which this strategy does not tell it",
                "choose by numel and dims, or use ddp or a strategy of local steps",
            )
        return [is_named(name, self.apart) for name in self._names]

    def _packed(self, tensors: Tensors) -> Tensors:
        """Small tensors as they travel."""
        return tensors if trait(self.small, "by_tensor") else packed(tensors)

    def _unpacked(self, flats: Tensors, like: Tensors) -> Tensors:
        """The inverse of `_packed`, for tensors shaped like `like`."""
        return flats if trait(self.small, "by_tensor") else unpacked(flats, like)
