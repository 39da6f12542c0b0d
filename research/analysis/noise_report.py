"""What a report says of the gradient's noise: its section, figure and finding, from noise.py's analysis alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from research.analysis.page import Section, Table
from research.analysis.style import FAINT, legend

Noise = Sequence[Mapping[str, Any]]
LINES = {"independent": "-", "paired": (0, (1, 1.2))}


def section(found: Noise, tokens_per_step: int | None) -> Section | None:
    """None where nothing was measured. tokens_per_step: of every strategy, None where they differ."""
    if not found:
        return None
    first = found[0]
    text = (
        "At fixed weights, one piece of text gives another gradient than the next. How much it varies was measured at "
        f"the weights of each run's newest checkpoint, over {first['batches']} pieces of {first['tokens']:,} tokens, "
        "for every length of rows up to that of their training: once with each row from a place of its own "
        "(independent), once with all rows of a piece from one place (paired). A step of k pieces has a k-th of a "
        "piece's variance, so at equal tokens the ratios are those of steps. The text is that of training: "
        f"{_seen(found)} tokens of it were trained on."
    )
    return Section("How noisy is the gradient?", text, (_ratios(found), _cells(found, tokens_per_step)))


def _ratios(found: Noise) -> Table:
    names = ("total", "matrices", "length", "diversity", "place")
    rows = tuple(
        (
            label(run, found),
            str(run["seed"]),
            f"{run['consumed']:,}",
            f"{run['long']:,} to {run['short']:,}" if "total" in run["ratios"] else f"{run['short']:,}",
            *(_factor(run["ratios"].get(name)) for name in names),
        )
        for run in found
    )
    note = (
        "Variance (trace of the covariance) of the gradient of as many tokens in the longest rows over that in the "
        "shortest [95 %, jackknife over blocks of pieces of text; the weights are given]. Total: in independent order; "
        "matrices: of attention, router and experts alone, which Muon trains where it is used. Row length: the same "
        "text in long rows over the same in short ones; diversity: the rest, for total = row length x diversity. One "
        "place: the shortest rows, neighbours over places of their own; where the longest rows are whole pieces this "
        "and diversity are one number."
    )
    columns = (
        "weights of",
        "seed",
        "tokens trained",
        "rows",
        "total",
        "matrices",
        "row length",
        "diversity",
        "one place",
    )
    return Table(columns, rows, note)


def _cells(found: Noise, tokens_per_step: int | None) -> Table:
    rows = tuple(
        (
            label(run, found),
            f"{cell['rows']} x {cell['length']}",
            cell["order"],
            _factor(cell["relative"]),
            _tokens(cell["scale"]),
            _over(cell["scale"], tokens_per_step),
            ", ".join(f"{name} {share:.0%}" for name, share in cell["groups"].items()),
        )
        for run in found
        for cell in run["cells"]
    )
    step = f" in a step of {tokens_per_step:,} tokens" if tokens_per_step else ""
    note = (
        "Variance relative to that of the shortest rows in independent order. Noise scale: the tokens of a step whose "
        "noise (trace of the covariance) equals its signal (the squared norm of the true gradient); > where the "
        "interval of the signal holds zero. It is of plain gradients: Muon and AdamW scale theirs otherwise. In rows "
        "shorter than their last the weights were not trained at the end: the signal there is that of another task, "
        "and larger for it, so noise over signal compares lengths less purely than variance does."
    )
    columns = (
        "weights of",
        "piece",
        "order",
        "variance",
        "noise scale, tokens",
        f"noise over signal{step}",
        "of it in",
    )
    return Table(columns, rows, note)


def _over(scale: Mapping[str, Any], tokens_per_step: int | None) -> str:
    return f"{scale['value'] / tokens_per_step:.2f}" if tokens_per_step and scale["value"] is not None else "–"


def _factor(found: Mapping[str, Any] | None) -> str:
    return "–" if found is None else f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def _tokens(scale: Mapping[str, Any]) -> str:
    if scale["value"] is None:
        return "no signal" if scale["low"] is None else f"> {scale['low']:,.0f}"
    return f"{scale['value']:,.0f} [{scale['low']:,.0f}, {scale['high']:,.0f}]"


def finding(found: Noise) -> list[str]:
    """The sentence of the weights that were trained at the longest rows; none where no two lengths were measured."""
    run = max(found, key=lambda run: run["long"], default=None)
    if run is None or "total" not in run["ratios"]:
        return []
    ratios = run["ratios"]
    lengths = f"in rows of {run['long']:,} tokens over rows of {run['short']:,}"
    parts = {"diversity": "diversity", "length": "row length"}
    factors = [f"{_factor(ratios[name])} by {words}" for name, words in parts.items() if name in ratios]
    return [
        f"At equal tokens and the weights of {label(run, found)}, the gradient's variance {lengths} is "
        f"{_factor(ratios['total'])} times as large{': ' * bool(factors)}{' and '.join(factors)}."
    ]


def label(run: Mapping[str, Any], found: Noise) -> str:
    """A run's strategy; where that was measured more than once, with what tells it apart."""
    alike = [other for other in found if other["strategy"] == run["strategy"]]
    return run["strategy"] if len(alike) == 1 else f"{run['strategy']}, {run['setting']}, seed {run['seed']}"


