"""What the tokens of a step are worth, by the rows that they are cut into: shapes at equal tokens, and at equal steps.

A shape is B rows of T tokens. From one to a larger one leads more rows, or longer ones; shapes of equally many tokens
per step differ in how they are cut. Every shape has the learning rate that it did best at, by a seed of its own.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research import files
from research.analysis import shapes_report
from research.analysis.pairs import pairs_of, rounded
from research.analysis.runs import FINISHED, load, shared_context

BUDGETS = ("tokens", "steps")  # that shapes are compared at
Losses = Mapping[str, np.ndarray]
Finished = Mapping[str, Sequence[Mapping[str, Any]]]  # shape -> runs


def sizes(shape: str) -> tuple[int, int]:
    """(rows, tokens of a row) of a name such as 64x128."""
    rows, _, length = shape.partition("x")
    return int(rows), int(length)


def write(folder: Path) -> dict[str, Any]:
    """Makes the analysis, figure, report.md and report.html of the two data files in `folder`; returns results.json.

    Raises: ConfigError where a data file is missing or damaged.
    """
    results, losses = load(folder, "study of shapes", "compared")
    results["analysis"] = analyse(results["study"], results["runs"], losses)
    files.write_json(folder / "results.json", results)
    shapes_report.write(results, folder)
    return results


def analyse(study: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], losses: Losses) -> dict[str, Any]:
    """Each shape's losses and costs, and the differences that answer something.

    study: `shapes`, `grids` (budget -> shape -> what was tried, tuning.grid; the largest steps are under `tokens`
    alone), `compared` (run -> shape, budget, seed, rate), `shortest`. losses: `<run>/loss` [n] nats at the shared
    context, `document` [n].
    """
    done = [run for run in runs if run["status"] == FINISHED]
    at = {budget: finished_at(study, done, budget) for budget in BUDGETS}
    pairs = [pair for budget in BUDGETS for pair in _pairs(budget, at, losses)]
    return {
        "context": shared_context(done[0]["result"]["eval"]["contexts"], study["shortest"]) if done else None,
        "targets": len(losses.get("document", ())),
        "documents": len(np.unique(losses.get("document", ()))),
        "passes": max((run["result"]["epochs"] for run in done), default=None),
        "seeds": {budget: seeds_of(at[budget]) for budget in BUDGETS},
        "shapes": [_describe(shape, study, at, losses) for shape in study["shapes"]],
        "lowest": {budget: _lowest(at[budget], losses) for budget in BUDGETS},
        "pairs": pairs,
        "choices": [choice for budget in BUDGETS for choice in _choices(budget, at[budget], pairs)],
        "unfinished": {run["name"]: run["status"] for run in runs if run["status"] != FINISHED},
    }


def finished_at(study: Mapping[str, Any], done: Sequence[Mapping[str, Any]], budget: str) -> Finished:
    """The runs that are compared at a budget, of each shape: of the seeds that all shapes have finished.

    The largest steps make equal tokens and equal steps of the same runs; a shape without any run holds none back.
    """
    largest = max(rows * length for rows, length in map(sizes, study["shapes"]))
    found: dict[str, list] = {shape: [] for shape in study["shapes"]}
    for run in done:
        about = study["compared"][run["name"]]
        rows, length = sizes(about["shape"])
        if about["budget"] == budget or rows * length == largest:
            found[about["shape"]].append(run)
    seeds = seeds_of(found)
    return {shape: [run for run in runs if run["result"]["seed"] in seeds] for shape, runs in found.items()}


def seeds_of(finished: Finished) -> list[int]:
    """Those that all shapes have, of the shapes that have any."""
    each = [{run["result"]["seed"] for run in runs} for runs in finished.values() if runs]
    return sorted(set.intersection(*each)) if each else []


def _describe(shape: str, study: Mapping[str, Any], at: Mapping[str, Finished], losses: Losses) -> dict[str, Any]:
    rows, length = sizes(shape)
    results = [run["result"] for budget in BUDGETS for run in at[budget][shape]]
    grids = {budget: study["grids"][budget].get(shape, study["grids"]["tokens"][shape]) for budget in BUDGETS}
    found = {"shape": shape, "batch_size": rows, "seq_len": length, "tokens_per_step": rows * length}
    found |= {"rates": {budget: {name: grid[name] for name in ("best", "inside")} for budget, grid in grids.items()}}
    found |= {"at": {budget: _losses(at[budget][shape], losses) for budget in BUDGETS}}
    quiet = min((r["step_seconds"]["median"] for r in results), default=None)
    known = results[0] if results else {}
    return found | {
        "step_seconds": rounded(quiet),
        "flops_per_token": known.get("flops_per_token"),
        "memory_bytes": known.get("memory_bytes", {}).get("compiled_step"),
        "devices": math.prod(known["mesh"].values()) if "mesh" in known else None,
    }


def _losses(runs: Sequence[Mapping[str, Any]], losses: Losses) -> dict[str, Any] | None:
    """The mean over seeds at the shared context, and at the longest context of its rows."""
    if not runs:
        return None
    first = runs[0]["result"]
    each = _by_seed(runs, losses)
    scored = first["eval"]["contexts"]
    reach = max((c for c in scored if not scored[c]["beyond"]), key=int)
    own = [run["result"]["eval"]["contexts"][reach]["loss"] for run in runs]
    return {
        "mean": rounded(np.mean(each)),
        "sd": _sd(each),
        "seeds": [run["result"]["seed"] for run in runs],
        "by_seed": [rounded(loss) for loss in each],
        "steps": first["steps"],
        "tokens": first["tokens"],
        "reach": {"context": int(reach), "mean": rounded(np.mean(own)), "sd": _sd(own)},
    }


def _by_seed(runs: Sequence[Mapping[str, Any]], losses: Losses) -> list[float]:
    return [float(losses[f"{run['name']}/loss"].mean(dtype=np.float64)) for run in runs]


def _sd(values: Sequence[float]) -> float | None:
    return rounded(np.std(values, ddof=1)) if len(values) > 1 else None


def _lowest(finished: Finished, losses: Losses) -> dict[str, Any] | None:
    """The shape of the lowest mean loss, `a`, and the next, `b`: loss of a minus that of b, chosen after the fact."""
    means = {shape: np.mean(_by_seed(runs, losses)) for shape, runs in finished.items() if runs}
    first = sorted(means, key=means.__getitem__)[:2]
    return pairs_of(finished, losses, [tuple(first)])[0] if len(first) == 2 else None


def _pairs(budget: str, at: Mapping[str, Finished], losses: Losses) -> list[dict[str, Any]]:
    """`rows`: as long rows, more of them; `length`: as many rows, longer; `cut`: as many tokens per step, shorter rows.

    Each is loss of `a`, which has the more or longer or shorter rows, minus that of `b`: neighbours, and the two ways
    from a shape to a larger step. p values are corrected (Holm) over those of one kind and budget.
    """
    there = [shape for shape, runs in at[budget].items() if runs]
    both = ways(there)
    of_kind = {
        "rows": more_rows(there) + [(more, base) for base, _, more, _ in both],
        "length": longer(there) + [(long, base) for base, _, _, long in both],
        "cut": cuts(there) + [(more, long) for _, _, more, long in both],
    }
    return [
        {"budget": budget, "kind": kind} | pair
        for kind, chosen in of_kind.items()
        for pair in pairs_of(at[budget], losses, list(dict.fromkeys(chosen)))
    ]


def more_rows(shapes: Sequence[str]) -> list[tuple[str, str]]:
    """(more rows, fewer) of one length, neighbours."""
    return _neighbours(shapes, alike=lambda rows, length: length, by=lambda rows, length: rows)


def longer(shapes: Sequence[str]) -> list[tuple[str, str]]:
    """(longer rows, shorter), as many of them, neighbours."""
    return _neighbours(shapes, alike=lambda rows, length: rows, by=lambda rows, length: length)


def cuts(shapes: Sequence[str]) -> list[tuple[str, str]]:
    """(more and shorter rows, fewer and longer) of as many tokens per step, neighbours."""
    return _neighbours(shapes, alike=lambda rows, length: rows * length, by=lambda rows, length: rows)


def _neighbours(shapes: Sequence[str], alike: Any, by: Any) -> list[tuple[str, str]]:
    rising = sorted(shapes, key=lambda shape: (alike(*sizes(shape)), by(*sizes(shape))))
    return [(b, a) for a, b in itertools.pairwise(rising) if alike(*sizes(a)) == alike(*sizes(b))]


def _choices(budget: str, finished: Finished, pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """From a shape to as many times more tokens per step, in rows or in length: both changes, and rows minus length."""
    of = {(pair["kind"], pair["a"], pair["b"]): pair for pair in pairs if pair["budget"] == budget}
    found = []
    for base, times, more, long in ways([shape for shape, runs in finished.items() if runs]):
        about = {"budget": budget, "from": base, "times": times, "more_rows": more, "longer": long}
        parts = {"rows": of["rows", more, base], "length": of["length", long, base], "cut": of["cut", more, long]}
        found.append(about | parts)
    return found


def ways(shapes: Sequence[str]) -> list[tuple[str, int, str, str]]:
    """(shape, times, that with more rows, that with longer ones), of each shape the least times that there are both."""
    of = {sizes(shape): shape for shape in shapes}
    found = []
    for (rows, length), shape in of.items():
        times = [more // rows for more, same in of if same == length and more > rows and more % rows == 0]
        both = [k for k in sorted(times) if (rows, k * length) in of]
        if both:
            k = both[0]
            found.append((shape, k, of[k * rows, length], of[rows, k * length]))
    return found
