"""What `--reproducible` costs: tokens/s of the same job with and without it, two workers, alternating runs.

    python benchmarks/reproducible.py [--rounds 3] [--steps 12]

The job of the speed comparison (`setting.py`). With the option, each forward pass holds one micro-batch (an eighth of the global
batch, unless --micro-batch says otherwise), and their gradients are added in one fixed tree, so that any number of workers gets the
same bits. It is run with the default micro-batch and with one of 4 rows, which four workers can still share. Writes
``results/reproducible.json``.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import harness
import setting
import train_speed

WORKERS = 2
VARIANTS = {
    "manyhands": (),
    "reproducible": ("--reproducible",),
    "reproducible, micro-batch of 4": ("--reproducible", "--micro-batch", "4"),
}


def main() -> int:
    from manyhands.core.hardware import cache_directory

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of each run, those of --warmup included")
    parser.add_argument("--warmup", type=int, default=3, help="first steps that are not timed")
    parser.add_argument("--work", type=Path, default=cache_directory() / "benchmarks")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "reproducible.json")
    given = parser.parse_args()
    place = given.work.resolve()
    facts = setting.make(place)
    chosen = [
        train_speed.ours(
            name, "defaults", place, given.steps, *options, workers=WORKERS, rows=setting.GLOBAL_BATCH
        )
        for name, options in VARIANTS.items()
    ]
    samples: dict[str, list[harness.Sample]] = defaultdict(list)

    def say(line: str) -> None:
        print(line, flush=True)

    for one, sample in harness.alternate(chosen, rounds=given.rounds, common={}, say=say):
        samples[one.name].append(sample)
    rates = {
        name: {
            s.round: harness.tokens_per_s(
                s, rows=setting.GLOBAL_BATCH, seq_len=setting.SEQ_LEN, warmup=given.warmup
            )
            for s in each
        }
        for name, each in samples.items()
    }
    reference = samples["manyhands"][0].losses
    results: dict[str, dict[str, Any]] = {
        name: {
            "command": "manyhands train bench.toml " + " ".join(one.command(Path("RUN"))[4:-2]),
            "tokens_per_s": asdict(harness.Spread.of(list(rates[name].values()))),
            "ratio_to_without": asdict(harness.ratios(rates[name], rates["manyhands"])),
            "largest_difference_of_losses": harness.largest_difference(samples[name][0].losses, reference),
            "runs": [asdict(s) for s in samples[name]],
        }
        for one in chosen
        for name in (one.name,)
    }
    data = {
        "command": f"python benchmarks/reproducible.py --rounds {given.rounds} --steps {given.steps}",
        "machine": harness.facts_of_machine(),
        "setting": {**asdict(facts), "warmup": given.warmup},
        "results": results,
    }
    harness.write_json(given.output, data)
    for name, found in results.items():
        ratio = found["ratio_to_without"]
        say(
            f"{name:<32} {found['tokens_per_s']['median']:,.0f} tokens/s, "
            f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f}) of the run without"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
