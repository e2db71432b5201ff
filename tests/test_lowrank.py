"""PowerSGD and DCT top-k: exchanges that look at tensors in their own shapes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from manyhands.core import config
from manyhands.core.errors import UsageError
from manyhands.core.request import Gather, Sum
from manyhands.exchange import dct
from manyhands.exchange.dct import DctTopK, Grid, basis, blocked, restore, transform, unblocked
from manyhands.exchange.feedback import ErrorFeedback
from manyhands.exchange.powersgd import PowerSGD, orthonormal
from manyhands.wire.drive import lockstep

WORLDS = [1, 2, 3, 5]
SHAPES: list[tuple[int, ...]] = [(40, 30), (), (17,), (0,), (64, 3, 9), (2, 50), (30, 40)]


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _everybodys(world: int, dtype: torch.dtype = torch.float64) -> list[list[torch.Tensor]]:
    return [[_normal(*s, seed=100 * r + i).to(dtype) for i, s in enumerate(SHAPES)] for r in range(world)]


def _talk(exchange: Any, deltas: list[list[torch.Tensor]], states: list[Any] | None = None) -> list[Any]:
    states = states or [exchange.init(d) for d in deltas]
    return lockstep([exchange.talk([t.clone() for t in d], s) for d, s in zip(deltas, states, strict=True)])


def _requests(exchange: Any, delta: list[torch.Tensor]) -> list[Any]:
    """What one of two workers asks for."""
    seen = []

    def tapped(talk: Any, note: bool) -> Any:
        reply = None
        while True:
            try:
                request = talk.send(reply)
            except StopIteration as end:
                return end.value
            if note and isinstance(request, Sum | Gather):
                seen.append(request)
            reply = yield request

    talks = [exchange.talk([t.clone() for t in delta], exchange.init(delta)) for _ in range(2)]
    lockstep([tapped(talk, rank == 0) for rank, talk in enumerate(talks)])
    return seen


def _size_bytes(requests: list[Any]) -> int:
    return sum(r.tensor.numel() * r.tensor.element_size() for r in requests)


# ------------------------------------------------------------------------------------------------ PowerSGD


def _reference(
    matrices: list[torch.Tensor], q: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Algorithm 1 for one matrix of everybody's, with Gram-Schmidt: mean, everybody's sent, the new Q."""
    p = sum(m @ q for m in matrices)
    for i in range(p.shape[1]):
        for j in range(i):
            p[:, i] -= (p[:, j] @ p[:, i]) * p[:, j]
        p[:, i] /= p[:, i].norm()
    factors = [m.T @ p for m in matrices]
    return p @ sum(factors).T, [p @ f.T for f in factors], sum(factors)


@pytest.mark.parametrize("world", WORLDS)
def test_powersgd_equals_algorithm_1(world: int) -> None:
    exchange = PowerSGD(rank=3)
    deltas = _everybodys(world)
    states = [exchange.init(d) for d in deltas]
    assert len(states[0]["q"]) == 3  # (40, 30), (64, 27) and (30, 40)
    for _ in range(3):
        bases = [q.clone() for q in states[0]["q"]]
        agreed = _talk(exchange, deltas, states)
        at = 0
        for i, shape in enumerate(SHAPES):
            everyones = [d[i] for d in deltas]
            total = sum(each.sent[i] for each in agreed)
            torch.testing.assert_close(agreed[0].mean[i], total)
            if shape in ((40, 30), (64, 3, 9), (30, 40)):
                mean, sent, _ = _reference([m.reshape(shape[0], -1) for m in everyones], bases[at])
                torch.testing.assert_close(agreed[0].mean[i], mean.view(shape))
                for each, own in zip(agreed, sent, strict=True):
                    torch.testing.assert_close(each.sent[i], own.view(shape))
                at += 1
            else:
                torch.testing.assert_close(agreed[0].mean[i], sum(everyones))
        states = [each.state for each in agreed]
        for each in agreed[1:]:
            assert all(torch.equal(a, b) for a, b in zip(each.state["q"], states[0]["q"], strict=True))
            assert all(torch.equal(a, b) for a, b in zip(each.mean, agreed[0].mean, strict=True))


