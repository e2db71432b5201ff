"""Optimizers as values: ``AdamW(3e-4)`` is configuration; `build` makes PyTorch's own of it.

The first value is always the learning rate; the rest is named. PyTorch's fused kernels are used where a
device has them (on a CPU fused AdamW is three times as fast as the loop). `weight_decay` is applied to
parameters of two or more dimensions only: norms and biases do not decay (the convention of nanoGPT and of
most language models).

`Adam`, `AdamW`, `Muon` and `Adafactor` come with a cosine schedule, as language models are trained; `SGD`,
`Adagrad` and `RMSprop` with a constant rate. Without a known length of the run every schedule is constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from manyhands.core.checked import checked
from manyhands.core.config import choice, option
from manyhands.core.errors import UsageError
from manyhands.core.names import check_patterns, is_named
from manyhands.strategy.schedules import Constant, Schedule

if TYPE_CHECKING:
    from torch import nn

    from manyhands.strategy.named import Named, NamedOptimizer, Section

FUSED_ON = {"SGD": ("cpu", "cuda"), "Adam": ("cpu", "cuda"), "AdamW": ("cpu", "cuda"), "Adagrad": ("cpu",)}

RATE = "learning rate at the schedule's height"
DECAY = "weight decay of parameters with two or more dimensions"
SCHEDULE = "how the rate changes over the run"


@dataclass(frozen=True)
@checked
class SGD:
    """Stochastic gradient descent; with momentum, Polyak's or Nesterov's (Sutskever et al. 2013)."""

    lr: float = option(0.1, help=RATE)
    _: KW_ONLY
    momentum: float = option(0.0, help="share of the last update that is kept")
    nesterov: bool = option(False, help="look ahead along the momentum")
    weight_decay: float = option(0.0, help=DECAY + ", added to the gradient")
    schedule: Schedule = choice("schedules", "constant", help=SCHEDULE)

    def __post_init__(self) -> None:
        _check(self, shares=("momentum",))
        if self.nesterov and not self.momentum:
            raise UsageError(
                "nesterov = true with momentum = 0", "it looks ahead along the momentum", "give momentum=0.9"
            )

    def build(self, named_params: Named, device_type: str) -> NamedOptimizer:
        """The optimizer of these parameters, which live on a device of this type ("cpu", "cuda")."""
        from manyhands.strategy.named import NamedOptimizer

        options = {"lr": self.lr, "momentum": self.momentum, "nesterov": self.nesterov}
        keys = ("momentum_buffer",) if self.momentum else ()
        section = _section(
            "SGD", named_params, options, self.weight_decay, device_type, _full(*keys, step=False)
        )
        if self.momentum:
            import torch

            # PyTorch's fused step fails where only some parameters have a buffer (a gradient that first comes
            # later). A buffer of zeros is the same as none: buf ← momentum·0 + gradient.
            for _, param in named_params:
                section.optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
        return NamedOptimizer([section])


@dataclass(frozen=True)
@checked
class Adam:
    """Adam (arXiv:1412.6980, algorithm 1); weight decay is added to the gradient (L2)."""

    lr: float = option(3e-4, help=RATE)
    _: KW_ONLY
    betas: tuple[float, float] = option(
        (0.9, 0.999), help="decay of the running means of gradient and square"
    )
    eps: float = option(1e-8, help="added to the root of the mean square")
    weight_decay: float = option(0.0, help=DECAY + ", added to the gradient")
    schedule: Schedule = choice("schedules", "cosine", help=SCHEDULE)

    def __post_init__(self) -> None:
        _check(self, shares=("betas",))

    def build(self, named_params: Named, device_type: str) -> NamedOptimizer:
        """The optimizer of these parameters, which live on a device of this type ("cpu", "cuda")."""
        from manyhands.strategy.named import NamedOptimizer

        options = {"lr": self.lr, "betas": self.betas, "eps": self.eps}
        keeps = _full("exp_avg", "exp_avg_sq")
        return NamedOptimizer(
            [_section("Adam", named_params, options, self.weight_decay, device_type, keeps)]
        )


@dataclass(frozen=True)
@checked
class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101, algorithm 2)."""

    lr: float = option(3e-4, help=RATE)
    _: KW_ONLY
    betas: tuple[float, float] = option((0.9, 0.95), help="decay of the running means of gradient and square")
    eps: float = option(1e-8, help="added to the root of the mean square")
    weight_decay: float = option(0.1, help=DECAY + ", times the rate")
    schedule: Schedule = choice("schedules", "cosine", help=SCHEDULE)

    def __post_init__(self) -> None:
        _check(self, shares=("betas",))

    def build(self, named_params: Named, device_type: str) -> NamedOptimizer:
        """The optimizer of these parameters, which live on a device of this type ("cpu", "cuda")."""
        from manyhands.strategy.named import NamedOptimizer

        return NamedOptimizer([_adamw(self, named_params, device_type)])


