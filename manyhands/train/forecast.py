"""Own steps are a forecast: the gradients of H steps agree, and the agreed steps made of them take the place of the own ones.

    θᵢ, sᵢ ← optimizer(θᵢ, sᵢ, gᵢⱼ)                    each step j of a round, on my share; s: the optimizer's state
    ḡ = exchange(Σⱼ nᵢⱼ gᵢⱼ) / Σ nᵢⱼ                    over workers and the round's steps; nᵢⱼ: my valid targets
    A, S ← H times optimizer(A, S, ḡ)                   the same on all workers, to the bit
    θᵢ, sᵢ ← d times optimizer(A, S, ḡᵢ)                 when ḡ is there, d steps after its exchange began;
                                                        ḡᵢ: the mean of my gradients since then

Where local SGD averages the ways, whose optimizers have each seen the noise of a share, here one optimizer sees the mean of all
(its state is a function of agreed gradients, as in Mime, arXiv:2008.03606, which has local steps use the state of the
centralized optimizer), and nothing but one gradient travels, in any codec, once in H steps. That a forecast is made again
when the agreement arrives is from eager updates (arXiv:2502.12996).

**Second moments.** ḡ has less noise than the gradient of one step of all N workers, so its square is too small a second
moment. With n terms gᵢⱼ, weighted by targets, and noise of a variance inverse to a term's targets,

    mean |gᵢⱼ|² = s² + σ²        |ḡ|² = s² + σ²/n        |gradient of one step|² = s² + σ² H/n

so each tensor's squares are counted c = (s² + σ² H/n) / |ḡ|² times, 1 ≤ c ≤ H, with s² and σ² from the first two, which
the workers tell each other (one number per tensor). Of ḡᵢ likewise. Optimizers without a mean of squares take ḡ as it is.

A worker alone has made the agreed steps already: with one worker this is plain training to the bit, and nothing is
compressed. Schedules that count tokens use the rate of a round's end.

It costs copies of parameters and optimizer state and two sums of gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from manyhands.exchange.combine import trait
from manyhands.strategy.optimizers import AdamW
from manyhands.train.local import LocalSteps
from manyhands.train.norm import is_finite, norm_of
from manyhands.train.replay import AdamRule, AdamState, adamw, square_length
from manyhands.train.rounds import Piece

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.core.types import Agreed
    from manyhands.strategy.base import Strategy
    from manyhands.train.fragments import Flight, Fragment
    from manyhands.train.header import Header, Wishes
    from manyhands.train.method import Loss, Part, StepResult
    from manyhands.train.replica import Replica


class ForecastSteps(LocalSteps):
    """See the module."""

    def __init__(self, replica: Replica) -> None:
        super().__init__(replica)
        views = dict(zip((n for n, _ in replica.named), self.inner.gradients.by_parameter(), strict=True))
        self._pieces = [Piece.of(f, [views[name] for name in f.names]) for f in self._fragments]
        self._redone = False  # some of a round's steps were gone twice, each on a part of its rows

    @staticmethod
    def extra_bytes(strategy: Strategy, own: float) -> float:
        """See `manyhands.train.state_bytes`: anchors, sums of the round that is made and of the one under way; own steps."""
        return 12.0 + (0.0 if strategy.inner else own)

    # -- own steps

    def step(self, part: Part, loss: Loss, wishes: Wishes) -> StepResult:
        for piece in self._pieces:
            piece.round.steps += 1
        return super().step(part, loss, wishes)

    def _inner_step(self) -> tuple[float, float, bool]:
        count = self.inner.count
        norm, lr, skipped = super()._inner_step()
        if count and not skipped:
            used = dict(zip((n for n, _ in self._replica.named), self.inner.gradients.used, strict=True))
            for piece, fragment in zip(self._pieces, self._fragments, strict=True):
                piece.round.take(piece.gradients, count, [used[name] for name in fragment.names])
        return norm, lr, skipped

    # -- agreements

    @property
    def _speaks(self) -> bool:
        return self._replica.wire.size > 1

    def _measure(self, i: int) -> Sequence[float]:
        piece, fragment = self._pieces[i], self._fragments[i]
        piece.round, piece.sent = piece.sent, piece.round
        piece.round.clear()
        scale = 1.0 / (fragment.nominal or 1.0)
        for view, total in zip(fragment.views, piece.sent.sums, strict=True):
            torch.mul(total, scale, out=view) if piece.sent.terms else view.zero_()
        if not self._speaks and self._cadence.delay:
            state = {n: t.clone() for n, t in self.inner.optimizer.state_by_name(piece.names).items()}
            piece.apart = [p.detach().clone() for p in fragment.params], state
        return [float(piece.sent.terms), *piece.sent.squares, *map(float, piece.sent.used)]

    def _settle(
        self, i: int, flight: Flight, found: Sequence[Agreed], told: Header | None, keep_local: float
    ) -> bool:
        del keep_local  # what I went on meanwhile is kept whole, nothing else
        assert told is not None
        fragment, piece = self._fragments[i], self._pieces[i]
        targets = float(told.more[:, 0].sum())
        scale = flight.nominal / targets if targets else math.nan
        if found:
            (agreed,) = found
            means = fragment.shaped(agreed.mean, by_tensor=getattr(self._exchange, "by_tensor", False))
        elif self._redone:  # alone now, but my way is not the agreed one
            means = fragment.views
        else:
            self._take_own(fragment, piece)
            return False
        norm = norm_of(means) * scale
        finite = is_finite(norm)
        if finite:
            self._agreed_steps(fragment, piece, means, scale, told.more)
            if found:
                self.states[i] = agreed.state
        self._go_on(fragment, piece, anew=finite)
        piece.sent.clear()
        self._redone = False
        lost = bool(targets) and not finite
        self._count_lost(lost, norm)
        return lost

    def _take_own(self, fragment: Fragment, piece: Piece) -> None:
        """What I sent from is what is agreed."""
        behind = piece.round.steps
        params, state = [p.detach() for p in fragment.params], self.inner.optimizer.state_by_name(piece.names)
        if behind and piece.apart is not None:
            params, state = piece.apart
        with torch.no_grad():
            for anchor, param in zip(fragment.anchors, params, strict=True):
                anchor.copy_(param)
        self.outer.take_state_by_name(state, piece.names)
        piece.apart = None
        piece.sent.clear()
        fragment.drifted = behind > 0

    def _agreed_steps(
        self, fragment: Fragment, piece: Piece, means: Sequence[Tensor], scale: float, told: Tensor
    ) -> None:
        """A, S ← H times optimizer(A, S, ḡ). `told`: [workers, 2 + 2 tensors], targets, terms, squares and who was used."""
        means = [m.reshape(a.shape).to(a.dtype) for m, a in zip(means, fragment.anchors, strict=True)]
        targets, terms, *rest = told.sum(0).tolist()
        self._replay(
            fragment,
            means,
            [square / targets for square in rest[: len(means)]],
            [bool(users) for users in rest[len(means) :]],
            terms,
            agreed=True,
            scale=scale,
            steps=piece.sent.steps,
            behind=piece.round.steps,
        )

    def _go_on(self, fragment: Fragment, piece: Piece, *, anew: bool) -> None:
        """From what is agreed; with `anew` my own steps since the gradients were sent are made again from there."""
        done = piece.round
        if not anew or not done.terms:
            self._go_back(fragment)
            return
        pending = self.inner.pending  # gradients that no step has used: they stay, and are not of this
        if pending:
            self.inner.gradients.detach()
        means = piece.gradients  # of this step, where no other was made
        if done.steps > 1:
            means = [
                (total / fragment.targets).to(p.dtype)
                for total, p in zip(done.sums, fragment.params, strict=True)
            ]
        squares = [s / fragment.targets for s in done.squares]
        self._replay(
            fragment, means, squares, done.used, done.terms, agreed=False, steps=done.terms, behind=0
        )
        if pending:
            self.inner.gradients.attach(self.inner.gradients.used)
        fragment.drifted = True

    def _replay(
        self,
        fragment: Fragment,
        means: Sequence[Tensor],
        squares: Sequence[float],
        used: Sequence[bool],
        terms: float,
        *,
        agreed: bool,
        steps: int,
        behind: int,
        scale: float = 1.0,
    ) -> None:
        """`steps` steps, agreed ones or my own, with `scale` · `means`, of `terms` gradients; `behind`: steps since the last."""
        optimizer, params = (
            (self.outer, fragment.anchors) if agreed else (self.inner.optimizer, fragment.params)
        )
        if agreed:
            lengths = [square_length(mean) * scale**2 for mean in means]
        elif steps > 1:  # what nobody else computes may differ in its last bits
            lengths = [float(n) ** 2 for n in torch._foreach_norm(list(means))]
        else:
            lengths = list(squares)
        counts = [times(square, short, terms, steps) for square, short in zip(squares, lengths, strict=True)]
        if not trait(self._exchange, "fills"):  # else it says nothing
            used = [
                a or short > 0.0 for a, short in zip(used, lengths, strict=True)
            ]  # or held back from before
        spec = self._replica.strategy.outer
        factors = [self._replica.rate(spec, behind=behind + steps - j)[0] for j in range(steps)]
        if isinstance(spec, AdamW):
            self._replay_adamw(spec, optimizer, fragment, means, counts, used, factors, scale)
            return
        if scale != 1.0:
            means = [mean * scale for mean in means]
        if not agreed:
            self._go_back(fragment)
        for param, mean, is_used in zip(params, means, used, strict=True):
            param.grad = mean if is_used else None
        raised = [(p, m, c) for p, m, c in zip(params, means, counts, strict=True) if c > 1.0]
        if raised:
            optimizer.make_state()
        for factor in factors:
            for section in optimizer.sections:
                _count_squares(section.optimizer, raised)
            optimizer.set_lr(factor)
            optimizer.step()
        for param in params:
            param.grad = None

    def _replay_adamw(
        self,
        spec: AdamW,
        optimizer: Any,
        fragment: Fragment,
        means: Sequence[Tensor],
        counts: Sequence[float],
        used: Sequence[bool],
        factors: Sequence[float],
        scale: float,
    ) -> None:
        """The same in one pass, of the own steps together with the way back to what is agreed."""
        anchors, own = fragment.anchors, optimizer is not self.outer
        params = fragment.params if own else anchors
        for param, anchor, mean, is_used in zip(params, anchors, means, used, strict=True):
            param.grad = mean if is_used or (own and self.outer.state_of(anchor)) else None
        optimizer.make_state()
        for param, anchor, mean, count, is_used in zip(params, anchors, means, counts, used, strict=True):
            param.grad = None
            target, source = _adam_state(optimizer, param), _adam_state(self.outer, anchor)
            if target is None:  # nobody has used it
                with torch.no_grad():
                    param.copy_(anchor)
                continue
            if source is None:  # only I have, since then
                with torch.no_grad():
                    target.value.copy_(anchor)
                for tensor in (target.first, target.second, target.step):
                    tensor.zero_()
                source = target
            rule = AdamRule(spec.betas, spec.eps, spec.weight_decay if param.dim() >= 2 else 0.0)
            rates = [spec.lr * factor for factor in factors] if is_used else []
            adamw(source, target, mean, count, rates, rule, scale=scale)

    def _go_back(self, fragment: Fragment) -> None:
        """θᵢ ← A, sᵢ ← S."""
        fragment.mix(0.0)
        self.inner.optimizer.take_state_by_name(self.outer.state_by_name(fragment.names), fragment.names)

    # -- state

    def local_state(self) -> dict[str, Tensor]:
        """Nothing: at rest the inner optimizer's is what is agreed."""
        return {}

    def load_local_state(self, state: Mapping[str, Tensor]) -> None:
        del state

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_optimizer_state(state)
        self.inner.optimizer.take_state_by_name(self.outer.state_by_name())

    def mended(self) -> None:
        """What was agreed was replaced: my forecast is dropped, the gradients that I have computed are not."""
        for fragment in self._fragments:
            self._go_back(fragment)

    def restart(self) -> None:
        super().restart()
        self._forget()

    def rewind(self) -> dict[int, list[int]]:
        whole = self.comes_to_rest
        if whole:  # sent, or about to be
            (piece,) = self._pieces
            piece.round.add(piece.sent)
            piece.sent.clear()
        held = super().rewind()
        if whole:
            piece.round.steps = 0  # they go by again
            self._redone = self._redone or piece.round.terms > 0
        else:
            self._forget()
        return held

    def _forget(self) -> None:
        for piece in self._pieces:
            piece.round.clear()
            piece.sent.clear()
            piece.apart = None
        self._redone = False
        self.inner.optimizer.take_state_by_name(self.outer.state_by_name())

    def adopt(self, other: LocalSteps) -> None:
        super().adopt(other)
        assert isinstance(other, ForecastSteps)
        for mine, theirs in zip(self._pieces, other._pieces, strict=True):
            mine.round.clear()
            mine.round.add(theirs.round)
            mine.round.steps = theirs.round.steps
        self._redone = other._redone
        self.inner.optimizer.take_state_by_name(other.inner.optimizer.state_by_name())


