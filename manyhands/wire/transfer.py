"""A worker hands its state to a newcomer: named tensors and a few facts, over gRPC, while both go on.

A call asks for one *version*. Its reply is a stream: a JSON header with names, types, shapes and facts; the tensors' bytes, one
tensor after another, in messages of at most `CHUNK_BYTES`; and an empty message, sent only if the version was still on offer when
the last byte had been read. So who gets to the end has the state as it was offered, although nothing was copied for the offer.

Whoever wants the state must know the job's token. The bytes are not encrypted: between hosts use a network of your own.
"""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from manyhands.core import rpc
from manyhands.core.aside import Aside
from manyhands.core.errors import ManyhandsError, PeerLost, UsageError

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BYTES = 4 << 20
HEADER_BYTES = 64 << 20
_WIDE = (  # a chunk is one frame, and several may be on their way
    ("grpc.http2.max_frame_size", (1 << 24) - 1),
    ("grpc.http2.lookahead_bytes", 4 * CHUNK_BYTES),
    ("grpc.http2.bdp_probe", 0),
)
FETCHERS = 16  # at once; further ones wait
LOOK_S = 0.02
CANCEL_S = 2.0  # for a cancelled call to end
SILENT_S = 60.0  # a state that has begun, and of which nothing comes for so long, is not awaited any longer
PHASE = "fetching the state"
_SERVICE, _METHOD = "manyhands.State", "Fetch"
_TYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith(("torch.q", "torch.bits"))
}


