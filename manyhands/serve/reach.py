"""Where a job's parameter servers are: links to those that its placement names, or that its launcher has started."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.core import tls
from manyhands.core.environment import read_env
from manyhands.core.errors import UsageError
from manyhands.serve.link import Endpoint, Link, endpoints

if TYPE_CHECKING:
    from manyhands.placement.served import Served

START_S = 120.0  # for servers that the launcher is starting


def links(placement: Served, store: str = "") -> list[Link]:
    """One for each server.

    Args:
        store: where a launcher of this machine has started the job's servers, if mine has not (see `store_of`).

    Raises:
        UsageError: nobody says where they are.
    """
    if placement.address:
        token = tls.read_token(placement.token_file)
        prints = placement.fingerprints or ("",) * len(placement.addresses)
        known = [Endpoint(a, f) for a, f in zip(placement.addresses, prints, strict=True)]
        return [_fixed(where, token, placement.patience_s) for where in known]
    store = store_of(store)
    if not store:
        raise UsageError(
            "placement = 'served' without address",
            "only manyhands' own launcher starts servers beside the workers, and only its machine reaches them",
            "start `manyhands serve-parameters` and give address=host:port, token_file=…, fingerprint=…",
        )
    token = tls.read_token(str(Path(store) / "token"))
    files = [str(Path(store) / f"server-{i}.json") for i in range(placement.servers)]
    return [_announced(file, token, placement.patience_s) for file in files]


def store_of(others: str = "") -> str:
    """The directory of my launcher, where it has started servers, or else of `others`; empty where neither has."""
    for store in (read_env().store or "", others):
        if store and (Path(store) / "token").exists():
            return store
    return ""


def _fixed(where: Endpoint, token: str, patience_s: float) -> Link:
    return Link(lambda: where, token, patience_s=patience_s)


def _announced(file: str, token: str, patience_s: float) -> Link:
    """A server that tells its address in a file, anew after each start."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and not Path(file).exists():
        time.sleep(0.02)
    return Link(lambda: next(endpoints(file)), token, patience_s=patience_s)
