"""The methods that are compared: each a name, the command of one worker, and how many steps make a fair sample of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import methods_setting as setting
from methods_setting import Size

from manyhands.core.hardware import cpu_has_bf16

PEERS = Path(__file__).parent / "peers"
RATES: Mapping[str, float | None] = {
    "10gbit": 10e9,
    "1gbit": 1e9,
    "100mbit": 100e6,
    "20mbit": 20e6,
    "5mbit": 5e6,  # these two where a machine is so slow that 20 Mbit/s are a fast link to it
    "2.5mbit": 2.5e6,
}
USUAL = ("10gbit", "1gbit", "100mbit", "20mbit")
DENSE = {
    "10gbit": 8,
    "1gbit": 5,
    "100mbit": 2,
    "20mbit": 1,
    "5mbit": 1,
    "2.5mbit": 1,
}  # steps timed at each rate
THIN = {"10gbit": 10, "1gbit": 10, "100mbit": 8, "20mbit": 6, "5mbit": 6, "2.5mbit": 6}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a worker's command is made for."""

    size: Size
    place: Path
    seed: int
    steps: int
    output: Path
    global_batch: int
    eval_every: int | None = None
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train.

    Attributes:
        name: unique; of ours the strategy's own name where it is one.
        command: of one worker (all are started alike; their environment tells them apart).
        timed: steps of a sample at each rate; multiples of `period`.
        settle: steps left out after a change of the rate, for what is still under way.
        period: steps from one conversation to the next.
        ours: whether it is manyhands.
        apart: whether workers train without each other.
        strategy: ours: the value.
        note: what the table says of it.
    """

    name: str
    command: Callable[[Work], Sequence[str]]
    timed: Mapping[str, int]
    settle: int = 0
    period: int = 1
    ours: bool = False
    apart: bool = False
    strategy: str = ""
    note: str = ""
    more: Mapping[str, str] = field(default_factory=dict)


def ours(
    name: str,
    strategy: str,
    timed: Mapping[str, int] | None = None,
    *,
    period: int = 1,
    settle: int = 0,
    apart: bool = False,
    note: str = "",
    options: Sequence[str] = (),
) -> Method:
    """`manyhands train --strategy "…"`; LR, WARM in it stand for the setting's rate and schedule."""

    def command(work: Work) -> list[str]:
        said = strategy.replace("LR", f"{work.size.lr:g}").replace("WARM", work.size.schedule)
        given = setting.options(work.size, work.place, work.seed, work.device)
        given[given.index("--global-batch") + 1] = str(work.global_batch)
        every = [] if work.eval_every is None else ["--eval-every", str(work.eval_every)]
        return [
            *(sys.executable, "-m", "manyhands", "train", *given, "--strategy", said, *options),
            *("--steps", str(work.steps), "--log-every", "1", *every, "--output", str(work.output)),
        ]

    return Method(
        name=name,
        command=command,
        timed=timed or dict.fromkeys(RATES, period),
        period=period,
        settle=settle,
        ours=True,
        apart=apart,
        strategy=strategy,
        note=note,
    )


def peer(
    name: str,
    script: str,
    *options: str,
    timed: Mapping[str, int],
    period: int = 1,
    settle: int = 0,
    python: str | None = None,
    apart: bool = False,
    note: str = "",
) -> Method:
    """A script of ``peers/``, which computes in what ours chooses on this machine: bf16 where it has units for it."""

    def command(work: Work) -> list[str]:
        every = [] if work.eval_every is None else ["--evaluate"]
        precision = "bf16" if cpu_has_bf16() else "fp32"
        return [
            *(python or sys.executable, str(PEERS / script), "--setting", str(work.place)),
            *("--seed", str(work.seed), "--steps", str(work.steps), "--precision", precision),
            *(*options, *every),
        ]

    return Method(
        name=name, command=command, timed=timed, period=period, settle=settle, apart=apart, note=note
    )


BASE = "lr=LR, weight_decay=0.1, schedule='WARM'"
EVERY = 16  # steps between two conversations of the local methods


def local(name: str, strategy: str, *, every: int = EVERY, settle: int = 0, note: str = "") -> Method:
    """One of ours whose workers speak every `every` steps."""
    return ours(name, strategy, dict.fromkeys(RATES, every), period=every, settle=settle, note=note)


