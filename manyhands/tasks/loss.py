"""Cross entropy as a sum, for large vocabularies: exact in float32 without float32 copies of the logits.

loss = Σ over rows with a valid target of (logsumexp(xᵢ) − xᵢ[targetᵢ]); its gradient softmax(xᵢ) −
onehot(targetᵢ) is written directly in the logits' type. On a CPU each is one
pass of a kernel of ours (``core/compute.cpp``);
on a GPU each is one fused kernel where Triton is there; elsewhere, and in float64, rows are taken in blocks that
stay in the cache or bound the extra memory. `torch.nn.functional.cross_entropy` is the reference that the tests
compare with; for bfloat16 logits it first makes float32 copies of logits, log-probabilities and gradient. On
one core with bfloat16 logits the blocks took 22 ms against 63 at 1,024 rows × 8,192, and 94 ms against 243 at
512 × 50,304; the kernels take about half (docs/log.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyhands.core import compute
from manyhands.core.fuse import can_fuse, fuse
from manyhands.core.types import Summed

IGNORED = -100
FUSED_FROM = 1 << 22  # logits; fewer are not worth a compilation
BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 28}  # of one block in the type of the computation


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ of the cross entropy over rows whose target is not −100.

    Args:
        logits: [rows, classes] of any floating type; the sum is computed in float32, or in float64 for
        float64. targets: [rows] int64 within 0 … classes − 1, or −100.

    Returns:
        a scalar, with a graph; 0 where every target is ignored.
    """
    loss: Tensor = _CrossEntropySum.apply(logits, targets)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        rows = logits.shape[0]
        kind = compute.kind_of(logits)
        if kind is not None:
            norm = compute.log_norms(logits, kind)  # [rows] log of the sum of exponentials
        elif _long_on_gpu(logits):
            norm = fuse(log_norms, any_shape=False)(logits)
        else:
            block = _block_rows(logits, dtype)
            norm = torch.empty(rows, dtype=dtype, device=logits.device)
            for i in range(0, rows, block):
                torch.logsumexp(logits[i : i + block].to(dtype), 1, out=norm[i : i + block])
        valid = targets != IGNORED
        index = targets.masked_fill(~valid, 0).unsqueeze(1)  # [rows, 1]
        picked = logits.gather(1, index).squeeze(1).to(dtype)
        ctx.save_for_backward(logits, index, valid, norm)
        return torch.where(valid, norm - picked, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        logits, index, valid, norm = ctx.saved_tensors
        kind = compute.kind_of(logits)
        if kind is not None:
            weight = (valid * grad_loss).to(norm.dtype)  # [rows]
            return compute.cross_entropy_gradient(logits, index, weight, norm, kind), None
        if _long_on_gpu(logits):
            return fuse(gradient, any_shape=False)(logits, index, valid, norm, grad_loss), None
        rows = logits.shape[0]
        block = _block_rows(logits, norm.dtype)
        grad = torch.empty_like(logits)
        weight = (valid * grad_loss).to(norm.dtype).unsqueeze(1)  # [rows, 1]
        minus_one = torch.full((block, 1), -1.0, dtype=norm.dtype, device=norm.device)
        for i in range(0, rows, block):
            part = slice(i, min(i + block, rows))
            share = (logits[part].to(norm.dtype, copy=True).sub_(norm[part].unsqueeze(1))).exp_()  # softmax
            share.scatter_add_(1, index[part], minus_one[: part.stop - i]).mul_(weight[part])
            grad[part] = share
        if grad.device.type != "cpu" or not bool(valid.all()):
            grad.masked_fill_(
                ~valid.unsqueeze(1), 0.0
            )  # also where the logits of an ignored row are not finite
        return grad, None


def log_norms(logits: Tensor) -> Tensor:
    """The logarithm [rows] of each row's sum of exponentials, as float32; in this form it is fused to one pass."""
    x = logits.to(torch.float32)
    largest = x.amax(1, keepdim=True)
    return (x - largest).exp().sum(1).log() + largest.squeeze(1)


def gradient(logits: Tensor, index: Tensor, valid: Tensor, norm: Tensor, grad_loss: Tensor) -> Tensor:
    """(softmax − onehot(index)) · grad_loss in the logits' type; 0 where a row is not `valid`."""
    classes = torch.arange(logits.shape[1], device=logits.device)
    share = (logits.to(torch.float32) - norm.unsqueeze(1)).exp() - (classes == index).to(torch.float32)
    return torch.where(valid.unsqueeze(1), share * grad_loss, 0.0).to(logits.dtype)


def _long_on_gpu(logits: Tensor) -> bool:
    long = logits.device.type == "cuda" and logits.numel() >= FUSED_FROM and logits.dtype != torch.float64
    return long and can_fuse()


def _block_rows(logits: Tensor, dtype: torch.dtype) -> int:
    limit = BLOCK_BYTES.get(logits.device.type, BLOCK_BYTES["cuda"])
    return max(8, limit // max(1, logits.shape[1] * dtype.itemsize))


def nothing(like: Tensor) -> Summed:
    """The loss of no rows: 0 with a graph that reaches no parameter; backward leaves no gradient."""
    return Summed(torch.zeros((), device=like.device, requires_grad=True) * 1.0, 0)


def valid_count(targets: Tensor) -> int | Tensor:
    """How many targets are not −100: an int on the CPU, a tensor elsewhere (no wait for the device)."""
    count = (targets != IGNORED).sum()
    return int(count) if count.device.type == "cpu" else count
