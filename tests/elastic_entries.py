"""Entry points for tests of elastic launches: workers that form epochs and "train" without torch, and misbehave when told.

The argument is JSON: `fifo` (they speak through it, and its end of file proves that all are gone), `steps`, `step_s`, and what
goes wrong.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any

from manyhands.coordinate.client import connect_from_env
from manyhands.core.errors import Stopped, UsageError
from manyhands.core.membership import Seat
from manyhands.core.signals import Interrupts

WARM = "elastic_warm" in sys.modules


class Voice:
    def __init__(self, fifo: str, seat: str) -> None:
        self._number, self._seat = os.open(fifo, os.O_WRONLY), seat

    def say(self, what: str, **fields: Any) -> None:
        record = {"seat": self._seat, "pid": os.getpid(), "what": what, **fields}
        os.write(self._number, (json.dumps(record) + "\n").encode())


def known(member: Any, step: int) -> None:
    """Wait until the coordinator knows of this step (or hangs up)."""
    echo, hear, key = threading.Event(), member._line._hear, f"known/{member.me.id}"

    def hearing(message: Any) -> None:
        hear(message)
        if message["op"] == "fact" and message["key"] == key:
            echo.set()

    member._line._hear = hearing
    member._line.say(
        "beat", phase="step", step=step, calls=member._calls, stack="elastic_entries.py:1 in known"
    )
    member.publish(key, str(step))
    while not echo.wait(0.05) and not member.over.is_set():
        pass
    member._line._hear = hear


def train(argument: str) -> int:
    """Every worker counts to `steps`, all in the same epochs; a newcomer begins where the first rank is."""
    order = json.loads(argument)
    id = os.environ["MANYHANDS_SEAT"]
    voice = Voice(order["fifo"], id)
    voice.say("started", warm=WARM, threads=os.environ.get("OMP_NUM_THREADS"))
    if order.get("misuse"):
        raise UsageError("lr = -1", "a rate is positive", "give --lr 3e-4")
    if id.startswith(order.get("fail_start", "none")) and id.count("-") < order.get("fails", 9):
        raise OSError("no such device")
    while id in order.get("held", ()) and not os.path.exists(order["gate"]):
        time.sleep(0.01)
    member = connect_from_env(Seat(id="", host="h", pid=os.getpid()))
    assert member is not None
    voice.say("meeting")
    step = 0
    with Interrupts() as interrupts, interrupts.phase("step", interruptible=False):
        while step < order["steps"] and not os.path.exists(order["enough"]):
            if step == 0 or member.over.is_set() or member.change_wanted:
                epoch = member.next()
                step = max(step, int(member.facts().get("step", "0")))
                voice.say(
                    "epoch",
                    number=epoch.number,
                    ids=[seat.id for seat in epoch.seats],
                    losses=[[loss.seat.id, loss.how, loss.detail] for loss in epoch.losses],
                )
                fresh = True
            member.at("step", step)
            time.sleep(order["step_s"])
            if order.get("poison") == step + 1:  # whoever is not first dies of it; the first waits for them
                if epoch.rank_of(member.me.id) > 0:
                    raise ValueError("poison")
                while not (member.over.is_set() or member.change_wanted):
                    time.sleep(0.01)
                continue
            if interrupts.requested:
                voice.say("signal", stopping=member.stopping)
                member.leave("asked to")
                raise Stopped(interrupts.requested)
            step += 1
            if epoch.rank_of(member.me.id) == 0:
                member.publish("step", str(step))
            if step == 1 or fresh:
                member.at("step", step)
                known(member, step)
                voice.say("stepped", step=step, rank=epoch.rank_of(member.me.id))
                fresh = False
    voice.say("done", step=step)
    member.leave("done")
    return 0


def ignore_membership(argument: str) -> int:
    """A worker that knows nothing of coordinators."""
    voice = Voice(json.loads(argument)["fifo"], os.environ["MANYHANDS_SEAT"])
    voice.say("started")
    signal.pause()
    return 0
