"""Measuring programs against each other fairly: whole processes, alternating rounds, medians and spread, raw figures kept.

A `Contender` is a command whose steps can be read afterwards. `alternate` runs all contenders once a round, in an order
that rotates, so that what changes over a sitting (clock, neighbours, temperature) meets everybody; ratios are formed within
a round. Each run records the machine's load and how much of its processors others used meanwhile.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TIMEOUT_S = 900
# a contender's environment is ours without what would tune it behind its back, and without a network
REMOVED = (
    "OMP_",
    "GOMP_",
    "KMP_",
    "MKL_",
    "MALLOC_",
    "LD_PRELOAD",
    "TORCH",
    "MANYHANDS_ALLOCATOR",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
)
ADDED = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Steps:
    """What a run says of its steps.

    Attributes:
        seconds, losses: of each step, the losses over the whole global batch.
        facts: whatever else it printed of itself.
    """

    seconds: Sequence[float]
    losses: Sequence[float]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to train.

    Attributes:
        name: unique.
        group: "defaults", "tuned", "one core" or "allocator"; manyhands' own take part in each.
        ours: whether it is manyhands.
        command: for a scratch directory (for outputs), the arguments after the interpreter.
        read: the steps of a finished run, from its standard output and its scratch directory.
        environment: variables that are set for it.
        processes, threads: how many of each.
        rows: the global batch.
        precision: "fp32" or "bf16"; decides the tolerance of the loss curve.
    """

    name: str
    group: str
    command: Callable[[Path], Sequence[str]]
    read: Callable[[str, Path], Steps]
    processes: int
    threads: int
    rows: int
    precision: str
    ours: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One run of one contender."""

    round: int
    seconds: Sequence[float]
    losses: Sequence[float]
    wall_s: float
    load_before: float
    others_share: float
    facts: Mapping[str, Any]


class RunFailed(Exception):
    """A contender that did not finish, with the end of what it said."""


def run(contender: Contender, *, round: int, common: Mapping[str, str]) -> Sample:
    """Run it once, alone, to its end. Raises `RunFailed`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(REMOVED)}
    environment.update({**ADDED, **common, **contender.environment})
    with tempfile.TemporaryDirectory(prefix="manyhands-benchmark-") as scratch:
        command = [sys.executable, *contender.command(Path(scratch))]
        load = os.getloadavg()[0]
        busy, own, start = busy_seconds(), _children_seconds(), time.perf_counter()
        code, out, err = _communicate(command, environment)
        wall = time.perf_counter() - start
        others = (busy_seconds() - busy) - (_children_seconds() - own)
        if code != 0:
            raise RunFailed(f"{contender.name}: exit code {code}\n{out[-1500:]}\n{err[-3000:]}")
        steps = contender.read(out, Path(scratch))
    share = max(0.0, others / wall / (os.cpu_count() or 1))
    return Sample(round, steps.seconds, steps.losses, wall, load, share, steps.facts)


def _communicate(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str, str]:
    """Run in a session of its own; whatever it started is ended with it."""
    process = subprocess.Popen(
        command,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return process.returncode, out, err


def alternate(
    contenders: Sequence[Contender], *, rounds: int, common: Mapping[str, str], say: Callable[[str], None]
) -> Iterator[tuple[Contender, Sample]]:
    """All contenders once a round; each round begins elsewhere in the list."""
    for round in range(rounds):
        for contender in rotated(contenders, round, rounds):
            sample = run(contender, round=round, common=common)
            say(
                f"round {round + 1}/{rounds}  {contender.name:<36} "
                f"median step {statistics.median(sample.seconds):.3f} s  wall {sample.wall_s:.0f} s  "
                f"others used {sample.others_share:.0%}"
            )
            yield contender, sample


def rotated(items: Sequence[Any], round: int, rounds: int) -> list[Any]:
    """The list for a round: begun further on each time, and every second time backwards.

    >>> rotated("abcd", 0, 2), rotated("abcd", 1, 2)
    (['a', 'b', 'c', 'd'], ['b', 'a', 'd', 'c'])
    """
    first = round * len(items) // rounds
    turned = [*items[first:], *items[:first]]
    return turned[::-1] if round % 2 else turned


def read_json_lines(out: str, _scratch: Path) -> Steps:
    """The steps of a script that prints them with `peers/common.py`."""
    seconds, losses, facts = [], [], {}
    for line in out.splitlines():
        if line.startswith('{"step"'):
            record = json.loads(line)
            seconds.append(record["seconds"])
            losses.append(record["loss"])
        elif line.startswith('{"done"'):
            facts = json.loads(line)["done"]
    if not facts:
        raise RunFailed(f"it printed no result:\n{out[-2000:]}")
    return Steps(seconds, losses, facts)


@dataclass(frozen=True)
class Spread:
    """Of one figure over rounds."""

    min: float
    median: float
    max: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(min(values), statistics.median(values), max(values))


def tokens_per_s(sample: Sample, *, rows: int, seq_len: int, warmup: int) -> float:
    """From the median step after the first `warmup`."""
    return rows * seq_len / statistics.median(sample.seconds[warmup:])


def ratios(mine: Mapping[int, float], theirs: Mapping[int, float]) -> Spread:
    """mine / theirs within each round (both by round)."""
    return Spread.of([mine[round] / theirs[round] for round in sorted(mine.keys() & theirs.keys())])


def largest_difference(curve: Sequence[float], reference: Sequence[float]) -> float:
    """Largest relative difference of two loss curves over their common steps.

    >>> largest_difference([2.0, 1.0], [2.0, 1.25])
    0.2
    """
    return max(abs(a - b) / abs(b) for a, b in zip(curve, reference, strict=False))


def busy_seconds() -> float:
    """Seconds that all processors of the machine have worked (or were taken by the hypervisor); 0 off Linux."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(f) for f in fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def matrix_peak(processes: int, threads: int) -> float:
    """FLOP/s of bf16 matrix products over `processes` pinned processes at once, measured now (best product of each)."""
    code = (
        "import os, sys\n"
        "rank, threads = map(int, sys.argv[1:])\n"
        "os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[rank * threads:][:threads])\n"
        "import torch\n"
        "torch.set_num_threads(threads)\n"
        "from manyhands.core.hardware import peak_flops\n"
        "print(peak_flops('cpu', 'bfloat16', threads))\n"
    )
    with tempfile.TemporaryDirectory() as cache:  # peak_flops keeps what it measures; here it is to measure
        running = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(rank), str(threads)],
                env={**os.environ, "MANYHANDS_CACHE": f"{cache}/{rank}", "OMP_NUM_THREADS": str(threads)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        return sum(float(process.communicate()[0]) for process in running)


def facts_of_machine() -> dict[str, Any]:
    """Machine and versions, those of the peers too."""
    import importlib.metadata

    from manyhands.core.hardware import machine_facts

    facts = machine_facts()
    for package in ("accelerate", "lightning", "manyhands"):
        try:
            facts["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    temporary.replace(path)
