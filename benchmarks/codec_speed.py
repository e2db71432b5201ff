"""How fast each codec encodes and decodes a gradient on one core, against a plain copy and the naive PyTorch expression.

    python benchmarks/codec_speed.py [--numel 30000000] [--rounds 7] [--only int8 "topk(chunk=0)" ...]

All codecs of the registry as they come, the quantizers by both ways of rounding, and whatever call forms `--only` gives. A
rate is the gradient's bytes (4 a value) divided by the seconds of `encode` and `decode` together. In every round each subject
runs once, the order turns by one, and ratios are formed within a round. *Copy* is ``tensor.clone()``, a fresh tensor just as
`decode` makes one; memory comes from the caching allocator, as in training. *Naive* is ``reference_encode`` and
``reference_decode`` where a codec has them; for top-k it is ``torch.topk`` of the magnitudes, 1% of them.
Writes ``results/codec_speed.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

TARGET, GPU_TARGET = 0.25, 0.5  # of a copy's rate, for the quantizers
QUANTIZERS = ("int8", "int4", "int2", "ternary", "sign", "natural", "bf16", "fp16")
NAIVE_ROUNDS = 2
GPU_REPEATS = 10
SEED = 0
Timed = dict[str, float]  # part: seconds


def subjects(only: Sequence[str]) -> dict[str, Any]:
    """Name: codec."""
    from manyhands.core import config, registry
    from manyhands.exchange.codec import Codec

    if only:
        return {text: config.from_text("exchanges", text) for text in only}
    found: dict[str, Any] = {}
    for name in registry.entries("exchanges"):
        kind = registry.resolve("exchanges", name)
        fields = {field.name: field for field in dataclasses.fields(kind)}
        if not all(hasattr(kind, part) for part in ("encode", "decode", "size_bytes")) or any(
            f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            for f in fields.values()
        ):
            continue
        if isinstance(codec := kind(), Codec):
            found[name] = codec
        if "rounding" in fields:
            other = "stochastic" if codec.rounding == "nearest" else "nearest"
            found[f"{name}(rounding={other!r})"] = kind(rounding=other)
    found["topk(chunk=0)"] = config.from_text("exchanges", "topk(chunk=0)")  # by a sampled threshold
    return found


def gradient(numel: int, device: str) -> Any:
    """Float32 [numel]: normal values whose scale is log-normal in rows of 1,024, as layers differ."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(numel, generator=generator)
    scales = torch.exp(torch.randn(-(-numel // 1024), generator=generator))
    return (x * scales.repeat_interleave(1024)[:numel] * 1e-3).to(device)


def stopwatch(device: str) -> Callable[[], float]:
    """Seconds, after what the device still had to do."""
    import torch

    def now() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def timed(codec: Any, x: Any, now: Callable[[], float], *, naive: bool = False) -> Timed:
    """Seconds of encoding and decoding once."""
    encode = codec.reference_encode if naive else codec.encode
    decode = codec.reference_decode if naive else codec.decode
    times = repeats(x.device.type)
    start = now()
    for _ in range(times):
        payload = encode(x, 1)
    middle = now()
    for _ in range(times):
        decoded = decode(payload, x.numel(), x.dtype)
    end = now()
    del decoded
    encoding, decoding = (middle - start) / times, (end - middle) / times
    return {"encode": encoding, "decode": decoding, "both": encoding + decoding}


def repeats(device: str) -> int:
    """How often a call is made before the clock is read: a GPU is given the next one while it works on the last."""
    return GPU_REPEATS if device == "cuda" else 1


def quality(codec: Any, x: Any) -> dict[str, float]:
    """Bits a value, and ‖x − x̂‖² / ‖x‖²."""
    payload = codec.encode(x, 1)
    if payload.numel() != codec.size_bytes(x.numel()):
        raise SystemExit(f"{codec}: {payload.numel()} bytes, size_bytes says {codec.size_bytes(x.numel())}")
    error = codec.decode(payload, x.numel(), x.dtype).sub_(x)
    return {
        "bits": 8 * payload.numel() / x.numel(),
        "squared_error": float(error.double().square_().sum() / x.double().square_().sum()),
    }


def measure(codecs: Mapping[str, Any], x: Any, rounds: int, device: str) -> dict[str, list[Timed]]:
    """Of each subject ("copy" and "torch.topk" among them), its timings round by round; "naive NAME" less often."""
    now = stopwatch(device)

    def copy() -> Timed:
        times = repeats(x.device.type)
        start = now()
        for _ in range(times):
            twin = x.clone()
        end = now()
        del twin
        return {"both": (end - start) / times}

    def topk() -> Timed:
        start = now()
        kept = x.abs().topk(max(1, x.numel() // 100), sorted=False)
        end = now()
        del kept
        return {"both": end - start}

    runs: dict[str, Callable[[], Timed]] = {"copy": copy}
    slow: dict[str, Callable[[], Timed]] = {"torch.topk": topk}
    for name, codec in codecs.items():
        runs[name] = lambda codec=codec: timed(codec, x, now)  # type: ignore[misc]
        if hasattr(codec, "reference_encode"):
            slow[f"naive {name}"] = lambda codec=codec: timed(codec, x, now, naive=True)  # type: ignore[misc]
    seconds: dict[str, list[Timed]] = {name: [] for name in [*runs, *slow]}
    for run in runs.values():
        run()  # warms caches, compiles
    for round in range(rounds):
        for name in harness.rotated(list(runs), round, rounds):
            seconds[name].append(runs[name]())
    for _ in range(min(NAIVE_ROUNDS, rounds)):
        for name, run in slow.items():
            seconds[name].append(run())
    return seconds


def summary(seconds: Mapping[str, list[Timed]], facts: Mapping[str, Mapping[str, float]], size: int) -> Any:
    """One row a codec: rates in GB/s of input (medians), and shares of a copy's rate within rounds."""
    copies = [sample["both"] for sample in seconds["copy"]]
    rows = {}
    for name, qualities in facts.items():
        samples = seconds[name]
        shares = [c / s["both"] for c, s in zip(copies, samples, strict=True)]
        row: dict[str, Any] = {
            **qualities,
            **{
                part: size / statistics.median(s[part] for s in samples) / 1e9
                for part in ("encode", "decode", "both")
            },
            "share_of_copy": {"min": min(shares), "median": statistics.median(shares), "max": max(shares)},
        }
        slow = "torch.topk" if name.startswith("topk") else f"naive {name}"
        if seconds.get(slow):
            naive = min(s["both"] for s in seconds[slow])
            row["naive"] = size / naive / 1e9
            row["times_naive"] = row["both"] / row["naive"]
        rows[name] = row
    return rows


def table(data: Mapping[str, Any]) -> str:
    """The figures as a page."""
    copy, topk = data["copy"], data["torch_topk"]
    said = (
        f"{data['numel']:,} float32 values, {data['gpu'] or data['machine']['cpu']}, torch {data['machine']['versions']['torch']}, "
        f"{data['rounds']} rounds. Rates in GB/s of input; a plain copy: {copy:.2f} GB/s; `torch.topk` of 1%: "
        f"{topk:.3f} GB/s. Others used {data['others_share']:.1%} of the processors. "
        f"Quantizers: {data['quantizer']}."
    )
    lines = [
        f"# Codecs: encode and decode on {'a GPU' if data['gpu'] else 'one core'}",
        "",
        said,
        "",
        f"    {data['command']}",
        "",
        "| codec | bits a value | ‖x−x̂‖²/‖x‖² | encode | decode | both | share of a copy (min – max) | naive | × naive |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in data["codecs"].items():
        share = row["share_of_copy"]
        naive = f"{row['naive']:.3f} | {row['times_naive']:.0f}" if "naive" in row else "– | –"
        lines.append(
            f"| `{name}` | {row['bits']:.2f} | {row['squared_error']:.3g} | {row['encode']:.2f} | {row['decode']:.2f} | "
            f"{row['both']:.2f} | {share['median']:.0%} ({share['min']:.0%} – {share['max']:.0%}) | {naive} |"
        )
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--numel", type=int, default=30_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=[], metavar="CODEC", help="call forms")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "codec_speed.json")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

    import torch

    from manyhands.core.native import enable_allocator
    from manyhands.exchange import quantize

    torch.set_num_threads(1)
    allocator = enable_allocator()
    x = gradient(given.numel, given.device)
    codecs = subjects(given.only)
    facts = {name: quality(codec, x) for name, codec in codecs.items()}
    busy, own, start = harness.busy_seconds(), time.process_time(), time.perf_counter()
    seconds = measure(codecs, x, given.rounds, given.device)
    others = (harness.busy_seconds() - busy) - (time.process_time() - own)
    size = 4 * given.numel
    words = ["python benchmarks/codec_speed.py", f"--numel {given.numel} --rounds {given.rounds}"]
    words += ["--only " + " ".join(f'"{name}"' for name in given.only)] if given.only else []
    words += [f"--device {given.device}"] if given.device != "cpu" else []
    data = {
        "command": " ".join(words),
        "machine": harness.facts_of_machine(),
        "device": given.device,
        "gpu": torch.cuda.get_device_name() if given.device == "cuda" else None,
        "numel": given.numel,
        "rounds": given.rounds,
        "seed": SEED,
        "threads": 1,
        "allocator": allocator,
        "quantizer": quantize.status(),
        "others_share": max(0.0, others) / (time.perf_counter() - start) / (os.cpu_count() or 1),
        "target_share_of_copy": TARGET if given.device == "cpu" else GPU_TARGET,
        "copy": size / statistics.median(s["both"] for s in seconds["copy"]) / 1e9,
        "torch_topk": size / min(s["both"] for s in seconds["torch.topk"]) / 1e9,
        "codecs": summary(seconds, facts, size),
        "seconds": seconds,
    }
    page = table(data)
    print(page)
    harness.write_json(given.output, data)
    given.output.with_suffix(".md").write_text(page)
    target = data["target_share_of_copy"]
    slow = [
        name
        for name, row in data["codecs"].items()
        if name.split("(")[0] in QUANTIZERS and row["share_of_copy"]["median"] < target
    ]
    if slow:
        print(f"below {target:.0%} of a copy: {', '.join(slow)}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
