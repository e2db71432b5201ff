"""Facts of a small job on one CPU, from which a plan is derived."""

from __future__ import annotations

import dataclasses
from typing import Any

from manyhands.train.plan import Facts

SMALL = Facts(
    rows=100,
    world_size=1,
    hosts=("h",),
    device_type="cpu",
    device_name="cpu",
    threads=1,
    has_bf16=False,
    draws_random=False,
    parameters=10,
    flops_per_token=60.0,
    peak_flops=1e9,
)


def facts(**changes: Any) -> Facts:
    return dataclasses.replace(SMALL, **changes)
