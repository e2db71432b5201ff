"""The named strategy whose parameters live on servers."""

from __future__ import annotations

from typing import Any

from manyhands.core.checked import checked_call
from manyhands.placement.served import Durability, Served
from manyhands.strategy.base import Strategy


@checked_call
def parameter_server(
    *,
    consistency: Any = "sync",
    lr: float | None = None,
    optimizer: Any = "adamw",
    schedule: Any = None,
    weight_decay: float | None = None,
    exchange: Any = "all-reduce",
    servers: int = 1,
    address: str = "",
    token_file: str = "",
    fingerprint: str = "",
    accumulate: int = 1,
    discard: int | None = None,
    compensation: float = 0.0,
    durability: Durability = "each",
    interval_s: float = 60.0,
    lease_s: float = 30.0,
    patience_s: float = 60.0,
) -> Strategy:
    """Workers push gradients to servers and pull parameters (Li et al., OSDI 2014; Ho et al., NIPS 2013).

    Args:
        consistency: sync, bounded(s) or async.
        exchange: what a push says: all-reduce for raw numbers, or error-feedback(CODEC), or a codec.
        servers, address, token_file, fingerprint, accumulate, discard, compensation, durability, interval_s, lease_s,
            patience_s: see `manyhands.placement.served.Served`.
    """
    from manyhands.strategy.presets import _exchange, _optimizer

    return Strategy(
        placement=Served(
            consistency=consistency,
            servers=servers,
            address=address,
            token_file=token_file,
            fingerprint=fingerprint,
            accumulate=accumulate,
            discard=discard,
            compensation=compensation,
            durability=durability,
            interval_s=interval_s,
            lease_s=lease_s,
            patience_s=patience_s,
        ),
        exchange=_exchange(exchange),
        outer=_optimizer(optimizer, lr, schedule, weight_decay),
    )
