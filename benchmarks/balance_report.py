"""The table and the plot of `balance.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def markdown(data: Mapping[str, Any]) -> str:
    """What was found, with the facts above it."""
    machine, about = data["machine"], data["setting"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        "# Uneven workers",
        "",
        (
            f"{about['model']}, {about['rows']} rows × {about['seq_len']} tokens a step, {about['precision']}; workers are "
            f"processes of one thread, throttled by {data['throttled_by']}."
        ),
        f"Machine: {machine.get('cpu', machine.get('device', ''))}, {machine.get('cores', '')} cores; {versions}.",
        "",
    ]
    if "uneven" in data:
        part = data["uneven"]
        lines += [
            f"## Speeds {', '.join(f'{s:g}' for s in part['shares_of_a_core'])} of a core",
            "",
            "| | tokens/s (rounds) | manyhands is × of it: median (min to max) | largest loss difference | others' CPU |",
            "|---|---|---|---|---|",
        ]
        for name, ratio in part["ratios"].items():
            runs = [r for r in part["runs"] if r["name"] == name]
            rates = ", ".join(f"{r['tokens_per_s']:,.0f}" for r in runs)
            apart = max(r["loss_difference"] for r in runs)
            others = max(r["others_share"] for r in runs)
            lines.append(
                f"| {name} | {rates} | {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) | {apart:.1e} "
                f"| {others:.0%} |"
            )
        last = [r["redivided"][-1]["shares"] for r in part["runs"] if r["redivided"]]
        lines += ["", f"Possible: {part['ideal']:.2f}. Last shares: {last}.", f"`{part['command']}`", ""]
    if "change" in data:
        part = data["change"]
        needed = [r["steps_needed"] for r in part["runs"]]
        lines += [
            "## A change in mid-run",
            "",
            (
                "One of three equal workers is slowed to a quarter, later let go. Steps until two in a row take at most a "
                f"tenth longer than they do in the end: {needed} (slowed, let go; each run)."
            ),
            f"`{part['command']}`",
            "",
        ]
    return "\n".join(lines)


def plot(path: Path, data: Mapping[str, Any]) -> None:
    """Seconds of each step: speeds 1:2:4 beside the others, and a change in mid-run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = [part for part in ("uneven", "change") if part in data]
    if not parts:
        return
    figure, axes = pyplot.subplots(
        1, len(parts), figsize=(5 * len(parts), 3.2), squeeze=False, layout="constrained"
    )
    for ax, part in zip(axes[0], parts, strict=True):
        seen = set()
        for each in data[part]["runs"]:
            if each["name"] not in seen:
                seen.add(each["name"])
                steps = range(1, len(each["seconds"]) + 1)
                colour = "#1f6f8b" if each["name"] == "manyhands" else None
                ax.plot(steps, each["seconds"], label=each["name"], color=colour, linewidth=1.3)
            for at in each["changed_at"] if each is data[part]["runs"][0] else ():
                ax.axvline(at + 0.5, color="#888", linewidth=0.8, linestyle=":")
        ax.set_ylim(bottom=0)
        ax.set_xlabel("step")
        ax.set_title(
            {"uneven": "speeds 1:2:4", "change": "one worker slowed, let go"}[part], loc="left", fontsize=10
        )
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("seconds a step")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
