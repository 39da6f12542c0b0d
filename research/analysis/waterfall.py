"""The waterfall: the three strategies' table at each stage from the original's protocol to a fair comparison.

A study's folder is gathered into results.json (the stages, each run's result and config) and heldout_losses.npz (each
target's loss at the shared context); the analysis is made of these two, the report of results.json alone.
"""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research import files
from research.analysis import bootstrap, original, statistics, waterfall_report
from research.analysis.archive import read_json, refuse_nan
from research.config import ConfigError

FINISHED, DIVERGED, MISSING = "finished", "diverged", "missing"
DIVERGED_CODE = 3  # exit code of experiments.train: this learning rate has no loss, and is not tried again
_SEED = 0  # of the resampling


def read_result(folder: Path) -> dict[str, Any] | None:
    """A finished run's result.json, or None. Raises: ConfigError where it is damaged."""
    path = folder / "result.json"
    return read_json(path) if path.exists() else None


def shared_context(contexts: Sequence[str], shortest: int) -> int:
    """The longest context (tokens) whose windows, of up to 1.25 times it, fit in the shortest training length."""
    return max(int(context) for context in contexts if 5 * int(context) // 4 <= shortest)


def shared_loss(result: Mapping[str, Any], shortest: int) -> float:
    """Loss (nats/token) of a run on the held-out targets at the shared context of strategies down to `shortest`."""
    contexts = result["eval"]["contexts"]
    return contexts[str(shared_context(contexts, shortest))]["loss"]


def gather(workdir: Path, study: Mapping[str, Any], state: Mapping[str, Any], folder: Path) -> None:
    """Writes results.json and heldout_losses.npz of a study's run folders into `folder`.

    study: `scale`, `tuning_seed`, `stages` (number, name, changed, measure, leaking, runs: strategy -> names of runs)
    and `grids` (strategy -> run -> learning rate). state: `exit_codes` and `seconds` by run.
    Raises: ConfigError where a file is damaged, or clean runs were not scored on the same targets.
    """
    stages = study["stages"]
    names = [name for stage in stages for names in stage["runs"].values() for name in names]
    names = list(dict.fromkeys([*names, *(name for grid in study["grids"].values() for name in grid)]))
    lengths = [run["seq_len"] for name in names if (run := read_result(workdir / name))]
    runs, arrays, targets = [], {}, None
    for name in names:
        run = _read_run(workdir / name, state)
        runs.append(run)
        if run["status"] != FINISHED or run["result"]["protocol"] != "clean":
            continue  # a leaking run's targets are text that it has trained on
        with np.load(workdir / name / "heldout_losses.npz") as file:
            context = shared_context(run["result"]["eval"]["contexts"], min(lengths))
            arrays[f"{name}/loss"] = file[f"loss_{context}"].astype(np.float16)
            found = run.pop("heldout"), file["document"], file["position"]
        targets = targets or found
        if found[0] != targets[0] or not all(map(np.array_equal, found[1:], targets[1:])):
            raise ConfigError("--workdir", str(workdir), f"{name} was not scored on the targets of the others")
    if targets is not None:
        arrays |= {"document": targets[1], "position": targets[2]}
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".heldout_losses", "wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(folder / ".heldout_losses", folder / "heldout_losses.npz")
    files.write_json(folder / "results.json", {"study": study, "runs": runs})


def _read_run(folder: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    code, result = state["exit_codes"].get(folder.name, 0), read_result(folder)
    status = FINISHED if result else DIVERGED if code == DIVERGED_CODE else f"failed: exit code {code}"
    run = {
        "name": folder.name,
        "status": status if result or code else MISSING,
        "exit_code": code,
        "seconds": state["seconds"].get(folder.name),  # of the process, with its start and its compilation
        "result": result,
    }
    if result:
        config = read_json(folder / "config.json")
        data = {name: value for name, value in config["data"].items() if name != "cache_dir"}
        if os.path.isabs(data["path"]):
            data["path"] = os.path.basename(data["path"])  # folders of one machine say nothing to another
        files = read_json(folder / "data_manifest.json")["files"]
        run |= {"config": config | {"data": data}}
        if result["protocol"] == "clean":
            run["heldout"] = files["heldout.npy"]["sha256"]
    return run


def write(folder: Path) -> dict[str, Any]:
    """Makes the analysis, figure, report.md and report.html of the two data files in `folder`; returns results.json.

    Raises: ConfigError where a data file is missing or damaged.
    """
    results = read_json(folder / "results.json")
    if "study" not in results:
        raise ConfigError("--workdir", str(folder), "its results.json is not a waterfall's; see experiments.ablation")
    try:
        with np.load(folder / "heldout_losses.npz") as file:
            losses = dict(file)
        refuse_nan(losses)
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        raise ConfigError("--workdir", str(folder), f"heldout_losses.npz cannot be read ({error})") from None
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
    lengths = [run["result"]["seq_len"] for run in runs if run["result"]]
    stages = [_stage(stage, by_name, losses, min(lengths, default=0)) for stage in study["stages"]]
    known = [stage for stage in stages if stage["order"]]
    changes = [b["number"] for a, b in itertools.pairwise(known) if a["order"] != b["order"]]
    rates = {s: _rates(names, by_name, min(lengths, default=0)) for s, names in study["grids"].items()}
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
    pairs = _pairs(finished, losses) if context else []
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
        "passes": _rounded(first["tokens"] / first["train_tokens"]),
        "learning_rate": runs[0]["config"]["optimizer"]["learning_rate"],
        "unigram_entropy": _rounded(first["unigram_entropy"]),
        "train_loss": _mean([r["train_loss_last"] for r in results]),
        "loss": loss,
        "sd": _rounded(float(np.std([s["loss"] for s in suites], ddof=1))) if len(suites) > 1 else None,
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
        row |= {"first_token_entropy": _rounded(entropy), "floor": _rounded(floor)}
        row["first_token_measured"] = bool(first.get("first_token_entropy"))
        row |= {"above_floor": _rounded(loss - floor), "nats_per_window": _rounded(loss * first["seq_len"])}
    return row


def _contexts(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """context -> mean loss over runs, and whether its windows are longer than the training length."""
    return {
        name: {"loss": _mean([r["eval"]["contexts"][name]["loss"] for r in results]), "beyond": suite["beyond"]}
        for name, suite in results[0]["eval"]["contexts"].items()
    }


def _pairs(finished: Mapping[str, Sequence[Mapping[str, Any]]], losses: Mapping[str, np.ndarray]) -> list[dict]:
    """Loss of a minus that of b on the same targets, over the seeds that both have finished; Holm over the pairs."""
    pairs = []
    for a, b in itertools.combinations([s for s, runs in finished.items() if runs], 2):
        by_seed = [{run["result"]["seed"]: run["name"] for run in finished[s]} for s in (a, b)]
        seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
        if not seeds:
            continue
        arms = [np.stack([losses[f"{names[s]}/loss"] for s in seeds]).astype(np.float64) for names in by_seed]
        found = bootstrap.hierarchical_bootstrap(*arms, losses["document"], _SEED)
        pairs.append({"a": a, "b": b, "seeds": seeds, "found": found})
    adjusted = statistics.holm([pair["found"].p for pair in pairs])
    for pair, p in zip(pairs, adjusted, strict=True):
        found = pair.pop("found")
        pair |= {name: _rounded(getattr(found, name)) for name in ("mean", "low", "high", "p")}
        pair |= {"p_holm": _rounded(p), "shown": p < 0.05}
    return pairs


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


def _rates(grid: Mapping[str, float], runs: Mapping[str, Any], shortest: int) -> dict[str, Any]:
    """A strategy's losses by learning rate, the best, and whether a higher loss lies on both of its sides."""
    tried = []
    for name, rate in sorted(grid.items(), key=lambda item: item[1]):
        result = runs[name]["result"]
        loss = _rounded(shared_loss(result, shortest)) if result else None
        tried.append({"rate": rate, "run": name, "status": runs[name]["status"], "loss": loss})
    known = {entry["rate"]: entry["loss"] for entry in tried if entry["loss"] is not None}
    best = min(known, key=known.__getitem__) if known else None
    settled = [entry["rate"] for entry in tried if entry["status"] in (FINISHED, DIVERGED)]
    return {"tried": tried, "best": best, "inside": best is not None and min(settled) < best < max(settled)}


def _mean(values: Sequence[float]) -> float:
    return _rounded(sum(values) / len(values))


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def _rounded(value: float | None) -> float | None:
    """Six decimals: the same on every machine. JSON has no NaN."""
    return round(float(value), 6) if value is not None and math.isfinite(value) else None
