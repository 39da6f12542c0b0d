"""The runs of a study that adds them as it goes, gathered: results.json, and each target's loss at one context.

What is analysed is made of these two files; archive.py is for studies whose runs are known beforehand.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research import files
from research.analysis.archive import NEEDED, damaged, read_json, refuse_nan
from research.config import ConfigError

FINISHED, DIVERGED, MISSING = "finished", "diverged", "missing"
_RUN = frozenset({"name", "status", "exit_code", "seconds", "result"})  # what an entry of results.json has
DIVERGED_CODE = 3  # exit code of experiments.train: this run has no loss, and is not tried again


def finished(folder: Path) -> bool:
    """Whether a run's folder holds what it leaves at its end."""
    return (folder / "result.json").exists() and (folder / "heldout_losses.npz").exists()


def read_result(folder: Path) -> dict[str, Any] | None:
    """A finished run's result.json, or None. Raises: ConfigError where it is damaged."""
    path = folder / "result.json"
    if not path.exists():
        return None
    result = read_json(path)
    if absent := sorted(NEEDED - result.keys()):
        raise damaged(path, f"has no {absent[0]!r}")
    return result


def shared_context(contexts: Sequence[str], shortest: int) -> int:
    """The longest context (tokens) whose windows, of up to 1.25 times it, fit in the shortest training length."""
    return max(int(context) for context in contexts if 5 * int(context) // 4 <= shortest)


def shared_loss(result: Mapping[str, Any], shortest: int) -> float:
    """Loss (nats/token) of a run on the held-out targets at the shared context of strategies down to `shortest`."""
    contexts = result["eval"]["contexts"]
    return contexts[str(shared_context(contexts, shortest))]["loss"]


def lowest(losses: Mapping[float, float | None], middle: float) -> float | None:
    """The value of the lowest loss, of equal ones that nearest to `middle`; None where no loss is known."""
    known = {value: loss for value, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return min(known, key=lambda value: (known[value], abs(math.log(value / middle))), default=None)


def gather(
    workdir: Path, study: Mapping[str, Any], names: Sequence[str], state: Mapping[str, Any], folder: Path
) -> None:
    """Writes results.json (`study` and the runs) and heldout_losses.npz of run folders into `folder`.

    study: with `shortest`, the training length (tokens) that the shared context fits, and whatever its analysis has to
    know. names: of the runs' folders in `workdir`. state: `exit_codes` and `seconds` by run (experiments/ledger.py).
    Raises: ConfigError where a file is damaged, or clean runs were not scored on the same targets.
    """
    runs, arrays, targets = [], {}, None
    for name in names:
        run = read_run(workdir / name, state)
        runs.append(run)
        if run["status"] != FINISHED or run["result"]["protocol"] != "clean":
            continue  # a leaking run's targets are text that it has trained on
        with np.load(workdir / name / "heldout_losses.npz") as file:
            context = shared_context(run["result"]["eval"]["contexts"], study["shortest"])
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


def read_run(folder: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of results.json: how a run ended and what it found; `heldout`, the hash of its targets, where clean."""
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
        environment = folder / "environment.json"
        run |= {"config": config | {"data": data}}
        run |= {"environment": read_json(environment) if environment.exists() else None}
        if result["protocol"] == "clean":
            run["heldout"] = read_json(folder / "data_manifest.json")["files"]["heldout.npy"]["sha256"]
    return run


def load(folder: Path, what: str, needed: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(results.json, `<run>/loss` [n] and `document` [n]) of a folder that `gather` wrote.

    what: the study's name; needed: what its `study` has and that of no other. Raises: ConfigError where a file is
    missing, damaged, or another study's.
    """
    results = read_json(folder / "results.json")
    if needed not in results.get("study", {}):
        raise ConfigError("--workdir", str(folder), f"its results.json is not a {what}'s")
    if not isinstance(results.get("runs"), list) or any(_RUN - run.keys() for run in results["runs"]):
        raise ConfigError("--workdir", str(folder), "its results.json is damaged; make it again")
    try:
        with np.load(folder / "heldout_losses.npz") as file:
            losses = dict(file)
        refuse_nan(losses)
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        raise ConfigError("--workdir", str(folder), f"heldout_losses.npz cannot be read ({error})") from None
    return results, losses
