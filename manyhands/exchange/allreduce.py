"""All-reduce: everybody's contribution is added, in buckets.

The reference all others are compared with. The sum is Σ wᵢ gᵢ: contributions arrive weighted, so the result is
the exact mean over all valid targets (promise 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from manyhands.core.checked import checked
from manyhands.core.errors import UsageError
from manyhands.core.request import Sum
from manyhands.core.types import Agreed
from manyhands.exchange.codec import wide
from manyhands.exchange.combine import packed, protected, renewed, trait, unpacked

if TYPE_CHECKING:
    from manyhands.core.types import Exchange, Talk, Tensors

Precision = Literal["as-is", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
@checked
class AllReduce:
    """Add everybody's contribution.

    Args:
        bucket_mb: gradients travel in buckets of about this many MiB, each as soon as backward has filled it.
        precision: the number format on the wire. ``as-is`` sends the parameters' own; bf16 and fp16 halve the bytes of
            fp32 and round each contribution, and then the sum at every addition (relative error 2⁻⁸ and 2⁻¹¹ each; fp16
            overflows above 65,504): feedback, which knows of the first alone, takes the codecs ``bf16`` and ``fp16`` instead.
    """

    bucket_mb: float = 25.0
    precision: Precision = "as-is"

    def __post_init__(self) -> None:
        if not self.bucket_mb > 0:
            raise UsageError(
                f"bucket_mb = {self.bucket_mb}",
                "a bucket holds at least one parameter",
                "give a positive size",
            )

    @property
    def rounds_sums(self) -> bool:
        """Whether the sum is rounded on its way, too."""
        return self.precision in ("bf16", "fp16")

    @property
    def conserves(self) -> bool:
        """Whether what was sent adds up to the sum."""
        return not self.rounds_sums

    def init(self, like: Tensors) -> Any:
        return ()

    def talk(self, delta: Tensors, state: Any) -> Talk:
        mean, sent = [], []
        for tensor in delta:
            if self.precision == "as-is" or not tensor.is_floating_point():
                mean.append((yield Sum(tensor)))
                sent.append(tensor)
            else:
                wire = tensor.to(_dtype(self.precision))
                if wire is tensor:
                    mean.append((yield Sum(tensor)))
                    sent.append(tensor)
                else:
                    decoded = wire.to(tensor.dtype)
                    mean.append((yield Sum(wire)).to(tensor.dtype))
                    sent.append(decoded)
        return Agreed(mean, sent, state)


def together(delta: Tensors) -> Talk:
    """A lossless all-reduce of many tensors as one of each type: one message for a model's, not one a tensor."""
    agreed = yield from AllReduce().talk(packed(delta), ())
    return Agreed(unpacked(agreed.mean, delta), unpacked(agreed.sent, delta), ())


def beside(inner: Exchange, delta: Tensors, state: Any) -> Talk:
    """A round of all-reduce instead of one of `inner`, whose `state` follows it.

    Where `inner` keeps estimates of contributions they are renewed: in float32 for half precision, so that the estimate of
    the sum is the sum of the estimates.
    """
    if not trait(inner, "follows"):
        agreed = yield from together(delta)
        return Agreed(agreed.mean, agreed.sent, state)
    offered = [t.to(wide(t.dtype)) for t in delta]
    agreed = yield from protected(together(offered))
    mean = [m.to(d.dtype) for m, d in zip(agreed.mean, delta, strict=True)]
    return Agreed(mean, list(delta), renewed(inner, offered, agreed.mean, state))


def _dtype(precision: Precision) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
