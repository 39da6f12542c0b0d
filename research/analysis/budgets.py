"""One table of runs under five budgets: equal tokens, steps, FLOPs, train seconds, and memory.

Losses are read off each run's logged evaluations by linear interpolation, at the largest budget that every strategy
reached; where one was not yet evaluated there, nothing is measured. Train seconds are steps times the strategy's
typical step: the median of its least disturbed run, so that a machine that was busy with something else does not decide
who wins.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from research.analysis.context import rounded
from research.analysis.page import Section, Table
from research.analysis.study import Arm, Run

AXES = ("tokens", "step", "flops", "seconds")
LABELS = {"tokens": "tokens", "step": "steps", "flops": "FLOPs", "seconds": "train seconds", "memory": "memory"}
SAME_MEMORY = 0.05  # of the largest: differences below it are no difference
_GRID = 400  # places at which crossings are looked for
_CHANGING = {  # what a run of another length would have had otherwise at the same step
    "the learning rates": lambda arm: arm.runs[0].config.get("optimizer", {}).get("schedule") != "constant",
    "the rows": lambda arm: arm.grows,
}


def analyse(arms: Sequence[Arm], shared: Sequence[int]) -> dict[str, Any]:
    """{'curves', 'equal', 'crossings'} at the longest shared context; empty where two strategies share none."""
    if len(arms) < 2 or not shared:
        return {}
    context = shared[-1]
    curves = {axis: [_curve(arm, axis, context) for arm in arms] for axis in AXES}
    if any(len(run) < 2 for found in curves.values() for arm in found for run in arm["x"]):
        return {}
    equal = [_equal(axis, found) for axis, found in curves.items()] + [_equal_memory(arms, curves["tokens"])]
    crossings = [
        dict(axis=axis, a=a["strategy"], b=b["strategy"], **found)
        for axis, arms_ in curves.items()
        for a, b in itertools.combinations(arms_, 2)
        for found in _crossings(a, b)
    ]
    found = dict(context=context, curves=curves, equal=equal, crossings=crossings)
    changing = [name for name, changes in _CHANGING.items() if any(changes(arm) for arm in arms)]
    return found | (dict(changing=changing) if changing else {})


def step_seconds(arm: Arm) -> float:
    """Median step of the arm's least disturbed run, in seconds; where rows grow, the mean of the stages' own."""
    steps, seconds = _clock(arm)
    return rounded(seconds[-1] / steps[-1])


def _clock(arm: Arm) -> tuple[np.ndarray, np.ndarray]:
    """(steps, seconds) from the start of a run to the start and end of each of its stages."""
    runs = [run.result for run in arm.runs]
    if not arm.grows:
        steps, seconds = [arm.first["steps"]], [rounded(min(run["step_seconds"]["median"] for run in runs))]
    else:
        steps = [stage["steps"] for stage in arm.first["stages"]]
        each = [[stage["step_seconds"] for stage in run["stages"]] for run in runs]
        seconds = min(each, key=lambda medians: np.dot(steps, medians))
    return np.cumsum([0, *steps]), np.cumsum([0.0, *np.multiply(steps, seconds)])


def _curve(arm: Arm, axis: str, context: int) -> dict[str, Any]:
    """The evaluations of each of `seeds`: x on the axis, y in nats per token."""
    name = "step" if axis == "seconds" else axis
    first = _first_trained(arm, context)
    points = [_evaluations(run, name, context, first) for run in arm.runs]
    if axis == "seconds":
        points = [[(np.interp(step, *_clock(arm)), loss) for step, loss in run] for run in points]
    return dict(
        strategy=arm.strategy,
        seeds=arm.seeds,
        x=[[rounded(x) for x, _ in run] for run in points],
        y=[[rounded(y) for _, y in run] for run in points],
    )


def _first_trained(arm: Arm, context: int) -> int:
    """The step from which on an arm's rows hold windows of a context (of 1.25 times as many tokens)."""
    step = 0
    for stage in arm.first["stages"] if arm.grows else ():
        if 4 * stage["seq_len"] >= 5 * context:
            break
        step += stage["steps"]
    return step


def _evaluations(run: Run, axis: str, context: int, first: int) -> list[tuple[float, float]]:
    name = f"eval/loss@{context}"
    return sorted((row[axis], row[name]) for row in run.curve if name in row and row["step"] > first)


