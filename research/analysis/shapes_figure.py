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
        styles = by_length(sorted({shape["seq_len"] for shape in shown}))
        for axes, (budget, title) in zip(panels, titles.items(), strict=True):
            _panel(axes, [shape for shape in shown if shape["at"][budget]], budget, styles)
            axes.set_title(title)
        panels[0].set_ylabel(f"held-out loss at context {found['context']} (nats/token)")
        said = "numbers: rows per step;  bars: lowest to highest seed;  dotted: as many rows"
        legend(figure, max(panels, key=lambda axes: len(axes.get_legend_handles_labels()[0])), said)
        save(figure, folder, "shapes")
    return [
        Picture("shapes", "Held-out loss by tokens per step and length of rows, at equal tokens and at equal steps")
    ]


def _panel(axes: Axes, shapes: list[Mapping[str, Any]], budget: str, styles: Mapping[int, dict[str, Any]]) -> None:
    order = list(styles)  # lengths a little apart, or bars of one size cover each other

    def place(shape: Mapping[str, Any]) -> float:
        return shape["tokens_per_step"] * 2 ** (0.09 * (order.index(shape["seq_len"]) - (len(order) - 1) / 2))

    for length, style in styles.items():
        curve = sorted((s for s in shapes if s["seq_len"] == length), key=lambda s: s["tokens_per_step"])
        losses = [shape["at"][budget]["mean"] for shape in curve]
        look = style | {"markeredgecolor": "white", "zorder": 3}
        if curve:
            axes.plot([place(shape) for shape in curve], losses, label=f"rows of {length:,} tokens", **look)
        falls = bool(losses) and losses[-1] < losses[0]
        for shape in curve:
            _mark(axes, place(shape), shape["at"][budget], str(shape["batch_size"]), style["color"], falls)
    for rows in sorted({shape["batch_size"] for shape in shapes}):
        same = sorted((s for s in shapes if s["batch_size"] == rows), key=lambda s: s["seq_len"])
        means = [shape["at"][budget]["mean"] for shape in same]
        axes.plot([place(shape) for shape in same], means, color=FAINT, ls=":", lw=1.1, zorder=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted({shape["tokens_per_step"] for shape in shapes})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.margins(x=0.1, y=0.08)
    axes.set_xlabel("tokens per step (log scale)")


def _mark(axes: Axes, place: float, entry: Mapping[str, Any], rows: str, color: str, falls: bool) -> None:
    """The range of the seeds, and the rows of a step below, on the side where the curve is not."""
    ends = [min(entry["by_seed"]), max(entry["by_seed"])]
    axes.plot([place] * 2, ends, color=color, lw=1.6, marker="_", zorder=2)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
    side = {"ha": "right", "xytext": (-6, -14)} if falls else {"ha": "left", "xytext": (7, -14)}
    axes.annotate(rows, (place, entry["mean"]), textcoords="offset points", fontsize=8.5, color=color, bbox=box, **side)