class Offer:
    """One worker's state, for those who ask. Serves from its making until it is closed; at first nothing is on offer.

    Args:
        token: what a caller must know.
        toward: an address (host, or host:port) that those who ask can reach, such as the coordinator's: the state is served on the
            interface of this host that leads there. Empty: for this host alone.

    Attributes:
        address: where to `fetch` it.

    Raises:
        UsageError: no port can be had there.
    """

    def __init__(self, token: str, *, toward: str = "") -> None:
        grpc = rpc.grpc_module()
        self._grpc, self._token = grpc, token
        self._changed = threading.Condition()
        self._version: int | None = None
        self._newest = -1  # of all versions that were ever on offer
        self._tensors: dict[str, Tensor] = {}
        self._facts: dict[str, Any] = {}
        self._closed = False
        self._threads = Aside("offer", FETCHERS)
        self._server = grpc.server(
            self._threads,
            options=(("grpc.so_reuseport", 0), *_WIDE, *rpc.options(HEADER_BYTES)),
        )
        handler = grpc.unary_stream_rpc_method_handler(self._serve)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler}),)
        )
        host = interface_toward(toward)
        port = rpc.listen(self._server, f"{host}:0", None)
        self.address = f"{host}:{port}"
        self._server.start()

    def put(self, version: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Offer `tensors` (references, read when asked for) and `facts` (JSON). They may not change until `withdraw`."""
        with self._changed:
            self._version, self._newest = version, max(version, self._newest)
            self._tensors, self._facts = dict(tensors), dict(facts)
            self._changed.notify_all()

    def withdraw(self) -> None:
        """From now on the tensors may change: a transfer that is not at its end fails."""
        with self._changed:
            self._version, self._tensors, self._facts = None, {}, {}

    def close(self) -> None:
        """Serve no more; waits for nobody."""
        self.withdraw()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._server.stop(0)
        self._threads.close()

    def _serve(self, request: bytes, context: Any) -> Iterator[bytes]:
        code = self._grpc.StatusCode
        if not rpc.knows(context, self._token):
            context.abort(code.UNAUTHENTICATED, "the token is another")
        try:
            version = int(json.loads(request)["version"])
        except (ValueError, KeyError, TypeError):
            context.abort(code.INVALID_ARGUMENT, "no version is asked for")
        with self._changed:
            while self._version != version:
                if self._newest >= version or self._closed:
                    context.abort(code.FAILED_PRECONDITION, f"version {version} is not on offer any more")
                self._changed.wait(0.2)
                if not context.is_active():
                    return
            tensors, facts = self._tensors, self._facts
        entries = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()]
        yield json.dumps({"tensors": entries, "facts": facts}).encode()
        for tensor in tensors.values():
            view = _bytes_of(tensor.detach().to("cpu").contiguous())
            for begin in range(0, len(view), CHUNK_BYTES):
                if self._version != version:
                    break
                yield bytes(view[begin : begin + CHUNK_BYTES])
        if self._version != version:
            context.abort(code.FAILED_PRECONDITION, f"version {version} was withdrawn")
        yield b""


def fetch(
    address: str,
    token: str,
    version: int,
    *,
    over: threading.Event | None = None,
    progress: Callable[[int, int], None] | None = None,
    moved: Callable[[], None] | None = None,
    timeout_s: float = 120.0,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and facts that the worker at `address` offers as `version`, awaited.

    Args:
        over: the membership epoch's end; ends the transfer.
        progress: told bytes so far and bytes in all, on another thread.
        moved: called on this thread as long as bytes arrive, not more often than every `LOOK_S`.
        timeout_s: how long to wait for the offer. The transfer itself may take any time.

    Raises:
        PeerLost: the epoch is over, or the peer is gone, has no such version any more, or does not offer it in time.
        UsageError: it knows another token.
    """
    if not address:
        raise PeerLost(None, PHASE, "the peer hands out no state")
    grpc = rpc.grpc_module()
    channel = rpc.channel(address, message_bytes=HEADER_BYTES, extra=_WIDE)
    call = channel.unary_stream(f"/{_SERVICE}/{_METHOD}")(
        json.dumps({"version": version}).encode(), metadata=rpc.bearer(token)
    )
    transfer, deadline, told = _Transfer(call, progress), time.monotonic() + timeout_s, 0
    late = silent = False
    try:
        transfer.start()
        while not transfer.ended.wait(LOOK_S):
            if moved is not None and transfer.messages > told:
                told = transfer.messages
                moved()
            late = not transfer.begun.is_set() and time.monotonic() > deadline
            silent = transfer.silent_s(LOOK_S) > SILENT_S
            if late or silent or (over is not None and over.is_set()):
                call.cancel()
                transfer.ended.wait(CANCEL_S)
                break
    finally:
        call.cancel()
        rpc.close_aside(channel)
    if transfer.found is not None:
        return transfer.found
    error = transfer.error
    if isinstance(error, grpc.RpcError) and error.code() == grpc.StatusCode.UNAUTHENTICATED:
        raise UsageError(f"a worker at {address}", "it knows another token", "give all workers the job's")
    if over is not None and over.is_set():
        raise PeerLost(None, PHASE, "the membership epoch is over")
    if silent:
        raise PeerLost(None, PHASE, f"{address} has sent nothing for {SILENT_S:.0f} s")
    if late or error is None:
        raise PeerLost(None, PHASE, f"{address} offers no state")
    if isinstance(error, grpc.RpcError):
        raise PeerLost(None, PHASE, error.details() or "")
    if isinstance(error, (StopIteration, ValueError, KeyError, TypeError)):
        raise PeerLost(None, PHASE, f"what {address} sent is no state: {error!r}") from error
    raise error


class _Transfer(threading.Thread):
    """Receives. A thread of its own: gRPC's waiting for a message has no limit, and does not always end with the call
    (grpc/grpc#20562; seen once in a whole run of the tests, after a server had gone)."""

    def __init__(self, call: Any, progress: Callable[[int, int], None] | None) -> None:
        super().__init__(name="fetch", daemon=True)
        self._call, self._progress = call, progress
        self.begun, self.ended = threading.Event(), threading.Event()
        self.messages = 0  # that have come
        self.found: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self.error: BaseException | None = None
        self._seen = 0  # messages, when it was last asked
        self._silent_s = 0.0

    def run(self) -> None:
        try:
            messages = self._messages()
            header = json.loads(next(messages))
            self.begun.set()
            self.found = _receive(header["tensors"], messages, self._progress), header["facts"]
        except BaseException as error:
            self.error = error
        finally:
            self.ended.set()

    def silent_s(self, passed_s: float) -> float:
        """How long nothing has come, after the beginning. It was looked at `passed_s` ago: this process may have been stopped."""
        came, before, self._seen = self.messages, self._seen, self.messages
        self._silent_s = self._silent_s + passed_s if came and came == before else 0.0
        return self._silent_s

    def _messages(self) -> Iterator[bytes]:
        for message in self._call:
            self.messages += 1
            yield message


def _receive(
    entries: list[Any], stream: Iterator[bytes], progress: Callable[[int, int], None] | None
) -> dict[str, Tensor]:
    tensors = {name: torch.empty(shape, dtype=_TYPES[dtype]) for name, dtype, shape in entries}
    if len(tensors) != len(entries):
        raise ValueError("two tensors of one name")
    total, done = sum(t.numel() * t.element_size() for t in tensors.values()), 0
    for tensor in tensors.values():
        view, at = _bytes_of(tensor), 0
        while at < len(view):
            chunk = next(stream)
            if not chunk:
                raise ValueError("it ends too early")
            view[at : at + len(chunk)] = chunk
            at += len(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, total)
    if next(stream) != b"":
        raise ValueError("it is too long")
    return tensors


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    if not math.prod(tensor.shape):
        return memoryview(b"")
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def interface_toward(address: str) -> str:
    """The IP address of this host from which `address` (host, or host:port) is reached; IPv6 in brackets.

    >>> interface_toward("127.0.0.1:80")
    '127.0.0.1'
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        host = address
    host = host.strip("[]")
    if not host:
        return "127.0.0.1"
    try:
        family, kind, protocol, _, to = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(to)  # sends nothing
            mine = str(probe.getsockname()[0])
    except OSError as error:
        raise ManyhandsError(f"{address}: {error}", "workers reach each other by addresses", "") from None
    return f"[{mine}]" if ":" in mine else mine
