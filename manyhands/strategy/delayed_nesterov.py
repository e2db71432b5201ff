"""Delayed Nesterov: momentum for updates that come one by one from many workers (arXiv:2401.09135, section 5).

Plain Nesterov momentum amplifies whatever a stale push brings. Here the momentum is renewed only after every N-th
update, from the mean of the last N gradients, and meanwhile (almost) plain gradient descent is made. With ε the rate of
a whole round, g_t the gradient of one update, Δ the sum since the last renewal, c in [0, 1/N]:

    every N-th update:   m ← β m + Δ/N;   θ ← θ − ε ((1 − cN + c) β m + g_t/N);   Δ ← 0
    all others:                           θ ← θ − ε (c β m + g_t/N)

A parameter server gives a push its share of the rate, ε/N with N equal workers; this optimizer's own rate is that ε/N, so
`every` is to be the number of workers. With N = 1 it is PyTorch's SGD with Nesterov momentum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from manyhands.core.checked import checked
from manyhands.core.config import choice, option
from manyhands.core.errors import UsageError
from manyhands.strategy.optimizers import DECAY, RATE, SCHEDULE
from manyhands.strategy.schedules import Schedule

if TYPE_CHECKING:
    from torch import nn

    from manyhands.strategy.named import Named, NamedOptimizer


@dataclass(frozen=True)
@checked
class DelayedNesterov:
    """Momentum that is renewed after every N-th update only (arXiv:2401.09135)."""

    lr: float = option(0.1, help=RATE)
    _: KW_ONLY
    every: int = option(4, help="N: updates between two renewals of the momentum, the number of workers")
    momentum: float = option(0.9, help="β: share of the last momentum that is kept")
    activation: float = option(0.0, help="c: share of the momentum in the updates between, 0 to 1/N")
    weight_decay: float = option(0.0, help=DECAY + ", added to the gradient")
    schedule: Schedule = choice("schedules", "constant", help=SCHEDULE)

    def __post_init__(self) -> None:
        from manyhands.strategy.optimizers import _check

        _check(self, shares=("momentum",))
        if self.every < 1:
            raise UsageError(f"every = {self.every}", "it is at least 1", "give the number of workers")
        if not 0 <= self.activation <= 1 / self.every:
            raise UsageError(
                f"activation = {self.activation} with every = {self.every}",
                f"it is 0 to 1/{self.every}",
                "0 applies the momentum at its renewal, 1/N spreads it evenly",
            )

    def build(self, named_params: Named, device_type: str) -> NamedOptimizer:
        """The optimizer of these parameters, which live on a device of this type ("cpu", "cuda")."""
        from manyhands.strategy.named import NamedOptimizer, Section, decay_groups

        groups = decay_groups(named_params, self.weight_decay)
        made = _torch_class()(groups, self.lr, self.every, self.momentum, self.activation)
        return NamedOptimizer([Section(made, tuple(named_params), _keeps)])


def _keeps(param: nn.Parameter) -> dict[str, tuple[int, ...]]:
    shape = tuple(param.shape)
    return {"step": (), "momentum_buffer": shape, "gathered": shape}


def _torch_class() -> Callable[..., Any]:
    """The optimizer as PyTorch's kind of class; made when asked for, since configuration does without torch."""
    import torch

    class Delayed(torch.optim.Optimizer):
        def __init__(self, groups: Any, lr: float, every: int, momentum: float, activation: float) -> None:
            defaults = {"lr": lr, "every": every, "momentum": momentum, "activation": activation}
            super().__init__(groups, {**defaults, "weight_decay": 0.0})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                n, beta, c = group["every"], group["momentum"], group["activation"]
                for param in group["params"]:
                    if param.grad is None:
                        continue
                    state = self.state[param]
                    if not state:
                        state["step"] = torch.zeros((), dtype=torch.float32)
                        state["momentum_buffer"] = torch.zeros_like(param)
                        state["gathered"] = torch.zeros_like(param)
                    grad = param.grad
                    if group["weight_decay"]:
                        grad = grad.add(param, alpha=group["weight_decay"])
                    momentum, gathered = state["momentum_buffer"], state["gathered"]
                    gathered.add_(grad)
                    state["step"] += 1
                    renewed = int(state["step"]) % n == 0
                    if renewed:
                        momentum.mul_(beta).add_(gathered, alpha=1 / n)
                        gathered.zero_()
                    active = 1 - c * n + c if renewed else c
                    if active and beta:
                        param.add_(momentum, alpha=-group["lr"] * n * active * beta)
                    param.add_(grad, alpha=-group["lr"])

    return Delayed
