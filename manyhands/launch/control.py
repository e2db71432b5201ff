"""A launcher's side of the coordinator: inside this process, or at an address that this launch joins."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from manyhands.coordinate.line import Line
from manyhands.coordinate.messages import loss_of
from manyhands.coordinate.server import Coordinator
from manyhands.coordinate.words import Happening, Rules
from manyhands.core import tls
from manyhands.core.errors import ManyhandsError

CONTACT = (
    "coordinator.json"  # in the output directory while the job runs: how `manyhands join OUTPUT` finds it
)
REACH_S = 20.0
GONE_S = 2.0  # without the coordinator, until that is told


def contact(address: str, token_file: str | Path, fingerprint: str = "", *, listen: str = "") -> str:
    """What `CONTACT` says: where it is reached, and listens; ``directory`` is where the job's relative paths begin."""
    found = {"address": address, "listen": listen or address, "fingerprint": fingerprint}
    return json.dumps({**found, "token_file": os.path.abspath(token_file), "directory": os.getcwd()}) + "\n"


@dataclass(frozen=True, kw_only=True)
class Elastic:
    """How a launch goes on when workers are lost.

    Attributes:
        restarts: replacements for each worker; counted anew after ten minutes of health.
        min_workers: fewer cannot go on.
        hang_s: a worker unheard of for so long is given up.
        stuck_s: and so is one whose main thread stands still for so long.
        start_s: and one that says nothing for so long from its start; more where `stuck_s`, or how long others took, say so.
        shared: only shared memory joins the workers.
        warm: modules that a waiting process imports beforehand, so that a replacement is there at once; empty: none waits.
        spare_after_s: how long the job runs undisturbed before one waits: its imports cost seconds, which a short job needs itself.
    """

    restarts: int = 3
    min_workers: int = 1
    hang_s: float = 10.0
    stuck_s: float = 300.0
    start_s: float = 60.0
    shared: bool = False
    warm: tuple[str, ...] = ()
    spare_after_s: float = 60.0


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A coordinator elsewhere, and the name under which this launch's workers join."""

    address: str
    token_file: str
    fingerprint: str = ""
    name: str = ""


class Control(Protocol):
    """What the launcher says and hears.

    Attributes:
        variables: of the environment, by which workers find the coordinator.
        shows: whether the job's display is on this launcher's terminal.
    """

    variables: Mapping[str, str]
    shows: bool

    @property
    def began(self) -> bool:
        """Whether the job has made its first step, or these workers are none of those it begins with."""
        ...

    @property
    def ended(self) -> tuple[int, str] | None:
        """(exit code, why) once the job has ended for everybody."""
        ...

    @property
    def gone(self) -> str:
        """Why the coordinator has not been reached for some seconds; empty: it is reached, or the job has ended."""
        ...

    def expect(self, *ids: str) -> None: ...

    def lost(self, id: str, *, how: str, detail: str, final: bool = False, then: str = "") -> None: ...

    def stop(self) -> bool:
        """Before a signal is handed on. Returns whether it is for the whole job, not for this launch's workers alone."""
        ...

    def happenings(self) -> list[Happening]:
        """What has happened since the last call."""
        ...

    def close(self) -> None: ...


class Embedded:
    """The coordinator in this process: it needs no journal, because the workers end with this process."""

    shows = True

    def __init__(self, elastic: Elastic, *, store: Path, output: Path) -> None:
        self._contact = output / CONTACT
        token, path = tls.new_token(), store / "coordinator.token"
        tls.private(path, token.encode())
        rules = Rules(
            hang_s=elastic.hang_s,
            stuck_s=elastic.stuck_s,
            start_s=elastic.start_s,
            min_workers=elastic.min_workers,
            shared=elastic.shared,
            resume=f"manyhands train --resume {output}",
        )
        self._coordinator = Coordinator(token=token, rules=rules)
        self._coordinator.start()
        self.variables: Mapping[str, str] = {
            "MANYHANDS_COORDINATOR": self._coordinator.address,
            "MANYHANDS_TOKEN_FILE": str(path),
        }
        self._contact.write_text(contact(self._coordinator.address, path), encoding="utf-8")

    @property
    def began(self) -> bool:
        return self._coordinator.began

    @property
    def ended(self) -> tuple[int, str] | None:
        return self._coordinator.ended

    @property
    def gone(self) -> str:
        return ""

    def expect(self, *ids: str) -> None:
        self._coordinator.expect(ids)

    def lost(self, id: str, *, how: str, detail: str, final: bool = False, then: str = "") -> None:
        self._coordinator.lost(id, how=how, detail=detail, final=final, then=then)

    def stop(self) -> bool:
        self._coordinator.tell_stop()
        return True

    def happenings(self) -> list[Happening]:
        return _drained(self._coordinator.happenings)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._contact.unlink()
        self._coordinator.stop()