@dataclass(frozen=True)
@checked
class Adagrad:
    """Rates divided by the root of all squares so far (Duchi, Hazan, Singer 2011)."""

    lr: float = option(0.01, help=RATE)
    _: KW_ONLY
    eps: float = option(1e-10, help="added to the root of the sum of squares")
    weight_decay: float = option(0.0, help=DECAY + ", added to the gradient")
    schedule: Schedule = choice("schedules", "constant", help=SCHEDULE)

    def __post_init__(self) -> None:
        _check(self)

    def build(self, named_params: Named, device_type: str) -> NamedOptimizer:
        """The optimizer of these parameters, which live on a device of this type ("cpu", "cuda")."""
        from manyhands.strategy.named import NamedOptimizer

        options = {"lr": self.lr, "eps": self.eps}
        keeps = _full("sum")
        return NamedOptimizer(
            [_section("Adagrad", named_params, options, self.weight_decay, device_type, keeps)]
        )


@dataclass(frozen=True)
@checked
class RMSprop:
    """Rates divided by the root of a running mean square (Hinton 2012, lecture 6e)."""

    lr: float = option(1e-3, help=RATE)
    _: KW_ONLY
    alpha: float = option(0.99, help="decay of the running mean square")
    eps: float = option(1e-8, help="added to the root of the mean square")
    momentum: float = option(0.0, help="share of the last update that is kept")
    centered: bool = option(False, help="divide by an estimate of the variance instead")
    weight_decay: float = option(0.0, help=DECAY + ", added to the gradient")
    schedule: Schedule = choice("schedules", "constant", help=SCHEDULE)

    def __post_init__(self) -> None:
        _check(self, shares=("alpha", "momentum"))

    def build(self, named_params: Named, device_type: str) -> NamedOptimizer:
        """The optimizer of these parameters, which live on a device of this type ("cpu", "cuda")."""
        from manyhands.strategy.named import NamedOptimizer

        options = {k: getattr(self, k) for k in ("lr", "alpha", "eps", "momentum", "centered")}
        keys = [
            "square_avg",
            *(["momentum_buffer"] if self.momentum else []),
            *(["grad_avg"] if self.centered else []),
        ]
        section = _section("RMSprop", named_params, options, self.weight_decay, device_type, _full(*keys))
        return NamedOptimizer([section])


@dataclass(frozen=True)
@checked
class Adafactor:
    """Second moments of matrices kept as a row and a column: O(rows + columns) memory (arXiv:1804.04235).

    PyTorch's version: without momentum, with relative step sizes scaled by the parameters' root mean square.
    """

    lr: float = option(0.01, help=RATE)
    _: KW_ONLY
    beta2_decay: float = option(-0.8, help="beta2 of step t is 1 − t**beta2_decay (section 7.2)")
    eps: float = option(1e-3, help="smallest root mean square of a parameter that scales its steps")
    clip: float = option(1.0, help="largest root mean square of an update, d in section 6")
    weight_decay: float = option(0.0, help=DECAY + ", times the rate")
    schedule: Schedule = choice("schedules", "cosine", help=SCHEDULE)

    def __post_init__(self) -> None:
        _check(self)
        if self.beta2_decay > 0:
            raise UsageError(
                f"beta2_decay = {self.beta2_decay}", "beta2 = 1 − t**beta2_decay rises", "give one <= 0"
            )
        if not self.clip >= 1:
            raise UsageError(
                f"clip = {self.clip}", "PyTorch's Adafactor clips at 1 or more", "give clip >= 1"
            )

    def build(self, named_params: Named, device_type: str) -> NamedOptimizer:
        """The optimizer of these parameters, which live on a device of this type ("cpu", "cuda")."""
        from manyhands.strategy.named import NamedOptimizer

        options = {"lr": self.lr, "beta2_decay": self.beta2_decay, "eps": (None, self.eps), "d": self.clip}
        section = _section("Adafactor", named_params, options, self.weight_decay, device_type, _factored)
        return NamedOptimizer([section])


