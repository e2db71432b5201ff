"""What workers and the coordinator say to each other: JSON objects, one a message, on one stream per worker.

A worker says hello first; the coordinator answers welcome. Whatever does not have the form below is `Garbage`; it is
refused and changes nothing.

    worker       hello, beat, ready, suspect, fail, leaving, publish, ack; a launcher that joins: hello without a seat, expect, lost
    coordinator  welcome, epoch, over, wanted, fact, stop, left, evicted, ended; tick, that it is there
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from manyhands.core.errors import ManyhandsError
from manyhands.core.membership import Epoch, Loss, Seat

METHOD = "/manyhands.Coordinator/Attend"
VERSION = 2
SIGN_S = 5.0  # between ticks
MESSAGE_BYTES = 4 << 20
KEY_LENGTH = 200
FACT_LENGTH = 1 << 20
DETAIL_LENGTH = 4000
FACTS = 10_000  # a job publishes a handful


class Garbage(ManyhandsError):
    """A message that is none of this protocol."""


class Refused(ManyhandsError):
    """A worker that cannot take part.

    Attributes:
        status: the name of gRPC's status code that tells it.
    """

    def __init__(self, status: str, value: str, rule: str = "", remedy: str = "") -> None:
        super().__init__(value, rule, remedy)
        self.status = status


def pack(message: Mapping[str, Any]) -> bytes:
    """A message's bytes."""
    return json.dumps(message, separators=(",", ":")).encode()


def unpack(data: bytes) -> dict[str, Any]:
    """A message from its bytes. Raises `Garbage`."""
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        raise Garbage(f"a message of {len(data):,} bytes that is not JSON", "", "") from None
    if not isinstance(message, dict) or not isinstance(message.get("op"), str):
        raise Garbage("a message without op", "it is a JSON object that says what it is", "")
    return message


def text(message: Mapping[str, Any], name: str, *, most: int = KEY_LENGTH, least: int = 0) -> str:
    """A field that is text of `least` to `most` characters. Raises `Garbage`."""
    value = message.get(name, "")
    if not isinstance(value, str) or not least <= len(value) <= most:
        raise Garbage(f"{name} = {str(value)[:80]!r}", f"it is text of {least} to {most:,} characters", "")
    return value


def whole(message: Mapping[str, Any], name: str) -> int:
    """A field that is a whole number, not negative. Raises `Garbage`."""
    value = message.get(name, 0)
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise Garbage(f"{name} = {str(value)[:80]!r}", "it is a whole number that is not negative", "")
    return value


def seat_of(data: Any) -> Seat:
    """A seat from its fields. Raises `Garbage`."""
    if not isinstance(data, dict):
        raise Garbage("a seat that is no object", "", "")
    return Seat(
        id=text(data, "id", least=1),
        host=text(data, "host"),
        device=text(data, "device"),
        pid=whole(data, "pid"),
        address=text(data, "address"),
    )


def loss_of(data: Any) -> Loss:
    """A loss from its fields (the coordinator's own: trusted)."""
    return Loss(**{**data, "seat": Seat(**data["seat"])})


def epoch_to(epoch: Epoch) -> dict[str, Any]:
    """An epoch's fields as JSON has them."""
    return {**asdict(epoch), "fresh": sorted(epoch.fresh)}


def epoch_of(data: Any) -> Epoch:
    """An epoch from its fields (the coordinator's own: trusted)."""
    return Epoch(
        number=data["number"],
        seats=tuple(Seat(**seat) for seat in data["seats"]),
        fresh=frozenset(data["fresh"]),
        losses=tuple(loss_of(loss) for loss in data["losses"]),
    )
