"""What others read is frozen: the events of ``metrics.jsonl`` and the ledger. Adding a field is a change of contract, too."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from contract import EVENTS, LOAD

from manyhands.core import events as e
from manyhands.core.events import to_record
from manyhands.train.ledger import Batches, Ledger


def test_the_events_and_their_fields() -> None:
    found = {kind.__name__.lower(): fields_of(kind) for kind in e.Event.__subclasses__()}
    assert found == EVENTS
    assert fields_of(e.Load) == LOAD


def fields_of(kind: Any) -> str:
    """The fields of an event and what each is in JSON."""
    words = []
    for f in dataclasses.fields(kind):
        word = str(f.type).split("[")[0].replace(" ", "")
        word = {"Sequence": "list", "tuple": "list", "Mapping": "dict"}.get(word, word)
        words.append(f"{f.name}:{word}")
    return " ".join(word for word in words if not word.startswith("time_s:"))


def test_nested_values_are_plain_json() -> None:
    load = e.Load(seat="w0", rank=0, host="n", rows=4, compute_s=float("nan"))
    record = to_record(e.Balance(step=1, wall_s=1.0, workers=(load,)))
    assert list(record["workers"][0]) == [word.split(":")[0] for word in LOAD.split()]
    assert json.loads(json.dumps(record, allow_nan=False))["workers"][0]["compute_s"] == "nan"


def test_the_lines_of_the_ledger(tmp_path: Path) -> None:
    ledger = Ledger(
        tmp_path, "w0", Batches(n=9, global_batch=4, seed=1, micro_batch=2), attempt=1, resumed_at=0
    )
    for step in (1, 2):
        ledger.commit(step, epoch=1, who={"w0": [(0, 1)], "w1": [(1, 2)]}, rows=4)
    ledger.commit(3, epoch=2, who={"w0": [(0, 1)]}, rows=1, alone=True)
    ledger.dropped(4, epoch=2, who={"w1": [(1, 2)]}, rows=4, why="killed")
    ledger.left_out(4, epoch=2, who={"w0": [(0, 1)]}, rows=4, why="NaN", update=4)
    ledger.left_out(4, epoch=2, who={"w1": [(1, 2)]}, rows=4, why="NaN", update=5, alone=True)
    ledger.close()
    assert (tmp_path / "ledger" / "w0.jsonl").read_text().splitlines() == [
        (
            '{"ledger":1,"seat":"w0","attempt":1,"resumed_at":0,"n":9,"global_batch":4,"seed":1,"micro_batch":2,'
            '"drop_last":false,"order":"shuffled"}'
        ),
        '{"step":1,"epoch":1,"rows":4,"who":{"w0":[[0,1]],"w1":[[1,2]]}}',
        '{"step":2}',
        '{"step":3,"epoch":2,"rows":1,"who":{"w0":[[0,1]]},"alone":true}',
        '{"step":4,"epoch":2,"rows":4,"dropped":{"w1":[[1,2]]},"why":"killed"}',
        '{"step":4,"epoch":2,"rows":4,"skipped":{"w0":[[0,1]]},"why":"NaN","update":4}',
        '{"step":4,"epoch":2,"rows":4,"skipped":{"w1":[[1,2]]},"why":"NaN","update":5,"alone":true}',
    ]
