"""Which value of a field, such as the learning rate, each strategy does best at, and what the choice is worth.

One run per value, and the losses that choose are those that are compared: intervals cover the choice of held-out
documents, not the seed. For a comparison the values found go into a study of other seeds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research import files
from research.analysis import bootstrap, tuning_report
from research.analysis.pairs import pairs_of, rounded
from research.analysis.runs import DIVERGED, FINISHED, load, lowest, shared_context, shared_loss
from research.analysis.study import shape

_SEED = 0  # of the resampling


def grid(values: Mapping[str, float], runs: Mapping[str, Any], shortest: int, middle: float) -> dict[str, Any]:
    """A strategy's losses by value, the best, and whether a higher loss lies on both of its sides.

    values: run -> value. runs: by name. shortest: training length (tokens) that the shared context fits. middle: the
    value that the grid began with.
    """
    tried, losses = [], {}
    for name, value in sorted(values.items(), key=lambda item: item[1]):
        result = runs[name]["result"]
        losses[value] = shared_loss(result, shortest) if result else None
        tried.append({"value": value, "run": name, "status": runs[name]["status"], "loss": rounded(losses[value])})
    best = lowest(losses, middle)
    settled = [entry["value"] for entry in tried if entry["status"] in (FINISHED, DIVERGED)]
    return {"tried": tried, "best": best, "inside": best is not None and min(settled) < best < max(settled)}


def write(folder: Path) -> dict[str, Any]:
    """Makes the analysis, figure, report.md and report.html of the two data files in `folder`; returns results.json.

    Raises: ConfigError where a data file is missing or damaged.
    """
    results, losses = load(folder, "tuning", "given")
    results["analysis"] = {"tuning": analyse(results["study"], results["runs"], losses)}
    files.write_json(folder / "results.json", results)
    tuning_report.write(results, folder)
    return results


def analyse(
    study: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], losses: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Each strategy's grid, and the strategies beside each other at the config's value and at their best.

    study: `scale`, `seed`, `shortest` (runs.py), `field`, `overrides`, `given` (strategy -> the config's value) and
    `grids` (strategy -> run -> value). losses: `<run>/loss` [n] nats at the shared context, `document` [n].
    """
    by_name = {run["name"]: run for run in runs}
    results = [run["result"] for run in runs if run["result"]]
    shortest = study["shortest"]
    grids = {}
    for strategy, values in study["grids"].items():
        found = grid(values, by_name, shortest, study["given"][strategy]) | {"given": study["given"][strategy]}
        best = next((entry["run"] for entry in found["tried"] if entry["value"] == found["best"]), None)
        for entry in found["tried"]:
            entry["above"] = _above(entry["run"], best, losses)
        first = next((by_name[name]["result"] for name in values if by_name[name]["result"]), None)
        found["shape"] = shape(first) if first else None
        grids[strategy] = found
    return {
        "grids": grids,
        "context": shared_context(results[0]["eval"]["contexts"], shortest) if results else None,
        "targets": len(losses.get("document", ())),
        "documents": len(np.unique(losses.get("document", ()))),
        "compared": {name: _compared(grids, name, by_name, losses) for name in ("given", "best")},
        "unfinished": [run["name"] for run in runs if run["status"] not in (FINISHED, DIVERGED)],
        "seconds": round(sum(run["seconds"] for run in runs if run["seconds"]), 1),
    }


def _above(run: str, best: str | None, losses: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """Loss of a run minus that of the strategy's best, over documents; None for the best, or without a loss."""
    if run == best or f"{run}/loss" not in losses:
        return None
    pair = (losses[f"{name}/loss"].astype(np.float64) for name in (run, best))
    found = bootstrap.paired_bootstrap(*pair, losses["document"], _SEED, bootstrap.RESAMPLES)
    return {name: rounded(getattr(found, name)) for name in ("mean", "low", "high")} | {"shown": found.shown}


def _compared(
    grids: Mapping[str, Any], which: str, runs: Mapping[str, Any], losses: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The strategies at the value that `which` names: their losses, lowest first, and pairs (Holm)."""
    chosen = {}
    for strategy, found in grids.items():
        entry = next((entry for entry in found["tried"] if entry["value"] == found[which]), None)
        if entry is not None and entry["loss"] is not None:
            chosen[strategy] = entry
    rows = [{"strategy": s, "value": entry["value"], "loss": entry["loss"]} for s, entry in chosen.items()]
    rows.sort(key=lambda row: row["loss"])
    return {"rows": rows, "pairs": pairs_of({s: [runs[entry["run"]]] for s, entry in chosen.items()}, losses)}
