"""A worker's connection to one parameter server.

It pins the server's certificate, sends the token, and calls again while the server is gone (one under the launcher is
started anew and continues).
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from manyhands.core import errors, rpc
from manyhands.core.aside import Aside
from manyhands.core.errors import ManyhandsError, PeerLost, UsageError
from manyhands.serve import protocol

if TYPE_CHECKING:
    from torch import Tensor

FIRST_S, LONGEST_S = 0.05, 1.0  # between calls to a server that is gone
HELD_S = 60.0  # a call that took longer was with a server: connecting, and keep-alive, give up sooner where there is none
SILENT_S = 600.0  # a call of which nothing moves for so long is made again: nothing is done twice by that


class Endpoint(NamedTuple):
    """Where a server is: HOST:PORT or unix:PATH, and its certificate's fingerprint (empty: plain)."""

    address: str
    fingerprint: str = ""


class Answer(NamedTuple):
    """A reply: its header and its payload (uint8)."""

    header: dict[str, Any]
    payload: Tensor


class _Channel(NamedTuple):
    """A gRPC channel and its one method."""

    channel: Any
    method: Any


class _Silent(OSError):
    """A call was ended by this side, because nothing moved."""


class Link:
    """One connection to one server.

    Args:
        where: asked at each (re)connection: a restarted server may be elsewhere. May raise `OSError`: not yet there.
        token: the server's.
        patience_s: how long to try to reach a server that is gone, from when it was found to be.
    """

    def __init__(self, where: Callable[[], Endpoint], token: str, *, patience_s: float = 60.0) -> None:
        self._grpc = rpc.grpc_module()
        self._where, self._patience_s = where, patience_s
        self._metadata = rpc.bearer(token)
        self._lock = threading.Lock()
        self._channel: _Channel | None = None
        self._closed = False
        self._threads = Aside("call")
        self._heard_s = -math.inf  # when an answer has come last, to any thread
        self._address = ""  # where it was at last
        self.sent_bytes = self.received_bytes = 0

    def call(
        self,
        header: Mapping[str, Any],
        payload: Sequence[memoryview] = (),
        *,
        out: Tensor | None = None,
        silent_s: float = SILENT_S,
    ) -> Answer:
        """Ask and wait for the answer.

        Args:
            out: where the answer's payload goes (uint8 of its size); None: into a new tensor.
            silent_s: how long nothing may move. After that the server counts as gone, unless it answers other calls.

        Raises:
            PeerLost: the server could not be reached for `patience_s`.
            ManyhandsError: what the server says, in its own type.
        """
        codes = self._grpc.StatusCode
        gone = (codes.UNAVAILABLE, codes.CANCELLED, codes.INTERNAL, codes.UNKNOWN, codes.ABORTED)
        lost_s, pause = math.inf, FIRST_S
        while True:
            if self._closed:
                raise self._lost(header, "hung up")
            used, begun_s, silent = None, time.monotonic(), False
            try:
                used = self._connect()
                answer = self._once(used.method, header, payload, out, silent_s)
                self._heard_s = time.monotonic()
                return answer
            except self._grpc.RpcError as error:
                code, detail = error.code(), error.details() or ""
                if code is codes.UNAUTHENTICATED:
                    raise UsageError(
                        "the parameter server refused the token", detail, "give the token_file of that server"
                    ) from None
                if code not in gone:
                    raise _raised(code.name, detail) from None
                reason = f"{code.name}: {detail}"
            except ManyhandsError:
                raise
            except _Silent as error:
                reason, silent = str(error), True
            except (OSError, ValueError) as error:  # ValueError: another thread has just closed the channel
                reason = str(error)
            now_s = time.monotonic()
            there = self._heard_s > begun_s if silent else now_s - begun_s > HELD_S
            lost_s = now_s if there else min(lost_s, now_s)
            if now_s - lost_s >= self._patience_s:
                raise self._lost(header, reason[:300])
            self._disconnect(used)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_S)

    def close(self) -> None:
        """Hang up; calls of other threads end, too."""
        self._closed = True
        with self._lock:  # a call of another thread finds no channel, and makes no new one
            used, self._channel = self._channel, None
        if used is not None:
            rpc.close_aside(used.channel)
        self._threads.close()

    def _once(
        self,
        method: Any,
        header: Mapping[str, Any],
        payload: Sequence[memoryview],
        out: Tensor | None,
        silent_s: float,
    ) -> Answer:
        """One call. A thread aside waits for its messages: it is left where none comes any more and gRPC does not say so."""
        reading = _Reading(out)
        replies = method(reading.sent(protocol.messages(header, payload)), metadata=self._metadata)
        try:
            deaf, found = rpc.Deaf(replies), self._threads.submit(reading.read, replies)
            while not wait((found,), rpc.LOOK_S).done:
                if self._closed:
                    raise ConnectionAbortedError("hung up")
                if deaf.look():
                    raise ConnectionAbortedError("the call has ended without an answer")
                if time.monotonic() - reading.moved_s > silent_s:
                    raise _Silent(f"nothing has moved for {silent_s:.0f} s")
            answer = found.result()
        finally:
            reading.leave()
            replies.cancel()
        self.sent_bytes += sum(len(part) for part in payload)
        self.received_bytes += answer.payload.numel()
        return answer

    def _lost(self, header: Mapping[str, Any], detail: str) -> PeerLost:
        at = f" at {self._address}" if self._address else ""
        return PeerLost(None, f"a call to the parameter server{at} ({header.get('op')})", detail)

    def _connect(self) -> _Channel:
        with self._lock:
            if self._closed:
                raise ConnectionAbortedError("hung up")
            if self._channel is None:
                endpoint = self._where()
                self._address = endpoint.address
                channel = rpc.channel(
                    endpoint.address,
                    fingerprint=endpoint.fingerprint,
                    message_bytes=protocol.MESSAGE_BYTES,
                )
                self._channel = _Channel(channel, channel.stream_stream(protocol.METHOD))
            return self._channel

    def _disconnect(self, used: _Channel | None) -> None:
        """Close the channel `used`, unless another thread has done so; a newer one of its is left alone."""
        with self._lock:
            if used is None or self._channel is not used:
                return
            self._channel = None
        rpc.close_aside(used.channel)


