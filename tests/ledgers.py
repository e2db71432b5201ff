"""Small ledgers, and what is told of them."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from manyhands.cli.main import main
from manyhands.data.partition import divide
from manyhands.data.sample import Order
from manyhands.train.audit import Report, audit, load
from manyhands.train.ledger import Batches, Ledger

BATCHES = Batches(n=50, global_batch=16, seed=3, micro_batch=2)  # 4 steps a pass, the last of 2 rows


def rows_of(step: int, batches: Batches = BATCHES) -> int:
    return Order(batches.n, batches.global_batch, batches.seed, batches.drop_last).rows(step - 1)


def division(step: int, seats: list[str], batches: Batches = BATCHES) -> dict[str, list[tuple[int, int]]]:
    places = -(-rows_of(step, batches) // batches.micro_batch)
    return {s: [(r.start, r.stop)] for s, r in zip(seats, divide(places, [1.0] * len(seats)), strict=True)}


def write(
    output: Path,
    seat: str,
    steps: range,
    seats: list[str],
    *,
    epoch: int = 1,
    attempt: int = 1,
    at: int = 0,
    batches: Batches = BATCHES,
) -> None:
    ledger = Ledger(output, seat, batches, attempt=attempt, resumed_at=at)
    for step in steps:
        ledger.commit(step, epoch=epoch, who=division(step, seats, batches), rows=rows_of(step, batches))
    ledger.close()


def told(output: Path, *more: Path) -> Report:
    return audit(load([output, *more]))


def run(*arguments: object) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = main(["ledger", *map(str, arguments)])
    return code, said.getvalue()
