"""The ledger under kills, full disks and any history of both; every slip is found, and millions of samples are counted."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ledgers import BATCHES, division, rows_of, told, write
from runs import environment

from manyhands.train.ledger import Batches, Ledger

VICTIM = """
import sys
from pathlib import Path
from test_ledger import BATCHES, division, rows_of
from manyhands.train.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]), "w0", BATCHES, attempt=int(sys.argv[2]), resumed_at=int(sys.argv[3]))
step = int(sys.argv[3])
while True:
    step += 1
    ledger.commit(step, epoch=1, who=division(step, ["w0", f"w{step % 5 + 1}"]), rows=rows_of(step))
"""


def test_kills_leave_whole_lines_or_a_cut_last_one(tmp_path: Path) -> None:
    """Real SIGKILLs while lines are written; each attempt continues from what the last one left."""
    done = 0
    for attempt in range(1, 5):
        process = subprocess.Popen(
            [sys.executable, "-c", VICTIM, tmp_path, str(attempt), str(done)],
            cwd=Path(__file__).parent,
            env=environment(),
        )
        path, deadline = tmp_path / "ledger" / "w0.jsonl", time.monotonic() + 60
        before = path.stat().st_size if path.exists() else 0
        while time.monotonic() < deadline and (
            not path.exists() or path.stat().st_size < before + 20_000 + attempt * 777
        ):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        report = told(tmp_path)
        assert report.ok, report.problems[:3]
        assert report.steps > done
        done = report.steps - 7  # as if the checkpoint were a little older
    assert told(tmp_path).void == 7 * 3


def test_a_full_disk_does_not_end_training_and_nothing_is_lost(tmp_path: Path) -> None:
    program = f"""
import resource, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_ledger import BATCHES, division, rows_of
from manyhands.train.ledger import Ledger
heard = []
ledger = Ledger(Path(sys.argv[1]), "w0", BATCHES, attempt=1, resumed_at=0, emit=heard.append)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for step in range(1, 101):
    if step == 20:
        resource.setrlimit(resource.RLIMIT_FSIZE, (ledger.path.stat().st_size + 30, hard))
    if step == 60:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    ledger.commit(step, epoch=1, who=division(step, ["w0", f"w{{step % 5 + 1}}"]), rows=rows_of(step))
    if step == 40:
        ledger.sync()
        assert ledger.path.read_bytes().endswith(b"}}\\n")
ledger.close()
print(len(heard), heard[0].message)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 lines wait in memory")
    report = told(tmp_path)
    assert report.ok
    assert report.steps == 100


def test_any_history_of_kills_and_resumes_is_accepted_and_any_slip_is_found(tmp_path: Path) -> None:
    """Random groups that do what the job does, against a plain count; then one place is left out, or done twice."""
    for seed in range(25):
        output = tmp_path / str(seed)
        ledgers, counted = simulate(output, random.Random(seed))
        report = told(output)
        assert report.ok, (seed, report.problems[:3])
        assert report.used == counted
        slip(random.Random(seed).choice(ledgers).path, random.Random(seed))
        assert not told(output).ok, seed


def simulate(output: Path, rnd: random.Random) -> tuple[list[Ledger], int]:
    number, epoch = itertools.count(), 1
    step, checkpoint, attempt = 0, 0, 1
    group = {
        s: Ledger(output, s, BATCHES, attempt=1, resumed_at=0) for s in (f"w{next(number)}" for _ in range(3))
    }
    while step < 30:
        step += 1
        if rnd.random() < 0.1:  # everything dies; what was committed after the checkpoint is done again
            attempt, step = attempt + 1, checkpoint + 1
            names = [f"w{next(number)}" for _ in range(rnd.randint(1, 3))]
            group = {s: Ledger(output, s, BATCHES, attempt=attempt, resumed_at=checkpoint) for s in names}
            epoch = 1
        if rnd.random() < 0.2:
            new = f"w{next(number)}"
            group[new] = Ledger(output, new, BATCHES, attempt=attempt, resumed_at=step)
            epoch += 1
        if rnd.random() < 0.3 and len(group) > 1:
            victim = rnd.choice(sorted(group))
            if rnd.random() < 0.5:  # it was ahead: it had applied the step, and nobody else had
                group[victim].commit(step, epoch=epoch, who=division(step, sorted(group)), rows=rows_of(step))
            del group[victim]
            epoch += 1
        who = division(step, sorted(group))
        for ledger in group.values():
            ledger.commit(step, epoch=epoch, who=who, rows=rows_of(step))
        if step % 5 == 0:
            checkpoint = step
    return list(group.values()), sum(rows_of(s) for s in range(1, step + 1))


def slip(path: Path, rnd: random.Random) -> None:
    """Change what one file tells of one step that counts: a place less, or one twice."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    last: dict[str, Any] = {}
    whole = []
    for line in lines:
        last = {**last, **line} if "who" in last or "who" in line else line
        whole.append(dict(last) if "step" in line else line)
        if "ledger" in line:
            last = {}
    at = max(i for i, line in enumerate(whole) if line.get("step"))
    line = json.loads(json.dumps(whole[at]))
    seat = next(s for s, spans in line["who"].items() if spans)
    a, b = line["who"][seat][0]
    line["who"][seat] = [[a, b - 1]] if rnd.random() < 0.5 else [[a, b], [a, a + 1]]
    whole[at] = line
    path.write_text("".join(json.dumps(each) + "\n" for each in whole))


def test_millions_of_samples_are_counted_in_seconds(tmp_path: Path) -> None:
    batches = Batches(n=2_000_003, global_batch=64, seed=1, micro_batch=4)
    write(tmp_path, "w0", range(1, 40_001), ["w0", "w1"], batches=batches)
    begun = time.monotonic()
    report = told(tmp_path)
    assert report.ok
    assert report.counted
    assert time.monotonic() - begun < 60
