"""The figure of a tuning: loss by value, a curve a strategy, from results.json alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from research.analysis.page import Picture
from research.analysis.style import FAINT, LOOK, legend, save, styles_of, with_shape


def draw(study: Mapping[str, Any], found: Mapping[str, Any], folder: Path) -> list[Picture]:
    """tuning.svg and .png in `folder`; nothing where fewer than two values of a strategy have a loss."""
    curves = {s: [e for e in grid["tried"] if e["loss"] is not None] for s, grid in found["grids"].items()}
    curves = {strategy: tried for strategy, tried in curves.items() if len(tried) > 1}
    if not curves:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    values = sorted({entry["value"] for tried in curves.values() for entry in tried})
    styles = styles_of(list(curves))
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(8.6, 5.2), layout="constrained")
        axes = figure.subplots()
        for number, (strategy, tried) in enumerate(curves.items()):
            grid, style = found["grids"][strategy], styles[strategy]
            apart = 2 ** (0.06 * (number - (len(curves) - 1) / 2))  # or bars of one value cover each other
            label = with_shape(strategy, grid["shape"])
            axes.plot([apart * e["value"] for e in tried], [e["loss"] for e in tried], **style, label=label, zorder=3)
            best = next(entry for entry in tried if entry["value"] == grid["best"])
            for entry in tried:
                if entry["above"] and entry["above"]["low"] is not None:
                    ends = [best["loss"] + entry["above"][end] for end in ("low", "high")]
                    bar = dict(color=style["color"], linewidth=1.4, marker="_", zorder=2)
                    axes.plot([apart * entry["value"]] * 2, ends, **bar)
            axes.plot(
                apart * best["value"], best["loss"], marker="o", markersize=16, markerfacecolor="none", zorder=4,
                markeredgecolor=style["color"], markeredgewidth=1.6,
            )  # fmt: skip
        for value in dict.fromkeys(grid["given"] for grid in found["grids"].values()):
            axes.axvline(value, color=FAINT, linewidth=1, linestyle=":", zorder=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(values))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.margins(x=0.08, y=0.1)
        axes.set_xlabel(f"config.{study['field']} (log scale)")
        axes.set_ylabel(f"held-out loss at context {found['context']} (nats/token)")
        said = "ring: lowest of its strategy;  dotted: the config's value;  bars: 95 %, difference from the lowest"
        legend(figure, axes, f"{said};  seed {study['seed']}")
        save(figure, folder, "tuning")
    best = ", ".join(f"{s} {grid['best']:g}" for s, grid in found["grids"].items() if grid["best"] is not None)
    return [Picture("tuning", f"Held-out loss by {study['field']}; lowest: {best}")]
