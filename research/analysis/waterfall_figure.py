"""The figure of a waterfall study: rank and loss of each strategy at each stage, from results.json alone."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from research.analysis.page import Picture
from research.analysis.style import FAINT, INK, LOOK, save, styles_of

_WARNING = "#B03A00"


def picture(found: Mapping[str, Any]) -> Picture:
    """What the figure is called, and what it shows in words."""
    changes = ", ".join(map(str, found["changes"])) or "no stage"
    return Picture("waterfall", f"Ranks and losses of three strategies by stage; the ranking changes at {changes}")


def draw(analysis: Mapping[str, Any], folder: Path) -> list[Picture]:
    """waterfall.svg and .png in `folder`: ranks by stage, and losses above the lowest. None where nothing is ranked."""
    found = analysis.get("waterfall")
    stages = [stage for stage in found["stages"] if stage["order"]] if found else []
    if not stages:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(10.5, 7.2), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.25, 1))
        _ranks(above, stages)
        _gaps(below, stages)
        save(figure, folder, "waterfall")
    return [picture(found)]


def _ranks(axes: Axes, stages: Sequence[Mapping[str, Any]]) -> None:
    """A line a strategy through its ranks, each with its loss; a grey bar joins two that no difference is shown of."""
    places = range(len(stages))
    strategies = stages[0]["order"]
    styles = styles_of(strategies)
    for x, stage in zip(places, stages, strict=True):
        rank = {strategy: number for number, strategy in enumerate(stage["order"], 1)}
        for pair in stage["pairs"]:
            if not pair["shown"] and abs(rank[pair["a"]] - rank[pair["b"]]) == 1:
                axes.plot([x, x], [rank[pair["a"]], rank[pair["b"]]], color="#BDBDBD", linewidth=7, zorder=1)
    for strategy in strategies:
        ranks = [stage["order"].index(strategy) + 1 for stage in stages]
        axes.plot(places, ranks, **styles[strategy], linewidth=2.6, markersize=10, markeredgecolor="white", zorder=3)
        axes.annotate(
            strategy, (len(stages) - 1, ranks[-1]), (14, 0), textcoords="offset points", va="center",
            color=styles[strategy]["color"], fontweight="bold",
        )  # fmt: skip
        for x, stage in zip(places, stages, strict=True):
            row = next(row for row in stage["rows"] if row["strategy"] == strategy)
            label = f"{row['loss']:.3f}" + (f"\nfloor {row['floor']:.3f}" if "floor" in row else "")
            axes.annotate(
                label, (x, stage["order"].index(strategy) + 1), (0, -9), textcoords="offset points",
                ha="center", va="top", fontsize=9, zorder=4,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )  # fmt: skip
    _mark_leaks(axes, stages, label=True)
    for x, (before, stage) in enumerate(itertools.pairwise(stages)):
        if before["measure"] != stage["measure"]:
            axes.axvline(x + 0.5, color=FAINT, linewidth=1, linestyle=":")
            words = {"right": "own length  ", "left": f"  same targets, {stage['context']} tokens of context"}
            for side, said in words.items():
                axes.text(x + 0.5, 0.53, said, fontsize=9, ha=side, va="center", color="#666666")
    axes.set_ylim(len(strategies) + 0.55, 0.45)
    axes.yaxis.set_major_locator(FixedLocator(range(1, len(strategies) + 1)))
    axes.set_ylabel("rank by loss (1: lowest)")
    axes.set_xlim(-0.5, len(stages) + 0.05)
    axes.grid(visible=False)
    axes.set_title("Rank at each stage, and the loss it is by (nats/token); grey bar: no difference shown")


def _gaps(axes: Axes, stages: Sequence[Mapping[str, Any]]) -> None:
    """Loss minus the lowest of the stage, with intervals; linear near zero, logarithmic beyond."""
    strategies = stages[0]["order"]
    styles = styles_of(strategies)
    for number, strategy in enumerate(strategies):
        shift = 0.14 * (number - (len(strategies) - 1) / 2)
        for x, stage in enumerate(stages):
            row = next(row for row in stage["rows"] if row["strategy"] == strategy)
            gap = row["loss"] - stage["rows"][0]["loss"]
            style = {name: value for name, value in styles[strategy].items() if name != "linestyle"}
            if row["behind"] and row["behind"]["low"] is not None:
                low, high = row["behind"]["low"], row["behind"]["high"]
                ends = dict(marker="_", markersize=11, markeredgewidth=1.6)  # seen where the bar is behind the mark
                axes.plot([x + shift] * 2, [low, high], color=style["color"], linewidth=1.6, zorder=4, **ends)
            axes.plot(x + shift, gap, **style, linestyle="none", markersize=7, markeredgecolor="white", zorder=3)
    axes.axhline(0, color=FAINT, linewidth=1)
    axes.set_yscale("symlog", linthresh=0.05)
    ticks = [0, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    largest = max(row["loss"] - stage["rows"][0]["loss"] for stage in stages for row in stage["rows"])
    lows = [row["behind"]["low"] or 0 for stage in stages for row in stage["rows"] if row["behind"]]
    axes.set_ylim(min(-0.008, *lows, 0) * 1.2, max(0.1, largest) * 1.5)
    axes.set_ylabel("loss above the stage's lowest\n(nats/token; linear up to 0.05, then log)")
    labels = [f"{stage['number']}\n" + "\n".join(textwrap.wrap(stage["name"], 11)) for stage in stages]
    axes.set_xticks(range(len(stages)), labels)
    _mark_leaks(axes, stages, label=False)
    axes.set_xlabel("stage: each removes one confound of the one before; bars: 95 % intervals", color=INK)


def _mark_leaks(axes: Axes, stages: Sequence[Mapping[str, Any]], label: bool) -> None:
    for x, stage in enumerate(stages):
        if stage["leaking"]:
            axes.axvspan(x - 0.5, x + 0.5, color=_WARNING, alpha=0.09, linewidth=0, zorder=0)
            if label:
                axes.text(x, 0.53, "LEAKING", color=_WARNING, fontsize=9, ha="center", va="center", fontweight="bold")
