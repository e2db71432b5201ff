"""Threshold: what is large enough travels, however much or little that is.

Strom 2015 ("Scalable distributed DNN training using commodity GPU cloud computing") sends what has grown beyond a fixed
value, which Sahu et al. 2021 (arXiv:2108.00951) show to be the choice of least total error, if the value is right. The
size of a message varies, so it is gathered with its length. Biased: use it under `ErrorFeedback`.

A threshold that moves with what is held back must not move away from it. Half the largest magnitude is always reached by
something. A multiple of the root mean square is not: where residuals have spread evenly up to it, the largest is √3
times their root mean square, so that from ``above = √3`` on everything may wait for ever; that is for use without feedback.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from manyhands.core.checked import checked
from manyhands.core.errors import UsageError
from manyhands.core.request import Where
from manyhands.core.types import Agreed
from manyhands.exchange import sparse
from manyhands.exchange.codec import wide
from manyhands.exchange.largest import at_least

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from manyhands.core.types import Talk, Tensors

HEADER_BYTES = 8  # the number of entries


@dataclass(frozen=True, kw_only=True)
@checked
class Threshold:
    """Send the entries whose magnitude is at least `above` times a scale.

    Args:
        above: the threshold, in units of `of`.
        of: ``max`` (the largest magnitude of the tensor), ``rms`` (its root mean square), ``norm`` (its Euclidean norm), or
            ``absolute`` (1).
        values: how values travel: fp32, bf16, or a sign and a level in 8, 4 or 2 bits.
        average: ``all`` workers or the ``senders`` of each entry alone; see `TopK`.
    """

    selects: ClassVar[bool] = True
    above: float = 0.5
    of: Literal["max", "rms", "norm", "absolute"] = "max"
    values: sparse.Values = "fp32"
    average: sparse.Average = "all"

    def __post_init__(self) -> None:
        if not (self.above > 0 and math.isfinite(self.above)):
            raise UsageError(
                f"above = {self.above}",
                "a threshold is a positive number",
                "use all-reduce to send everything; half of max is the default",
            )
        if self.of in ("norm", "max") and self.above > 1:
            raise UsageError(
                f"above = {self.above} of {self.of}",
                "no entry exceeds it, so nothing would be sent",
                "1 or less",
            )

    @property
    def conserves(self) -> bool:
        """Whether Σ of `sent` over workers is `mean`."""
        return self.average == "all"

    def init(self, like: Tensors) -> Any:
        return ()

    def talk(self, delta: Tensors, state: Any) -> Talk:
        _, size = yield Where()
        mean, sent = [], []
        for tensor in delta:
            whole, own = yield from sparse.agree(self, tensor, 0, size, even=False)
            mean.append(whole)
            sent.append(own)
        return Agreed(mean, sent, state)

    def encode(self, tensor: Tensor, key: int) -> Tensor:
        """Bytes (uint8 [payload_bytes(n, count)]) of a flat tensor [n]: the count, positions, values."""
        import torch

        level = self.level(tensor)
        where = at_least(tensor, level) if level > 0 else tensor.nonzero().view(-1)
        count = torch.tensor([where.numel()], device=tensor.device).view(torch.uint8)
        entries = sparse.Entries(where, tensor[where])
        return torch.cat([count, sparse.pack(entries, tensor.numel(), self.values)])

    def level(self, tensor: Tensor) -> float:
        """The magnitude from which on entries of `tensor` [n] are sent; infinite where only infinity and NaN are."""
        if self.of == "absolute" or tensor.numel() == 0:
            return self.above
        import torch

        exact = wide(tensor.dtype)
        if self.of == "max":
            scale = _largest(tensor)
        else:
            scale = float(torch.linalg.vector_norm(tensor, dtype=exact))
            if math.isinf(scale):  # a square may have overflowed
                most = _largest(tensor)
                scale = float(torch.linalg.vector_norm(tensor.to(exact) / most)) * most
        if not math.isfinite(scale):
            return math.inf
        return self.above * scale / (math.sqrt(tensor.numel()) if self.of == "rms" else 1.0)

    def entries(self, payload: Tensor, numel: int, dtype: torch.dtype) -> sparse.Entries:
        """What a payload stands for."""
        import torch

        count = int(payload[:HEADER_BYTES].clone().view(torch.int64))
        return sparse.unpack(payload[HEADER_BYTES:], numel, count, self.values, dtype)

    def decode(self, payload: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """The flat tensor [numel] that the bytes stand for."""
        return sparse.dense(self.entries(payload, numel, dtype), numel)

    def payload_bytes(self, numel: int, count: int) -> int:
        """Bytes on the wire for `count` entries of `numel`."""
        return HEADER_BYTES + sparse.packed_bytes(numel, count, self.values)


def _largest(tensor: Tensor) -> float:
    """The largest magnitude of a tensor [n], n > 0; NaN if there is one."""
    least, most = tensor.aminmax()
    return float(most if bool(most.isnan()) else max(-least, most))
