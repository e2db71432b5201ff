"""`manyhands chaos JOB.toml [--kills SECONDS …] [options of train]`: a job under a seeded schedule of faults."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.cli import options
from manyhands.core.errors import ManyhandsError, UsageError, WorkerFailed

if TYPE_CHECKING:
    from manyhands.launch.chaos import Fault, Injected

HELP = {
    "kills": "a SIGKILL (never of the last worker that holds the job's state)",
    "stops": "a SIGSTOP for 0.2 to 2 times --hang-s, so that about half of them are hangs, whose worker is given up",
    "slows": "a slowdown to half the speed for a while",
    "cuts": "a connection shut down",
    "fulls": "a disk that takes nothing more for a while",
    "flips": "a flipped bit in a parameter",
}
MOST_S = 86_400.0  # schedules are drawn so far; a job that ends earlier leaves the rest


def main(arguments: Sequence[str]) -> int:
    """Exit code 0: the job came through, and every sample was used once."""
    from manyhands.cli import train
    from manyhands.launch.chaos import KINDS, schedule

    p = options.Parser(
        prog="manyhands chaos",
        description="Run a training job twice, undisturbed and under a schedule of faults, on real processes, and say what the "
        "faults cost: goodput, recoveries, samples lost or doubled, the loss.",
        usage="manyhands chaos [JOB.toml] [--kills SECONDS …] [options of train]",
        epilog="All other options are those of `manyhands train`. Without a rate: --kills 30.",
        allow_abbrev=False,
    )
    p.add_argument(
        "--chaos-seed", type=int, default=0, metavar="N", help="of the schedule (--seed is the job's)"
    )
    for name, what in HELP.items():
        p.add_argument(
            f"--{name}", type=float, metavar="SECONDS", help=f"mean time from one to the next: {what}"
        )
    p.add_argument("--output", default="chaos", help="directory of both runs, the report and the picture")
    p.add_argument(
        "--baseline", metavar="DIR", help="an earlier undisturbed run of the same job, not to repeat it"
    )
    given, base = p.parse_known_args(list(arguments))
    rates = {KINDS[name]: getattr(given, name) for name in HELP if getattr(given, name) is not None}
    output = Path(given.output)
    job, origins = train.assemble(
        options.parse(train.parser(), [*base, "--output", str(output / "disturbed")])
    )
    faults = schedule(given.chaos_seed, rates or {"kill": 30.0}, until_s=MOST_S, hang_s=job.hang_s)
    if job.workers == 1 and any(f.kind in ("kill", "stop") for f in faults):
        raise UsageError("workers = 1", "somebody must be left to go on", "give --workers 2 or more")
    for name in ("disturbed", "undisturbed"):
        if (output / name / "ledger").exists():
            raise UsageError(
                f"{output / name} holds a run", "each report is of fresh runs", "give another --output"
            )
    plain = Path(given.baseline) if given.baseline else output / "undisturbed"
    if (
        given.baseline and not (plain / "metrics.jsonl").exists()
    ):  # not after the hour that the other run takes
        raise UsageError(f"--baseline {plain}", "it is the output of a run", "leave it out, and one is made")
    if given.baseline is None:
        options.say("the undisturbed run:")
        code, _ = _train([*base, "--output", str(plain)], plain, (), job.hang_s)
        if code:
            raise WorkerFailed(f"the undisturbed run ended with exit code {code}", "", f"see {plain}/logs")
    options.say("the run with faults:")
    # a run's config.toml says the default, too
    told = origins.get("restarts", "").startswith("--") or job.restarts != type(job).restarts
    more = [] if told or job.elastic == "off" else ["--restarts", "1000000"]
    code, injected = _train(
        [*base, *more, "--output", str(output / "disturbed")], output / "disturbed", faults, job.hang_s
    )
    return report(output, plain, injected, code, given.chaos_seed)


def report(output: Path, plain: Path, injected: Sequence[Injected], code: int, seed: int) -> int:
    """Write and print it; the exit code."""
    from manyhands.launch.chaos_report import compare, events_of, text, timeline
    from manyhands.train.durable import write_json, write_text

    found = compare(output / "disturbed", plain, injected, code, seed)
    write_json(output / "chaos.json", found)
    write_text(output / "chaos.svg", timeline(events_of(output / "disturbed"), found))
    options.say("")
    options.say(text(found))
    options.say(f"figures in {output / 'chaos.json'}, a picture in {output / 'chaos.svg'}")
    return code or (0 if found["ledger"]["ok"] else 1)


def _train(
    arguments: Sequence[str], output: Path, faults: Sequence[Fault], hang_s: float
) -> tuple[int, list[Injected]]:
    """Run `manyhands train`, with faults from its first step on."""
    from manyhands.launch.chaos import Chaos

    with tempfile.TemporaryDirectory(prefix="manyhands-chaos-") as told:
        environment = {**os.environ, "MANYHANDS_CHAOS": told}
        process = subprocess.Popen(
            [sys.executable, "-m", "manyhands", "train", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        chaos = Chaos(output, faults, lambda: has_stepped(output), Path(told), hang_s)
        with _passed_on(process):
            chaos.start()
            try:
                code = process.wait()
            finally:
                chaos.stop()
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise ManyhandsError("the run was stopped", "", "")
        return code, chaos.injected


def has_stepped(output: Path) -> bool:
    """Whether a step was committed."""
    from manyhands.launch.chaos import holds

    return any(map(holds, (output / "ledger").glob("*.jsonl")))


@contextlib.contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """SIGTERM reaches the job; a Ctrl-C does by itself (it is in our process group)."""

    def tell(signum: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signum)

    before = signal.signal(signal.SIGTERM, tell), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
