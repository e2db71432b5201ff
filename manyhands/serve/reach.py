"""Where a job's parameter servers are: links to those that its placement names, or that its launcher has started."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.core import tls
from manyhands.core.environment import read_env
from manyhands.core.errors import UsageError
from manyhands.serve.client import Endpoint, Link, endpoints

if TYPE_CHECKING:
    from manyhands.placement.served import Served

START_S = 120.0  # for servers that the launcher is starting


def links(placement: Served) -> list[Link]:
    """One for each server. Raises `UsageError`: nobody says where they are."""
    if placement.address:
        token = tls.read_token(placement.token_file)
        prints = placement.fingerprints or ("",) * len(placement.addresses)
        known = [Endpoint(a, f) for a, f in zip(placement.addresses, prints, strict=True)]
        return [_fixed(where, token, placement.patience_s) for where in known]
    store = read_env().store
    if store is None or not (Path(store) / "token").exists():
        raise UsageError(
            "placement = 'served' without address",
            "only manyhands' own launcher starts servers beside the workers",
            "start `manyhands serve-parameters` and give address=host:port, token_file=…, fingerprint=…",
        )
    token = tls.read_token(str(Path(store) / "token"))
    files = [str(Path(store) / f"server-{i}.json") for i in range(placement.servers)]
    return [_announced(file, token, placement.patience_s) for file in files]


def _fixed(where: Endpoint, token: str, patience_s: float) -> Link:
    return Link(lambda: where, token, patience_s=patience_s)


def _announced(file: str, token: str, patience_s: float) -> Link:
    """A server that tells its address in a file, anew after each start."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and not Path(file).exists():
        time.sleep(0.02)
    return Link(lambda: next(endpoints(file)), token, patience_s=patience_s)