def _seen(found: Noise) -> str:
    return " or ".join(f"{consumed:,}" for consumed in sorted({run["consumed"] for run in found}))


def figure(found: Noise, styles: Mapping[str, dict[str, Any]], tokens_per_step: int | None) -> Figure:
    """Variance at equal tokens, and the noise scale, by the rows' length."""
    drawing = Figure(figsize=(9.6, 4.4), layout="constrained")
    left, right = drawing.subplots(1, 2)
    names = [run["strategy"] for run in found]
    for number, run in enumerate(found):
        style = styles[run["strategy"]]
        again = run["strategy"] in names[:number]  # another seed
        for order, line in LINES.items():
            cells = [cell for cell in run["cells"] if cell["order"] == order]
            if order == "paired":  # the longest rows are one place each: both orders are one
                cells += [c for c in run["cells"] if c["length"] == run["tokens"]]
            words = f"weights of {run['strategy']}" if order == "independent" and not again else None
            apart = 2 ** (0.1 * (number - (len(found) - 1) / 2))
            _curve(left, cells, "relative", style, line, words, apart)
            if order == "independent":
                _curve(right, cells, "scale", style, line, None, apart)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        lengths = sorted({cell["length"] for run in found for cell in run["cells"]})
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("tokens per row (log scale)")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.margins(x=0.1, y=0.12)
    left.set_ylabel(f"gradient variance at equal tokens\n(1: rows of {found[0]['short']}, independent)")
    right.set_ylabel("noise scale, independent order (tokens)")
    if tokens_per_step:
        right.axhline(tokens_per_step, color=FAINT, linewidth=1.2, linestyle="--", zorder=1)
        place = dict(xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", fontsize=9)
        right.annotate(f"a step: {tokens_per_step:,}", (1, tokens_per_step), (-2, 4), color="#666666", **place)
    said = "solid: each row from a place of its own;  dotted: all rows of a piece from one place;  bars: 95 %"
    legend(drawing, left, said)
    return drawing


def _curve(
    axes: Axes, cells: Sequence[Mapping[str, Any]], what: str,
    style: Mapping[str, Any], line: Any, label: str | None, apart: float,
) -> None:  # fmt: skip
    cells = sorted((c for c in cells if c[what]["value"] is not None), key=lambda c: c["length"])
    x, y = [apart * c["length"] for c in cells], [c[what]["value"] for c in cells]
    axes.plot(x, y, color=style["color"], linestyle=line, linewidth=1.6, zorder=2)
    for place, cell in zip(x, cells, strict=True):
        axes.plot([place] * 2, [cell[what]["low"], cell[what]["high"]], color=style["color"], linewidth=1.2, zorder=2)
        axes.plot(place, cell[what]["value"], marker=style["marker"], color=style["color"], zorder=3)
    if label:
        look = dict(marker=style["marker"], markeredgecolor=style["color"], linestyle=line)
        axes.plot([], [], color=style["color"], label=label, **look)