class _Reading:
    """Reads one call's answer, until it is left: from then on nothing is written into `out` any more.

    Attributes:
        moved_s: when a message was sent or came last.
    """

    def __init__(self, out: Tensor | None) -> None:
        self._out, self._lock, self._left = out, threading.Lock(), False
        self.moved_s = time.monotonic()

    def sent(self, messages: Iterable[bytes]) -> Iterator[bytes]:
        """`messages`, as they are sent."""
        for message in messages:
            self.moved_s = time.monotonic()
            yield message

    def read(self, replies: Iterator[bytes]) -> Answer:
        opening = protocol.opening(replies)
        size, out = opening.size_bytes, self._out
        if out is None or not size:
            out, view = protocol.buffer(size)
        elif out.numel() != size:
            raise protocol.Garbage(f"an answer of {size:,} bytes", f"{out.numel():,} were expected", "")
        else:
            view = protocol.view(out)
        protocol.receive(replies, view, writing=self._writing)
        return Answer(opening.header, out)

    def leave(self) -> None:
        with self._lock:
            self._left = True

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock:
            if self._left:
                raise ConnectionAbortedError("nobody waits for it any more")
            self.moved_s = time.monotonic()
            yield


def endpoints(file: str) -> Iterator[Endpoint]:
    """The servers that a launcher's file names: one JSON object a line. Raises `OSError` while it is not there."""
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            found = json.loads(line)
            yield Endpoint(found["address"], found["fingerprint"])


def _raised(code: str, detail: str) -> ManyhandsError:
    """The error that a server told of."""
    try:
        told = json.loads(detail)
        kind = getattr(errors, told["type"], ManyhandsError)
        if kind in (errors.PeerLost, errors.Stopped) or not issubclass(kind, ManyhandsError):
            kind = ManyhandsError
        found: ManyhandsError = kind(told["value"], told["rule"], told["remedy"])
        return found
    except (ValueError, KeyError, TypeError):
        return ManyhandsError(
            f"the parameter server answered {code}: {detail[:300]}", "", "see the server's log"
        )
