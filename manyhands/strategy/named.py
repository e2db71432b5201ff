"""PyTorch's optimizers behind names: state that depends on neither world size nor parameter order.

One `NamedOptimizer` may hold several PyTorch optimizers (Muon for matrices, AdamW for the rest). Its state is
a flat table ``"<parameter name>.<state key>" -> tensor``, which goes into a safetensors file as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manyhands.core.errors import CheckpointError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Named = Sequence[tuple[str, nn.Parameter]]
    Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Section:
    """One PyTorch optimizer and what it keeps.

    Attributes:
        optimizer: over `named`'s parameters.
        named: the parameters it serves.
        keeps: the state of a parameter that was stepped: key -> shape.
    """

    optimizer: torch.optim.Optimizer
    named: Named
    keeps: Callable[[nn.Parameter], Shapes]


class NamedOptimizer:
    """Steps its sections as one optimizer.

    A parameter whose gradient is None is left as it is, its state too (PyTorch's rule).

    Each of ``param_groups`` has in ``lr`` the rate of the next step.
    """

    def __init__(self, sections: Sequence[Section]) -> None:
        self.sections = tuple(sections)
        self._rates = [float(g["lr"]) for g in self.param_groups]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Asked anew each time: PyTorch replaces its groups when it loads a state."""
        return [g for s in self.sections for g in s.optimizer.param_groups]

    def set_lr(self, factor: float) -> None:
        """Use `factor` times the rate given at the start, for all groups."""
        for group, rate in zip(self.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    @property
    def looks_itself(self) -> bool:
        """Whether `step` takes a divisor and a flag that are still on the device (PyTorch's fused kernels do)."""
        return all(getattr(s.optimizer, "_step_supports_amp_scaling", False) for s in self.sections)

    def step(self, *, divisor: Tensor | None = None, left_out: Tensor | None = None) -> None:
        """One update from the parameters' gradients.

        Args:
            divisor: of all gradients, float32 [] on their device; only where it `looks_itself`, as the next.
            left_out: 1.0 leaves the update out, the state too; float32 [] on their device.
        """
        for section in self.sections:
            optimizer: Any = section.optimizer
            if divisor is not None and left_out is not None:  # how torch.amp.GradScaler tells them
                optimizer.grad_scale, optimizer.found_inf = divisor, left_out
            optimizer.step()
            if divisor is not None and left_out is not None:
                del optimizer.grad_scale, optimizer.found_inf

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for section in self.sections:
            section.optimizer.zero_grad(set_to_none=True)

    def state_by_name(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """The state (of `names` alone), in order of names. The tensors are the optimizer's own: copy them before a step."""
        found: dict[str, Tensor] = {}
        for section in self.sections:
            for name, param in section.named:
                if names is not None and name not in names:
                    continue
                for key, value in section.optimizer.state.get(param, {}).items():
                    if value is not None:
                        found[f"{name}.{key}"] = value.detach()
        return dict(sorted(found.items()))

    def state_of(self, param: Tensor) -> dict[str, Tensor]:
        """The optimizer's own state of a parameter; empty where it was never stepped."""
        for section in self.sections:
            if param in section.optimizer.state:
                return dict(section.optimizer.state[param])
        return {}

    def replace_state_by_name(
        self, state: Mapping[str, Tensor], names: Collection[str] | None = None
    ) -> None:
        """Go back to a copy of an earlier `state_by_name` of this same optimizer (and as many `names`), in place; what is not
        in it is dropped.
        """
        for section in self.sections:
            for name, param in section.named:
                current = section.optimizer.state.get(param)
                if not current or (names is not None and name not in names):
                    continue
                if not any(f"{name}.{key}" in state for key in current):
                    del section.optimizer.state[param]
                    continue
                for key, value in current.items():
                    if value is not None:
                        value.copy_(state[f"{name}.{key}"])

    def take_state_by_name(self, state: Mapping[str, Tensor], names: Collection[str] | None = None) -> None:
        """Become a copy of another optimizer of the same kind (as far as `names` go), in place where there is a state already."""
        mine = self.state_by_name(names)
        if set(mine) <= set(state):
            for name, value in mine.items():
                value.copy_(state[name])
        else:
            self.replace_state_by_name(state, names)
        if missing := {name: value for name, value in state.items() if name not in mine}:
            self.load_state_by_name(missing)

    def make_state(self) -> None:
        """Empty state for the parameters that have a gradient and were never stepped.

        PyTorch makes it in a parameter's first step: here in one of rate 0.
        """
        import torch

        for section in self.sections:
            every = [(p, p.grad) for _, p in section.named]
            new = [p for p, grad in every if grad is not None and not section.optimizer.state.get(p)]
            if not new:
                continue
            for param, _ in every:
                param.grad = None
            for param in new:
                param.grad = torch.zeros_like(param)
            self.set_lr(0.0)
            section.optimizer.step()
            for value in (v for p in new for v in section.optimizer.state[p].values() if v is not None):
                value.zero_()
            for param, grad in every:
                param.grad = grad

    def load_state_by_name(self, state: Mapping[str, Tensor]) -> None:
        """Take over a copy of what `state_by_name` gave, from any device; rates and options stay.

        Raises:
            CheckpointError: a parameter is unknown, or its state is of another optimizer or shape.
        """
        by_name: dict[str, dict[str, Tensor]] = {}
        for full_name, tensor in state.items():
            name, _, key = full_name.rpartition(".")
            by_name.setdefault(name, {})[key] = tensor
        known = [name for section in self.sections for name, _ in section.named]
        for name in sorted(set(by_name) - set(known)):
            raise CheckpointError(
                f"optimizer state of {name!r}",
                "the model has no such trainable parameter",
                nearest(name, known),
            )
        for section in self.sections:
            self._load(section, by_name)

    def _load(self, section: Section, by_name: Mapping[str, Mapping[str, Tensor]]) -> None:
        optimizer = section.optimizer
        names = {param: name for name, param in section.named}
        packed = optimizer.state_dict()  # the order of parameters is the groups'
        order = [param for group in optimizer.param_groups for param in group["params"]]
        loaded: dict[int, dict[str, Tensor]] = {}
        for index, param in enumerate(order):
            name = names[param]
            if name in by_name:
                _check(name, by_name[name], section.keeps(param))
                loaded[index] = {key: tensor.detach().clone() for key, tensor in by_name[name].items()}
            elif index in packed["state"]:
                loaded[index] = packed["state"][index]
        # PyTorch's own loader puts each entry on the right device and type
        optimizer.load_state_dict({"state": loaded, "param_groups": packed["param_groups"]})


def _check(name: str, given: Mapping[str, Tensor], wanted: Shapes) -> None:
    if set(given) != set(wanted):
        raise CheckpointError(
            f"optimizer state of {name!r} holds {', '.join(sorted(given))}",
            f"this optimizer keeps {', '.join(sorted(wanted)) or 'nothing'}",
            "continue with the optimizer (and options such as momentum) of the checkpoint",
        )
    for key, tensor in given.items():
        if tuple(tensor.shape) != tuple(wanted[key]):
            raise CheckpointError(
                f"optimizer state {name}.{key} has shape {list(tensor.shape)}",
                f"for this parameter it is {list(wanted[key])}",
                "continue with the model of the checkpoint",
            )


def decay_groups(named: Named, weight_decay: float) -> list[dict[str, Any]]:
    """Groups in which only parameters of two dimensions or more decay; norms and biases do not (nanoGPT)."""
    matrices = [p for _, p in named if p.dim() >= 2]
    vectors = [p for _, p in named if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]