def _equal(axis: str, curves: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Losses at the largest place of the axis that every run reached: mean and range over seeds, lowest first.

    None where a run's first evaluation is later: before it, its loss is not known.
    """
    at = min(max(x) for arm in curves for x in arm["x"])
    measured = all(min(x) <= at for arm in curves for x in arm["x"])
    losses = {arm["strategy"]: _at(arm, at) for arm in curves} if measured else {}
    return dict(budget=axis, at=at, losses=dict(sorted(losses.items(), key=lambda item: item[1]["mean"])))


def _at(arm: dict[str, Any], at: float) -> dict[str, float]:
    values = [float(np.interp(at, x, y)) for x, y in zip(arm["x"], arm["y"], strict=True)]
    return dict(mean=rounded(np.mean(values)), low=rounded(min(values)), high=rounded(max(values)))


def _equal_memory(arms: Sequence[Arm], curves: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Final losses where the compiled steps need the same memory (to SAME_MEMORY); else none are said to be equal."""
    bytes_ = {arm.strategy: arm.first["memory_bytes"]["compiled_step"] for arm in arms}
    known = [b for b in bytes_.values() if b is not None]
    held = len(known) == len(bytes_) and max(known) - min(known) <= SAME_MEMORY * max(known)
    found = dict(budget="memory", at=max(known, default=None), bytes=bytes_, held_equal=held)
    return found | dict(losses=_equal("tokens", curves)["losses"] if held else {})


def _crossings(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """Where the mean curves of two strategies cross, and the range of the seeds' own crossings nearest to it.

    Of the seeds that both have.
    """
    both = [seed for seed in a["seeds"] if seed in b["seeds"]]
    if not both:
        return []
    means = _crossing_places(_mean_curve(a, both), _mean_curve(b, both))
    seeds = [_crossing_places(_seed_curve(a, seed), _seed_curve(b, seed)) for seed in both]
    found = []
    for place in means:
        nearest = [min(places, key=lambda x, place=place: abs(x - place)) for places in seeds if places]
        band = dict(low=rounded(min(nearest)), high=rounded(max(nearest))) if nearest else dict(low=None, high=None)
        found.append(dict(at=rounded(place), seeds_that_cross=len(nearest), seeds=len(seeds), **band))
    return found


def _seed_curve(arm: dict[str, Any], seed: int) -> tuple[list[float], Callable]:
    i = arm["seeds"].index(seed)
    return arm["x"][i], lambda at: np.interp(at, arm["x"][i], arm["y"][i])


def _mean_curve(arm: dict[str, Any], seeds: Sequence[int]) -> tuple[list[float], Callable]:
    places, curves = zip(*(_seed_curve(arm, seed) for seed in seeds), strict=True)
    ends = [max(min(x) for x in places), min(max(x) for x in places)]
    return ends, lambda at: np.mean([curve(at) for curve in curves], axis=0)


def _crossing_places(a: tuple[list[float], Callable], b: tuple[list[float], Callable]) -> list[float]:
    """Where a - b changes sign between evaluations that both have on either side."""
    low, high = max(min(a[0]), min(b[0])), min(max(a[0]), max(b[0]))
    if low >= high:
        return []
    grid = np.linspace(low, high, _GRID)
    gap = a[1](grid) - b[1](grid)
    turns = np.nonzero((gap[:-1] >= 0) != (gap[1:] >= 0))[0]
    return [float(grid[i] + (grid[i + 1] - grid[i]) * gap[i] / (gap[i] - gap[i + 1])) for i in turns]


def section(analysis: dict[str, Any]) -> Section | None:
    found = analysis["budgets"]
    if not found:
        return None
    tables = [_equal_table(found)]
    if found["crossings"]:
        tables.append(_crossing_table(found["crossings"]))
    winners = {next(iter(e["losses"])) for e in found["equal"] if e["losses"]}
    text = "The same runs, stopped where they have used the same amount of something"
    if found["crossings"] or len(winners) > 1:
        text += ". Who wins depends on what is scarce."
    else:
        text += ": the winner is the same." if winners else "."
    if found.get("changing"):
        what = " and ".join(found["changing"])
        text += f" What is read off before its end had {what} of a longer run: planned to end there, it may do better."
    return Section("Five budgets", text, tuple(tables))


def _equal_table(found: dict[str, Any]) -> Table:
    names = [arm["strategy"] for arm in found["curves"]["tokens"]]
    rows = []
    for entry in found["equal"]:
        cells = [_range(entry["losses"].get(name)) for name in names]
        unknown = "not held equal" if entry["budget"] == "memory" and not entry["held_equal"] else "not measured"
        winner = next(iter(entry["losses"]), unknown)
        rows.append((f"equal {LABELS[entry['budget']]}", shown(entry["budget"], entry["at"]), *cells, winner))
    note = (
        f"Held-out loss at context {found['context']}, nats per token: mean over seeds [lowest, highest seed]. Read "
        "off the evaluations by linear interpolation. Memory is that of the compiled step; it counts as equal where "
        "all strategies need the same to within 5 %. Train seconds: steps times the median step of the least "
        "disturbed run (stage by stage where rows grow)."
    )
    if any(row[-1] == "not measured" for row in rows):
        note += " Not measured: one is evaluated later for the first time."
    return Table(("budget", "at", *names, "lowest"), tuple(rows), note)


def _crossing_table(crossings: Sequence[dict[str, Any]]) -> Table:
    rows = tuple(
        (
            f"{e['a']} and {e['b']}",
            LABELS[e["axis"]],
            shown(e["axis"], e["at"]),
            "–" if e["low"] is None else f"{shown(e['axis'], e['low'])} to {shown(e['axis'], e['high'])}",
            f"{e['seeds_that_cross']} of {e['seeds']}",
        )
        for e in crossings
    )
    note = (
        "Where the mean curves, over the seeds that both have, cross between evaluations; the band is the range of the "
        "seeds' own nearest crossings."
    )
    return Table(("curves of", "axis", "cross at", "band over seeds", "seeds that cross"), rows, note)


def _range(entry: dict[str, float] | None) -> str:
    return "–" if entry is None else f"{entry['mean']:.4f} [{entry['low']:.4f}, {entry['high']:.4f}]"


def shown(axis: str, value: float | None) -> str:
    """A budget with its unit."""
    if value is None:
        return "–"
    if axis == "flops":
        return f"{value:.3g} FLOPs"
    if axis == "seconds":
        return f"{value:,.1f} s"
    return f"{value / 1e9:.2f} GB" if axis == "memory" else f"{value:,.0f} {LABELS[axis]}"
