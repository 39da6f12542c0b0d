"""How every figure of a study looks: one colour, marker and line a strategy; a light frame."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from research.analysis.study import lengths_of
from research.files import write_bytes

# Okabe and Ito's colours, told apart by colour-blind readers too; (colour, marker, line) of a
# strategy.
_STYLES = (
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", (0, (5, 1.5))),
    ("#009E73", "^", (0, (3, 1.2, 1, 1.2))),
    ("#CC79A7", "D", (0, (1, 1))),
    ("#E69F00", "v", (0, (7, 1.5, 1, 1.5))),
    ("#56B4E9", "P", (0, (2, 2))),
)
_KNOWN = ("balanced", "long_seq", "large_batch")  # keep their colours whatever else is drawn
INK, FAINT = "#333333", "#8A8A8A"
LOOK = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "lines.linewidth": 1.9,
    "lines.markersize": 6.5,
    "legend.frameon": False,
    "svg.hashsalt": "batch-or-length",  # the same file for the same numbers
}


def styles_of(strategies: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Arguments of `Axes.plot` for each strategy."""
    others = [name for name in strategies if name not in _KNOWN]
    order = [*_KNOWN, *others]
    styles = {}
    for name in strategies:
        color, marker, line = _STYLES[order.index(name) % len(_STYLES)]
        styles[name] = {"color": color, "marker": marker, "linestyle": line}
    return styles


def by_length(lengths: Sequence[int]) -> dict[int, dict[str, Any]]:
    """The same for lengths of rows, rising: the first three as the strategies that have such rows."""
    order = [2, 0, 1, *range(3, len(_STYLES))]
    looks = (_STYLES[order[number % len(order)]] for number in range(len(lengths)))
    return {
        length: {"color": color, "marker": marker, "linestyle": line}
        for length, (color, marker, line) in zip(sorted(lengths), looks, strict=True)
    }


def covered(curves: Mapping[str, Sequence[float]]) -> str:
    """What a note says of curves that one drawn later covers: those within 5 % of it everywhere. Empty: of none."""
    *below, (top, values) = curves.items()
    alike = [name for name, ys in below if len(ys) == len(values) and np.allclose(ys, values, rtol=0.05, atol=0)]
    return f";  under {top}, within 5 %: {', '.join(alike)}" if alike else ""


def legend(figure: Figure, axes: Axes, said: str, leaking: bool = False) -> None:
    """Above the panels, so that it covers no line; below them what the marks mean, and a leak."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if len(labels) == 4 else 3
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, handlelength=3.8)
    note(figure, said, leaking)


def columns(figure: Figure, labels: Sequence[str], most: int = 4) -> int:
    """How many columns of a legend fit the figure's width, with a handle and a gap each."""
    if not labels:
        return 1
    em = LOOK["font.size"] / 72  # inches
    widest = max((6.5 + 0.56 * len(label)) * em for label in labels)
    fit = max(1, min(most, len(labels), int(figure.get_figwidth() / widest)))
    return math.ceil(len(labels) / math.ceil(len(labels) / fit))  # as few for as many lines: no line is half empty


def note(figure: Figure, said: str, leaking: bool = False) -> None:
    """Below the panels."""
    warning = "LEAKING: these losses measure memorisation.\n" if leaking else ""
    figure.supxlabel(warning + said, fontsize=9, color="#B03A00" if leaking else "#666666")


def trained_lengths(axes: Axes, arms: Sequence[Mapping[str, Any]], styles: Mapping[str, dict[str, Any]]) -> None:
    """A mark and T=... at the foot of an axis of tokens for each length; of two arms', that whose rows do not grow."""
    marked = {arm["seq_len"]: arm["strategy"] for arm in sorted(arms, key=lambda arm: not arm.get("stages"))}
    for seq_len, strategy in marked.items():
        color = styles[strategy]["color"]
        axes.axvline(seq_len, ymax=0.04, color=color, linewidth=2.2)
        place = dict(xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8.5, color=color)
        axes.annotate(f"T={seq_len}", (seq_len, 0.045), **place)


def name_of(arm: dict[str, Any]) -> str:
    """An arm as legends call it: its strategy and B×T, or T alone where rows grow."""
    if arm.get("stages"):
        return f"{arm['strategy']}  {length_of(arm)}"
    return with_shape(arm["strategy"], f"{arm['batch_size']} x {arm['seq_len']}")


def with_shape(strategy: str, shape: str) -> str:
    """A strategy and its shape, such as 16 x 512; a strategy that is called by its shape, once."""
    sign = shape.replace(" x ", "×")
    return sign if strategy == shape.replace(" ", "") else f"{strategy}  {sign}"


def length_of(arm: Mapping[str, Any]) -> str:
    """T=2,048, or T=128→2,048 where rows grow."""
    return "T=" + "→".join(f"{length:,}" for length in lengths_of(arm))


def save(figure: Figure, folder: Path, name: str) -> None:
    """Writes `<name>.svg` and `<name>.png` (150 dpi); the same figure gives the same bytes."""
    FigureCanvasAgg(figure)
    for kind in ("svg", "png"):
        content = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(content, format=kind, dpi=150, metadata=metadata)
        write_bytes(folder / f"{name}.{kind}", content.getvalue())