@dataclass(frozen=True)
@checked
class Muon:
    """Orthogonalised momentum for hidden matrices (Jordan 2024), AdamW for embeddings, head, norms, biases.

    Updates are scaled to AdamW's root mean square, 0.2·√max(rows, columns) (arXiv:2502.16982, eq. 4), so that
    one rate and one weight decay serve both. Needs torch 2.9.
    """

    lr: float = option(3e-4, help=RATE)
    _: KW_ONLY
    momentum: float = option(0.95, help="share of the last momentum that is kept")
    nesterov: bool = option(True, help="look ahead along the momentum")
    ns_steps: int = option(5, help="Newton-Schulz iterations of the orthogonalisation")
    betas: tuple[float, float] = option((0.9, 0.95), help="of AdamW's running means")
    eps: float = option(1e-8, help="of AdamW")
    weight_decay: float = option(0.1, help=DECAY + ", times the rate")
    adamw: tuple[str, ...] = option(
        ("*embed*", "wte", "wpe", "lm_head", "head", "classifier", "score"),
        help="parameters with a module of such a name (patterns) are AdamW's: embeddings and heads",
    )
    schedule: Schedule = choice("schedules", "cosine", help=SCHEDULE)

    def __post_init__(self) -> None:
        _check(self, shares=("momentum", "betas"))
        check_patterns("muon(adamw)", self.adamw)
        if not 1 <= self.ns_steps < 100:
            raise UsageError(f"ns_steps = {self.ns_steps}", "the iteration takes 1 to 99 steps", "5 is usual")

    def build(self, named_params: Named, device_type: str) -> NamedOptimizer:
        """The optimizer of these parameters, which live on a device of this type ("cpu", "cuda").

        Raises:
            UsageError: torch is older than 2.9.
        """
        from manyhands.strategy.named import NamedOptimizer

        matrices = [(name, p) for name, p in named_params if p.dim() == 2 and not self.is_adamw(name)]
        ours = {name for name, _ in matrices}
        rest = [(name, p) for name, p in named_params if name not in ours]
        sections = []
        if matrices:
            names = ("lr", "momentum", "nesterov", "ns_steps")
            options = {**{k: getattr(self, k) for k in names}, "adjust_lr_fn": "match_rms_adamw"}
            keeps = _full("momentum_buffer", step=False)
            sections.append(_section("Muon", matrices, options, self.weight_decay, device_type, keeps))
        if rest:
            sections.append(_adamw(self, rest, device_type))
        return NamedOptimizer(sections)

    def is_adamw(self, name: str) -> bool:
        """Whether a matrix of this name is left to AdamW."""
        return is_named(name, self.adamw)


# -- how

Keeps = Callable[["nn.Parameter"], Mapping[str, "tuple[int, ...]"]]


def _section(
    kind: str, named: Named, options: Mapping[str, Any], weight_decay: float, device_type: str, keeps: Keeps
) -> Section:
    """PyTorch's optimizer of that name over `named`, fused where the device has the kernel."""
    import torch

    from manyhands.strategy.named import Section, decay_groups

    cls = getattr(torch.optim, kind, None)
    if cls is None:
        raise UsageError(
            f"{kind} with torch {torch.__version__}",
            f"this torch has no torch.optim.{kind}",
            "install torch >= 2.9, or use adamw",
        )
    halves = any(param.dtype in (torch.bfloat16, torch.float16) for _, param in named)
    # torch 2.13's fused SGD of half precision on a CPU leaves values out and reads memory that nobody has written
    wrong = kind == "SGD" and device_type == "cpu" and halves
    fused = {"fused": True} if device_type in FUSED_ON.get(kind, ()) and not wrong else {}
    return Section(cls(decay_groups(named, weight_decay), **options, **fused), tuple(named), keeps)


def _adamw(spec: AdamW | Muon, named: Named, device_type: str) -> Section:
    options = {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps}
    return _section("AdamW", named, options, spec.weight_decay, device_type, _full("exp_avg", "exp_avg_sq"))


def _full(*keys: str, step: bool = True) -> Keeps:
    """State of the parameter's own shape under each key, and a step counter."""

    def keeps(param: nn.Parameter) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {key: tuple(param.shape) for key in keys}
        return {"step": (), **shapes} if step else shapes

    return keeps


def _factored(param: nn.Parameter) -> dict[str, tuple[int, ...]]:
    shape = tuple(param.shape)
    if len(shape) < 2:
        return {"step": (), "variance": shape}
    return {"step": (), "row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}


def _check(spec: Any, shares: Sequence[str] = ()) -> None:
    """The rules that all specs share; `shares` are fields within 0 … 1."""
    if not 0 < spec.lr < math.inf:
        raise UsageError(f"lr = {spec.lr}", "a learning rate is positive", "give lr > 0")
    if not 0 <= spec.weight_decay < math.inf:
        raise UsageError(f"weight_decay = {spec.weight_decay}", "it is not negative", "0 switches it off")
    if not 0 < getattr(spec, "eps", 1.0) < math.inf:
        raise UsageError(f"eps = {spec.eps}", "it keeps a divisor from zero", "give eps > 0")
    for name in shares:
        value = getattr(spec, name)
        for share in value if isinstance(value, tuple) else (value,):
            if not 0 <= share < 1:
                raise UsageError(f"{name} = {value}", "it is a share that is kept", f"give 0 <= {name} < 1")
    if spec.schedule is None:  # "none" on the command line
        object.__setattr__(spec, "schedule", Constant())