class Joined:
    """A coordinator elsewhere.

    Raises:
        UsageError: the token or the certificate is not its own, or it is none.
        ManyhandsError: it is not reached.
    """

    shows = False

    def __init__(self, remote: Remote) -> None:
        self.variables: Mapping[str, str] = {
            "MANYHANDS_COORDINATOR": remote.address,
            "MANYHANDS_TOKEN_FILE": str(Path(remote.token_file).absolute()),
            **({"MANYHANDS_FINGERPRINT": remote.fingerprint} if remote.fingerprint else {}),
        }
        self.facts: dict[str, str] = {}
        self._queue: queue.SimpleQueue[Happening] = queue.SimpleQueue()
        self._ended: tuple[int, str] | None = None
        self._error: ManyhandsError | None = None
        self._told: list[tuple[str, dict[str, str | bool]]] = []  # said again after a reconnection
        self._line = Line(
            remote.address,
            tls.read_token(remote.token_file),
            fingerprint=remote.fingerprint,
            greeting=lambda: {"op": "hello"},
            hear=self._hear,
            fatal=self._fail,
        )
        self._line.start()
        deadline = time.monotonic() + REACH_S
        while self._line.gone_s is not None and self._error is None:
            if time.monotonic() > deadline:
                self._error = self._unreached()
            time.sleep(0.01)
        if self._error is not None:
            self._line.close()
            raise self._error

    def fact(self, *keys: str) -> str:
        """The first of these facts that the job publishes, awaited; empty: the job is done.

        Raises:
            ManyhandsError: it failed, or is no longer reached.
        """
        while True:
            since = self._line.gone_s
            if since is not None and time.monotonic() - since > REACH_S:
                raise self._unreached()
            if self._ended is not None:
                if self._error is not None:
                    raise self._error
                if self._ended[0] == 0:
                    return ""
                raise ManyhandsError(f"the job has ended: {self._ended[1]}")
            for key in keys:
                if key in self.facts:
                    return self.facts[key]
            time.sleep(0.02)

    @property
    def began(self) -> bool:
        return True  # the others do not depend on these workers

    @property
    def ended(self) -> tuple[int, str] | None:
        return self._ended

    @property
    def gone(self) -> str:
        since = self._line.gone_s
        return (
            self._line.reason
            if since is not None and self._ended is None and time.monotonic() - since > GONE_S
            else ""
        )

    def expect(self, *ids: str) -> None:
        for id in ids:
            self._say("expect", id=id)

    def lost(self, id: str, *, how: str, detail: str, final: bool = False, then: str = "") -> None:
        self._say("lost", id=id, how=how, detail=detail[:1000], final=final, then=then[:200])

    def stop(self) -> bool:
        return False

    def happenings(self) -> list[Happening]:
        return _drained(self._queue)

    def close(self) -> None:
        self._line.close()

    def _unreached(self) -> ManyhandsError:
        return ManyhandsError(
            f"the coordinator at {self._line.address} cannot be reached ({self._line.reason})",
            "workers join a job through it",
            "see that it runs there, and that no firewall is in between",
        )

    def _say(self, op: str, **fields: str | bool) -> None:
        self._told.append((op, fields))
        self._line.say(op, **fields)

    def _hear(self, message: Mapping[str, Any]) -> None:
        op = message["op"]
        if op == "welcome":
            self.facts.update(message["facts"])
            for said, fields in self._told:
                self._line.say(said, **fields)
        elif op == "fact":
            self.facts[message["key"]] = message["text"]
        elif op in ("evict", "lost", "stop"):
            loss = loss_of(message["loss"]) if "loss" in message else None
            self._queue.put(Happening(kind=op, seat_id=message["id"], detail=message["detail"], loss=loss))
        elif op in ("failed", "done"):
            self._ended = (1 if op == "failed" else 0, message["detail"])

    def _fail(self, error: ManyhandsError) -> None:
        self._error = error
        if self._ended is None:
            self._ended = (1, str(error))


def _drained(happenings: queue.SimpleQueue[Happening]) -> list[Happening]:
    found = []
    with contextlib.suppress(queue.Empty):
        while True:
            found.append(happenings.get_nowait())
    return found
