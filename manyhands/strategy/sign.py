"""Steps of one size in the direction of a sign: signSGD with momentum (Signum, arXiv:1802.04434, algorithm 2)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from manyhands.core.checked import checked
from manyhands.core.config import choice, option
from manyhands.strategy.optimizers import DECAY, RATE, SCHEDULE, _check, _full
from manyhands.strategy.schedules import Schedule

if TYPE_CHECKING:
    from manyhands.strategy.named import Named, NamedOptimizer


@dataclass(frozen=True)
@checked
class SignSGD:
    """θ ← θ − lr·sign(m), m ← β m + (1 − β) g; where m is 0 nothing moves. The outer optimizer of DeMo."""

    lr: float = option(3e-4, help=RATE)
    _: KW_ONLY
    momentum: float = option(0.0, help="β, share of the last momentum that is kept")
    weight_decay: float = option(0.0, help=DECAY + ", times the rate")
    schedule: Schedule = choice("schedules", "cosine", help=SCHEDULE)

    def __post_init__(self) -> None:
        _check(self, shares=("momentum",))

    def build(self, named_params: Named, device_type: str) -> NamedOptimizer:
        """The optimizer of these parameters, which live on a device of this type ("cpu", "cuda")."""
        from manyhands.strategy.named import NamedOptimizer, Section, decay_groups

        groups = decay_groups(named_params, self.weight_decay)
        keys = ("momentum_buffer",) if self.momentum else ()
        optimizer = _torch_class()(groups, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        return NamedOptimizer([Section(optimizer, tuple(named_params), _full(*keys, step=False))])


@lru_cache(maxsize=1)
def _torch_class() -> Any:
    """The optimizer in PyTorch's terms, made on first use so that configuration needs no torch."""
    import torch

    class Signum(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float, momentum: float, weight_decay: float) -> None:
            super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                lr, beta = group["lr"], group["momentum"]
                for param in group["params"]:
                    if param.grad is None:
                        continue
                    direction = param.grad
                    if beta:
                        state = self.state[param]
                        if not state:
                            state["momentum_buffer"] = torch.zeros_like(param)
                        direction = state["momentum_buffer"].lerp_(param.grad, 1.0 - beta)
                    if group["weight_decay"]:
                        param.mul_(1.0 - lr * group["weight_decay"])
                    param.add_(direction.sign(), alpha=-lr)

    return Signum
