"""A connection to the coordinator that comes back by itself, from its own thread; the owner goes on meanwhile."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from manyhands.coordinate import messages
from manyhands.core import rpc
from manyhands.core.errors import ManyhandsError, Superseded, UsageError

FIRST_S, LONGEST_S = 0.05, 1.0  # between attempts
FRESH = (("grpc.use_local_subchannel_pool", 1),)  # else gRPC's own back-off outlives the channel


class Line:
    """One stream of messages.

    Args:
        greeting: makes the hello of each (re)connection.
        hear: takes every message, in order, in this line's thread.
        fatal: takes the error after which there is no coming back.

    Attributes:
        gone_s: since when (monotonic) the coordinator is not reached; None: it is.
        reason: why it is not.
    """

    def __init__(
        self,
        address: str,
        token: str,
        *,
        fingerprint: str = "",
        greeting: Callable[[], Mapping[str, Any]],
        hear: Callable[[Mapping[str, Any]], None],
        fatal: Callable[[ManyhandsError], None],
    ) -> None:
        self._grpc = rpc.grpc_module()
        self.address, self._token, self._fingerprint = address, token, fingerprint
        self._greeting, self._hear, self._fatal = greeting, hear, fatal
        self.gone_s: float | None = time.monotonic()
        self.reason = "not yet connected"
        self._lock = threading.Lock()
        self._out: queue.SimpleQueue[bytes | None] | None = None
        self._call: Any = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="coordinator", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def say(self, op: str, **fields: Any) -> bool:
        """Send a message; whether there was a connection to send it on."""
        with self._lock:
            if self._out is None:
                return False
            self._out.put(messages.pack({"op": op, **fields}))
            return True

    def close(self) -> None:
        """Hang up for good."""
        self._closed.set()
        with self._lock:
            call = self._call
        if call is not None:
            call.cancel()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(5.0)

    def _run(self) -> None:
        pause = FIRST_S
        while not self._closed.is_set():
            try:
                self._talk()
                self.reason = "it hung up"
            except ManyhandsError as error:
                self._fatal(error)
                return
            except OSError as error:
                self.reason = str(error)
            if self.gone_s is None:
                self.gone_s, pause = time.monotonic(), FIRST_S
            if self._closed.wait(pause):
                return
            pause = min(2 * pause, LONGEST_S)

    def _talk(self) -> None:
        """One connection. Raises `OSError` where another attempt may help, `ManyhandsError` where none does."""
        out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        out.put(messages.pack(self._greeting()))
        channel = rpc.channel(
            self.address, fingerprint=self._fingerprint, message_bytes=messages.MESSAGE_BYTES, extra=FRESH
        )
        try:
            method = channel.stream_stream(messages.METHOD)
            call = method(iter(out.get, None), metadata=rpc.bearer(self._token))
            with self._lock:
                self._call = call
            if self._closed.is_set():
                call.cancel()
            for data in call:
                message = messages.unpack(data)
                if message["op"] == "welcome":
                    with self._lock:
                        self._out = out
                    self.gone_s = None
                self._hear(message)
        except self._grpc.RpcError as error:
            self._classify(error)
        finally:
            with self._lock:
                self._out = self._call = None
            out.put(None)
            channel.close()

    def _classify(self, error: Any) -> None:
        codes = self._grpc.StatusCode
        code, detail = error.code(), error.details() or ""
        if code is codes.UNAUTHENTICATED:
            raise UsageError(
                f"the coordinator at {self.address} refused the token",
                "",
                "give the --token-file of that coordinator",
            ) from None
        final = {
            codes.PERMISSION_DENIED: UsageError,
            codes.ABORTED: Superseded,
        }  # so would be whoever came in its place
        if code in (*final, codes.FAILED_PRECONDITION, codes.ALREADY_EXISTS, codes.INVALID_ARGUMENT):
            told: Any = {}
            with contextlib.suppress(ValueError):
                told = json.loads(detail)
            raise final.get(code, ManyhandsError)(
                *(str(told.get(name, "")) for name in ("value", "rule", "remedy"))
            ) from None
        if code is codes.UNIMPLEMENTED:
            raise UsageError(
                f"{self.address} is no coordinator of manyhands", "", "give the address that it printed"
            ) from None
        raise OSError(f"{code.name}: {detail[:300]}") from None
