"""Parameter servers on free ports, and workers without a model that push given sums of gradients to them."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhands.core import config
from manyhands.serve.client import Servers
from manyhands.serve.link import Endpoint, Link
from manyhands.serve.server import Server

TOKEN = "a token that only the tests know"
SHAPES = {"wide": (7, 5), "bias": (5,), "scalar": (), "head": (3, 7)}
WAIT_S = 60.0


def initial(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=g, dtype=dtype) for name, shape in SHAPES.items()}


def gradient(step: int, worker: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1000 * step + worker + 1)
    return {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in SHAPES.items()}


class Worker:
    """A worker without a model: pushes given sums of gradients."""

    def __init__(
        self, servers: list[Server], name: str, *, job: str = "job", patience_s: float = 20.0
    ) -> None:
        links = [
            Link(lambda s=s: Endpoint(s.address, s.fingerprint), TOKEN, patience_s=patience_s)
            for s in servers
        ]
        self.servers = Servers(links, member=name, job=job, lease_s=1000.0)
        self.servers.lay_out(initial())
        self.out = [torch.zeros(lay.size_bytes, dtype=torch.uint8) for lay in self.servers.layouts]
        self.version = 0

    def begin(self, optimizer: Any, *, serial: int = 0, steps: int = 0, **rules: Any) -> None:
        rules = {"optimizer": config.to_data(optimizer, "optimizers"), **rules}
        self.servers.begin(rules, initial(), {}, serial=serial, steps=steps, tokens=0)

    def push(
        self,
        step: int,
        sums: dict[str, torch.Tensor],
        *,
        count: int = 4,
        share: float = 0.5,
        nominal: float = 8.0,
        loss: float = 1.0,
        norm: float | None = None,
        codec: Any = None,
        used: dict[str, bool] | None = None,
        stop: int = 0,
        save: bool = False,
        change: bool = False,
        load: Sequence[float] | None = None,
    ) -> dict[str, Any]:
        payloads = []
        for lay in self.servers.layouts:
            flat = torch.zeros(lay.size_bytes, dtype=torch.uint8)
            for name, view in lay.views(flat).items():
                view.copy_(sums[name] / nominal)
            if codec is not None:
                flat = torch.cat([codec.encode(f, step) for f in lay.flats(flat)])
            payloads.append(flat)
        mean = math.sqrt(sum(float((s / count).square().sum()) for s in sums.values()))
        header = {
            "step": step,
            "version": self.version,
            "share": share,
            "nominal": nominal,
            "loss": loss,
            "count": count,
            "norm": mean if norm is None else norm,
            "stop": stop,
            "save": save,
            "change": change,
            "load": load,
        }
        answer = self.servers.push(header, used or dict.fromkeys(sums, True), payloads, self.out)
        self.version = answer["version"]
        return answer

    @property
    def params(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for lay, out in zip(self.servers.layouts, self.out, strict=True):
            found.update({name: view.clone() for name, view in lay.views(out).items()})
        return found


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """`serve(**options)`: a started server on a free port, stopped at the end; its log in `server.lines`."""
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> Server:
            lines: list[str] = []
            server = Server(
                **{"listen": "127.0.0.1:0", "token": TOKEN, "log": lines.append, "lease_s": 1000.0, **options}
            )
            server.lines = lines  # type: ignore[attr-defined]
            server.start()
            stack.callback(lambda: server._ended.is_set() or server.stop(0))
            return server

        start.workers = lambda servers, n, **more: [  # type: ignore[attr-defined]
            enter(stack, Worker(servers, f"worker-{i}", **more)) for i in range(n)
        ]
        yield start


def enter(stack: contextlib.ExitStack, worker: Worker) -> Worker:
    stack.callback(worker.servers.close)
    return worker


def vanish(server: Server) -> None:
    """As after a SIGKILL: nothing more is written. The lock goes with the process."""
    server._ended.set()
    server._server.stop(0).wait()
    keeper: Any = server.shard._keeper
    keeper._journal.close()
    server.shard._keeper = None


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Run on threads of their own; their results in order, or the first error."""
    results: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            results[i] = calls[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "a call hangs"
    if errors:
        raise errors[0]
    return results


def plain(
    optimizer: Any, grads: list[dict[str, torch.Tensor]], factors: list[float] | None = None
) -> dict[str, Any]:
    """The same updates with PyTorch alone: one for each mean gradient."""
    params = {name: torch.nn.Parameter(t) for name, t in initial().items()}
    made = optimizer.build(list(params.items()), "cpu")
    for i, grad in enumerate(grads):
        for name, param in params.items():
            param.grad = grad[name].clone()
        made.set_lr(factors[i] if factors else 1.0)
        made.step()
    return {name: p.detach() for name, p in params.items()}


def close_to(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-12) -> None:
    for name in b:
        assert torch.allclose(a[name], b[name], rtol=0, atol=tolerance), name
