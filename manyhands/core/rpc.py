"""What every gRPC connection of ours has in common: the package, the options, the token, the pinned certificate.

gRPC brings flow control, TLS and keep-alive over HTTP/2. Its messages are raw bytes of ours (no protoc, nothing pickled):
`manyhands.serve.protocol` frames tensors, the coordinator speaks JSON.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

from manyhands.core import tls
from manyhands.core.errors import UsageError

COMMON = (
    ("grpc.enable_http_proxy", 0),  # workers talk to each other, not through somebody's proxy
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)
LOOK_S = 0.25  # how often whoever waits for a call looks whether it can still end by itself
CANCEL_S = 2.0  # for whoever reads a call's messages to be told of its end
CLOSE_S = 0.5  # for a channel to be closed, which takes milliseconds, or for ever
EVERYWHERE = ("0.0.0.0", "[::]", "")  # hosts to listen on that nobody is reached at


def grpc_module() -> Any:
    """The package grpc. Raises `UsageError` where it is absent."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # our children are new interpreters
    try:
        import grpc
    except ImportError:
        raise UsageError(
            "the package grpcio cannot be imported",
            "workers, servers and the coordinator talk over gRPC",
            "pip install grpcio",
        ) from None
    return grpc


def options(message_bytes: int) -> tuple[tuple[str, Any], ...]:
    """Channel and server options where a message has at most so many bytes."""
    return (
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", message_bytes),
        *COMMON,
    )


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata that a caller who knows the token sends."""
    return (("authorization", f"Bearer {token}"),)


def knows(context: Any, token: str) -> bool:
    """Whether the caller behind a server's `context` has sent the token."""
    metadata = dict(context.invocation_metadata())
    return tls.same_token(str(metadata.get("authorization", "")), f"Bearer {token}")


def channel(
    address: str, *, fingerprint: str = "", message_bytes: int, timeout_s: float = 10.0, extra: Any = ()
) -> Any:
    """A channel to ``HOST:PORT`` or ``unix:PATH``; with `fingerprint`, over TLS to the server whose certificate has it.

    Raises:
        OSError: nobody answers there (TLS only; a plain channel connects when used).
        UsageError: another certificate is shown.
    """
    grpc = grpc_module()
    settings = (*options(message_bytes), *extra)
    if not fingerprint:
        return grpc.insecure_channel(address, options=settings)
    host, _, port = address.rpartition(":")
    pem = tls.pinned(host.strip("[]"), int(port), fingerprint, timeout_s=timeout_s)
    return grpc.secure_channel(
        address,
        grpc.ssl_channel_credentials(pem),
        options=(("grpc.ssl_target_name_override", tls.name_in(pem)), *settings),
    )


def close_aside(channel: Any) -> None:
    """Close a channel, on a thread of its own: that waits for its calls' last operations, which may never end (grpc/grpc#20026)."""
    thread = threading.Thread(target=channel.close, name="close", daemon=True)
    with contextlib.suppress(RuntimeError):  # no thread can be started: the channel is left open
        thread.start()
        thread.join(CLOSE_S)


class Deaf:
    """Whether a call has ended, and whoever reads its messages was not told so (grpc/grpc#20562). Asked every `LOOK_S`."""

    def __init__(self, call: Any) -> None:
        self._call, self._looks = call, 0

    def look(self) -> bool:
        """Whether it had ended `CANCEL_S` ago; counted in looks, because this process itself may have been stopped."""
        self._looks = 0 if self._call.is_active() else self._looks + 1
        return self._looks * LOOK_S > CANCEL_S


class CannotListen(UsageError):
    """The address cannot be used: taken, or none of this machine's."""


def listen(
    server: Any, address: str, identity: tls.Identity | None, *, otherwise: Callable[[], None] = lambda: None
) -> int:
    """Bind a gRPC server; returns the port. `otherwise` clears up where that fails.

    Raises:
        CannotListen: the address cannot be used.
    """
    reason, number = "it cannot be bound", address.rpartition(":")[2]
    try:
        if not address.startswith("unix:") and not (number.isdigit() and int(number) < 65536):
            raise RuntimeError(f"{number!r} is no port")  # gRPC would take it modulo 65,536
        if identity is None:
            port = int(server.add_insecure_port(address))
        else:
            credentials = grpc_module().ssl_server_credentials([(identity.key, identity.certificate)])
            port = int(server.add_secure_port(address, credentials))
    except RuntimeError as error:
        port, reason = 0, str(error).split("\n")[0]
    if not port:
        otherwise()
        raise CannotListen(
            f"listen = {address!r}: {reason}",
            "it is a free HOST:PORT of this machine",
            "give another port, or 0 for any free one",
        )
    return port


def reachable(address: str) -> str:
    """``HOST:PORT`` at which others reach a server that listens at `address`, which may stand for all interfaces.

    That of the interface that leads outside; where none does, the host's name.

    >>> reachable("127.0.0.1:29500")
    '127.0.0.1:29500'
    """
    host, _, port = address.rpartition(":")
    if host not in EVERYWHERE:
        return address
    outside = [(socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")]  # of no host
    for family, to in outside[:1] if host == "0.0.0.0" else outside:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((to, 9))  # sends nothing
            mine = str(probe.getsockname()[0])
            return f"[{mine}]:{port}" if ":" in mine else f"{mine}:{port}"
    return f"{socket.gethostname()}:{port}"
