"""The figures of a memory frontier: iso-memory curves, the law, and predictions beside measurements."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

from research.analysis import memory_report
from research.analysis.original import ORIGINAL
from research.analysis.style import FAINT, INK, LOOK, columns, covered, note, save, styles_of

ALTS = {
    "frontier": "The largest batch that fits against the length, and the tokens per step along it",
    "law": "Memory of a step against its length, at fixed batch and at equal tokens",
    "check": "Measured against predicted memory of real steps",
}
GIB = 2**30


def draw(plan: dict[str, Any], checked: Sequence[dict[str, Any]], folder: Path) -> set[str]:
    """Draws what there are numbers for into `folder`, as SVG and PNG; returns the names."""
    measured = [run for run in checked if run["measured"] is not None]
    figures = {}
    with matplotlib.rc_context(LOOK):
        if any(cell["batch"] for cell in plan["cells"]):
            figures["frontier"] = frontier_figure(plan)
        if plan["law"]:
            figures["law"] = law_figure(plan)
        if measured:
            figures["check"] = check_figure(measured)
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            save(figure, folder, name)
    return set(figures)


def frontier_figure(plan: dict[str, Any]) -> Figure:
    """Left: batch against length on log scales, one curve per choice; lines of equal tokens. Right: tokens per step."""
    shared = memory_report.shared([cell["choice"] for cell in plan["cells"]])
    curves: dict[str, list[dict[str, Any]]] = {}
    for cell in plan["cells"]:
        if cell["batch"]:
            curves.setdefault(_name(cell["choice"], shared), []).append(cell)
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = styles_of(list(curves))
    for name, cells in curves.items():
        lengths = [cell["seq_len"] for cell in cells]
        look = dict(label=name, markeredgecolor="white", **styles[name])
        left.plot(lengths, [cell["batch"] for cell in cells], **look)
        right.plot(lengths, [cell["tokens"] for cell in cells], **look)
    lengths = sorted({cell["seq_len"] for cell in plan["cells"]})
    if plan["scale"] == "published":
        theirs = [o for o in ORIGINAL if o.seq_len in lengths]
        mark = dict(
            marker="*", color=INK, markersize=13, linestyle="none", label="original, by trial and error (20 to 22 GB)"
        )
        left.plot([o.seq_len for o in theirs], [o.batch_size for o in theirs], **mark)
        right.plot([o.seq_len for o in theirs], [o.batch_size * o.seq_len for o in theirs], **mark)
    for axes in (left, right):
        _length_axis(axes, lengths)
    left.set_xlim(left=min(lengths) / 1.9)  # room for what _equal_tokens writes
    left.set_yscale("log", base=2)
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _equal_tokens(left, lengths)
    left.set_ylabel("largest batch that fits (sequences)")
    right.set_ylim(bottom=0)
    right.yaxis.set_major_formatter(EngFormatter(sep=""))
    right.set_ylabel("tokens per step")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=columns(figure, labels), handlelength=3.4)
    held = f", {memory_report.label(shared)}" if shared and len(curves) > 1 else ""
    under = covered({name: [cell["tokens"] for cell in cells] for name, cells in curves.items()})
    _note(
        figure, f"{plan['budget']} per device{held}, compiled for {plan['target']};  grey: equal tokens per step{under}"
    )
    return figure


def _note(figure: Figure, said: str) -> None:
    """Below the panels, in lines that fit: 16 characters of its size are an inch."""
    note(figure, textwrap.fill(said, int(16 * figure.get_figwidth())))


def _name(choice: dict[str, Any], shared: dict[str, Any]) -> str:
    """A choice by what not all choices share, if there is such."""
    own = {name: value for name, value in choice.items() if name not in shared}
    return memory_report.label(own or choice)


def _equal_tokens(axes: Axes, lengths: Sequence[int]) -> None:
    """Pale lines of equal tokens per step, each written where it leaves the panel on the left."""
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    axes.set_autoscale_on(False)
    for power in range(8, 28, 2):
        x = np.array([left, right])
        axes.plot(x, 2.0**power / x, color="#C8C8C8", linewidth=0.9, zorder=0.5)
        at = 2.0**power / left
        if low * 1.2 < at < high / 1.1:
            axes.annotate(
                f"{2**power:,}", (left, at), (3, 2), textcoords="offset points", fontsize=7.5, color="#777777"
            )


def _length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlim(min(lengths) / 1.3, max(lengths) * 1.3)
    axes.set_xlabel("length (tokens per row, log scale)")


def law_figure(plan: dict[str, Any]) -> Figure:
    """Memory against length at a fixed batch, and at equal tokens per step: points are programs, lines the law."""
    figure = Figure(figsize=(9.6, 4.1), layout="constrained")
    panels = figure.subplots(1, 2)
    styles = styles_of([law["attention"] for law in plan["law"]])
    for law in plan["law"]:
        style = styles[law["attention"]]
        points = {(p["batch"], p["seq_len"]): p["amount"] for p in law["points"]}
        batches, lengths = sorted({b for b, _ in points}), sorted({t for _, t in points})
        fixed = [(batches[0], t) for t in lengths]
        tokens = max({b * t for b, t in points}, key=lambda n: (sum(b * t == n for b, t in points), n))
        equal = sorted((k for k in points if k[0] * k[1] == tokens), key=lambda k: k[1])
        a, b, c = (law["fit"][name]["value"] for name in "abc")
        for axes, keys, title in zip(
            panels,
            (fixed, equal),
            (f"Fixed batch ({batches[0]} rows)", f"Equal tokens ({tokens:,} per step)"),
            strict=True,
        ):
            x = np.geomspace(keys[0][1], keys[-1][1], 60)
            rows = np.full_like(x, batches[0]) if keys is fixed else tokens / x
            axes.plot(x, (a + b * rows * x + c * rows * x**2) / GIB, **style | {"marker": ""})
            axes.plot(
                [k[1] for k in keys],
                [points[k] / GIB for k in keys],
                markeredgecolor="white",
                **style | {"linestyle": "none"},
            )
            axes.plot([], [], label=law["attention"], markeredgecolor="white", **style)
            _length_axis(axes, [k[1] for k in keys])
            axes.set_title(title)
            axes.set_ylim(bottom=0)
            axes.set_ylabel("memory of a step (GiB per device)")
    handles, labels = panels[0].get_legend_handles_labels()
    names = [f"attention {label}" for label in labels]
    under = covered({law["attention"]: [point["amount"] for point in law["points"]] for law in plan["law"]})
    figure.legend(handles, names, loc="outside upper center", ncols=columns(figure, names), handlelength=3.4)
    _note(figure, f"compiled for {plan['target']};  points: programs, lines: a + b B T + c B T²{under}")
    return figure


def check_figure(measured: Sequence[dict[str, Any]]) -> Figure:
    """Measured over predicted memory of each step against its length; a length's largest step is filled."""
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    shared = memory_report.shared([run["choice"] for run in measured])
    names = list(dict.fromkeys(_name(run["choice"], shared) for run in measured))
    styles = styles_of(names)
    for place, name in enumerate(names):
        aside = 1.13 ** (place - (len(names) - 1) / 2)  # side by side, not on top of each other
        runs = [run for run in measured if _name(run["choice"], shared) == name]
        axes.plot([], [], styles[name]["marker"], color=styles[name]["color"], label=name)
        for run in runs:
            largest = run["batch"] == max(other["batch"] for other in runs if other["seq_len"] == run["seq_len"])
            color = styles[name]["color"]
            axes.plot(run["seq_len"] * aside, run["measured"] / run["predicted"], styles[name]["marker"], color=color,
                      markerfacecolor=color if largest else "white")  # fmt: skip
    axes.axhline(1, color=FAINT, linewidth=1.2)
    axes.axhspan(0.9, 1.1, color=FAINT, alpha=0.15, lw=0)
    _length_axis(axes, sorted({run["seq_len"] for run in measured}))
    axes.set_ylabel("measured while it runs / predicted")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=columns(figure, names))
    said = "filled: the largest batch that was tried at a length, open: smaller ones;  grey: 10 %"
    _note(figure, said)
    return figure
