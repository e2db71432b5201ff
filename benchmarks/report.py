"""The table and the plot of the speed comparison, from raw samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import harness
import setting
from harness import Contender, Sample, Spread

RIVALS = {
    "defaults": "manyhands",
    "tuned": "manyhands, tuned",
    "allocator": "manyhands, tuned",
}  # like is compared with like
SINGLE = {"manyhands": "manyhands, one core", "manyhands, tuned": "manyhands, one core, tuned"}
TITLES = {
    "defaults": "As it comes",
    "tuned": "Tuned: bf16, compiled, fused AdamW, pinned",
    "allocator": "Tuned, and tcmalloc preloaded",
    "one core": "One pinned core, 8 rows",
}


def table_rows(
    chosen: Sequence[Contender],
    samples: Mapping[str, Sequence[Sample]],
    curves: Mapping[str, Mapping[str, Any]],
    facts: setting.Setting,
    *,
    warmup: int,
    peak: float,
) -> list[dict[str, Any]]:
    """One row a contender: tokens/s, MFU, manyhands' lead within rounds, scaling, loss check.

    Args:
        peak: FLOP/s of the whole machine's bf16 matrix products.
    """
    rates = {
        one.name: {
            s.round: harness.tokens_per_s(s, rows=one.rows, seq_len=setting.SEQ_LEN, warmup=warmup)
            for s in samples[one.name]
        }
        for one in chosen
    }
    rows = []
    for one in chosen:
        spread = Spread.of(list(rates[one.name].values()))
        row: dict[str, Any] = {
            "name": one.name,
            "group": one.group,
            "ours": one.ours,
            "processes": one.processes,
            "threads": one.threads,
            "precision": one.precision,
            "tokens_per_s": asdict(spread),
            "mfu": spread.median * facts.flops_per_token / peak,
            **curves[one.name],
            "others_share": max(s.others_share for s in samples[one.name]),
        }
        rival = RIVALS.get(one.group)
        if rival in rates and rival != one.name:
            row["manyhands_lead"] = asdict(harness.ratios(rates[rival], rates[one.name]))
        if SINGLE.get(one.name) in rates:
            double = {round: 2 * rate for round, rate in rates[SINGLE[one.name]].items()}
            row["of_twice_one_core"] = asdict(harness.ratios(rates[one.name], double))
        rows.append(row)
    return rows


def markdown(data: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, with the facts that a reader needs above it."""
    machine, about = data["machine"], data["setting"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    peak = max(data["peak_flops"].values())
    rounds = max(len(c["runs"]) for c in data["contenders"])
    lines = [
        "# Training speed, two cores",
        "",
        f"`{data['command']}`, {data['started']}; {machine['cpu']}, {machine['cores']} cores;",
        f"Python {machine['python']}, {versions}.",
        "",
        f"GPT-2 of 6 layers × 384, {about['parameters'] / 1e6:.1f}M parameters; rows of {about['seq_len']} tokens;",
        f"global batch 16 (one core: 8); {rounds} rounds of {about['steps']} steps, the first {about['warmup']} not timed.",
        "Tokens/s from the median step of a run: minimum, **median**, maximum over rounds.",
        f"MFU = tokens/s × {about['flops_per_token'] / 1e6:.1f} MFLOP (6N + 12·L·d·s) / {peak / 1e12:.2f} TFLOP/s, the measured",
        "bf16 matrix peak of the whole machine.",
        "*manyhands is ahead* is its ratio to manyhands of the same group within a round: minimum, **median**, maximum.",
        "*loss* is the largest relative difference from plain PyTorch's fp32 curve at any step (tolerance 0.001 in fp32,",
        "0.02 in bf16).",
        "*others' CPU* is how much of the machine other programs used meanwhile, at most in any round.",
        "",
        "| | processes × threads | precision | tokens/s | MFU | manyhands is ahead | loss | others' CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group, title in TITLES.items():
        members = [row for row in rows if row["group"] == group]
        if members:
            lines.append(f"| *{title}* | | | | | | | |")
        for row in members:
            name = f"**{row['name']}**" if row["ours"] else row["name"]
            verdict = "" if row["equal"] else " **differs**"
            lines.append(
                f"| {name} | {row['processes']} × {row['threads']} | {row['precision']} | {_figures(row['tokens_per_s'], ',.0f')} "
                f"| {row['mfu']:.1%} | {_figures(row.get('manyhands_lead'), '.2f')} "
                f"| {row['largest_relative_difference']:.1e}{verdict} | {row['others_share']:.0%} |"
            )
    for row in rows:
        if "of_twice_one_core" in row:
            lines += [
                "",
                f"{row['name']}: {_figures(row['of_twice_one_core'], '.3f')} of twice one pinned core.",
            ]
    return "\n".join(lines) + "\n"


def _figures(spread: Mapping[str, float] | None, form: str) -> str:
    if spread is None:
        return ""
    return f"{spread['min']:{form}} **{spread['median']:{form}}** {spread['max']:{form}}"


def plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Bars of tokens/s with whiskers from minimum to maximum, manyhands' own in colour, groups apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [(title, [r for r in rows if r["group"] == group]) for group, title in TITLES.items()]
    groups = [(title, members) for title, members in groups if members]
    figure, axes = pyplot.subplots(
        len(groups),
        1,
        figsize=(8, 0.9 + sum(0.3 * len(m) + 0.5 for _, m in groups)),
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": [len(m) for _, m in groups]},
        layout="constrained",
    )
    for ax, (title, members) in zip(axes[:, 0], groups, strict=True):
        members = sorted(members, key=lambda r: r["tokens_per_s"]["median"])
        spreads = [r["tokens_per_s"] for r in members]
        medians = [s["median"] for s in spreads]
        whiskers = [
            [s["median"] - s["min"] for s in spreads],
            [s["max"] - s["median"] for s in spreads],
        ]
        labels = [
            r["name"]
            if f"{r['processes']}×{r['threads']}" in r["name"]
            else f"{r['name']} {r['processes']}×{r['threads']}"
            for r in members
        ]
        colors = ["#1f6f8b" if r["ours"] else "#b8bec4" for r in members]
        ax.barh(
            labels,
            medians,
            xerr=whiskers,
            color=colors,
            height=0.72,
            error_kw={"ecolor": "#444", "elinewidth": 1},
        )
        for place, spread in enumerate(spreads):
            end = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
            ax.annotate(f"{spread['median']:,.0f}", (spread["max"], place), **end)
        ax.set_title(title, loc="left", fontsize=10)
        ax.tick_params(axis="y", labelsize=8, length=0)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.margins(x=0.12)
    axes[-1, 0].set_xlabel("tokens/s (median; whiskers from the slowest to the fastest round)")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
