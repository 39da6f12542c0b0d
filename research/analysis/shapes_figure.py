"""The figure of a study of shapes: loss by tokens per step, a curve a length, at equal tokens and at equal steps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from research.analysis.page import Picture
from research.analysis.style import FAINT, LOOK, by_length, legend, save


def draw(results: Mapping[str, Any], folder: Path) -> list[Picture]:
    """shapes.svg and .png in `folder`; nothing where no shape has a loss."""
    study, found = results["study"], results["analysis"]
    shown = [shape for shape in found["shapes"] if any(shape["at"].values())]
    if not shown:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    titles = {
        "tokens": f"at equal tokens: {study['tokens']:,} each",
        "steps": f"at equal steps: {study['steps']:,} each",
    }
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(9.6, 5.0), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (budget, title) in zip(panels, titles.items(), strict=True):
            _panel(axes, [shape for shape in shown if shape["at"][budget]], budget)
            axes.set_title(title)
        panels[0].set_ylabel(f"held-out loss at context {found['context']} (nats/token)")
        said = "numbers: rows per step;  bars: lowest to highest seed;  dotted: as many rows"
        legend(figure, panels[0], said)
        save(figure, folder, "shapes")
    return [
        Picture("shapes", "Held-out loss by tokens per step and length of rows, at equal tokens and at equal steps")
    ]


def _panel(axes: Axes, shapes: list[Mapping[str, Any]], budget: str) -> None:
    lengths = sorted({shape["seq_len"] for shape in shapes})
    styles = by_length(lengths)
    for number, length in enumerate(lengths):
        curve = sorted((s for s in shapes if s["seq_len"] == length), key=lambda s: s["tokens_per_step"])
        apart = 2 ** (0.09 * (number - (len(lengths) - 1) / 2))  # or bars of one size cover each other
        places = [apart * shape["tokens_per_step"] for shape in curve]
        losses = [shape["at"][budget]["mean"] for shape in curve]
        axes.plot(
            places, losses, **styles[length], label=f"rows of {length:,} tokens", markeredgecolor="white", zorder=3
        )
        for place, shape in zip(places, curve, strict=True):
            entry = shape["at"][budget]
            ends = [min(entry["by_seed"]), max(entry["by_seed"])]
            axes.plot([place] * 2, ends, color=styles[length]["color"], lw=1.6, marker="_", zorder=2)
            axes.annotate(
                f"{shape['batch_size']}", (place, entry["mean"]), (8, -13), textcoords="offset points", fontsize=8.5,
                color=styles[length]["color"], zorder=4, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
            )  # fmt: skip
    for rows in sorted({shape["batch_size"] for shape in shapes}):
        same = sorted((s for s in shapes if s["batch_size"] == rows), key=lambda s: s["seq_len"])
        apart = [2 ** (0.09 * (lengths.index(s["seq_len"]) - (len(lengths) - 1) / 2)) for s in same]
        places = [shape["tokens_per_step"] * a for shape, a in zip(same, apart, strict=True)]
        axes.plot(places, [s["at"][budget]["mean"] for s in same], color=FAINT, ls=":", lw=1.1, zorder=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted({shape["tokens_per_step"] for shape in shapes})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.margins(x=0.1, y=0.08)
    axes.set_xlabel("tokens per step (log scale)")
