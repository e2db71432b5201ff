"""All workers take parts of the same batches: whoever has other data does not begin, and each held-out row is scored once."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import warm
from fleet import Fleet
from jobs import Job as Running

from manyhands.core.errors import DataError, ManyhandsError
from manyhands.core.events import ignore
from manyhands.train.evaluate import evaluate
from manyhands.train.job import Job
from manyhands.train.material import check_joins
from manyhands.train.order import Order
from manyhands.train.parts import Parts


def prepared(world: Any, data: list[str], cache: str, given: list[dict[str, Any]]) -> str:
    """What a worker says that has its own copy of the data and its own options."""
    job = Job(data=(data[world.rank],), tokenizer="byte", seq_len=32, cache=cache, **given[world.rank])
    try:
        Parts(job, torch.device("cpu"), None, lambda phase, steps: None).prepare(world, ignore)
    except ManyhandsError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("texts", "given", "says"),
    [
        (("light work\n", "light work\n"), ({}, {}), "$"),
        (
            ("light work\n", "light word\n"),  # as many rows, of as many tokens
            ({}, {}),
            r"DataError: .*\.txt: worker 1 on \S+ has other data there than worker 0 on \S+ has\. .*copy them to every machine",
        ),
        (
            ("light work\n", "light work\n"),
            ({"seed": 1}, {"seed": 2}),
            "UsageError: seed = 2 for worker 1 on .*, 1 for worker 0.*give all of them the same options",
        ),
        (
            ("light work\n", "light work\n"),
            ({}, {"eval_fraction": 0.5}),
            "UsageError: rows = .* for worker 1 on ",
        ),
    ],
    ids=["alike", "data", "seed", "rows"],
)
def test_workers_that_would_make_other_batches_do_not_begin(
    fleets: Callable[[int, str], Fleet], tmp_path: Path, texts: Any, given: Any, says: str
) -> None:
    data = [tmp_path / f"{rank}.txt" for rank in range(2)]
    for path, text in zip(data, texts, strict=True):
        path.write_text("many hands make " * 200 + text)
    found = fleets(2, "shared").run(prepared, [str(p) for p in data], str(tmp_path / "cache"), list(given))
    assert all(re.match(says, said) for said in found), found


def test_a_replacement_that_meets_other_data_is_not_taken_in(corpus: Path, tmp_path: Path) -> None:
    """Somebody edits the corpus while the job runs: it goes on with those that have read it as it was."""
    text, output = tmp_path / "a.txt", tmp_path / "run"
    text.write_text(corpus.read_text())
    with Running(output, text, "--steps", 100000, workers=2) as job:
        job.reach(3)
        text.write_text(corpus.read_text().replace("hand", "band"))
        job.send("w1", signal.SIGKILL)
        job.wait_for(lambda: "it would meet the same" in job.printed(), "the refusal")
        job.reach(job.step + 5)
        job.process.send_signal(signal.SIGTERM)
        said = job.end(128 + signal.SIGTERM)
    (line,) = [each for each in said.splitlines() if "it would meet the same" in each]
    assert "w1-1" in line
    assert "a.txt: this worker has other data there than the job trains on" in line
    assert "every sample once" in warm.manyhands("ledger", output)


class Numbers:
    """Rows that are their own numbers, and a task that adds them up."""

    bytes_per_target = 1.0

    def __len__(self) -> int:
        return 50

    def take(self, ids: Any) -> dict[str, torch.Tensor]:
        return {"x": torch.as_tensor(ids)}

    def score(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sum": batch["x"].double().sum(), "rows": torch.tensor(float(len(batch["x"])))}

    def metrics(self, totals: dict[str, torch.Tensor], *, bytes_per_target: float) -> dict[str, float]:
        return {name: float(total) for name, total in totals.items()}


def scored(world: Any, most: list[int], breaks: int | None = None) -> dict[str, float] | None:
    numbers: Any = Numbers()
    return evaluate(
        torch.nn.Identity(),
        numbers,
        numbers,
        world,
        batch_rows=most[world.rank],
        device=torch.device("cpu"),
        autocast=nullcontext,
        asked=lambda: world.rank == breaks,
    )


@pytest.mark.parametrize("most", [[16, 5], [3, 64], [7, 7]])
def test_each_held_out_row_counts_once_whatever_each_worker_takes_at_once(
    fleets: Callable[[int, str], Fleet], most: list[int]
) -> None:
    """As a GPU and a CPU do, or one that has less memory."""
    found = fleets(2, "shared").run(scored, most)
    assert found == [{"rows": 50.0, "sum": sum(range(50))}] * 2


def test_an_evaluation_is_broken_off_by_all(fleets: Callable[[int, str], Fleet]) -> None:
    """Also where the others have computed their shares by then."""
    assert fleets(2, "shared").run(scored, [16, 5], 1) == [None, None]


def test_the_order_of_an_earlier_release_says_nothing_of_the_data() -> None:
    given = json.loads(Order(Job(data=("a.txt",)), {}, data="known").to_json())
    assert Order.from_json(json.dumps(given)).data == "known"
    del given["data"]
    unknown: Any = SimpleNamespace(identity="of anything")
    check_joins(Job(), unknown, Order.from_json(json.dumps(given)).data)
    with pytest.raises(DataError, match="has other data there"):
        check_joins(Job(), unknown, "known")
