"""Tables and plots of the comparison of methods, from what its slices have measured."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from methods_catalogue import RATES, catalogue

SHOWN = {
    "10gbit": "10 Gbit/s",
    "1gbit": "1 Gbit/s",
    "100mbit": "100 Mbit/s",
    "20mbit": "20 Mbit/s",
    "5mbit": "5 Mbit/s",
    "2.5mbit": "2.5 Mbit/s",
}
ALONE, ALONE_PEERS = "no communication", "PyTorch, no communication"
BYTES_OF = "PyTorch DDP, bf16 hook"  # whose bytes the others are held against
TIME_OF = ("PyTorch DDP", "ddp")  # whose time: of the first that was timed
LOSS_OF = "ddp"  # whose loss
WITHIN = 1.01  # of that loss: the common loss
MOST_OTHERS = 0.15  # share of the machine that others may have used during a sample
DRAWN = (  # in the plots of loss against time; where fewer than two of them were timed, all that were
    "PyTorch DDP",
    "PyTorch DDP, bf16 hook",
    "PyTorch DDP, PowerSGD hook",
    "torchft DiLoCo",
    "demo",
    "streaming-diloco",
    "sparseloco",
)


class Results:
    """What was measured, by method.

    Attributes:
        order: the names of all methods that have a figure, in the catalogue's order.
        speeds: (method, workers, rate) -> samples; the rate of workers apart is "none". Samples during which others used
            the machine are left out.
        bytes: (method, workers) -> what the busiest host sent in a step over a limited link, of all samples.
        losses: method -> quality runs of the size that most methods have.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        methods = {m.name: m for m in catalogue("python")}
        self.speeds: dict[tuple[str, int, str], list[dict[str, Any]]] = defaultdict(list)
        self.bytes: dict[tuple[str, int], list[float]] = defaultdict(list)
        self.losses: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        self.large: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        for one in data.get("rates", []):
            if one["method"] not in methods or one["strategy"] != methods[one["method"]].strategy:
                continue
            if RATES.get(one["rate"], 1e9) <= 100e6:
                self.bytes[one["method"], one["workers"]].append(max(one["sent_bytes_per_step"]))
            if one["others_share"] <= MOST_OTHERS:
                self.speeds[one["method"], one["workers"], one["rate"]].append(one)
        for one in data.get("quality", []):
            if one["method"] in methods and one["strategy"] == methods[one["method"]].strategy:
                by = self.large if one["size"] == "large" else self.losses
                by[one["method"]][one["seed"]] = one  # the last of a seed counts
        measured = {name for name, _ in self.bytes} | {name for name, _, _ in self.speeds} | set(self.losses)
        self.order = [name for name in methods if name in measured]
        self.methods = methods
        self.shown = {
            rate: title for rate, title in SHOWN.items() if any(r == rate for _, _, r in self.speeds)
        }
        self.worlds = sorted({world for _, world, _ in self.speeds} | {world for _, world in self.bytes})

    def speed(self, name: str, world: int, rate: str) -> float | None:
        """Median tokens/s over samples."""
        samples = self.speeds.get((name, world, rate), [])
        return statistics.median(s["tokens_per_s"] for s in samples) if samples else None

    def share(self, name: str, world: int, rate: str) -> float | None:
        """Of the speed that its own program reached without communication, nearest in time; median over samples."""
        own = ALONE if self.methods[name].ours else ALONE_PEERS
        alone = self.speeds.get((own, world, "none"), [])
        mine = self.speeds.get((name, world, rate), [])
        if not alone or not mine:
            return None

        def nearest(sample: Mapping[str, Any]) -> Mapping[str, Any]:
            return min(alone, key=lambda each: abs(_seconds(each) - _seconds(sample)))

        return statistics.median(m["tokens_per_s"] / nearest(m)["tokens_per_s"] for m in mine)

    def sent(self, name: str, world: int) -> float | None:
        """Bytes a step that the busiest host sent; median over samples."""
        values = self.bytes.get((name, world), [])
        return statistics.median(values) if values else None

    def loss(self, name: str, seeds: Sequence[int] | None = None) -> list[float]:
        runs = self.losses.get(name, {})
        return [runs[s]["eval_loss"] for s in sorted(runs) if seeds is None or s in seeds]

    def against(self, name: str) -> float | None:
        """Mean over common seeds of loss / the reference's loss, less 1."""
        mine, theirs = self.losses.get(name, {}), self.losses.get(LOSS_OF, {})
        common = sorted(mine.keys() & theirs.keys())
        if not common:
            return None
        return statistics.mean(mine[s]["eval_loss"] / theirs[s]["eval_loss"] for s in common) - 1

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(tokens, held-out loss), the mean over seeds. Methods of equal mathematics share one where one was not run."""
        runs = list(self.losses.get(name, {}).values()) or list(
            self.losses.get(self._twin(name), {}).values()
        )
        found = []
        for points in zip(*(r["evaluations"] for r in runs), strict=False):
            step, per_step = points[0][0], runs[0]["tokens"] / runs[0]["steps"]
            found.append((step * per_step, statistics.mean(loss for _, loss in points)))
        return found

    def _twin(self, name: str) -> str:
        return {"PyTorch DDP": "ddp", "PyTorch DDP, bf16 hook": "ddp, bf16", "zero1": "ddp"}.get(name, name)

    def tokens_to(self, name: str, target: float) -> float | None:
        """Tokens until the held-out loss is at `target`, between evaluations in a straight line; None: never."""
        before: tuple[float, float] | None = None
        for tokens, loss in self.curve(name):
            if loss <= target:
                if before is None:
                    return tokens
                part = (before[1] - target) / (before[1] - loss)
                return before[0] + part * (tokens - before[0])
            before = (tokens, loss)
        return None

    def target(self) -> float:
        return WITHIN * statistics.mean(self.loss(LOSS_OF)) if self.losses.get(LOSS_OF) else 0.0


def write(output: Path) -> None:
    """``methods.md`` and ``methods.png`` beside ``methods.json``."""
    data = json.loads(output.with_suffix(".json").read_text())
    results = Results(data)
    output.with_suffix(".md").write_text(markdown(data, results))
    plot(output.with_suffix(".png"), results)
    print(output.with_suffix(".md").read_text())


def markdown(data: Mapping[str, Any], results: Results) -> str:
    machine = data["machine"]
    lines = [
        "# Methods over limited links",
        "",
        (
            f"{machine.get('cpu', '')}, {machine.get('cores', '')} cores, torch {machine['versions'].get('torch')}. "
            "Made by `python benchmarks/methods.py report`; how it is measured is in benchmarks/README.md."
        ),
    ]
    if data.get("note"):
        lines += ["", f"**{data['note']}**"]
    for world in results.worlds:
        lines += ["", *_speed_table(results, world)]
    lines += ["", *_loss_table(results)]
    if results.large:
        lines += ["", *_large_table(results)]
    for world in results.worlds:
        lines += ["", *_time_table(results, world)]
    return "\n".join(lines) + "\n"


def _speed_table(results: Results, world: int) -> list[str]:
    base = results.sent(BYTES_OF, world)
    rows = [
        f"## Tokens/s, {world} workers, 30M parameters",
        "",
        (
            "In brackets: share of what the same program reached with no communication, nearest in time. "
            "Bytes: what the busiest host sends, "
            "headers included, at 100 Mbit/s and less."
        ),
        "",
        f"| method | {' | '.join(results.shown.values())} | kB/step | fewer than bf16 DDP |",
        "|---|" + "--:|" * (len(results.shown) + 2),
    ]
    for name in results.order:
        if results.methods[name].apart:
            if speed := results.speed(name, world, "none"):
                rows.append(f"| *{name}* |" + f" {speed:,.0f} |" * len(results.shown) + " 0 | |")
            continue
        cells = []
        for rate in results.shown:
            speed, share = results.speed(name, world, rate), results.share(name, world, rate)
            cells.append("" if speed is None else f"{speed:,.0f} ({share:.0%})" if share else f"{speed:,.0f}")
        sent = results.sent(name, world)
        if not any(cells) and sent is None:
            continue
        fewer = f"{base / sent:,.3g} ×" if base and sent else ""
        rows.append(f"| {name} | {' | '.join(cells)} | {_kb(sent)} | {fewer} |")
    return rows


def _kb(sent: float | None) -> str:
    if sent is None:
        return ""
    return f"{sent / 1e3:,.0f}" if sent >= 1e5 else f"{sent / 1e3:.3g}"


def _loss_table(results: Results) -> list[str]:
    runs = next(iter(results.losses[LOSS_OF].values()), None) if results.losses.get(LOSS_OF) else None
    if runs is None:
        return []
    rows = [
        f"## Held-out loss after {runs['tokens']:,} tokens, {runs['workers']} workers, size *{runs['size']}*",
        "",
        "| method | loss, mean over seeds | spread | against ddp | seeds | strategy |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for name in results.order:
        losses = results.loss(name)
        if not losses:
            continue
        apart = results.against(name)
        rows.append(
            f"| {name} | {statistics.mean(losses):.4f} | {max(losses) - min(losses):.4f} | "
            f"{'' if apart is None else f'{apart:+.2%}'} | {len(losses)} | {_code(results.methods[name].strategy)} |"
        )
    return rows


def _code(strategy: str) -> str:
    return f"`{strategy}`" if strategy else ""


def _large_table(results: Results) -> list[str]:
    first = next(iter(next(iter(results.large.values())).values()))
    rows = [
        f"## The same with 30M parameters, after {first['tokens']:,} tokens",
        "",
        "| method | held-out loss | against ddp | seeds |",
        "|---|--:|--:|--:|",
    ]
    base = results.large.get(LOSS_OF, {})
    for name in results.order:
        runs = results.large.get(name, {})
        if not runs:
            continue
        common = sorted(runs.keys() & base.keys())
        ratio = [runs[s]["eval_loss"] / base[s]["eval_loss"] - 1 for s in common]
        mean = statistics.mean(r["eval_loss"] for r in runs.values())
        rows.append(
            f"| {name} | {mean:.4f} | {f'{statistics.mean(ratio):+.2%}' if ratio else ''} | {len(runs)} |"
        )
    return rows


def _time_table(results: Results, world: int) -> list[str]:
    target = results.target()
    if not target:
        return []
    timed = [n for n in TIME_OF if any(results.speed(n, world, rate) for rate in results.shown)]
    whose = (timed or TIME_OF)[0]
    rows = [
        f"## Seconds to a common loss ({target:.4f}: {WITHIN - 1:.0%} above ddp's last), {world} workers",
        "",
        (
            "Tokens that the loss needs (size *small*, 2 workers) over the tokens/s above (30M parameters). "
            f"In brackets: times faster than {whose} at that rate."
        ),
        "",
        f"| method | tokens | {' | '.join(results.shown.values())} |",
        "|---|" + "--:|" * (len(results.shown) + 1),
    ]
    reference = results.tokens_to(whose, target)
    for name in results.order:
        if results.methods[name].apart or not results.curve(name):
            continue
        needed = results.tokens_to(name, target)
        if needed is None:
            rows.append(f"| {name} | not reached |" + " |" * len(results.shown))
            continue
        cells = []
        for rate in results.shown:
            speed, theirs = results.speed(name, world, rate), results.speed(whose, world, rate)
            if speed is None:
                cells.append("")
            elif theirs is None or reference is None:
                cells.append(f"{needed / speed:,.0f}")
            else:
                cells.append(f"{needed / speed:,.0f} ({reference / theirs / (needed / speed):.3g} ×)")
        rows.append(f"| {name} | {needed / 1e6:.2f}M | {' | '.join(cells)} |")
    return rows


def plot(path: Path, results: Results, *, world: int = 2) -> None:
    """Loss against time at each rate; tokens/s of each method and rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure = plt.figure(figsize=(15, 13), layout="constrained")
    grid = figure.add_gridspec(2, max(1, len(results.shown)), height_ratios=[1, 1.9])
    timed = [
        name
        for name in results.order
        if results.curve(name) and any(results.speed(name, world, rate) for rate in results.shown)
    ]
    drawn = [name for name in DRAWN if name in timed]
    drawn = drawn if len(drawn) > 1 else timed
    colours = dict(zip(drawn, plt.get_cmap("tab10").colors, strict=False))
    shared = None
    for column, (rate, title) in enumerate(results.shown.items()):
        axes = figure.add_subplot(grid[0, column], sharey=shared)
        shared = shared or axes
        for name in drawn:
            if speed := results.speed(name, world, rate):
                times = [tokens / speed for tokens, _ in results.curve(name)]
                losses = [loss for _, loss in results.curve(name)]
                axes.plot(times, losses, "o-", ms=3, lw=1.5, color=colours[name], label=name)
        if results.target():
            axes.axhline(results.target(), color="grey", lw=0.8, ls="--")
        axes.set(title=title, xlabel="seconds (log)", xscale="log")
        axes.xaxis.set_minor_formatter(NullFormatter())  # a span below a decade would be crowded
        if column == 0:
            axes.set_ylabel("held-out loss (tokens of the small model\nat the speed of the large one)")
    lines = [plt.Line2D([], [], color=colours[name], marker="o", ms=3, label=name) for name in drawn]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines) or 1, fontsize=9)
    axes = figure.add_subplot(grid[1, :])
    _bars(axes, results, world)
    figure.suptitle(
        f"{world} workers, each on a core of its own behind a link of the given rate; GPT-2 of 30M parameters, wikitext2"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axes: Any, results: Results, world: int) -> None:
    names = [n for n in results.order if any(results.speed(n, world, r) for r in results.shown)][::-1]
    shades = ["#08306b", "#2171b5", "#6baed6", "#c6dbef", "#fdae6b", "#e6550d"]
    height = 0.8 / max(1, len(results.shown))
    for i, (rate, title) in enumerate(results.shown.items()):
        speeds = [results.speed(n, world, rate) or 0 for n in names]
        places = [y + ((len(results.shown) - 1) / 2 - i) * height for y in range(len(names))]
        axes.barh(places, speeds, height, color=shades[i], label=title)
    if most := results.speed(ALONE, world, "none"):
        axes.axvline(most, color="black", lw=1, ls="--", label=f"{ALONE} (manyhands)")
    if most := results.speed(ALONE_PEERS, world, "none"):
        axes.axvline(most, color="grey", lw=1, ls=":", label=f"{ALONE} (PyTorch)")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="tokens/s", title="Speed")
    axes.margins(y=0.01)
    axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=6)


def _seconds(sample: Mapping[str, Any]) -> float:
    """When a sample ended."""
    return datetime.strptime(sample["at"], "%Y-%m-%d %H:%M:%SZ").timestamp() if "at" in sample else 0.0
