"""The server process's network side: gRPC streams of raw bytes, a token on every call, and a log of what was refused.

gRPC brings flow control (a slow server slows its workers down instead of filling its memory), TLS and keep-alive; the
bytes are `manyhands.serve.protocol`'s. What is no request of a worker that knows the token is refused, logged, and
changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.core import rpc, tls
from manyhands.core.aside import Aside
from manyhands.core.errors import ManyhandsError, UsageError
from manyhands.serve import protocol
from manyhands.serve.protocol import Garbage
from manyhands.serve.rules import Push
from manyhands.serve.shard import Shard

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.serve.journal import Durability

STOP_S = 5.0  # for gRPC to stop, and calls to end
THREADS = 1024  # one for each call that waits for others; started as they are needed
RECEIVING = (
    8  # payloads in memory at once that are not yet part of a round; further ones wait in flow control
)
Reply = tuple[Mapping[str, Any], Sequence[memoryview]]


class Server:
    """Serves one `Shard` at an address until stopped.

    Args:
        listen: HOST:PORT (port 0: any free one) or unix:PATH.
        token: what a caller must know.
        identity: certificate for TLS; None: plain, for this machine alone.
        state: directory of snapshots and log; None: nothing survives a restart.

    Attributes:
        address: where it can be reached.

    Raises:
        UsageError: the address cannot be used.
        CheckpointError: the state is damaged or in use.
    """

    def __init__(
        self,
        *,
        listen: str,
        token: str,
        identity: tls.Identity | None = None,
        state: Path | None = None,
        durability: Durability = "each",
        interval_s: float = 60.0,
        lease_s: float = 30.0,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        from manyhands.serve.journal import Journal

        grpc = rpc.grpc_module()
        if listen.startswith("unix:"):
            _make_way(Path(listen.removeprefix("unix:")))
        self._grpc, self._token, self._log, self._lease_s = grpc, token, log, lease_s
        journal = Journal(state, durability) if state is not None else None
        self.shard = Shard(journal, lease_s=lease_s, interval_s=interval_s, log=log)
        self._receiving = threading.BoundedSemaphore(RECEIVING)
        self._pool = Aside("call", THREADS)
        self._server = grpc.server(
            self._pool, options=(("grpc.so_reuseport", 0), *rpc.options(protocol.MESSAGE_BYTES))
        )
        handler = grpc.stream_stream_rpc_method_handler(self._call)
        service, _, method = protocol.METHOD.strip("/").partition("/")
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {method: handler}),)
        )
        port = rpc.listen(self._server, listen, identity, otherwise=self.shard.close)
        host = listen.rpartition(":")[0]
        self.address = listen if listen.startswith("unix:") else f"{host}:{port}"
        self.fingerprint = identity.fingerprint if identity is not None else ""
        self._ended = threading.Event()
        self._janitor = threading.Thread(target=self._expire, name="leases", daemon=True)

    def start(self) -> None:
        self._server.start()
        self._janitor.start()

    def stop(self, grace_s: float = 1.0) -> None:
        """Finish calls within `grace_s`, then write what is not yet written."""
        self._ended.set()
        self._server.stop(grace_s).wait(grace_s + STOP_S)
        self._janitor.join()
        self._pool.close(STOP_S)
        self.shard.close()

    # -- how

    def _expire(self) -> None:
        every_s = min(1.0, self._lease_s / 4)
        looked_s = time.monotonic()
        while not self._ended.wait(every_s):
            before_s, looked_s = looked_s, time.monotonic()
            if looked_s - before_s > every_s + self._lease_s / 2:
                self.shard.hear_all()  # it was this process that stood still
                continue
            with contextlib.suppress(ManyhandsError):  # a full disk: said when it is met by a push
                self.shard.expire()

    def _call(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """One call of a worker, or of somebody else."""
        code = self._grpc.StatusCode
        peer = context.peer()
        if not rpc.knows(context, self._token):
            self._log(f"refused {peer}: wrong token")
            context.abort(code.UNAUTHENTICATED, "the token is not this server's")
        try:
            opening = protocol.opening(requests)
            reply = protocol.messages(*self._do(opening, requests, context.is_active))
        except Garbage as error:
            self._log(f"refused {peer}: {error}")
            context.abort(code.INVALID_ARGUMENT, _told(error))
        except ManyhandsError as error:
            if not context.is_active():
                return
            self._log(f"could not serve {peer}: {error}")
            context.abort(code.FAILED_PRECONDITION, _told(error))
        except self._grpc.RpcError:
            self._log(f"refused {peer}: the call broke off, or a message was longer than allowed")
            raise
        except (
            Exception
        ) as error:  # a defect, or a header that lies in a way not foreseen: nobody else suffers
            self._log(f"refused {peer}: {type(error).__name__}: {error}")
            context.abort(code.INVALID_ARGUMENT, _told(Garbage(f"{type(error).__name__}: {error}")))
        else:
            yield from reply

    def _do(self, opening: protocol.Opening, requests: Iterator[bytes], alive: Callable[[], bool]) -> Reply:
        header, size = opening
        op, shard = header.get("op"), self.shard
        start = time.perf_counter()
        if op == "push":
            push, payload = self._push(header, size, requests)
            received = time.perf_counter()
            return _timed(shard.push(push, payload, header, alive), received)
        if op == "begin":
            tensors = self._tensors(header, size, requests)
            return shard.begin(header, tensors), ()
        if size:
            raise Garbage(f"a payload of {size:,} bytes for {str(op)[:40]!r}", "it has none", "")
        protocol.nothing_more(requests)
        plain: dict[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {
            "join": shard.join,
            "leave": shard.leave,
            "beat": shard.beat,
            "halt": shard.halt,
            "status": lambda _: shard.status(),
        }
        if op in plain:
            return plain[op](header), ()
        if op == "agree":
            return _timed(shard.agree(header, alive), start)
        if op == "pull":
            return _timed(shard.pull(header), start)
        if op == "state":
            answer, tensors = shard.state(header)
            entries, parts = protocol.described(tensors)
            return {**answer, "tensors": entries}, parts
        raise Garbage(
            f"op = {str(op)[:40]!r}", "push, pull, agree, begin, join, leave, beat, halt, state, status", ""
        )

    def _push(self, header: Mapping[str, Any], size: int, requests: Iterator[bytes]) -> tuple[Push, Tensor]:
        store = self.shard.ready(header)
        push = Push.read(header, len(store.layout.entries))
        if size != store.payload_bytes:
            raise Garbage(f"a push of {size:,} bytes", f"this server's have {store.payload_bytes:,}", "")
        with self._receiving:
            payload, view = protocol.buffer(size)
            protocol.receive(requests, view)
        store.check(payload)  # before it is in the log, from which it could never be applied
        return push, payload

    def _tensors(self, header: Mapping[str, Any], size: int, requests: Iterator[bytes]) -> dict[str, Tensor]:
        entries = protocol.entries_of(header.get("tensors"))
        described = sum(entry.size_bytes for entry in entries)
        if size != described:
            raise Garbage(f"a payload of {size:,} bytes", f"its tensors have {described:,}", "")
        payload, view = protocol.buffer(size)
        protocol.receive(requests, view)
        return protocol.carved(entries, payload)


def _make_way(path: Path) -> None:
    """Remove the socket file of a server that was killed; nothing else is removed. Raises `UsageError`."""
    try:
        if stat.S_ISSOCK(path.lstat().st_mode):
            if _answers(path):
                raise UsageError(
                    f"listen = unix:{path}: somebody listens there",
                    "a server has its socket to itself",
                    "give another path, or end the other server",
                )
            path.unlink()
            return
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"listen = unix:{path}: {error.strerror}", "a socket is made there", "") from None
    raise UsageError(
        f"listen = unix:{path}: something else than a socket is there",
        "the server makes its socket there, and removes nobody's files",
        "give a path where nothing is",
    )


def _answers(path: Path) -> bool:
    """Whether a process listens at this socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except BlockingIOError:  # it has many callers already
            return True
    return True


def _timed(found: tuple[Mapping[str, Any], Tensor | None], start: float) -> Reply:
    """An answer with parameters, and how long the server took to have it (waiting included, not the transfer)."""
    answer, image = found
    parts = () if image is None else (protocol.view(image),)
    return {**answer, "served_s": time.perf_counter() - start}, parts


def _told(error: ManyhandsError) -> str:
    """An error as a status's detail, which takes 8 KB: JSON, from which the worker raises the same."""
    text = {"type": type(error).__name__, "value": error.value, "rule": error.rule, "remedy": error.remedy}
    return json.dumps({k: v[:300] for k, v in text.items()})
