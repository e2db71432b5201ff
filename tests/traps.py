"""A worker of the main job that stops at a chosen place and says so, for whoever kills it there: by a fault, not by chance.

Entry point ``traps:main``. $TRAPS is JSON: `directory`, where it tells what it meets, and `traps`, each with the `seat` that walks
into it and the `place`: a phase as the worker tells it, or one of `INSIDE`; `step`: only after so many steps; `act`: "stop"
(default: the thread stops there for good, other threads live on), "exit" (an exception), "wait" (until the file `open` is there),
"asked" (until a signal asks it to end) or "newcomer" (until one waits to be taken in, or is);
or what becomes of a forward pass: "nan" (its loss), "nan-gradient" (its gradient alone), "nan-parameter" (the model, before
it), "oom" (the process, as if by the kernel for memory, of which the launcher reads in the file `oom`), "no-memory" (an
allocation in it fails), "no-memory-late" (one in its backward, which has handed over gradients), "rows" (nothing: they are told).
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

POISONS = ("nan", "nan-gradient", "nan-parameter", "oom", "no-memory", "no-memory-late", "rows")
INSIDE = ("claim", "piece", "forward", "score", "exchange", "writing", "part")


class Traps:
    """What this worker is to meet."""

    def __init__(self) -> None:
        order = json.loads(os.environ["TRAPS"])
        self.directory = Path(order["directory"])
        self.seat = os.environ["MANYHANDS_SEAT"]
        self.mine = [trap for trap in order["traps"] if trap["seat"] == self.seat]
        self.doing = ("start", 0)
        self.member: Any = None
        self.echo = threading.Event()
        self.asked = False

    def tell(self, what: str, **fields: Any) -> None:
        record = {"what": what, "seat": self.seat, "pid": os.getpid(), "time_s": time.time(), **fields}
        line = (json.dumps(record) + "\n").encode()
        number = os.open(self.directory / "said", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(number, line)
        os.close(number)

    def known(self, phase: str, step: int) -> None:
        """Wait until the coordinator knows what is done here."""
        if self.member is not None:
            self.member._line.say(
                "beat", phase=phase, step=step, calls=self.member._calls, stack="traps.py:1 in meet"
            )
            self.echo.clear()
            self.member.publish(f"trap/{self.seat}", f"{time.time()}")
            self.echo.wait(30.0)

    def _over(self, act: str) -> bool:
        """Whether what a trap waits for has come."""
        if act == "newcomer":
            return (
                bool(self.member.change_wanted) or len(self.member._epoch.seats) > 1
            )  # it may be in already
        if act == "asked":
            return self.asked
        return act == "wait" and (self.directory / "open").exists()

    def meet(self, place: str) -> str:
        """Walk into the trap that is there, if any; the poison that it holds."""
        phase, step = self.doing
        for trap in self.mine:
            if trap["place"] == place and step >= trap.get("step", 0):
                self.mine.remove(trap)
                if trap.get("act") in POISONS:
                    return str(trap["act"])
                self.known(phase, step)
                self.tell("trapped", place=place, phase=phase, step=step)
                if trap.get("act") == "exit":
                    raise OSError(5, "the device is gone")
                while not self._over(trap.get("act", "stop")):
                    time.sleep(0.01)
                return ""
        return ""


def main(argument: str) -> int:
    from manyhands.coordinate.client import Member
    from manyhands.core.signals import Interrupts

    traps = Traps()
    at, hear, connect = Member.at, Member._hear, Member.connect
    handle = Interrupts._handle

    def telling_handle(self: Interrupts, *given: Any) -> None:
        traps.asked = True
        handle(self, *given)

    def telling_at(self: Member, phase: str, step: int) -> None:
        traps.doing, traps.member = (phase, step), self
        at(self, phase, step)
        traps.meet(phase)

    def telling_hear(self: Member, message: Any) -> None:
        if message["op"] in ("over", "epoch"):
            traps.tell(message["op"], losses=[loss["seat"]["id"] for loss in message["losses"]])
        hear(self, message)
        if message["op"] == "fact" and message["key"] == f"trap/{traps.seat}":
            traps.echo.set()

    def slow_connect(*given: Any, **named: Any) -> Member:
        traps.meet("connect")
        member = connect(*given, **named)
        traps.tell("connected")
        return member

    Member.at, Member._hear = telling_at, telling_hear  # type: ignore[method-assign]
    Member.connect = slow_connect  # type: ignore[method-assign]
    Interrupts._handle = telling_handle  # type: ignore[method-assign]
    _patch(traps)
    from manyhands.train.worker import main

    return main(argument)


def _patch(traps: Traps) -> None:
    """Places within phases."""
    from manyhands.data import prepare
    from manyhands.tasks.pretrain import Pretrain
    from manyhands.train import checkpoint, joint
    from manyhands.wire.shared import SharedWire

    for owner, name, place, phases in (
        (prepare, "_claim", "claim", ("prepare",)),
        (prepare, "prepare_piece", "piece", ("prepare",)),
        (Pretrain, "loss", "forward", ("compile", "step")),
        (Pretrain, "score", "score", ("evaluate",)),
        (SharedWire, "barrier", "exchange", ("step",)),
        (checkpoint, "_write", "writing", ()),
        (joint.Share, "write", "part", ()),
    ):
        setattr(owner, name, _trapped(getattr(owner, name), traps, place, phases))


def _trapped(function: Any, traps: Traps, place: str, phases: tuple[str, ...]) -> Any:
    def trapped(*given: Any, **named: Any) -> Any:
        poison = traps.meet(place) if not phases or traps.doing[0] in phases else ""
        if poison in ("oom", "no-memory", "no-memory-late", "rows"):
            traps.tell("rows", rows=len(next(iter(given[-1].values()))))
        if poison == "oom":
            (traps.directory / "oom").open("a").write("oom\n")
            os.kill(os.getpid(), signal.SIGKILL)
        if poison == "no-memory":
            raise MemoryError
        return _poisoned(function, poison, *given, **named) if poison else function(*given, **named)

    return trapped


def _poisoned(loss: Any, poison: str, task: Any, model: Any, batch: Any) -> tuple[Any, Any]:
    nan = float("nan")
    if poison == "nan-parameter":
        next(iter(model.parameters())).data.fill_(nan)
    if poison == "no-memory-late":  # the embedding's gradient is the last one

        def fail(_: Any) -> None:
            handle.remove()
            raise MemoryError

        handle = next(iter(model.parameters())).register_hook(fail)
    loss_sum, count = loss(task, model, batch)
    if poison == "nan-gradient":
        loss_sum.register_hook(lambda gradient: gradient * nan)
    return loss_sum * nan if poison == "nan" else loss_sum, count
