"""What feedback has held back of a parameter reaches it also in steps in which nobody uses it; nothing else does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from manyhands.core import config
from manyhands.exchange.combine import is_own, leaves
from manyhands.serve.server import Server
from manyhands.train.replica import Part, Replica

STEPS = 8
TOKEN = "a token that only the tests know"


class Turns(nn.Module):
    """Two parameters that are used in turn, and one that never is. The loss is linear: gradients are what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.odd, self.never = (nn.Linear(9, 1, bias=False, dtype=torch.float64) for _ in range(3))

    def forward(self, x: torch.Tensor, step: int) -> torch.Tensor:
        out: torch.Tensor = (self.odd if step % 2 else self.even)(x)
        return out


def turns_run(world: Any, text: str) -> tuple[float, float, float, float]:
    """(Σ of all mean gradients, how far parameters have gone, what is held back by all, how far the unused one has gone)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Turns()
    replica = Replica(model, config.from_text("strategies", text), world.wire)
    before = {name: tensor.clone() for name, tensor in whole(replica).items()}
    came = 0.0
    for step in range(STEPS):
        x = torch.rand(2, 9, generator=torch.Generator().manual_seed(10 * step + world.rank)).double() + 0.1
        came += float(x.sum()) / (2 * world.size)
        part = Part(step, [(world.rank, {"x": x})], world.size, 2 * world.size, 0)
        replica.step(part, lambda m, b, at=step: (m(b["x"], at).sum(), len(b["x"])))
    replica.meet()
    gone = {name: before[name] - tensor for name, tensor in whole(replica).items()}
    own = [(path, t) for state in replica.states for path, t in leaves(state) if is_own(path)]
    held = sum(float(t.sum()) * (STILL if "velocity" in path else 1.0) for path, t in own)
    replica.close()
    never = gone.pop("never.weight")
    return (
        sum(world.gather(came)),
        sum(float(t.sum()) for t in gone.values()),
        sum(world.gather(held)),
        float(never.abs().max()),
    )


def whole(replica: Replica) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in replica.model.state_dict().items()}


STILL = 0.9 / (1 - 0.9)  # of a velocity comes without further contributions
SPARSE = "optimizer=sgd, lr=1.0, exchange=error-feedback(topk(density=0.1, chunk=0))"


@pytest.mark.parametrize(
    "text",
    [
        f"ddp({SPARSE})",
        f"accumulate({SPARSE}, every=1)",
        f"eager({SPARSE})",
        f"zero1({SPARSE})",
        f"zero3({SPARSE}, shard=1)",
        "ddp(optimizer=sgd, lr=1.0, exchange=error-feedback(by-tensor(topk(density=0.1, chunk=0), numel=2)))",
        "ddp(optimizer=sgd, lr=1.0, exchange=warmup(error-feedback(int4(block=0)), rounds=1))",
        "ddp(optimizer=sgd, lr=1.0, exchange=momentum(by-tensor(topk(density=0.1, chunk=0), numel=20)))",
        "eager(optimizer=sgd, lr=1.0, exchange=momentum(warmup(topk(density=0.1, chunk=0), rounds=3), mask=false))",
    ],
)
def test_what_was_held_back_of_an_unused_parameter_is_not_lost(fleets: Any, text: str) -> None:
    for came, gone, held, never in fleets(2, "group").run(turns_run, text):
        assert held
        assert gone + held == pytest.approx(came * (1 + STILL if "momentum" in text else 1), rel=1e-9)
        assert never == 0.0


@pytest.mark.parametrize("name", ["ddp(", "eager(", "forecast(every=2, delay=1, "])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_parameter_that_nobody_has_used_stays_though_the_codec_has_no_zero(
    fleets: Any, name: str, optimizer: str
) -> None:
    text = f"{name}optimizer={optimizer}, lr=0.1, exchange=error-feedback(sign(block=0)))"
    assert [never for *_, never in fleets(2, "group").run(turns_run, text)] == [0.0, 0.0]


def test_pushes_to_a_server_lose_nothing_either(fleets: Any, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    server = Server(listen=f"unix:{tmp_path}/socket", token=TOKEN, lease_s=1000.0)
    server.start()
    try:
        text = f"parameter-server({SPARSE}, address='{server.address}', token_file='{token}')"
        for came, gone, held, never in fleets(2, "shared").run(turns_run, text):
            assert held
            assert gone + held == pytest.approx(came, rel=1e-9)
            assert never == 0.0
    finally:
        server.stop(0)
