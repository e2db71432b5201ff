"""What is under way while something else is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from manyhands.core import config
from manyhands.core.request import Gather, Place, Where
from manyhands.wire.drive import Interleave
from manyhands.wire.solo import Ready


class Recorder:
    """A wire between two workers that notes what is begun."""

    def __init__(self) -> None:
        self.begun: list[Any] = []

    def begin(self, request: Any) -> Ready:
        self.begun.append(request)
        if isinstance(request, Where):
            return Ready(Place(0, 2))
        return Ready([request.tensor.clone(), request.tensor.clone()])


@pytest.mark.parametrize("name", ["int4", "topk(density=0.1)", "error-feedback(int8)", "sign", "bf16"])
def test_what_a_codec_sends_is_on_its_way_before_anybody_waits(name: str) -> None:
    """A codec asks where it is before it sends: an answer that is known here must not keep its bytes back."""
    exchange: Any = config.from_text("exchanges", name)
    wire: Any = Recorder()
    delta = [torch.linspace(-1, 1, 1000)]
    talks = Interleave(wire)
    talks.start(exchange.talk(delta, exchange.init(delta)))
    assert any(isinstance(request, Gather) for request in wire.begun)
    (agreed,) = talks.finish()
    assert agreed.mean[0].shape == (1000,)
