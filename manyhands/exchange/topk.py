"""Top-k: only the entries of largest magnitude travel; what is left waits in a residual.

Aji and Heafield 2017 (arXiv:1704.05021) drop all but the largest 1% of a gradient; Lin et al. 2018 (arXiv:1712.01887) add
what training to the same loss takes. SparseLoCo (arXiv:2508.15706, algorithm 1) keeps the 64 largest of each 4,096 of a
*pseudo-gradient*, as 2 bits: ``ErrorFeedback(TopK(chunk=4096, k=64, values="int2"), decay=0.95)``.

It is a biased codec: use it under `ErrorFeedback`. Raw gradients at high sparsity are unstable under Adam; compress
momentum or pseudo-gradients. Bytes received grow with the number of workers; `TwoPhase` keeps them constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from manyhands.core.checked import checked
from manyhands.core.errors import UsageError
from manyhands.core.request import Where
from manyhands.core.types import Agreed
from manyhands.exchange import sparse
from manyhands.exchange.largest import kept, largest, largest_of_chunks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from manyhands.core.types import Talk, Tensors


@dataclass(frozen=True, kw_only=True)
@checked
class TopK:
    """Send the k entries of largest magnitude of each chunk, or of the whole tensor.

    Positions take 2 + log₂(n/k) bits (`sparse`); NaN counts as the largest, so that it is seen by all.

    Args:
        density: the share of entries that is sent, at least one of each chunk.
        k: how many of each chunk; in place of `density`.
        chunk: entries are chosen within chunks of this many; 0: within the whole tensor, by a sampled threshold.
        values: how values travel: fp32, bf16, or a sign and a level in 8, 4 or 2 bits.
        average: ``all`` workers (whoever does not send an entry counts as 0), or the ``senders`` of each entry alone
            (DeMo, SparseLoCo). Then the mean is more than what was sent, so a residual is not an exact account.
    """

    selects: ClassVar[bool] = True
    density: float = 0.01
    k: int | None = None
    chunk: int = 4096
    values: sparse.Values = "fp32"
    average: sparse.Average = "all"

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise UsageError(
                f"density = {self.density}",
                "a share of the entries is above 0 and at most 1",
                "0.01 sends 1%",
            )
        if self.chunk < 0:
            raise UsageError(
                f"chunk = {self.chunk}", "a chunk holds entries; 0 takes the whole tensor", "try 4096"
            )
        if self.k is not None and not 0 < self.k <= (self.chunk or self.k):
            raise UsageError(
                f"k = {self.k}",
                f"at least one and at most all entries of a chunk of {self.chunk} are sent",
                "give k between 1 and chunk",
            )

    @property
    def conserves(self) -> bool:
        """Whether Σ of `sent` over workers is `mean`."""
        return self.average == "all"

    @property
    def fills(self) -> bool:
        """Whether a zero that is selected may come out as something else: two bits have none."""
        return self.values == "int2"

    def init(self, like: Tensors) -> Any:
        return ()

    def talk(self, delta: Tensors, state: Any) -> Talk:
        _, size = yield Where()
        mean, sent = [], []
        for tensor in delta:
            whole, own = yield from sparse.agree(self, tensor, 0, size, even=True)
            mean.append(whole)
            sent.append(own)
        return Agreed(mean, sent, state)

    def encode(self, tensor: Tensor, key: int) -> Tensor:
        numel = tensor.numel()
        if self._count(numel) == numel:
            where = largest(tensor, numel)
        elif self.chunk and numel > self.chunk:
            where = largest_of_chunks(tensor, self.chunk, self._share(self.chunk))
        else:
            where = largest(tensor, self._count(numel))
        return sparse.pack(sparse.Entries(where, tensor[where]), numel, self.values)

    def entries(self, payload: Tensor, numel: int, dtype: torch.dtype) -> sparse.Entries:
        """What a payload stands for."""
        return sparse.unpack(payload, numel, self._count(numel), self.values, dtype)

    def decode(self, payload: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        return sparse.dense(self.entries(payload, numel, dtype), numel)

    def size_bytes(self, numel: int) -> int:
        return sparse.packed_bytes(numel, self._count(numel), self.values)

    def _share(self, numel: int) -> int:
        """How many of `numel` entries are sent."""
        return min(numel, max(1, self.k if self.k is not None else round(self.density * numel)))

    def _count(self, numel: int) -> int:
        if self.chunk:
            return kept(numel, self.chunk, self._share(self.chunk))
        return self._share(numel)