def forecast(name: str, every: int, *, delay: int, fragments: int = 1) -> Method:
    """Gradients of `every` steps in 4 bits, `delay` steps in flight."""
    turns = f", fragments={fragments}" if fragments > 1 else ""
    strategy = f"forecast({BASE}, every={every}, delay={delay}{turns}, exchange='error-feedback(int4)')"
    timed = dict.fromkeys(RATES, every * (-(-8 // every)))
    return ours(name, strategy, timed, period=every, settle=every + delay)


def catalogue(torchft_python: str | None = None) -> list[Method]:
    """Everybody, in the order of the tables."""
    codec = f"ddp({BASE}, exchange='%s')"
    pushes, rarely = f"{BASE}, every={EVERY}", f"{BASE}, every=256"
    gentle = "outer_lr=0.8, outer_momentum=0.6"  # few rounds: less momentum than in papers of long runs
    return [
        ours("no communication", f"ddp({BASE})", THIN, apart=True, note="each worker for itself"),
        peer("PyTorch, no communication", "ddp_hooks.py", "--hook", "alone", timed=THIN, apart=True),
        peer("PyTorch DDP", "ddp_hooks.py", timed=DENSE),
        peer("PyTorch DDP, bf16 hook", "ddp_hooks.py", "--hook", "bf16", timed=DENSE),
        peer("PyTorch DDP, PowerSGD hook", "ddp_hooks.py", "--hook", "powersgd", timed=THIN, settle=1),
        *([_torchft(torchft_python)] if torchft_python else []),
        ours("ddp", f"ddp({BASE})", DENSE),
        ours("ddp, bf16", f"ddp({BASE}, precision='bf16')", DENSE),
        ours("ddp, int8 with feedback", codec % "error-feedback(two-phase(int8))", DENSE),
        ours("ddp, int4 with feedback", codec % "error-feedback(two-phase(int4))", DENSE),
        ours("ddp, int2 with feedback", codec % "error-feedback(two-phase(int2))", DENSE),
        ours("ddp, top 1% with feedback", codec % "error-feedback(topk(density=0.01))", THIN),
        ours("powersgd", f"powersgd({BASE})", THIN),
        ours("demo", "demo(lr=3e-4, schedule='WARM')", THIN),
        ours("eager", f"eager({BASE})", DENSE, settle=1),
        ours(
            "eager, powersgd", f"eager({BASE}, exchange='error-feedback(powersgd(rank=4))')", THIN, settle=1
        ),
        ours("eager, int4", f"eager({BASE}, exchange='error-feedback(int4)')", THIN, settle=1),
        ours(
            "one step late, int4",
            f"eager({BASE}, correct=false, exchange='error-feedback(int4)')",
            THIN,
            settle=1,
            note="nothing is corrected: at this rate it learns worse",
        ),
        forecast("forecast, int4, every 3", 3, delay=1),
        forecast("forecast, int4, every 4", 4, delay=1),
        *(forecast(f"forecast, int4, every {n}, {n} in turn", n, delay=1, fragments=n) for n in (3, 4, 6, 8)),
        *(
            forecast(f"forecast, int4, every {n}, {n // 2} in turn, delay 2", n, delay=2, fragments=n // 2)
            for n in (8, 16)
        ),
        ours("zero1", f"zero1({BASE})", DENSE),
        local("local-sgd", f"local-sgd({pushes})"),
        local("slowmo", f"slowmo({pushes})"),
        local("gossip", f"gossip({pushes})"),
        local(
            "local-sgd, int4, every 256", f"local-sgd({rarely}, exchange='error-feedback(int4)')", every=256
        ),
        local("diloco", f"diloco({pushes}, {gentle})"),
        local("diloco, int4", f"diloco({pushes}, {gentle}, exchange='error-feedback(int4)')"),
        local(
            "diloco, int4, every 256",
            f"diloco({rarely}, {gentle}, exchange='error-feedback(int4)')",
            every=256,
        ),
        local("streaming-diloco", f"streaming-diloco({pushes}, delay=2, {gentle})", settle=EVERY + 4),
        local(
            "streaming-diloco, delay 4", f"streaming-diloco({pushes}, delay=4, {gentle})", settle=EVERY + 4
        ),
        local("muloco", f"muloco({pushes}, {gentle})"),
        local("sparseloco", f"sparseloco({pushes})"),
    ]


def _torchft(python: str) -> Method:
    every = str(EVERY)
    return peer(
        "torchft DiLoCo",
        "torchft_diloco.py",
        "--every",
        every,
        timed=dict.fromkeys(RATES, EVERY),
        period=EVERY,
        python=python,
    )
