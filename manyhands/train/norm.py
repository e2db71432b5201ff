"""The norm of gradients, and what clipping makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def norm_of(tensors: Sequence[Tensor]) -> float:
    """The Euclidean norm of all of them, added up in float64."""
    return float(norm_there(tensors)) if tensors else 0.0


def norm_there(tensors: Sequence[Tensor]) -> Tensor:
    """The same, [] float64 on their device: nobody waits."""
    norms = [
        torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)).double()
        for t in tensors
    ]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of norm `norm` are multiplied with (torch.nn.utils.clip_grad_norm_'s rule)."""
    return min(1.0, max_norm / (norm + 1e-6))


def is_finite(*values: float) -> bool:
    return all(math.isfinite(v) for v in values)
