"""The waterfall: the three strategies' table at each stage from the original's protocol to a fair comparison.

The analysis is made of the two files that runs.py gathers a study into, the report of results.json alone.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research import files
from research.analysis import original, tuning, waterfall_report
from research.analysis.pairs import pairs_of, rounded
from research.analysis.runs import DIVERGED, FINISHED, load, shared_context


def runs_of(study: Mapping[str, Any]) -> list[str]:
    """The names of a study's runs, each once.

    study: `scale`, `tuning_seed`, `rate` (that strategies share), `shortest` (runs.py), `stages` (number, name,
    changed, measure, leaking, runs: strategy -> names of runs) and `grids` (strategy -> run -> learning rate).
    """
    names = [name for stage in study["stages"] for names in stage["runs"].values() for name in names]
    return list(dict.fromkeys([*names, *(name for grid in study["grids"].values() for name in grid)]))


def write(folder: Path) -> dict[str, Any]:
    """Makes the analysis, figure, report.md and report.html of the two data files in `folder`; returns results.json.

    Raises: ConfigError where a data file is missing or damaged.
    """
    results, losses = load(folder, "waterfall", "stages")
    results["analysis"] = {"waterfall": analyse(results["study"], results["runs"], losses)}
    files.write_json(folder / "results.json", results)
    waterfall_report.write(results, folder)
    return results


def analyse(
    study: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], losses: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Each stage's table, the learning rates, and where the ranking changes, as JSON values.

    losses: `<run>/loss` [n] nats at the shared context, `document` [n].
    """
    by_name = {run["name"]: run for run in runs}
    stages = [_stage(stage, by_name, losses, study["shortest"]) for stage in study["stages"]]
    known = [stage for stage in stages if stage["order"]]
    changes = [b["number"] for a, b in itertools.pairwise(known) if a["order"] != b["order"]]
    rates = {s: tuning.grid(names, by_name, study["shortest"], study["rate"]) for s, names in study["grids"].items()}
    seconds = [run["seconds"] for run in runs if run["seconds"]]
    return {
        "scale": study["scale"],
        "tuning_seed": study["tuning_seed"],
        "corpus": next((run["result"]["corpus"] for run in runs if run["result"]), None),
        "parameters": next((run["result"]["parameters"] for run in runs if run["result"]), None),
        "device": next((run["result"]["device"] for run in runs if run["result"]), None),
        "targets": len(losses.get("document", ())),
        "documents": len(np.unique(losses.get("document", ()))),
        "stages": stages,
        "rates": rates,
        "changes": changes,
        "runs": len(runs),
        "unfinished": [run["name"] for run in runs if run["status"] not in (FINISHED, DIVERGED)],
        "seconds": round(sum(seconds), 1),
    }


def _stage(
    stage: Mapping[str, Any], runs: Mapping[str, Any], losses: Mapping[str, np.ndarray], shortest: int
) -> dict[str, Any]:
    """A stage's rows, lowest loss first; without an order where a strategy has no finished run.

    shortest: the training length of the whole study's shortest rows, which the shared context of every stage fits.
    """
    finished = {s: [runs[n] for n in names if runs[n]["status"] == FINISHED] for s, names in stage["runs"].items()}
    shown = [run["result"] for found in finished.values() for run in found]
    context = None
    if stage["measure"] == "shared" and shown:
        context = shared_context(shown[0]["eval"]["contexts"], shortest)
    rows = []
    for strategy, names in stage["runs"].items():
        missing = [name for name in names if runs[name]["status"] != FINISHED]
        rows.append({"strategy": strategy, "missing": missing} | _row(finished[strategy], context, stage["leaking"]))
    rows.sort(key=lambda row: math.inf if row["loss"] is None else row["loss"])
    order = [row["strategy"] for row in rows] if all(row["loss"] is not None for row in rows) else []
    pairs = pairs_of(finished, losses) if context else []
    for rank, row in enumerate(rows, 1):
        row["rank"] = rank if row["loss"] is not None else None
        row["behind"] = _behind(rows[0]["strategy"], row["strategy"], pairs)
    names = ("number", "name", "changed", "measure", "leaking")
    return {name: stage[name] for name in names} | {
        "context": context,
        "rows": rows,
        "order": order,
        "order_longest": [row["strategy"] for row in sorted(rows, key=_longest)] if order and context else [],
        "pairs": pairs,
    }


def _longest(row: Mapping[str, Any]) -> float:
    return row["longest_loss"]


def _row(runs: Sequence[Mapping[str, Any]], context: int | None, leaking: bool) -> dict[str, Any]:
    """What the finished runs of a strategy show at a stage; means over seeds."""
    if not runs:
        return {"loss": None, "seeds": []}
    results = [run["result"] for run in runs]
    first = results[0]
    suites = [r["eval"]["own"] if context is None else r["eval"]["contexts"][str(context)] for r in results]
    loss = _mean([suite["loss"] for suite in suites])
    row = {
        "seeds": [r["seed"] for r in results],
        "batch_size": first["batch_size"],
        "seq_len": first["seq_len"],
        "tokens_per_step": first["tokens_per_step"],
        "steps": first["steps"],
        "tokens": first["tokens"],
        "train_tokens": first["train_tokens"],
        "passes": rounded(first["tokens"] / first["train_tokens"]),
        "learning_rate": runs[0]["config"]["optimizer"]["learning_rate"],
        "unigram_entropy": rounded(first["unigram_entropy"]),
        "train_loss": _mean([r["train_loss_last"] for r in results]),
        "loss": loss,
        "sd": rounded(float(np.std([s["loss"] for s in suites], ddof=1))) if len(suites) > 1 else None,
        "accuracy": _mean([suite["accuracy"] for suite in suites]),
        "own": _mean([r["eval"]["own"]["loss"] for r in results]),
        "contexts": _contexts(results),
    }
    within = [name for name, found in row["contexts"].items() if not found["beyond"]]
    longest = max(within, key=int)  # what a window that slides has at any longer context too
    row |= {"longest_context": int(longest), "longest_loss": row["contexts"][longest]["loss"]}
    if leaking:
        entropy = first.get("first_token_entropy") or first["unigram_entropy"]
        floor = original.leak_floor(first["train_tokens"] - first["seq_len"], entropy, first["seq_len"])
        row |= {"first_token_entropy": rounded(entropy), "floor": rounded(floor)}
        row["first_token_measured"] = bool(first.get("first_token_entropy"))
        row |= {"above_floor": rounded(loss - floor), "nats_per_window": rounded(loss * first["seq_len"])}
    return row


def _contexts(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """context -> mean loss over runs, and whether its windows are longer than the training length."""
    return {
        name: {"loss": _mean([r["eval"]["contexts"][name]["loss"] for r in results]), "beyond": suite["beyond"]}
        for name, suite in results[0]["eval"]["contexts"].items()
    }


def _behind(lowest: str, strategy: str, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The loss of a strategy minus the lowest, with its interval; None for the lowest, or where there is none."""
    for pair in pairs:
        if {pair["a"], pair["b"]} == {lowest, strategy}:
            found = {name: pair[name] for name in ("mean", "low", "high", "p_holm", "shown")}
            if pair["a"] == lowest:
                low, high = pair["low"], pair["high"]
                found |= {"mean": -pair["mean"], "low": _negative(high), "high": _negative(low)}
            return found
    return None


def _mean(values: Sequence[float]) -> float:
    return rounded(sum(values) / len(values))


def _negative(value: float | None) -> float | None:
    return None if value is None else -value
