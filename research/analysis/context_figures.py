"""Figures of what contexts do, from the JSON values of an analysis: curves, places, and lengths against contexts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from research.analysis.style import INK, legend, length_of, name_of, note, trained_lengths

Styles = Mapping[str, dict[str, Any]]


def curves_figure(analysis: dict[str, Any], styles: Styles) -> Figure:
    """Loss on the same targets by context, and its paired difference from the longest strategy's at each context.

    Dotted and hollow: the raw model beyond its trained length. Thin and flat: a window that slides.
    """
    figure = Figure(figsize=(9.6, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    arms = [arm for arm in analysis["arms"] if arm["setting"] == "independent"]
    entries = [entry for entry in analysis["context"] if entry["setting"] == "independent"]
    for arm, entry in zip(arms, entries, strict=True):
        _curve(left, entry["curve"], styles[arm["strategy"]], name_of(arm), slides=True)
        if entry["against"]:
            _curve(right, entry["against"]["curve"], styles[arm["strategy"]], name_of(arm), slides=False)
    reference = next((entry["against"]["strategy"] for entry in entries if entry["against"]), None)
    if reference is None:
        right.set_visible(False)
    else:
        right.axhline(0, color=styles[reference]["color"], linewidth=1.6)
        right.set_title(f"Difference from {reference} (raw models)")
        right.set_ylabel("loss difference (nats/token)")
    left.set_title("Loss on the same targets (independent order)")
    left.set_ylabel("loss (nats/token)")
    for axes in (left, right):
        _context_axis(axes, [c["context"] for c in entries[0]["curve"]], arms, styles)
    marks = "dotted, hollow: raw, beyond the trained length T;  thin: sliding window"
    over = "seeds and documents" if any(len(arm["seeds"]) > 1 for arm in arms) else "documents (one seed)"
    said = f"bands (right): 95 %, {over};  {marks}" if right.collections else marks
    legend(figure, left, said, any(arm["own"]["leaking"] for arm in arms))
    return figure


def _curve(axes: Axes, curve: Sequence[dict], style: Mapping[str, Any], label: str, slides: bool) -> None:
    contexts = [c["context"] for c in curve]
    means = np.array([c["mean"] for c in curve])
    inside = sum(not c["beyond"] for c in curve)
    color = style["color"]
    if not slides and all(c["low"] is not None for c in curve):
        edges = [[c[end] for c in curve] for end in ("low", "high")]
        axes.fill_between(contexts, *edges, color=color, alpha=0.13, lw=0)
    beyond = slice(max(inside - 1, 0), None)
    axes.plot(contexts[beyond], means[beyond], color=color, linewidth=1.3, linestyle=":")
    axes.plot(contexts[inside:], means[inside:], style["marker"], color=color, markerfacecolor="white")
    axes.plot(contexts[:inside], means[:inside], label=label, markeredgecolor="white", **style)
    if slides and 0 < inside < len(curve):
        axes.plot([contexts[inside - 1], contexts[-1]], [means[inside - 1]] * 2, color=color, linewidth=0.9)


def _context_axis(axes: Axes, contexts: Sequence[int], arms: Sequence[dict], styles: Styles) -> None:
    """A log axis of contexts, with each strategy's trained length marked at its foot."""
    axes.margins(y=0.16)
    axes.set_xscale("log", base=2)
    longest = max([*contexts, *(arm["seq_len"] for arm in arms)])
    axes.set_xlim(min(contexts) / 1.4, longest * 1.5)
    axes.xaxis.set_major_locator(FixedLocator(contexts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("context before each target (tokens, log scale)")
    trained_lengths(axes, arms, styles)


PLACES = {"window": "In windows of the trained length", "place": "In the document"}
_TOKENS_OF = {"window": "window", "place": "document"}


def places_figure(analysis: dict[str, Any], styles: Styles) -> Figure | None:
    """Loss by the number of tokens before a target: in windows of the trained length, and in its document.

    None where nothing is known of either. Bins of too few windows or documents for an interval are left out; where no
    bin can have one, as windows are of one text and may overlap, means of windows are drawn alone.
    """
    arms = [arm for arm in analysis["arms"] if arm["setting"] == "independent"]
    entries = [entry for entry in analysis["context"] if entry["setting"] == "independent"]
    sure = {kind: any(b["low"] is not None for entry in entries for b in entry[kind]) for kind in PLACES}
    kinds = [kind for kind in PLACES if sure[kind] or (kind == "window" and any(entry[kind] for entry in entries))]
    if not kinds:
        return None
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    means = []
    for axes, kind in zip(panels, kinds, strict=True):
        for arm, entry in zip(arms, entries, strict=True):
            bins = [b for b in entry[kind] if b["low"] is not None or not sure[kind]]
            _bins(axes, bins, styles[arm["strategy"]], name_of(arm), sure[kind])
            means += [b["mean"] for b in bins]
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}")
        axes.set_title(PLACES[kind])
        axes.set_xlabel(f"tokens of the {_TOKENS_OF[kind]} before a target (log scale)")
    panels[0].set_ylim(min(means) - 0.6, max(means) + 0.6)
    panels[0].set_ylabel("loss (nats/token)")
    bands = "bands: 95 %, seeds and windows or documents;  bins of fewer than 6 of these left out"
    said = f"bins of powers of two;  {bands if any(sure.values()) else 'no bands: windows of one text'}"
    legend(figure, panels[0], said, any(arm["own"]["leaking"] for arm in arms))
    return figure


def _bins(axes: Axes, bins: Sequence[dict], style: Mapping[str, Any], label: str, sure: bool) -> None:
    middle = [(b["from"] * (b["to"] + 1)) ** 0.5 for b in bins]
    axes.plot(middle, [b["mean"] for b in bins], label=label, markeredgecolor="white", **style)
    if sure:
        edges = [[b[end] for b in bins] for end in ("low", "high")]
        axes.fill_between(middle, *edges, color=style["color"], alpha=0.1, lw=0)


def matrix_figure(analysis: dict[str, Any]) -> Figure:
    """Trained length against context at evaluation: mean losses as a heat map, hatched beyond the trained length."""
    arms = sorted((a for a in analysis["arms"] if a["setting"] == "independent"), key=lambda arm: arm["seq_len"])
    contexts = [str(c) for c in analysis["contexts"]]
    loss_AC = np.array([[arm["contexts"][c]["mean"] for c in contexts] for arm in arms])
    figure = Figure(figsize=(9.6, 1.5 + 0.62 * len(arms)), layout="constrained")
    axes = figure.subplots()
    image = axes.pcolormesh(loss_AC, cmap="cividis_r", edgecolors="white", linewidth=2)
    middle = (loss_AC.min() + loss_AC.max()) / 2
    for row, arm in enumerate(arms):
        for column, c in enumerate(contexts):
            beyond = arm["contexts"][c]["beyond"]
            dark = loss_AC[row, column] > middle
            ink = "white" if dark else INK
            text = f"{loss_AC[row, column]:.3f}" + ("*" if beyond else "")
            weight = "normal" if beyond else "bold"
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=ink, fontsize=10, weight=weight)
    axes.set_xticks(np.arange(len(contexts)) + 0.5, [f"{int(c):,}" for c in contexts])
    axes.set_yticks(np.arange(len(arms)) + 0.5, [f"{arm['strategy']}  {length_of(arm)}" for arm in arms])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.set_xlabel("context before each target at evaluation (tokens)")
    bar = figure.colorbar(image, ax=axes, pad=0.015)
    bar.set_label("loss (nats/token)")
    bar.outline.set_visible(False)
    note(figure, "*: beyond the trained length, the raw model", any(arm["own"]["leaking"] for arm in arms))
    return figure
