"""Parameters on a server: workers push gradients and pull parameters (Li et al., OSDI 2014).

``sync``: the server waits for every worker's push of a step and makes one update of them, as all-reduce does.
``bounded(s)``: pushes are applied as they come; no worker is more than s steps ahead of the slowest (stale synchronous
parallel, Ho et al., NIPS 2013); bounded(0) is sync. ``async``: nobody waits.

A push that is applied alone moves the parameters by its share of the rate, so that the pushes of one global batch
together move them as one update would. What staleness does to it can be lessened: `accumulate` makes one update of k
pushes (arXiv:1906.03496), `discard` drops pushes staler than a bound (Ringmaster ASGD, arXiv:2501.16168),
`compensation` corrects a stale gradient to first order (DC-ASGD, arXiv:1609.08326, equation 10), and the optimizer
``delayed-nesterov`` keeps momentum from old pushes (arXiv:2401.09135).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from manyhands.core.callform import Call
from manyhands.core.checked import checked
from manyhands.core.config import option
from manyhands.core.errors import UsageError, nearest

MODES = ("sync", "bounded", "async")
Durability = Literal["each", "synced", "interval"]


@dataclass(frozen=True, kw_only=True)
@checked
class Served:
    """Parameters and optimizer on servers; workers push gradients.

    Attributes:
        consistency: sync, bounded(s) or async.
        servers: processes among which the parameters are divided by bytes.
        address: host:port of running servers (``manyhands serve-parameters``), several with commas; empty: the
            launcher starts them on this machine.
        token_file: file with the token of those servers.
        fingerprint: ``sha256:…`` of each server's certificate, with commas; may be empty on this machine alone.
        accumulate: pushes that make one update.
        discard: drop pushes that are staler than this many updates; none: keep all.
        compensation: λ of delay compensation; 0: off.
        durability: what survives the server's death: each acknowledged push, each also after a loss of power
            (synced), or the last snapshot (interval).
        interval_s: seconds between snapshots.
        lease_s: a worker that is silent for so long is no longer waited for; of ``sync`` it counts as lost, since a round
            is one of all workers or of none.
        patience_s: how long a worker tries to reach a server that is gone.
    """

    consistency: Any = option("sync", help="sync, bounded(s) or async")
    servers: int = option(1, help="processes among which the parameters are divided by bytes")
    address: str = option(
        "", help="host:port of running servers, with commas; empty: started by the launcher"
    )
    token_file: str = option("", help="file with the token of those servers")
    fingerprint: str = option("", help="sha256:… of each server's certificate, with commas")
    accumulate: int = option(1, help="pushes that make one update (arXiv:1906.03496)")
    discard: int | None = option(None, help="drop pushes staler than this many updates (arXiv:2501.16168)")
    compensation: float = option(0.0, help="delay compensation's λ (arXiv:1609.08326); 0: off")
    durability: Durability = option(
        "each", help="each acknowledged push survives; synced: loss of power, too; interval: snapshots only"
    )
    interval_s: float = option(60.0, help="seconds between the server's snapshots")
    lease_s: float = option(30.0, help="a worker silent for so long is not waited for")
    patience_s: float = option(60.0, help="how long a worker tries to reach a server that is gone")

    method: ClassVar[str | None] = "manyhands.train.served:Served"

    def __post_init__(self) -> None:
        object.__setattr__(self, "consistency", _spelled(self.consistency))
        bound = bound_of(self.consistency)
        for name in ("servers", "accumulate"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} = {getattr(self, name)}", "it is at least 1", f"give {name}=1")
        for name in ("interval_s", "lease_s", "patience_s"):
            if not 0 < getattr(self, name) < 1e9:
                raise UsageError(f"{name} = {getattr(self, name)}", "it is a positive time in seconds", "")
        if self.discard is not None and self.discard < 0:
            raise UsageError(f"discard = {self.discard}", "staleness is not negative", "give discard >= 0")
        if not 0 <= self.compensation < 1e9:
            raise UsageError(f"compensation = {self.compensation}", "λ is not negative", "0.04 is usual")
        if bound == 0:
            self._check_sync()
        self._check_address()

    def check(self, *, exchange: Any, optimizer: Any, cadence: Any) -> None:
        """Refuse what the rest of a strategy cannot be here. Raises `UsageError`."""
        if type(cadence).__name__ != "EveryStep":
            raise UsageError(
                f"cadence = {cadence!r} with placement = 'served'",
                "a worker pushes at every step",
                "use cadence = 'every-step'; accumulate=k lets the server gather k pushes",
            )
        if type(exchange).__name__ == "AllReduce":
            one_way = exchange.precision == "as-is"
            if exchange.bucket_mb not in (25.0, math.inf):
                raise UsageError(
                    f"exchange = {exchange!r} with placement = 'served'",
                    "a push is one message to each server, so bucket_mb would be ignored",
                    "leave it out",
                )
        else:
            inner = exchange.inner if type(exchange).__name__ == "ErrorFeedback" else exchange
            one_way = all(callable(getattr(inner, part, None)) for part in ("encode", "decode", "size_bytes"))
            if not getattr(inner, "conserves", True):
                raise UsageError(
                    f"exchange = {exchange!r} with placement = 'served'",
                    "a server adds pushes one by one and does not know who sent an entry",
                    "give it average='all'",
                )
        if not one_way:
            raise UsageError(
                f"exchange = {exchange!r} with placement = 'served'",
                "a push goes one way: it is raw (all-reduce) or encoded by a codec, with error feedback or without",
                "use for example exchange = 'error-feedback(int8)' or 'bf16'",
            )

    @property
    def bound(self) -> int | None:
        """Steps that a worker may be ahead of the slowest: 0 synchronous, None without bound."""
        return bound_of(self.consistency)

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(a.strip() for a in self.address.split(",") if a.strip())

    @property
    def fingerprints(self) -> tuple[str, ...]:
        return tuple(f.strip() for f in self.fingerprint.split(",") if f.strip())

    def _check_sync(self) -> None:
        for name, off in (("accumulate", 1), ("discard", None), ("compensation", 0.0)):
            if getattr(self, name) != off:
                raise UsageError(
                    f"{name} = {getattr(self, name)} with consistency = {self.consistency}",
                    "no push is stale there, and all of a step make one update",
                    f"leave out {name}, or use bounded(4) or async",
                )

    def _check_address(self) -> None:
        if not self.address:
            for name in ("token_file", "fingerprint"):
                if getattr(self, name):
                    raise UsageError(
                        f"{name} without address",
                        "servers that the launcher starts have secrets of their own",
                        f"give address=host:port, or leave out {name}",
                    )
            return
        for name, default in (("durability", "each"), ("interval_s", 60.0)):
            if getattr(self, name) != default:
                raise UsageError(
                    f"{name} = {getattr(self, name)!r} with address = {self.address!r}",
                    "servers that run already do as they were told when they were started",
                    f"leave it out, and give `manyhands serve-parameters` its --{name.removesuffix('_s')}",
                )
        n = len(self.addresses)
        if not n or len(set(self.addresses)) != n:
            raise UsageError(
                f"address = {self.address!r}",
                "it names each server once, several with commas",
                "for example 10.0.0.5:7077,10.0.0.6:7077",
            )
        if self.servers not in (1, n):
            raise UsageError(
                f"servers = {self.servers} with {n} addresses", "each server has one", "leave out servers"
            )
        for address in self.addresses:
            host, _, port = address.rpartition(":")
            if not (address.startswith("unix:") or (host and port.isdigit() and 0 < int(port) < 65536)):
                raise UsageError(f"address = {address!r}", "it is host:port", "for example 10.0.0.5:7077")
            if self.fingerprint and address.startswith("unix:"):
                raise UsageError(
                    f"fingerprint = {self.fingerprint!r} with address = {address!r}",
                    "a socket of this machine shows no certificate",
                    "leave out fingerprint",
                )
            if not self.fingerprint and not local(address):
                raise UsageError(
                    f"address = {address!r} without fingerprint",
                    "a server elsewhere is known by its certificate",
                    "give fingerprint=sha256:… as the server printed it",
                )
        if not self.token_file:
            raise UsageError(
                f"address = {self.address!r} without token_file",
                "a server serves only those who know its token",
                "give token_file=FILE, the --token-file of manyhands serve-parameters",
            )
        if self.fingerprint and len(self.fingerprints) != n:
            raise UsageError(
                f"{len(self.fingerprints)} fingerprints for {n} addresses", "each server has one", ""
            )
        for fingerprint in self.fingerprints:
            if not re.fullmatch(r"sha256:[0-9a-fA-F]{64}", fingerprint):
                raise UsageError(
                    f"fingerprint = {fingerprint!r}", "it is sha256: and 64 hexadecimal digits", ""
                )


def bound_of(consistency: str) -> int | None:
    """The s of bounded(s), 0 of sync, None of async. Raises `UsageError`.

    >>> bound_of("sync"), bound_of("bounded(4)"), bound_of("async")
    (0, 4, None)
    """
    if consistency == "sync":
        return 0
    if consistency == "async":
        return None
    match = re.fullmatch(r"bounded\(\s*(\d+)\s*\)", consistency)
    if match:
        return int(match[1])
    mode = consistency.partition("(")[0]
    remedy = "write bounded(4)" if mode == "bounded" else nearest(mode, MODES)
    raise UsageError(f"consistency = {consistency!r}", "it is sync, bounded(s) with s >= 0, or async", remedy)


def local(address: str) -> bool:
    """Whether an address is on this machine, where nobody is in between."""
    host = address.rpartition(":")[0].strip("[]")
    return address.startswith("unix:") or host in ("localhost", "::1") or host.startswith("127.")


def _spelled(value: Any) -> str:
    """The text of a call form: on the command line, bounded(4) is read as a call."""
    if isinstance(value, Call):
        inside = [*map(str, value.args), *(f"{k}={v}" for k, v in value.kwargs.items())]
        return f"{value.name}({', '.join(inside)})"
    return str(value)
