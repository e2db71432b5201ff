"""The parameters that a server keeps, and what a push does to them. Knows no network and no other worker."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from manyhands.core.errors import ManyhandsError, UsageError
from manyhands.exchange.codec import wide
from manyhands.serve.layout import Layout
from manyhands.serve.protocol import Garbage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from manyhands.serve.rules import Push, Rules


class Store:
    """Parameters, optimizer and the gradient that is being gathered, in flat memory.

    Args:
        tensors: the parameters by name, of any floating-point type.
        optimizer: the optimizer's state by name; empty at the beginning.
    """

    def __init__(self, rules: Rules, tensors: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        from manyhands.serve.protocol import entry_of

        if not tensors:
            raise Garbage("a job without parameters", "a server keeps at least one", "")
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise Garbage(f"parameter {name} of type {tensor.dtype}", "it is of floating point", "")
        self.rules = rules
        self.layout = Layout.of(entry_of(name, t) for name, t in tensors.items())
        self.flat = torch.zeros(self.layout.size_bytes, dtype=torch.uint8)
        self._grad = torch.zeros(self.layout.size_bytes, dtype=torch.uint8)
        views, self._grads = self.layout.views(self.flat), self.layout.views(self._grad)
        self._grad_flats, self._flats = self.layout.flats(self._grad), self.layout.flats(self.flat)
        # gradients are added here: half precision in float32, and rounded once
        self._sums = [
            flat if wide(flat.dtype) is flat.dtype else torch.zeros(flat.numel(), dtype=wide(flat.dtype))
            for flat in self._grad_flats
        ]
        self.params = {}
        for name, view in views.items():
            view.copy_(tensors[name])
            self.params[name] = torch.nn.Parameter(view)
        # in the order in which the worker's model has them, which optimizers may depend on
        self.optimizer = rules.optimizer.build([(name, self.params[name]) for name in tensors], "cpu")
        if optimizer:
            self.optimizer.load_state_by_name(optimizer)
        self.payload_bytes = self.layout.size_bytes
        if rules.codec is not None:
            self.payload_bytes = sum(rules.codec.size_bytes(f.numel()) for f in self._grad_flats)
        self.backups: dict[str, Tensor] = {}
        self.gathered = 0  # pushes in the gradient
        self._used = [False] * len(self.layout.entries)

    def check(self, payload: Tensor) -> None:
        """Whether a push can be read. Raises `Garbage`: its bytes are none of the codec's."""
        if self.rules.codec is None:
            return  # any bytes are numbers
        try:
            self._decoded(payload)
        except (ValueError, RuntimeError, IndexError, ManyhandsError) as error:
            raise Garbage(f"a push that is no payload of {self.rules.codec} ({error})") from error

    def add(self, push: Push, payload: Tensor, *, weight: float = 1.0) -> None:
        """Put a push into the gradient, `weight` times; compensated for its delay where the rules say so."""
        parts = self._decoded(payload)
        if self.rules.compensation and push.member in self.backups and push.count:
            parts = self._compensated(push, parts)
        for total, part in zip(self._sums, parts, strict=True):
            if not self.gathered:
                total.copy_(part)
                if weight != 1.0:
                    total.mul_(weight)
            else:
                total.add_(part, alpha=weight)
        self.gathered += 1
        self._used = [was or now == "1" for was, now in zip(self._used, push.used, strict=True)]

    def norm_sq(self) -> float:
        """Σ of squares of the gradient gathered so far."""
        total = 0.0
        for gathered in self._sums:
            total += float(torch.linalg.vector_norm(gathered).double()) ** 2
        return total

    def update(self, scale: float, factor: float) -> None:
        """One optimizer step with `scale` times the gradient, at `factor` times the rate; the gradient is empty then."""
        for flat, total in zip(self._grad_flats, self._sums, strict=True):
            if scale != 1.0:
                total.mul_(scale)
            if flat is not total:
                flat.copy_(total)
        for entry, used in zip(self.layout.entries, self._used, strict=True):
            self.params[entry.name].grad = self._grads[entry.name] if used else None
        self.optimizer.set_lr(factor)
        self.optimizer.step()
        self.drop()

    def drop(self) -> None:
        """Forget the gradient."""
        self.gathered = 0
        self._used = [False] * len(self.layout.entries)

    def keep_backup(self, member: str) -> None:
        """Remember what `member` is given now: w_bak of DC-ASGD."""
        self.backups[member] = self.flat.clone()

    def tensors(self) -> dict[str, Tensor]:
        """Copies of everything that a snapshot holds, by name."""
        found = {f"parameters/{name}": p.detach().clone() for name, p in self.params.items()}
        state: Mapping[str, Tensor] = self.optimizer.state_by_name()
        found.update({f"optimizer/{name}": t.clone() for name, t in state.items()})
        found.update({f"backup/{member}": t for member, t in self.backups.items()})
        return found

    def _decoded(self, payload: Tensor) -> Sequence[Tensor]:
        """The payload as flat tensors, one a group."""
        codec = self.rules.codec
        if codec is None:
            return self.layout.flats(payload)
        parts, at = [], 0
        for flat in self._grad_flats:
            size = codec.size_bytes(flat.numel())
            parts.append(codec.decode(payload[at : at + size], flat.numel(), flat.dtype))
            at += size
        return parts

    def _compensated(self, push: Push, parts: Sequence[Tensor]) -> list[Tensor]:
        """g + λ g ⊙ g ⊙ (w − w_bak) with g the mean gradient of the part (arXiv:1609.08326, equation 10)."""
        to_mean = push.nominal / push.count
        backups = self.layout.flats(self.backups[push.member])
        corrected = []
        for part, now, then in zip(parts, self._flats, backups, strict=True):
            mean = part.to(wide(part.dtype)) * to_mean
            mean.addcmul_(mean * mean, now - then, value=self.rules.compensation)
            corrected.append(mean.div_(to_mean))
        return corrected


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Parameters, optimizer state and backups from names with prefixes. Raises `UsageError`."""
    found: dict[str, dict[str, Tensor]] = {"parameters": {}, "optimizer": {}, "backup": {}}
    for full, tensor in tensors.items():
        kind, _, name = full.partition("/")
        if kind not in found:
            raise UsageError(f"a tensor called {full[:80]!r}", "parameters/… or optimizer/…", "")
        found[kind][name] = tensor
    return found["parameters"], found["optimizer"], found["backup"]


def finite(*values: float) -> bool:
    """Whether all are numbers."""
    return all(math.isfinite(v) for v in values)
