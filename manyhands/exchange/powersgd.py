"""PowerSGD: a matrix travels as two thin ones (Vogels, Karimireddy and Jaggi 2019, arXiv:1905.13727, algorithm 1).

One step of subspace iteration on the *mean* matrix M̄, warm-started by the last round's factor Q:

    P = Σ M_i Q ;  P̂ = orthonormal basis of P ;  Q_i = M_iᵀ P̂ ;  Q = Σ Q_i ;  mean = P̂ Qᵀ, sent_i = P̂ Q_iᵀ

Both steps are linear, so two sums carry them for all matrices at once and the bytes do not grow with the number of
workers: ``r (n + m)`` values instead of ``n m``. Tensors with one dimension and those that would not shrink travel
as they are, in the first sum. Contributions come weighted, so the sums are means.

If M̄ has rank r or less, the mean is exact: the basis that starts the next round is Q's, made orthonormal with a pinch of
noise of a fixed seed, so that directions which Q has lost (a matrix of zeros, a lower rank) come back as random ones.

It is biased: use it under `ErrorFeedback`. All replicas compute the basis themselves from the same sums: on one kind of
processor they get the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from manyhands.core import rng
from manyhands.core.checked import checked
from manyhands.core.errors import UsageError
from manyhands.core.request import Sum
from manyhands.core.types import Agreed
from manyhands.exchange.codec import wide

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Talk, Tensors

NOISE = 1e-5  # of the largest column: enough to fill a lost direction, too little to turn a found one


@dataclass(frozen=True, kw_only=True)
@checked
class PowerSGD:
    """Send matrices as factors of low rank.

    Args:
        rank: r, the number of columns of the factors.
        min_compression: a tensor [n, …] (as a matrix [n, m]) is factored where that divides its bytes by more than this;
            others are summed as they are.
        seed: of the first Q.
    """

    by_tensor: ClassVar[bool] = True
    rank: int = 4
    min_compression: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"rank = {self.rank}", "a factor has at least one column", "try 4")
        if not self.min_compression >= 1:
            raise UsageError(
                f"min_compression = {self.min_compression}",
                "factors that are larger than their matrix are never sent",
                "give 1 or more",
            )

    def init(self, like: Tensors) -> dict[str, list[Tensor]]:
        """Q of each matrix that is factored: [m, r], equal on all workers."""
        shapes = [_matrix(t) for t in like]
        return {
            "q": [
                _noise(m, self.rank, rng.key(self.seed, i), t)
                for i, ((n, m), t) in enumerate(zip(shapes, like, strict=True))
                if self._factored(n, m)
            ]
        }

    def talk(self, delta: Tensors, state: Any) -> Talk:
        import torch

        if not delta:
            return Agreed([], [], state)
        exact = wide(delta[0].dtype)
        for tensor in delta:
            exact = torch.promote_types(exact, wide(tensor.dtype))
        factored = [self._factored(*_matrix(t)) for t in delta]
        plain = [t.detach() for t, yes in zip(delta, factored, strict=True) if not yes]
        matrices = [
            t.detach().reshape(_matrix(t)).to(exact).contiguous()
            for t, yes in zip(delta, factored, strict=True)
            if yes
        ]  # [n, m] each
        before = [q.to(exact) for q in state["q"]]

        mine = [m @ q for m, q in zip(matrices, before, strict=True)] + [t.to(exact) for t in plain]
        whole = _unflatten((yield Sum(_flatten(mine))), mine)
        agreed_plain = whole[len(matrices) :]
        bases = orthonormal(whole[: len(matrices)])  # [n, r] each
        own = [(p.T @ m).T for m, p in zip(matrices, bases, strict=True)]  # [m, r] each
        factors = own
        if matrices:
            factors = _unflatten((yield Sum(_flatten(own))), own)

        mean, sent, at, kept = [], [], 0, 0
        for tensor, yes in zip(delta, factored, strict=True):
            if yes:
                p = bases[at]
                mean.append((p @ factors[at].T).view(tensor.shape).to(tensor.dtype))
                sent.append((p @ own[at].T).view(tensor.shape).to(tensor.dtype))
                at += 1
            else:
                mean.append(agreed_plain[kept].to(tensor.dtype))
                sent.append(tensor)
                kept += 1
        return Agreed(mean, sent, {"q": self._warm(factors, before)})

    def size_bytes(self, shapes: Sequence[Sequence[int]], itemsize: int = 4) -> int:
        """Bytes of one worker's contribution to both sums for tensors of these shapes, computed in `itemsize` bytes."""
        total = 0
        for shape in shapes:
            n, m = _rows_columns(shape)
            total += self.rank * (n + m) if self._factored(n, m) else n * m
        return total * itemsize

    def _factored(self, n: int, m: int) -> bool:
        return self.min_compression * self.rank * (n + m) < n * m

    def _warm(self, factors: Sequence[Tensor], before: Sequence[Tensor]) -> list[Tensor]:
        """The bases that start the next round; of a factor that is not finite, the one from before."""
        import torch

        if not factors:
            return []
        longest = max(factors, key=len)
        noise = _noise(len(longest), self.rank, rng.key(self.seed, -1), longest) * NOISE
        noisy = []
        for q in factors:
            size = q.norm(dim=0).amax()
            noisy.append(torch.where(size > 0, q / size, q) + noise[: len(q)] * len(q) ** -0.5)
        warm = orthonormal(noisy)
        found = [torch.where(new.isfinite().all(), new, old) for new, old in zip(warm, before, strict=True)]
        return [q.contiguous() for q in found]  # as a checkpoint gives them back: products round by layout


def orthonormal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Matrices [n, r] with orthonormal columns (r ≤ n) that span what the columns of `matrices` span.

    Householder reflections: orthonormal for any rank, zero included. Those of equal shape go together.
    """
    import torch

    groups: dict[tuple[int, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        groups.setdefault(tuple(matrix.shape), []).append(i)
    result: list[Tensor] = list(matrices)
    for members in groups.values():
        bases = torch.linalg.qr(torch.stack([matrices[i] for i in members])).Q  # [group, n, r]
        for i, basis in zip(members, bases.unbind(0), strict=True):
            result[i] = basis
    return result


def _matrix(tensor: Tensor) -> tuple[int, int]:
    return _rows_columns(tensor.shape)


def _rows_columns(shape: Sequence[int]) -> tuple[int, int]:
    """[n, m] of a tensor: its first dimension and the rest; one column for vectors and scalars."""
    n, m = (shape[0] if shape else 1), 1
    for length in shape[1:]:
        m *= length
    return n, m


def _noise(rows: int, columns: int, key: int, like: Tensor) -> Tensor:
    """Normal [rows, columns], the same on every device."""
    import torch

    generator = torch.Generator().manual_seed(key >> 1)
    return torch.randn(rows, columns, generator=generator).to(like.device, wide(like.dtype))


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.cat([t.reshape(-1) for t in tensors])


def _unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    import torch

    parts = torch.split(flat, [t.numel() for t in like])
    return [part.view(t.shape) for part, t in zip(parts, like, strict=True)]