def test_what_is_held_back_and_what_is_agreed_are_the_mean() -> None:
    """ĝ + mean(eᵢ) = mean(Mᵢ), at every step under error feedback."""
    feedback, deltas = ErrorFeedback(PowerSGD(rank=2)), _everybodys(3)
    states = [feedback.init(d) for d in deltas]
    for _ in range(4):
        offered = [
            sum(d[i] + s["residual"][i] for d, s in zip(deltas, states, strict=True))
            for i in range(len(SHAPES))
        ]
        agreed = _talk(feedback, deltas, states)
        states = [each.state for each in agreed]
        for i, total in enumerate(offered):
            held = sum(s["residual"][i] for s in states)
            torch.testing.assert_close(agreed[0].mean[i] + held, total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_of_rank_r_is_exact_whatever_came_before(dtype: torch.dtype) -> None:
    """Each worker's own matrix has full rank; also after rounds of zeros and of lower rank, which lose directions."""
    exchange = PowerSGD(rank=4)
    tolerance = {torch.float32: 2e-4, torch.float64: 1e-9}[dtype]
    states = None
    for turn, rank in enumerate((4, 0, 4, 1, 4, 2, 0, 3)):
        target = _normal(60, rank, seed=turn, dtype=dtype) @ _normal(rank, 50, seed=turn + 50, dtype=dtype)
        noise = _normal(60, 50, seed=99 + turn, dtype=dtype)
        agreed = _talk(exchange, [[target / 2 + noise], [target / 2 - noise]], states)
        states = [each.state for each in agreed]
        scale = max(1.0, float(target.abs().max()))
        torch.testing.assert_close(
            agreed[0].mean[0], target, rtol=tolerance, atol=tolerance * scale * (1 if rank else 50)
        )


def test_the_same_matrix_again_is_approached_as_well_as_its_best_approximation() -> None:
    u, v = (torch.linalg.qr(_normal(50, 50, seed=i)).Q for i in range(2))
    matrix = u @ torch.diag(2.0 ** -torch.arange(50, dtype=torch.float64)) @ v
    exchange, states = PowerSGD(rank=4), None
    for _ in range(10):
        agreed = _talk(exchange, [[matrix]], states)
        states = [each.state for each in agreed]
    best = (matrix - u[:, :4] @ u[:, :4].T @ matrix).norm()
    assert float((matrix - agreed[0].mean[0]).norm()) <= 1.001 * float(best)


def test_all_matrices_travel_in_two_sums_at_the_stated_size() -> None:
    exchange = PowerSGD(rank=3)
    (delta,) = _everybodys(1, torch.float32)
    requests = _requests(exchange, delta)
    assert [type(r) for r in requests] == [Sum, Sum]
    factors = 3 * (40 + 30 + 64 + 27 + 30 + 40)
    assert _size_bytes(requests) == exchange.size_bytes(SHAPES) == 4 * (factors + 1 + 17 + 2 * 50)
    assert len(_requests(exchange, [delta[1], delta[2]])) == 1  # nothing to factor
    assert _requests(exchange, []) == []
    halves = [t.to(torch.bfloat16) for t in delta]
    assert all(r.tensor.dtype is torch.float32 for r in _requests(exchange, halves))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_round_that_is_not_finite_leaves_no_trace_in_the_basis(poison: float) -> None:
    exchange, deltas = PowerSGD(rank=2), _everybodys(2)
    states = [each.state for each in _talk(exchange, deltas)]
    bad = [[t.clone() for t in d] for d in deltas]
    bad[1][0][3, 4] = poison
    agreed = _talk(exchange, bad, states)
    assert all(not each.mean[0].isfinite().all() for each in agreed)
    for each, before in zip(agreed, states, strict=True):
        assert torch.equal(each.state["q"][0], before["q"][0])
        assert all(q.isfinite().all() for q in each.state["q"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_basis_is_orthonormal_for_any_rank(dtype: torch.dtype) -> None:
    matrices = [_normal(20, 4, dtype=dtype), torch.zeros(20, 4, dtype=dtype), _normal(9, 4, dtype=dtype)]
    matrices.append(_normal(20, 1, dtype=dtype).expand(20, 4) * 1e-20)
    matrices.append(1e18 * _normal(20, 2, dtype=dtype) @ _normal(2, 4, dtype=dtype))
    for matrix, basis_ in zip(matrices, orthonormal(matrices), strict=True):
        torch.testing.assert_close(basis_.T @ basis_, torch.eye(4, dtype=dtype), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            basis_ @ (basis_.T @ matrix), matrix, rtol=1e-4, atol=1e-5 * float(matrix.abs().max())
        )


# ----------------------------------------------------------------------------------------------------- DCT


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_the_transform_is_the_orthonormal_dct_ii(size: int) -> None:
    matrix = basis(size, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    x = _normal(size)
    for u in range(size):
        terms = [float(x[i]) * math.cos(math.pi * (2 * i + 1) * u / (2 * size)) for i in range(size)]
        assert math.isclose(
            float(matrix[u] @ x),
            math.sqrt((1 if u == 0 else 2) / size) * math.fsum(terms),
            rel_tol=1e-9,
            abs_tol=1e-12,
        )


def test_blocks_come_back() -> None:
    grids = [Grid(5, 7, 2, 3, 3, 3), Grid(3, 3, 1, 1, 3, 3)]
    tensors = [_normal(5, 7), _normal(3, 3, seed=1)]
    blocks = blocked(tensors, grids, torch.float64)
    assert blocks.shape == (7, 3, 3)
    torch.testing.assert_close(blocks[1][:, :3], tensors[0][:3, 3:6])
    torch.testing.assert_close(blocks[6], tensors[1])
    back = unblocked(restore(transform(blocks)), grids)
    for tensor, again in zip(tensors, back, strict=True):
        torch.testing.assert_close(again, tensor)


def _reference_dct(exchange: DctTopK, matrix: torch.Tensor) -> torch.Tensor:
    """What one worker's matrix [n, m], of whole blocks, is sent as: block by block."""
    result, side = torch.zeros_like(matrix), exchange.block
    d = basis(side, torch.float64, torch.device("cpu"))
    for top in range(0, matrix.shape[0], side):
        for left in range(0, matrix.shape[1], side):
            coefficients = d @ matrix[top : top + side, left : left + side] @ d.T
            kept = torch.zeros(side * side, dtype=torch.float64)
            where = coefficients.abs().view(-1).topk(exchange.k).indices
            kept[where] = coefficients.reshape(-1)[where].float().double()
            result[top : top + side, left : left + side] = d.T @ kept.view(side, side) @ d
    return result


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("few", [0, 32])
def test_dct_topk_equals_its_reference(world: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dct, "FEW", few)  # both ways back from the coefficients
    exchange = DctTopK(block=8, k=5)
    deltas = [[_normal(24, 16, seed=r), _normal(8, 8, seed=50 + r)] for r in range(world)]
    agreed = _talk(exchange, deltas)
    for i in range(2):
        expected = [_reference_dct(exchange, d[i]) for d in deltas]
        for each, own in zip(agreed, expected, strict=True):
            torch.testing.assert_close(each.sent[i], own)
            torch.testing.assert_close(each.mean[i], sum(expected))
            assert torch.equal(each.mean[i], agreed[0].mean[i])


@pytest.mark.parametrize("few", [0, 32])
def test_a_coefficient_is_averaged_over_its_senders(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dct, "FEW", few)
    d = basis(8, torch.float64, torch.device("cpu"))

    def wave(**strengths: float) -> list[torch.Tensor]:
        coefficients = torch.zeros(8, 8, dtype=torch.float64)
        for place, strength in strengths.items():
            coefficients[int(place[1]), int(place[2])] = strength
        return [d.T @ coefficients @ d]

    exchange = DctTopK(block=8, k=2, average="senders")
    agreed = _talk(exchange, [wave(_00=4.0, _12=1.0), wave(_00=2.0, _70=3.0)])
    torch.testing.assert_close(agreed[0].mean, wave(_00=6.0, _12=2.0, _70=6.0))
    torch.testing.assert_close(agreed[1].sent, wave(_00=2.0, _70=3.0))
    assert not exchange.conserves
    everyone = _talk(DctTopK(block=8, k=2), [wave(_00=4.0, _12=1.0), wave(_00=2.0, _70=3.0)])
    torch.testing.assert_close(everyone[0].mean, wave(_00=6.0, _12=1.0, _70=3.0))


@pytest.mark.parametrize("values", ["fp32", "bf16", "int8", "int2"])
def test_one_message_at_the_stated_size(values: Any) -> None:
    exchange = DctTopK(values=values)
    (delta,) = _everybodys(1, torch.float32)
    requests = _requests(exchange, delta)
    assert [type(r) for r in requests] == [Gather]
    assert _size_bytes(requests) == exchange.size_bytes(SHAPES)
    blocks = 50
    bits = 8 * exchange.size_bytes([(64 * blocks, 64)]) / (8 * blocks)
    value_bits = {"fp32": 32, "bf16": 16, "int8": 8.32, "int2": 2.32}[values]
    assert bits <= 11.1 + value_bits  # 12 without sorting
    assert _requests(exchange, [torch.zeros(0), torch.zeros(3, 0)]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_all_coefficients_of_odd_shapes_are_everything(dtype: torch.dtype) -> None:
    deltas = _everybodys(3, dtype)
    agreed = _talk(DctTopK(block=16, k=256), deltas)
    for i, shape in enumerate(SHAPES):
        assert agreed[0].mean[i].shape == shape
        assert agreed[0].mean[i].dtype is dtype
        total = sum(d[i].double() for d in deltas)
        tolerance = 0.05 if dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(agreed[0].mean[i].double(), total, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("world", WORLDS)
def test_demo_is_decayed_feedback(world: int) -> None:
    """DeMo's algorithm 1 line by line against ErrorFeedback(DctTopK(senders), decay)."""
    inner = DctTopK(block=8, k=3, average="senders")
    feedback = ErrorFeedback(inner, decay=0.999)
    states = [feedback.init([torch.zeros(16, 8, dtype=torch.float64)]) for _ in range(world)]
    momenta = [torch.zeros(16, 8, dtype=torch.float64) for _ in range(world)]
    for turn in range(4):
        gradients = [_normal(16, 8, seed=10 * turn + r) for r in range(world)]
        agreed = _talk(feedback, [[g] for g in gradients], states)
        states = [each.state for each in agreed]
        for rank, gradient in enumerate(gradients):
            momenta[rank] = 0.999 * momenta[rank] + gradient
            momenta[rank] -= _reference_dct(inner, momenta[rank])
            torch.testing.assert_close(states[rank]["residual"][0], momenta[rank])


@pytest.mark.parametrize(
    "exchange", [PowerSGD(rank=2), DctTopK(block=8, k=8)], ids=lambda e: type(e).__name__
)
def test_views_with_strides_are_as_good_as_copies(exchange: Any) -> None:
    matrix = _normal(30, 40, dtype=torch.float32)
    strided = matrix.t().contiguous().t()
    assert not strided.is_contiguous()
    first, second = _talk(exchange, [[matrix]]), lockstep([exchange.talk([strided], exchange.init([matrix]))])
    assert torch.equal(first[0].mean[0], second[0].mean[0])
    assert torch.equal(first[0].sent[0], second[0].sent[0])


@pytest.mark.parametrize(
    "text",
    [
        "powersgd(rank=0)",
        "powersgd(min_compression=0.5)",
        "dct-topk(block=0)",
        "dct-topk(k=0)",
        "dct-topk(block=4, k=17)",
        "two-phase(powersgd)",
        "two-phase(dct-topk)",
    ],
)
def test_what_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        config.from_text("exchanges", text)
