"""A connection to the coordinator that comes back by itself, from its own thread; the owner goes on meanwhile."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from typing import Any

from manyhands.coordinate import messages
from manyhands.core import rpc
from manyhands.core.aside import Aside
from manyhands.core.errors import ManyhandsError, Superseded, UsageError

FIRST_S, LONGEST_S = 0.05, 1.0  # between attempts
SILENT_S = 12 * messages.SIGN_S  # a coordinator that says nothing for so long is not reached
FRESH = (("grpc.use_local_subchannel_pool", 1),)  # else gRPC's own back-off outlives the channel


class Line:
    """One stream of messages.

    Args:
        greeting: makes the hello of each (re)connection.
        hear: takes every message, in order, in a thread of this line's.
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
        self._heard_s = time.monotonic()
        self._closed = threading.Event()
        self._threads = Aside("hear")
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
        self._threads.close()

    def _run(self) -> None:
        pause = FIRST_S
        while not self._closed.is_set():
            try:
                self._talk()
                self.reason = "it hung up"
            except ManyhandsError as error:
                self._fatal(error)
                return
            except Exception as error:  # unforeseen, too: else nobody would look for it any more
                self.reason = str(error) or repr(error)
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
            self._attend(call, out)
        except self._grpc.RpcError as error:
            self._classify(error)
        finally:
            with self._lock:
                self._out = self._call = None
            out.put(None)
            rpc.close_aside(channel)

    def _attend(self, call: Any, out: queue.SimpleQueue[bytes | None]) -> None:
        """Hear what is said until the call ends. A thread aside waits for it: it is left where gRPC does not tell it so."""
        self._heard_s = time.monotonic()
        deaf, heard = rpc.Deaf(call), self._threads.submit(self._listen, call, out)
        while not wait((heard,), rpc.LOOK_S).done:
            if deaf.look():
                raise OSError("its call has ended")
            if time.monotonic() - self._heard_s > SILENT_S:
                call.cancel()
                raise OSError(f"it has said nothing for {SILENT_S:.0f} s")
        heard.result()

    def _listen(self, call: Any, out: queue.SimpleQueue[bytes | None]) -> None:
        for data in call:
            message = messages.unpack(data)
            with self._lock:
                if self._call is not call:  # it was left
                    return
                self._heard_s = time.monotonic()
                if message["op"] == "welcome":
                    self._out, self.gone_s = out, None
            if message["op"] == "tick":
                continue
            try:
                self._hear(message)
            except (LookupError, TypeError, AttributeError) as error:
                raise messages.Garbage(  # it would say the same again
                    f"the coordinator's {message['op']!r} cannot be understood ({error!r})",
                    "it is of the same version",
                    "install the same manyhands everywhere",
                ) from error

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
