"""A worker's connection to the coordinator (`manyhands.core.membership.Membership`).

Two threads of its own: one hears the coordinator (and comes back to it after its restart), one sends a sign of life four
times a second with what the main thread does. Training never waits for either.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from manyhands.coordinate import messages
from manyhands.coordinate.line import Line
from manyhands.core import tls
from manyhands.core.environment import read_env
from manyhands.core.errors import ManyhandsError, PeerLost, Stopped
from manyhands.core.membership import Epoch, Seat, current

BEAT_S = 0.25
FRAMES = 8  # of the main thread's stack
LEAVE_S = 2.0
STOPPED_S = 2.0  # a coordinator that has told everybody to stop is not waited for any longer than this


class Member:
    """One worker's membership. Thread-safe; `connect` makes it.

    Attributes:
        me: this worker's seat.
        over: set as soon as the current epoch is known to be over, also when this worker was evicted or the job failed.
    """

    def __init__(
        self, address: str, token: str, seat: Seat, *, fingerprint: str = "", patience_s: float = 60.0
    ) -> None:
        self.me, self.over, self._patience_s = seat, threading.Event(), patience_s
        self._changed = threading.Condition()
        self._epoch: Epoch | None = None
        self._taken = 0  # number of the epoch that `next` returned last
        self._waiting = self._wanted = self._stopping = self._left = self._greeted = False
        self._facts: dict[str, str] = {}
        self._mine: dict[str, str] = {}  # published by me: told again after a reconnection
        self._suspicion: dict[str, Any] | None = None
        self._error: ManyhandsError | None = None
        self._doing: tuple[str, int] = ("start", 0)
        self._calls = 0
        self._thread = threading.main_thread().ident
        self._ended, self._beat_now = threading.Event(), threading.Event()
        self._line = Line(
            address,
            token,
            fingerprint=fingerprint,
            greeting=self._greeting,
            hear=self._hear,
            fatal=self._fail,
        )
        self._heart = threading.Thread(target=self._beat, name="heart", daemon=True)

    @classmethod
    def connect(
        cls,
        address: str,
        token: str,
        seat: Seat,
        *,
        fingerprint: str = "",
        patience_s: float = 60.0,
        first_s: float = 20.0,
    ) -> Member:
        """Connect and be heard.

        Args:
            address: ``HOST:PORT``.
            fingerprint: of the coordinator's certificate; empty: without TLS.
            patience_s: how long `next` waits for a coordinator that is gone.
            first_s: how long it may take to be reached first.

        Raises:
            UsageError: the token, or the certificate, is not the coordinator's.
            ManyhandsError: it cannot be reached, or it refuses this worker.
        """
        member = cls(address, token, seat, fingerprint=fingerprint, patience_s=patience_s)
        member._line.start()
        with member._changed:
            member._changed.wait_for(lambda: member._greeted or member._error is not None, first_s)
            error = member._error
            if not member._greeted and error is None:
                error = ManyhandsError(
                    f"the coordinator at {address} cannot be reached ({member._line.reason})",
                    "workers take part through it",
                    "see that it runs there, and that no firewall is in between",
                )
        if error is not None:
            member.close()
            raise error
        member._heart.start()
        return member

    @property
    def change_wanted(self) -> bool:
        return self._wanted

    @property
    def stopping(self) -> bool:
        return self._stopping

    @property
    def number(self) -> int:
        """Of the epoch that `next` returned last; 0: none yet."""
        return self._taken

    def next(self) -> Epoch:
        epoch = self.next_or("")
        assert epoch is not None
        return epoch

    def next_or(self, fact: str) -> Epoch | None:
        """As `next`; but None as soon as this fact is known and no epoch has come."""
        with self._changed:
            try:
                self._waiting = True
                if not self._arrived():
                    self._say_ready()
                while self._error is None and not self._arrived():
                    if fact in self._facts:
                        self._say_ready(waits=False)
                        return None
                    gone = self._line.gone_s
                    if self._stopping and gone is not None and time.monotonic() - gone > STOPPED_S:
                        raise Stopped(signal.SIGTERM)  # all were asked to stop, and the others have
                    if gone is not None and time.monotonic() - gone > self._patience_s:
                        raise ManyhandsError(
                            f"the coordinator at {self._line.address} has not been reached for "
                            f"{self._patience_s:.0f} s ({self._line.reason})",
                            "it says who takes part from here on",
                            "start it again with the same --output, or continue with --resume",
                        )
                    self._changed.wait(0.5)
            finally:
                self._waiting = False
            if self._error is not None:
                raise self._error
            assert self._epoch is not None
            self._taken = self._epoch.number
            return self._epoch

    def at(self, phase: str, step: int) -> None:
        """See `Membership.at`. `step` is the number of committed steps whose state I hold: 0 until I hold any."""
        before, self._doing = self._doing, (phase, step)
        self._calls += 1
        self._thread = threading.get_ident()
        if before[0] != phase or before[1] < 1 <= step:
            self._beat_now.set()  # so that it is known should I die in it; or that the job can go on from me

    def suspect(self, rank: int | None, detail: str) -> None:
        with self._changed:
            self.over.set()
            said = detail[: messages.DETAIL_LENGTH]
            fields = {"epoch": self._held(), "rank": rank, "step": self._doing[1], "detail": said}
            self._suspicion = fields
            self._line.say("suspect", **fields)

    def fail(self, detail: str) -> None:
        """See `Membership.fail`."""
        self._line.say("fail", detail=detail[: messages.DETAIL_LENGTH])

    def leave(self, detail: str) -> None:
        """See `Membership.leave`; "done" says that the job is done. Returns once it is known (or cannot be told)."""
        if self._line.say("leaving", detail=detail[: messages.DETAIL_LENGTH]):
            with self._changed:
                self._changed.wait_for(
                    lambda: self._left or self._error is not None or self._line.gone_s is not None, LEAVE_S
                )

    def publish(self, key: str, text: str) -> None:
        """See `Membership.publish`. Raises `ValueError`: too long to be a fact."""
        if not 1 <= len(key) <= messages.KEY_LENGTH or len(text) > messages.FACT_LENGTH:
            raise ValueError(f"fact {key[:80]!r} of {len(text):,} characters")
        with self._changed:
            self._mine[key] = self._facts[key] = text
            self._line.say("publish", key=key, text=text)

    def lookup(self, key: str, timeout_s: float = 30.0) -> str:
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while key not in self._facts:
                left = deadline - time.monotonic()
                if self._error is not None:
                    raise self._error
                if self.over.is_set() or left <= 0:
                    why = (
                        "the epoch is over" if self.over.is_set() else f"nobody said it in {timeout_s:.0f} s"
                    )
                    raise PeerLost(None, f"waiting for {key!r}", why)
                self._changed.wait(min(left, 0.5))
            return self._facts[key]

    def facts(self) -> Mapping[str, str]:
        with self._changed:
            return dict(self._facts)

    def close(self) -> None:
        """Hang up: to the coordinator a death, unless `leave` was said before."""
        self._ended.set()
        self._beat_now.set()
        self._line.close()

    # -- how

    def _say_ready(self, *, waits: bool = True) -> None:
        phase, step = self._doing
        self._line.say("ready", epoch=self._held(), step=step, phase=phase, waits=waits)

    def _held(self) -> int:
        return self._epoch.number if self._epoch is not None else 0

    def _arrived(self) -> bool:
        return self._held() > self._taken

    def _greeting(self) -> dict[str, Any]:
        holding = messages.epoch_to(self._epoch) if self._epoch is not None else None
        seat = dataclasses.asdict(self.me)
        version = messages.VERSION
        return {
            "op": "hello",
            "version": version,
            "seat": seat,
            "holding": holding,
            "step": self._doing[1],
        }

    def _hear(self, message: Mapping[str, Any]) -> None:
        with self._changed:
            op = message["op"]
            if op == "welcome":
                self._welcome(message)
            elif op == "epoch":
                epoch = messages.epoch_of(message)
                if epoch.number > self._held():
                    self._epoch, self._wanted, self._suspicion = epoch, False, None
                    self._facts, self._mine = (current(f, epoch.number) for f in (self._facts, self._mine))
                    self.over.clear()
            elif op == "over":
                if message["epoch"] == self._held():
                    self.over.set()
            elif op == "wanted":
                self._wanted = message["on"]
            elif op == "fact":
                self._facts[message["key"]] = message["text"]
            elif op == "stop":
                self._stopping = True
                self._line.say("ack")
            elif op == "left":
                self._left = True
            elif op == "evicted":
                self._give_up(ManyhandsError(f"this worker was given up: {message['detail']}"))
            elif op == "ended" and (
                message["code"] or not self._taken
            ):  # done, and I never took part: I am late
                self._give_up(
                    ManyhandsError(message["detail"] if message["code"] else "the job has ended: done")
                )
            self._changed.notify_all()

    def _welcome(self, message: Mapping[str, Any]) -> None:
        self._greeted = True
        self._facts.update(message["facts"])
        self._wanted, self._stopping = message["wanted"], self._stopping or message["stopping"]
        if message["stopping"]:
            self._line.say("ack")
        for key, text in self._mine.items():
            self._facts[key] = text
            if message["facts"].get(key) != text:
                self._line.say("publish", key=key, text=text)
        if self._suspicion is not None:
            self._line.say("suspect", **self._suspicion)
        if self._waiting and not self._arrived():
            self._say_ready()

    def _fail(self, error: ManyhandsError) -> None:
        with self._changed:
            self._give_up(error)
            self._changed.notify_all()

    def _give_up(self, error: ManyhandsError) -> None:
        self._error = error
        self.over.set()  # whoever waits for a peer wakes up, and `next` says why

    def _beat(self) -> None:
        while not self._ended.is_set():
            (phase, step), calls = self._doing, self._calls
            self._line.say("beat", phase=phase, step=step, calls=calls, stack=_stack(self._thread))
            self._beat_now.wait(BEAT_S)
            self._beat_now.clear()


def _stack(thread: int | None) -> str:
    """The top of a thread's stack, innermost call last."""
    frame = sys._current_frames().get(thread or 0)
    lines: list[str] = []
    while frame is not None and len(lines) < FRAMES:
        code = frame.f_code
        lines.append(f"{code.co_filename}:{frame.f_lineno} in {code.co_name}")
        frame = frame.f_back
    return "\n".join(reversed(lines))[-messages.DETAIL_LENGTH :]


def connect_from_env(seat: Seat) -> Member | None:
    """This worker's membership, where its launcher says that there is a coordinator.

    Args:
        seat: with the id that the launcher gave where it is empty.

    Raises:
        UsageError: the launcher's token file cannot be read, or the coordinator refuses the token.
        ManyhandsError: the coordinator cannot be reached, or refuses this worker.
    """
    env = read_env()
    if env.coordinator is None:
        return None
    seat = dataclasses.replace(seat, id=seat.id or env.seat or f"w{env.rank}")
    token = tls.read_token(env.token_file or "")
    return Member.connect(env.coordinator, token, seat, fingerprint=env.fingerprint or "")
