"""The figures of a report, as SVG and PNG, from the JSON values of its analysis alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator, PercentFormatter

from research.analysis import context_figures, noise, noise_report
from research.analysis.page import Picture
from research.analysis.style import FAINT, INK, LOOK, legend, length_of, name_of, save, styles_of, trained_lengths

Styles = Mapping[str, dict[str, Any]]
ALTS = {
    "curves": "Held-out loss of the same targets by context, and its difference between strategies",
    "budgets": "Held-out loss against tokens, FLOPs and train seconds",
    "decomposition": "Differences between strategies, split into row length and diversity",
    "places": "Loss by place in the window and in the document",
    "matrix": "Held-out loss by trained length and context at evaluation",
    "noise": "Variance of the gradient and noise scale by the rows' length",
    "recall": "Accuracy on the recall task by distance",
    "costs": "Step time, tokens per second and memory",
}


def draw(analysis: dict[str, Any], folder: Path) -> dict[str, Picture]:
    """Draws into `folder` what the analysis has numbers for: name -> picture (`<name>.svg`, `<name>.png`)."""
    names = dict.fromkeys(entry["strategy"] for entry in (*analysis["arms"], *analysis["recall"]))
    styles = styles_of(list(names))
    drawn = {}
    with matplotlib.rc_context(LOOK):
        for name, figure in _figures(analysis, styles).items():
            folder.mkdir(parents=True, exist_ok=True)
            save(figure, folder, name)
            leaking = name != "costs" and any(arm["own"]["leaking"] for arm in analysis["arms"])
            drawn[name] = Picture(name, ALTS[name] + (" (LEAKING)" if leaking else ""))
    return drawn


def _figures(analysis: dict[str, Any], styles: Styles) -> dict[str, Figure]:
    figures = {}
    if any(arm["setting"] == "independent" for arm in analysis["arms"]):
        figures["curves"] = context_figures.curves_figure(analysis, styles)
        if places := context_figures.places_figure(analysis, styles):
            figures["places"] = places
        figures["matrix"] = context_figures.matrix_figure(analysis)
        figures["costs"] = costs_figure(analysis, styles)
    if analysis["budgets"]:
        figures["budgets"] = budgets_figure(analysis, styles)
    if analysis["decomposition"]:
        figures["decomposition"] = decomposition_figure(analysis)
    if analysis.get("noise"):
        figures["noise"] = noise_report.figure(analysis["noise"], styles, noise.tokens_per_step(analysis))
    if analysis["recall"]:
        figures["recall"] = recall_figure(analysis, styles)
    return figures


def budgets_figure(analysis: dict[str, Any], styles: Styles) -> Figure:
    """Held-out loss against three budgets: mean over seeds, band from lowest to highest seed, crossings marked."""
    found, arms = analysis["budgets"], {a["strategy"]: a for a in analysis["arms"] if a["setting"] == "independent"}
    figure = Figure(figsize=(9.6, 4.1), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, axis, label in zip(
        panels, ("tokens", "flops", "seconds"), ("tokens", "training FLOPs", "train time (s)"), strict=True
    ):
        for curve in found["curves"][axis]:
            runs = [dict(zip(*run, strict=True)) for run in zip(curve["x"], curve["y"], strict=True)]
            x = sorted(set.intersection(*map(set, runs)))  # where every seed was evaluated
            y = np.array([[run[at] for at in x] for run in runs])
            style = styles[curve["strategy"]]
            axes.plot(x, y.mean(axis=0), label=name_of(arms[curve["strategy"]]), markeredgecolor="white", **style)
            axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=style["color"], alpha=0.18, lw=0)
        for crossing in found["crossings"]:
            if crossing["axis"] == axis:
                axes.axvline(crossing["at"], color=FAINT, linewidth=1, linestyle=(0, (2, 2)))
        axes.set_xlim(left=0)
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    entropy = next(iter(arms.values()))["unigram_entropy"]
    lowest = min(min(y) for curve in found["curves"]["tokens"] for y in curve["y"])
    highest = max(entropy, max(min(y) for curve in found["curves"]["tokens"] for y in curve["y"]))
    room = highest - min(lowest, entropy)
    panels[0].set_ylim(min(lowest, entropy) - 0.06 * room, highest + 0.25 * room)
    for axes in panels:
        axes.axhline(entropy, color=FAINT, linestyle=":", linewidth=1.5)
    place = dict(xycoords=("axes fraction", "data"), textcoords="offset points", ha="right")
    panels[0].annotate(f"unigram entropy {entropy:.2f}", (1, entropy), (-2, 3), fontsize=9, color="#666666", **place)
    panels[0].set_ylabel(f"held-out loss at context {found['context']}\n(nats/token)")
    leaking = any(arm["own"]["leaking"] for arm in arms.values())
    notes = ["bands: lowest to highest seed"] if any(len(c["y"]) > 1 for c in found["curves"]["tokens"]) else []
    notes += ["vertical lines: two curves cross"] if found["crossings"] else []
    legend(figure, panels[0], ";  ".join(notes), leaking)
    return figure


def decomposition_figure(analysis: dict[str, Any]) -> Figure:
    """For each pair, at the longest shared context: the total difference, and its parts, with 95 % intervals."""
    at = max(entry["at"] for entry in analysis["decomposition"])
    entries = [entry for entry in analysis["decomposition"] if entry["at"] == at]
    looks = {  # colours that no strategy has
        "total": ("total", INK, "o"),
        "length": ("row length", "#7A4EA3", "s"),
        "diversity": ("diversity of places", "#9A7200", "^"),
    }
    figure = Figure(figsize=(9.6, 1.7 + 0.75 * len(entries)), layout="constrained")
    axes = figure.subplots()
    for row, entry in enumerate(entries):
        for offset, (part, (name, color, marker)) in zip((-0.24, 0, 0.24), looks.items(), strict=True):
            value, label = entry[part], name if row == 0 else None
            if value["low"] is not None:
                axes.plot([value["low"], value["high"]], [row + offset] * 2, color=color, linewidth=2.4, alpha=0.5)
            axes.plot(value["mean"], row + offset, marker, color=color, label=label, markersize=8, linestyle="none")
            better = value["mean"] < 0  # the number stands on the side away from zero
            end = value["low" if better else "high"]
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            text = dict(textcoords="offset points", va="center", fontsize=9, color=color, bbox=box)
            text |= dict(xytext=(-6, 0), ha="right") if better else dict(xytext=(6, 0))
            axes.annotate(f"{value['mean']:+.2f}", (value["mean"] if end is None else end, row + offset), **text)
    axes.axvline(0, color=FAINT, linewidth=1.2)
    axes.set_yticks(range(len(entries)), [f"{entry['a']}\nminus {entry['b']}" for entry in entries])
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.margins(x=0.09)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"difference in held-out loss at context {at} (nats/token); negative: the first is better")
    legend(
        figure, axes, "total = row length (paired order: the same tokens per step) + diversity (the rest);  bars: 95 %"
    )
    return figure


def recall_figure(analysis: dict[str, Any], styles: Styles) -> Figure:
    """Accuracy by the distance to where the key was last said: whole documents, and windows of the trained length."""
    figure = Figure(figsize=(9.6, 4.1), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    thin = dict(linewidth=0.9, markersize=4, alpha=0.55, markeredgewidth=0)
    for axes, suite, title in zip(
        panels, ("raw", "window"), ("Whole documents (raw model)", "Windows of the trained length"), strict=True
    ):
        for entry in analysis["recall"]:
            style = styles[entry["strategy"]]
            middle = [(b["from"] * (b["to"] + 1)) ** 0.5 for b in entry[suite]]
            label = f"{entry['strategy']}  {length_of(entry)}"
            axes.plot(middle, [b["mean"] for b in entry[suite]], label=label, markeredgecolor="white", **style)
            seeds = list(zip(*(b["by_seed"] for b in entry[suite]), strict=True))
            for seed in seeds if len(seeds) > 1 else ():
                axes.plot(middle, seed, style["marker"], linestyle="-", color=style["color"], **thin)
            if len(seeds) == 1:
                edges = [[b[end] for b in entry[suite]] for end in ("low", "high")]
                axes.fill_between(middle, *edges, color=style["color"], alpha=0.15, lw=0)
        trained_lengths(axes, analysis["recall"], styles)
        axes.axhline(analysis["recall"][0]["chance"], color=FAINT, linestyle=":", linewidth=1.5)
        axes.set_xscale("log", base=2)
        bins = analysis["recall"][0][suite]
        middle = [(b["from"] * (b["to"] + 1)) ** 0.5 for b in bins]
        axes.set_xlim(bins[0]["from"] / 1.1, (bins[-1]["to"] + 1) * 1.25)
        axes.set_xticks(middle, [f"{b['from']}–{b['to']}" for b in bins])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(-0.12, 1.03)
        axes.set_xlabel("tokens since the key was last said (log scale)")
        axes.set_title(title)
    chance = analysis["recall"][0]["chance"]
    place = dict(xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=9, color="#666666")
    panels[0].annotate(f"chance {chance:.0%}", (0, chance), (5, 3), **place)
    panels[0].set_ylabel("answers that are right")
    several = any(len(entry["seeds"]) > 1 for entry in analysis["recall"])
    marks = "thin: single seeds, bold: their mean" if several else "bands: 95 % (Wilson)"
    note = f"{marks};  T: trained length"
    legend(figure, panels[0], note)
    return figure


def costs_figure(analysis: dict[str, Any], styles: Styles) -> Figure:
    """Median step time with its 10th to 90th percentile, tokens per second, and memory."""
    arms = [arm for arm in analysis["arms"] if arm["setting"] == "independent"]
    figure = Figure(figsize=(9.6, 1.3 + 0.65 * len(arms)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for place, arm in enumerate(arms):
        color, (low, high) = styles[arm["strategy"]]["color"], arm["step_spread"]
        panels[0].plot([low, high], [place] * 2, color=color, linewidth=4, alpha=0.35)
        panels[0].plot(arm["step_seconds"], place, "o", color=color, markersize=8)
        _value(panels[0], max(high, arm["step_seconds"]), place, f"{arm['step_seconds']:.3g}", offset=8)
        panels[1].barh(place, arm["tokens_per_second"], color=color, height=0.55)
        _value(panels[1], arm["tokens_per_second"], place, f"{arm['tokens_per_second']:,.0f}")
        memory = arm["memory_bytes"]
        size = memory.get("device_peak") or memory.get("compiled_step")
        if size is not None:
            panels[2].barh(place, size / 1e9, color=color, height=0.55)
            kind = "device" if memory.get("device_peak") else "compiled step"
            _value(panels[2], size / 1e9, place, f"{size / 1e9:.2f} {kind}")
    panels[0].set_xlim(0, 1.25 * max(arm["step_spread"][1] for arm in arms))
    panels[1].set_xlim(0, 1.35 * max(arm["tokens_per_second"] for arm in arms))
    panels[2].set_xlim(0, 2.0 * (panels[2].get_xlim()[1] or 1))
    panels[1].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.get_layout_engine().set(w_pad=0.14)  # the last label of a panel, and the first of the next
    middle = "median; mean where rows grow" if any(arm.get("stages") for arm in arms) else "median"
    titles = ("Step time", f"seconds ({middle}, p10 to p90)"), ("Throughput", "tokens/s"), ("Peak memory", "GB")
    for axes, (title, label) in zip(panels, titles, strict=True):
        axes.set_title(title)
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_yticks(range(len(arms)), [name_of(arm) for arm in arms])
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_ylim(len(arms) - 0.4, -0.6)
    return figure


def _value(axes: Axes, x: float, y: float, text: str, offset: float = 4) -> None:
    axes.annotate(text, (x, y), (offset, 0), textcoords="offset points", va="center", fontsize=9, color=INK)