def times(square: float, length: float, terms: float, steps: int) -> float:
    """How often the square of a mean gradient counts as a second moment: c of the module, 1 ≤ c ≤ steps.

    Args:
        square: mean |g|² of the terms, weighted by targets.
        length: |ḡ|².
        terms: n, gradients in the mean; `steps` of all workers.

    Rounded to 1/256: processors that add up |ḡ|² in another order shall not differ in what they agree on.
    """
    if steps <= 1 or terms <= 1 or not length > 0.0:
        return 1.0
    noise = min(max(0.0, (square - length) / (1.0 - 1.0 / terms)), square)
    count = (square - noise + noise * steps / terms) / length
    return min(max(1.0, round(count * 256) / 256), float(steps))


def _adam_state(optimizer: Any, param: Tensor) -> AdamState | None:
    """None where the parameter was never stepped."""
    state = optimizer.state_of(param)
    return AdamState(param.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"]) if state else None


def _count_squares(optimizer: torch.optim.Optimizer, raised: Sequence[tuple[Tensor, Tensor, float]]) -> None:
    """The next step adds (1 − β) ḡ² to β v: v is raised so that it adds c (1 − β) ḡ². `raised`: parameters, ḡ, c."""
    options = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    with torch.no_grad():
        for param, mean, count in raised:
            state = optimizer.state.get(param)
            if not state or param.grad is None:
                continue
            group = options[id(param)]
            if "exp_avg_sq" in state:
                key, beta = "exp_avg_sq", group["betas"][1]
            elif "square_avg" in state:
                key, beta = "square_avg", group["alpha"]
            elif "sum" in state:
                key, beta = "sum", 0.5  # no decay: c ḡ² as it is
            else:
                continue
            state[key].addcmul_(mean, mean, value=(count - 1.0) * (1.0 - beta) / beta)
