"""Random-k: the same random entries on every worker, so that only values travel, in one sum.

Which entries is a function of the seed and the round, so no position is sent and the bytes do not grow with the number of
workers (Stich, Cordonnier and Jaggi 2018, arXiv:1809.07599, "rand-k"). The vector is cut into k strata as even as can be and
one entry, or one contiguous block, is drawn from each: as likely as any other of its stratum, never twice, in ascending
order. Blocks of 64 entries and more move at the speed of a copy.

Without scaling it is a contraction: use it under `ErrorFeedback`. Scaled by the strata's lengths it is unbiased and needs
no residual, at a variance of n/k - 1 times the squared norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from manyhands.core import rng
from manyhands.core.checked import checked
from manyhands.core.errors import UsageError
from manyhands.core.request import Sum, Where
from manyhands.core.types import Agreed
from manyhands.exchange.codec import rounds, wide

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Talk, Tensors


@dataclass(frozen=True, kw_only=True)
@checked
class RandomK:
    """Send a random share of the entries, the same on all workers.

    Args:
        density: the share of the entries that is sent, at least one.
        block: entries are drawn in contiguous blocks of this many; what is left behind the last whole block is always sent.
        unbiased: multiply what is sent by the inverse of its probability.
        seed: of the choice of entries.
    """

    selects: ClassVar[bool] = True
    density: float = 0.01
    block: int = 1
    unbiased: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise UsageError(
                f"density = {self.density}",
                "a share of the entries is above 0 and at most 1",
                "0.01 sends 1%",
            )
        if self.block < 1:
            raise UsageError(
                f"block = {self.block}", "a block holds at least one entry", "1 draws single entries"
            )

    init = rounds

    @property
    def contracts(self) -> bool:
        """What is left out of scaled entries is up to n/k − 1 times as large as they were."""
        return not self.unbiased

    def talk(self, delta: Tensors, state: Any) -> Talk:
        import torch

        _, size = yield Where()
        turn = int(state["round"])
        mean, sent = [], []
        for i, tensor in enumerate(delta):
            flat = tensor.detach().reshape(-1)
            blocks, lengths = self._draw(flat.numel(), rng.key(self.seed, turn, i))
            chosen = blocks.to(flat.device)
            exact = wide(flat.dtype)
            own = torch.cat([self._rows(flat)[chosen].view(-1), self._rest(flat)]).to(exact)
            if self.unbiased:
                scale = lengths.to(flat.device, exact).repeat_interleave(self.block)
                own[: scale.numel()] *= scale
                own = own.to(flat.dtype).to(exact)  # what I report as sent is what I send
            # the entries that stay behind are not sent, but whether they are finite is
            own = torch.cat([own, _poison(flat)])
            agreed = own if size == 1 else (yield Sum(own.clone()))
            sent.append(self._spread(own, tensor, chosen))
            mean.append(sent[-1] if size == 1 else self._spread(agreed, tensor, chosen))
        return Agreed(mean, sent, {"round": state["round"] + 1})

    def size_bytes(self, numel: int) -> int:
        """Bytes of one worker's contribution to the sum, of float32 values (float64: twice as many)."""
        blocks = numel // self.block
        return 4 * (self._count(blocks) * self.block + numel % self.block + (numel > 0))

    def _count(self, blocks: int) -> int:
        return min(blocks, max(1, round(self.density * blocks)))

    def _draw(self, numel: int, key: int) -> tuple[Tensor, Tensor]:
        """Which blocks, and how many each was drawn from: int64 [k] on the CPU."""
        import torch

        blocks = numel // self.block
        count = self._count(blocks)
        if count == 0:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        ends = torch.arange(count + 1) * blocks // count
        lengths = ends.diff()
        generator = torch.Generator().manual_seed(key >> 1)
        uniform = torch.rand(count, dtype=torch.float64, generator=generator)
        return ends[:-1] + (uniform * lengths).to(torch.int64), lengths

    def _rows(self, flat: Tensor) -> Tensor:
        """The whole blocks of a vector: [blocks, block]."""
        return flat[: flat.numel() // self.block * self.block].view(-1, self.block)

    def _rest(self, flat: Tensor) -> Tensor:
        return flat[flat.numel() // self.block * self.block :]

    def _spread(self, values: Tensor, like: Tensor, blocks: Tensor) -> Tensor:
        """Values and the poison behind them as a tensor shaped like `like`, zero elsewhere."""
        import torch

        result = torch.zeros(like.numel(), dtype=like.dtype, device=like.device)
        cut = blocks.numel() * self.block
        self._rows(result)[blocks] = values[:cut].view(-1, self.block).to(like.dtype)
        self._rest(result).copy_(values[cut : cut + like.numel() % self.block])
        if like.numel() and not bool(values[-1] == 0):
            result.fill_(values[-1])
        return result.view(like.shape)


def _poison(flat: Tensor) -> Tensor:
    """[1]: 0 where all of a vector is finite, else NaN; [0] of an empty one."""
    import torch

    exact = wide(flat.dtype)
    if flat.numel() == 0:
        return flat.to(exact)
    # one pass that nothing infinite survives; only where it fails, because of that or by overflow, a slower one decides
    finite = bool(flat.sum(dtype=exact).isfinite()) or bool(flat.isfinite().all())
    return torch.full((1,), 0.0 if finite else torch.nan, dtype=exact, device=flat.device)
