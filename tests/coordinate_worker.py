"""A process that holds a membership and does as it is told on its standard input; or one that serves as the coordinator.

It answers in JSON lines. Its main thread reads commands; `next` waits in a thread, so that it can be told more meanwhile.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from manyhands.coordinate.client import Member
from manyhands.coordinate.server import Coordinator
from manyhands.coordinate.words import Rules
from manyhands.core.errors import ManyhandsError
from manyhands.core.membership import Seat

LOCK = threading.Lock()


def say(what: str, **fields: object) -> None:
    with LOCK:
        print(json.dumps({"what": what, **fields}), flush=True)


def serve(port: str, token: str, journal: str) -> None:
    rules = Rules(hang_s=2.0, awaited=3)
    coordinator = Coordinator(token=token, listen=f"127.0.0.1:{port}", journal=Path(journal), rules=rules)
    coordinator.start()
    signal.pause()


def take(member: Member) -> None:
    try:
        epoch = member.next()
    except ManyhandsError as error:
        say("error", message=str(error))
        return
    say(
        "epoch",
        number=epoch.number,
        ids=[seat.id for seat in epoch.seats],
        rank=epoch.rank_of(member.me.id),
        fresh=sorted(epoch.fresh),
        losses=[[x.seat.id, x.rank, x.how, x.detail, x.phase, x.step, x.stack] for x in epoch.losses],
        over=member.over.is_set(),
    )


def watch(member: Member) -> None:
    """Say each time that an epoch is over."""
    said = 0
    while True:
        member.over.wait()
        if member.number != said:
            said = member.number
            say("over")
        time.sleep(0.002)


def linger() -> None:
    for line in sys.stdin:
        if line.strip() == "return":
            return


def main() -> None:
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:])
        return
    address, token, id, fingerprint = sys.argv[1:]
    member = Member.connect(address, token, Seat(id=id, host="h", pid=os.getpid()), fingerprint=fingerprint)
    threading.Thread(target=watch, args=(member,), daemon=True).start()
    for line in sys.stdin:
        op, *words = line.split()
        if op == "next":
            threading.Thread(target=take, args=(member,), daemon=True).start()
        elif op == "at":
            member.at(words[0], int(words[1]))
        elif op == "linger":
            linger()
        elif op == "suspect":
            member.suspect(int(words[0]), "reset by peer")
        elif op == "publish":
            member.publish(*words)
        elif op == "lookup":
            say("fact", text=member.lookup(words[0]))
        elif op == "wanted":
            while not member.change_wanted:
                time.sleep(0.005)
            say("wanted")
        elif op == "stopping":
            say("stopping", value=member.stopping)
        elif op == "leave":
            member.leave(words[0])
            say("left")
        elif op == "close":
            member.close()
            return


main()
