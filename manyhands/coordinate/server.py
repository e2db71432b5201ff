"""The coordinator: the policy of `state`, served over gRPC. Threads only, no torch: it lives in the launcher or alone.

Each worker holds one stream. The kernel closes a killed process's socket at once; a living one comes back on another.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from manyhands.coordinate import messages
from manyhands.coordinate.journal import Journal, restore
from manyhands.coordinate.messages import Garbage, Refused
from manyhands.coordinate.state import BACK_S, State
from manyhands.coordinate.words import Happening, Note, Rules
from manyhands.core import rpc, tls
from manyhands.core.aside import Aside
from manyhands.core.errors import ManyhandsError
from manyhands.core.membership import Epoch

THREADS = 2048  # one for each connection; started as they are needed
TICK_S = 0.05
STOP_S = 5.0  # for gRPC to stop, and calls to end: it takes no longer, or for ever
HEARD_S = 3.0  # for workers to hear that the job stops, before we hang up
SLEPT_S = 1.0  # a tick that comes so late means that this process slept, not that the workers were silent


class _Line:
    """One connection: of the worker `id`, or of a launcher that joined (empty)."""

    def __init__(self) -> None:
        self.id = ""
        self.out: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self.expected: set[str] = set()  # by a launcher
        self.acknowledged = False  # that the job stops


class Coordinator:
    """Serves one job's membership until stopped.

    Args:
        token: what a caller must know.
        listen: HOST:PORT; port 0: any free one.
        identity: certificate for TLS; None: plain, for this machine alone.
        journal: file from which a restarted coordinator goes on; None: nothing survives.
        calling: until a worker that takes part in the journal's job is back, all others are told to try again.
        log: takes lines about who came, went or was refused.

    Attributes:
        address: where workers reach it.
        fingerprint: of the certificate; empty: plain.
        happenings: what a launcher acts on.

    Raises:
        UsageError: the address cannot be used, or the journal cannot.
    """

    def __init__(
        self,
        *,
        token: str,
        rules: Rules | None = None,
        listen: str = "127.0.0.1:0",
        identity: tls.Identity | None = None,
        journal: Path | None = None,
        calling: bool = False,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._grpc, self._token, self._log = rpc.grpc_module(), token, log
        self._journal = Journal(journal, log) if journal is not None else None
        self.happenings: queue.SimpleQueue[Happening] = queue.SimpleQueue()
        self._lock = threading.Condition()
        rules, now = rules or Rules(), time.monotonic()
        self._state = State(rules)
        if self._journal is not None:
            self._state = restore(self._journal.records, rules, now)
        self._lines: dict[str, _Line] = {}
        self._launchers: list[_Line] = []
        self._calling = calling and self._state.epoch is not None
        self._orphans: dict[str, float] = {}  # expected by a launcher that may come back, and since when
        self._ended = threading.Event()
        self._pool = Aside("coordinate", THREADS)
        settings = (("grpc.so_reuseport", 0), *rpc.options(messages.MESSAGE_BYTES))
        self._server = self._grpc.server(self._pool, options=settings)
        handler = self._grpc.stream_stream_rpc_method_handler(self._attend)
        service, _, method = messages.METHOD.strip("/").partition("/")
        self._server.add_generic_rpc_handlers(
            (self._grpc.method_handlers_generic_handler(service, {method: handler}),)
        )
        port = rpc.listen(self._server, listen, identity, otherwise=self._close)
        self.address = f"{listen.rpartition(':')[0]}:{port}"
        self.fingerprint = identity.fingerprint if identity is not None else ""
        self._clock = threading.Thread(target=self._tick, name="coordinate", daemon=True)

    def start(self) -> None:
        self._server.start()
        self._clock.start()

    def stop(self, grace_s: float = 0.2) -> None:
        """Hang up. Workers try to come back for a while: another coordinator may go on from the journal."""
        with self._lock:
            if self._state.stopping:  # who has not heard so would look for us for a minute
                self._lock.wait_for(lambda: all(li.acknowledged for li in self._lines.values()), HEARD_S)
        self._ended.set()
        with self._lock:
            for line in (*self._lines.values(), *self._launchers):
                line.out.put(None)
        self._server.stop(grace_s).wait(grace_s + STOP_S)
        if self._clock.is_alive():
            self._clock.join()
        self._pool.close(STOP_S)
        with self._lock:  # somebody may be writing a line
            self._close()

    # -- for a launcher

    def expect(self, ids: Iterable[str]) -> None:
        """These workers are being started; the first epoch waits for all of them, and has them in this order."""
        with self._deciding() as (state, now):
            state.expect(ids, now)

    def lost(self, seat_id: str, *, how: str, detail: str, final: bool = False, then: str = "") -> None:
        """A worker's process has ended (or was never started).

        Args:
            how: "death" (killed), "failed" (an exception, a crash) or "left" (as it should).
            final: whoever took its place would meet the same: before the first step the job has failed.
            then: what is done about it, in words.
        """
        with self._deciding() as (state, now):
            state.lose(seat_id, how=how, detail=detail, now=now, final=final, then=then)

    def publish(self, key: str, text: str) -> None:
        """A fact for all workers."""
        with self._deciding() as (state, _):
            state.publish(key, text)

    def tell_stop(self, wait_s: float = 1.0) -> bool:
        """Tell all workers that the whole job stops; whether all have heard it within `wait_s`."""
        with self._deciding() as (state, now):
            state.stop(now)
        with self._lock:
            heard = self._lock.wait_for(lambda: all(li.acknowledged for li in self._lines.values()), wait_s)
            for line in self._launchers:  # only now, because they send signals
                line.out.put({"op": "stop", "id": "", "detail": ""})
            return heard

    def fail(self, words: str, code: int = 1) -> None:
        """The job cannot go on."""
        with self._deciding() as (state, _):
            state.end(words, code)

    @property
    def began(self) -> bool:
        """Whether the job has committed its first step."""
        return self._state.began

    @property
    def epoch(self) -> Epoch | None:
        """The current epoch."""
        return self._state.epoch

    @property
    def ended(self) -> tuple[int, str] | None:
        """(exit code, why), once it is known."""
        return self._state.ended

    @property
    def facts(self) -> dict[str, str]:
        """All published facts."""
        with self._lock:
            return dict(self._state.facts)

    def alive(self) -> list[str]:
        """Ids of the connected workers."""
        with self._lock:
            return list(self._lines)

    @property
    def missing(self) -> bool:
        """Whether any of the journal's workers may still come back, or one whose connection has ended."""
        with self._lock:
            return not all(member.connected for member in self._state.members.values())

    # -- connections

    def _attend(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """One connection, for as long as it lasts."""
        code, peer = self._grpc.StatusCode, context.peer()
        if not rpc.knows(context, self._token):
            self._log(f"refused {peer}: wrong token")
            context.abort(code.UNAUTHENTICATED, "the token is not this coordinator's")
        line = _Line()
        try:
            first = next(requests, None)
            if first is None:
                raise Garbage("a call without a message", "it opens with hello", "")
            self._greet(line, messages.unpack(first))
        except ManyhandsError as error:
            status = error.status if isinstance(error, Refused) else "INVALID_ARGUMENT"
            if status != "UNAVAILABLE":
                self._log(f"refused {peer}: {error}")
            told = {"value": error.value, "rule": error.rule, "remedy": error.remedy}
            context.abort(getattr(code, status), json.dumps(told)[:2000])
        threading.Thread(target=self._read, args=(line, requests, peer), name="hear", daemon=True).start()
        while (message := line.out.get()) is not None:
            yield messages.pack(message)

    def _greet(self, line: _Line, hello: Mapping[str, Any]) -> None:
        if hello["op"] != "hello":
            raise Garbage(f"op = {str(hello['op'])[:40]!r}", "a worker says hello first", "")
        if self._calling and hello.get("holding") is None:
            raise Refused(
                "UNAVAILABLE", "it waits for the workers of before its restart, and then for others"
            )
        if hello.get("seat") is None:
            with self._deciding() as (state, _):
                self._launchers.append(line)
                if state.ended is not None:  # heard first: a launcher that is welcomed to facts acts on them
                    kind = "failed" if state.ended[0] else "done"
                    line.out.put({"op": kind, "id": "", "detail": state.ended[1]})
                line.out.put({"op": "welcome", "facts": dict(state.facts)})
            return
        seat = messages.seat_of(hello["seat"])
        holding = None
        if hello.get("holding") is not None:
            try:
                holding = messages.epoch_of(hello["holding"])
            except (KeyError, TypeError, AttributeError):
                raise Garbage("an epoch that lacks a part", "", "") from None
        with self._deciding() as (state, now):
            state.hello(
                seat,
                holding=holding,
                step=messages.whole(hello, "step"),
                version=messages.whole(hello, "version"),
                now=now,
            )
            line.id, self._calling = seat.id, False
            before, self._lines[seat.id] = self._lines.get(seat.id), line
            if before is not None:  # it is back before the end of its last connection was known
                before.out.put(None)

    def _read(self, line: _Line, requests: Iterator[bytes], peer: str) -> None:
        """All that a connection says, until it ends."""
        try:
            for data in requests:
                message = messages.unpack(data)
                if line.id:
                    self._hear(line, message)
                else:
                    self._hear_launcher(line, message)
        except ManyhandsError as error:
            self._log(f"hung up on {line.id or peer}: {error}")
        except self._grpc.RpcError:
            pass  # cut off
        except Exception as error:  # a defect: nobody else suffers
            self._log(f"hung up on {line.id or peer}: {type(error).__name__}: {error}")
        finally:
            with self._deciding() as (state, now):
                if self._lines.get(line.id) is line:
                    del self._lines[line.id]
                    self._lock.notify_all()
                    if not self._ended.is_set():
                        state.cut(line.id, now)
                elif line in self._launchers:
                    self._launchers.remove(line)
                    # it may be back before the end of this connection was known
                    awaited = {id for other in self._launchers for id in other.expected}
                    self._orphans |= dict.fromkeys((line.expected & set(state.coming)) - awaited, now)
                line.out.put(None)

    def _hear(self, line: _Line, message: Mapping[str, Any]) -> None:
        op, id = message["op"], line.id
        with self._deciding() as (state, now):
            if id not in state.members or self._lines.get(id) is not line:  # given up, or back on another one
                return
            step = messages.whole(message, "step")
            if op == "beat":
                state.beat(
                    id,
                    phase=messages.text(message, "phase"),
                    step=step,
                    calls=messages.whole(message, "calls"),
                    stack=messages.text(message, "stack", most=messages.DETAIL_LENGTH),
                    now=now,
                )
            elif op == "ready":
                epoch, phase = messages.whole(message, "epoch"), messages.text(message, "phase")
                waits = bool(message.get("waits", True))
                state.ready(id, epoch=epoch, step=step, now=now, phase=phase, waits=waits)
            elif op == "suspect":
                rank = None if message.get("rank") is None else messages.whole(message, "rank")
                detail = messages.text(message, "detail", most=messages.DETAIL_LENGTH)
                epoch = messages.whole(message, "epoch")
                state.suspect(id, epoch=epoch, rank=rank, detail=detail, now=now, step=step)
            elif op == "fail":
                state.end(messages.text(message, "detail", most=messages.DETAIL_LENGTH, least=1))
            elif op == "leaving":
                detail = messages.text(message, "detail", most=messages.DETAIL_LENGTH)
                state.leaving(id, detail=detail, now=now)
            elif op == "publish":
                value = messages.text(message, "text", most=messages.FACT_LENGTH)
                state.publish(messages.text(message, "key", least=1), value)
            elif op == "ack":
                line.acknowledged = True
                self._lock.notify_all()
            else:
                raise Garbage(f"op = {op[:40]!r}", "beat, ready, suspect, fail, leaving, publish, ack", "")

    def _hear_launcher(self, line: _Line, message: Mapping[str, Any]) -> None:
        op, id = message["op"], messages.text(message, "id", least=1)
        with self._deciding() as (state, now):
            if op == "expect":
                line.expected.add(id)
                self._orphans.pop(id, None)
                state.expect([id], now)
            elif op == "lost" and id in line.expected:
                how = messages.text(message, "how")
                if how not in ("death", "failed", "left"):
                    raise Garbage(f"how = {how!r}", "death, failed or left", "")
                detail = messages.text(message, "detail", most=messages.DETAIL_LENGTH)
                final, then = bool(message.get("final")), messages.text(message, "then")
                state.lose(id, how=how, detail=detail, now=now, final=final, then=then)
            else:
                raise Garbage(f"op = {op[:40]!r} of {id[:40]!r}", "expect, then lost", "")

    # -- how

    @contextlib.contextmanager
    def _deciding(self) -> Iterator[tuple[State, float]]:
        """The lock, the state and the time; at the end, what was decided is carried out."""
        with self._lock:
            try:
                yield self._state, time.monotonic()
            finally:
                self._carry_out()

    def _carry_out(self) -> None:
        """Say and do what the policy wants; the lock is held, so that it is heard in that order."""
        waiting, self._state.out = self._state.out, []
        for item in waiting:
            if isinstance(item, Note):
                if self._journal is not None and not self._ended.is_set():
                    self._journal.append(item.record)
            elif isinstance(item, Happening):
                self.happenings.put(item)
                told: dict[str, Any] = {"op": item.kind, "id": item.seat_id, "detail": item.detail}
                if item.loss is not None:
                    told["loss"] = asdict(item.loss)
                for line in self._launchers:
                    line.out.put(told)
            elif item.to in self._lines:
                line = self._lines[item.to]
                line.out.put(item.message)
                if item.message["op"] == "evicted":
                    del self._lines[item.to]
                    line.out.put(None)
        self._lock.notify_all()

    def _tick(self) -> None:
        told = last = time.monotonic()
        while not self._ended.wait(TICK_S):
            with self._deciding() as (state, now):
                if now - last > SLEPT_S:
                    state.shift(now - last)
                    self._orphans = {id: since + now - last for id, since in self._orphans.items()}
                last = now
                self._give_up_orphans(state, now)
                state.tick(now)
                if now - told > messages.SIGN_S:
                    told = now
                    for line in (*self._lines.values(), *self._launchers):
                        line.out.put({"op": "tick"})

    def _give_up_orphans(self, state: State, now: float) -> None:
        """Workers that were being started by a launcher whose connection has ended, and has not come back in time."""
        for id in [id for id, since in self._orphans.items() if now - since > BACK_S]:
            del self._orphans[id]
            if id in state.coming:
                state.lose(id, how="death", detail="its launcher is gone", now=now)

    def _close(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
