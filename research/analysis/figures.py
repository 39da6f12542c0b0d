"""The figures of a study, as SVG and PNG: losses along the run, losses by context, and costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, MaxNLocator, NullLocator

from research.analysis import comparison
from research.analysis.statistics import Difference, mean_interval, paired_bootstrap
from research.analysis.study import Run, same_targets
from research.analysis.style import FAINT, INK, LOOK, legend, name_of, save, styles_of


def draw(runs: Sequence[Run], compared: dict[str, Any], folder: Path) -> list[str]:
    """Draws the finished runs into `folder`; `compared` is `comparison.compare(runs)`.

    Returns: names of the figures (`<name>.svg` and `<name>.png`): `loss`, `context`, `cost`.
    Without a shared context there is no `loss`, without losses by target no `context`, without a
    finished run none.
    """
    finished = [run for run in runs if run.finished]
    drawn = []
    if finished:
        folder.mkdir(parents=True, exist_ok=True)
        styles = styles_of([run.strategy for run in finished])
        context = max(compared["shared_contexts"], default=None)
        with matplotlib.rc_context(LOOK):
            if context is not None:
                save(loss_figure(finished, styles, context), folder, "loss")
                drawn.append("loss")
            if any(run.losses for run in finished):
                save(context_figure(finished, styles), folder, "context")
                drawn.append("context")
            save(cost_figure(finished, styles), folder, "cost")
            drawn.append("cost")
    return drawn


def loss_figure(finished: Sequence[Run], styles: Mapping[str, dict[str, Any]], context: int) -> Figure:
    """Held-out loss at a context against tokens and train seconds, train loss faint behind."""
    figure = Figure(figsize=(9.6, 4.1), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    name = f"eval/loss@{context}"
    for axes, x, label in zip(
        panels, ("tokens", "train_seconds"), ("tokens trained on", "train time (s)"), strict=True
    ):
        for run in finished:
            style = styles[run.strategy]
            train = [(row[x], row["train/loss"]) for row in run.curve if "train/loss" in row]
            if train:
                axes.plot(*zip(*train, strict=True), color=style["color"], alpha=0.22, linewidth=0.9)
            held_out = [(row[x], row[name]) for row in run.curve if name in row]
            if held_out:
                axes.plot(
                    *zip(*held_out, strict=True),
                    label=name_of(run),
                    **style,
                    markeredgecolor="white",
                )
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
    _unigram(panels, finished, name)
    panels[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[0].set_ylabel(f"loss with {context} tokens of context\n(nats/token)")
    panels[0].set_title("At equal tokens")
    panels[1].set_title("At equal train time")
    legend(figure, panels[0], finished, "faint: train loss, at the strategy's own length")
    return figure


def _unigram(panels: Sequence[Axes], finished: Sequence[Run], name: str) -> None:
    """The unigram entropy as a reference; losses far above it, at a run's start, are cut off."""
    entropies = {round(run.result["unigram_entropy"], 4) for run in finished}
    for entropy in entropies:
        for axes in panels:
            axes.axhline(entropy, color=FAINT, linestyle=":", linewidth=1.5)
        panels[0].annotate(
            f"unigram entropy {entropy:.2f}",
            (1, entropy),
            (-2, 3),
            ha="right",
            va="bottom",
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            color="#666666",
            fontsize=9,
        )
    lowest = min((row[name] for run in finished for row in run.curve if name in row), default=None)
    if lowest is not None and lowest < min(entropies):
        span = max(entropies) - lowest
        panels[0].set_ylim(lowest - 0.08 * span, max(entropies) + 0.35 * span)


def context_figure(finished: Sequence[Run], styles: Mapping[str, dict[str, Any]]) -> Figure:
    """Loss on the same targets by context, and its paired difference from one strategy.

    The left bands are wide because documents differ; the right ones, of the differences, are what
    compares strategies. Both are 95 % intervals over documents.
    """
    figure = Figure(figsize=(9.6, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    scored = [run for run in finished if run.losses]
    reference = max(scored, key=lambda run: len(run.losses))  # has a context with every other run
    for run in scored:
        style = styles[run.strategy]
        _band(
            left,
            run,
            {c: mean_interval(a, run.documents, seed=0) for c, a in run.losses.items()},
            style,
        )
        if run is not reference and same_targets(run, reference):
            both = sorted(run.losses.keys() & reference.losses.keys())
            paired = {c: paired_bootstrap(run.losses[c], reference.losses[c], run.documents, seed=0) for c in both}
            _band(right, run, paired, style)
    right.axhline(0, color=styles[reference.strategy]["color"], linewidth=1.6)
    for axes in (left, right):
        _context_axis(axes, scored, styles)
    left.set_title("Loss on the same held-out targets")
    left.set_ylabel("loss (nats/token)")
    right.set_title(f"Difference from {reference.strategy}")
    right.set_ylabel("loss difference (nats/token)")
    note = "bands: 95 %, documents resampled;  T: trained length"
    if not all(comparison.within_length(c, run) for run in scored for c in run.losses):
        note += ";  hollow: beyond it"
    legend(figure, left, finished, note)
    return figure


def _band(axes: Axes, run: Run, found: Mapping[int, Difference], style: Mapping[str, Any]) -> None:
    """Means with their intervals by context; thin and hollow beyond the trained length."""
    contexts = sorted(found)
    low, high = [found[c].low for c in contexts], [found[c].high for c in contexts]
    means = [found[c].mean for c in contexts]
    color = style["color"]
    axes.fill_between(contexts, low, high, color=color, alpha=0.09, linewidth=0)
    for edge in (low, high):
        axes.plot(contexts, edge, color=color, alpha=0.3, linewidth=0.7)
    inside = sum(comparison.within_length(c, run) for c in contexts)
    beyond = slice(max(inside - 1, 0), None)
    axes.plot(contexts[beyond], means[beyond], color=color, linewidth=1, linestyle=":")
    axes.plot(contexts[inside:], means[inside:], style["marker"], color=color, markerfacecolor="white")
    axes.plot(contexts[:inside], means[:inside], label=name_of(run), markeredgecolor="white", **style)


def _context_axis(axes: Axes, scored: Sequence[Run], styles: Mapping[str, dict[str, Any]]) -> None:
    """A log axis of contexts, with each strategy's trained length marked at its foot."""
    contexts = sorted({c for run in scored for c in run.losses})
    axes.margins(y=0.14)
    axes.set_xscale("log", base=2)
    longest = max([*contexts, *(run.result["seq_len"] for run in scored)])
    axes.set_xlim(contexts[0] / 1.4, longest * 1.4)
    axes.xaxis.set_major_locator(FixedLocator(contexts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("context before each target (tokens, log scale)")
    lengths: dict[int, list[str]] = {}
    for run in scored:
        lengths.setdefault(run.result["seq_len"], []).append(styles[run.strategy]["color"])
    for length, colors in lengths.items():
        color = colors[0] if len(colors) == 1 else INK
        axes.axvline(length, ymax=0.045, color=color, linewidth=2.2)
        axes.annotate(
            f"T={length}",
            (length, 0.05),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=8.5,
            color=color,
        )


def cost_figure(finished: Sequence[Run], styles: Mapping[str, dict[str, Any]]) -> Figure:
    """Median step time with its 10th to 90th percentile, tokens a second, and memory."""
    figure = Figure(figsize=(9.6, 1.3 + 0.65 * len(finished)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    places = range(len(finished))
    colors = [styles[run.strategy]["color"] for run in finished]
    steps = [run.result["step_seconds"] for run in finished]
    for place, color, step in zip(places, colors, steps, strict=True):
        panels[0].plot([step["p10"], step["p90"]], [place] * 2, color=color, linewidth=4, alpha=0.35)
        panels[0].plot(step["median"], place, "o", color=color, markersize=8)
        _value(panels[0], step["p90"], place, f"{step['median']:.3g}", offset=8)
    panels[0].set_xlim(0, 1.25 * max(step["p90"] for step in steps))
    panels[0].set_title("Step time")
    panels[0].set_xlabel("seconds (median, p10 to p90)")

    speeds = [run.result["tokens_per_second"] for run in finished]
    panels[1].barh(places, speeds, color=colors, height=0.55)
    for place, speed in zip(places, speeds, strict=True):
        _value(panels[1], speed, place, f"{speed:,.0f}")
    panels[1].set_xlim(0, 1.3 * max(speeds))
    panels[1].xaxis.set_major_locator(MaxNLocator(3, prune="upper"))
    panels[1].xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[1].set_title("Throughput")
    panels[1].set_xlabel("tokens/s")

    _memory(panels[2], finished, colors)
    for axes in panels:
        axes.set_yticks(list(places), [name_of(run) for run in finished])
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_ylim(len(finished) - 0.4, -0.6)
    return figure


def _memory(axes: Axes, finished: Sequence[Run], colors: Sequence[str]) -> None:
    """Bars by kind: filled for the compiled step, open for the process, hatched for the device."""
    fills = {
        "step": {},
        "process": {"color": "white"},
        "device": {"color": "white", "hatch": "///"},
    }
    sizes = [_gigabytes(run) for run in finished]
    kinds = [kind for kind in fills if any(kind in size for size in sizes)]
    height = 0.72 / max(len(kinds), 1)
    for place, (size, color) in enumerate(zip(sizes, colors, strict=True)):
        for row, kind in enumerate(kinds):
            if kind in size:
                y = place + (row - (len(kinds) - 1) / 2) * height
                look = {"color": color, "edgecolor": color, "linewidth": 1} | fills[kind]
                axes.barh(y, size[kind], height * 0.86, **look)
                _value(axes, size[kind], y, f"{size[kind]:.2f} {kind}")
    most = max(max(size.values(), default=0) for size in sizes)
    axes.set_xlim(0, 1.6 * most or 1)
    axes.set_title("Peak memory")
    axes.set_xlabel("GB")


def _gigabytes(run: Run) -> dict[str, float]:
    """The memory that a run could measure, by kind."""
    names = {"step": "compiled_step", "process": "process_peak", "device": "device_peak"}
    sizes = {kind: run.result["memory_bytes"].get(name) for kind, name in names.items()}
    return {kind: size / 1e9 for kind, size in sizes.items() if size is not None}


def _value(axes: Axes, x: float, y: float, text: str, offset: float = 4) -> None:
    axes.annotate(text, (x, y), (offset, 0), textcoords="offset points", va="center", fontsize=9, color=INK)
