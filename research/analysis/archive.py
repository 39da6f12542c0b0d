"""The files of a study: read from the folders of its runs, kept in two small ones, read back from those alone.

A report's folder holds `results.json` (each run's result, config and curve, and later the analysis) and
`heldout_losses.npz` (the loss of every held-out target), so a report can be made again, and the losses used by anyone.
"""

import dataclasses
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research import files
from research.analysis import context
from research.analysis.study import FINISHED, MISSING, SETTINGS, TARGETS, Key, Run, same_targets
from research.config import ConfigError, differences

LOSSES_LIMIT = 1_000_000  # bytes of heldout_losses.npz above which losses are kept as float16
_TRAIN_ROWS = 100  # of a curve; more are not seen in a figure
_AXES = ("step", "tokens", "flops", "train_seconds")
NEEDED = frozenset(  # of result.json
    {"strategy", "protocol", "seed", "batch_size", "seq_len", "tokens_per_step", "steps", "tokens", "flops"}
    | {"parameters", "corpus", "fingerprint", "train_tokens", "unigram_entropy", "seconds", "eval"}
    | {"tokens_per_second", "step_seconds", "memory_bytes", "device", "jax", "date"}
)


def collect(workdir: Path, keys: Sequence[Key], exit_codes: Mapping[str, int]) -> list[Run]:
    """The runs in `<workdir>/<name>/`.

    A run whose last command failed is shown as failed even where an older result.json lies in its folder.
    Raises: ConfigError when a finished run's file is damaged, or text runs are of different corpora.
    """
    runs = []
    for key in keys:
        folder = workdir / key.name
        if code := exit_codes.get(key.name, 0):
            runs.append(Run(key, f"failed: exit code {code}"))
        elif not (folder / "result.json").exists():
            runs.append(Run(key, MISSING))
        else:
            runs.append(_read_run(folder, key))
    _refuse_mixed(runs, workdir)
    return runs


def _refuse_mixed(runs: Sequence[Run], workdir: Path) -> None:
    """One comparison: one corpus and one recall task, one set of targets, seeds that differ in nothing else."""
    finished = [run for run in runs if run.finished]
    for recall in (False, True):
        alike = [run for run in finished if (run.key.setting == "recall") == recall]
        for run in alike[1:]:
            if problem := _unlike(run, alike[0]):
                raise ConfigError("workdir", str(workdir), f"{run.key.name} is {problem}; compare them apart")
    for setting in SETTINGS:
        _refuse_unlike([run for run in finished if run.key.setting == setting], workdir)


def _unlike(run: Run, first: Run) -> str | None:
    if run.result["fingerprint"] != first.result["fingerprint"]:
        corpora = [r.result["corpus"] + " " + r.result["fingerprint"][:12] for r in (first, run)]
        return f"of another corpus ({corpora[1]}) than {first.key.name} ({corpora[0]})"
    if run.result["protocol"] != first.result["protocol"]:
        return f"of another protocol than {first.key.name}"
    if not same_targets(run, first):
        return f"scored on other held-out targets than {first.key.name}"
    return None


def _refuse_unlike(runs: Sequence[Run], workdir: Path) -> None:
    """Seeds of a strategy share a config, and all paired runs an order."""
    first: dict[str, Run] = {}
    for run in runs:
        other = first.setdefault(run.key.strategy, run)
        fields = [name for name, _ in differences(other.config, run.config) if name != "seed"]
        if (
            run.key.setting == "paired"
            and run.config["data"]["shuffle_block"] != runs[0].config["data"]["shuffle_block"]
        ):
            other, fields = runs[0], ["data.shuffle_block"]
        if fields:
            message = f"{run.key.name} differs from {other.key.name} in config.{fields[0]}; compare them apart"
            raise ConfigError("workdir", str(workdir), message)


def _read_run(folder: Path, key: Key) -> Run:
    result = read_json(folder / "result.json")
    if absent := sorted(NEEDED - result.keys()):
        raise damaged(folder / "result.json", f"has no {absent[0]!r}")
    config = _without_folders(read_json(folder / "config.json"))
    arrays = _read_arrays(folder / "heldout_losses.npz")
    if absent := sorted({"document", "position"} - arrays.keys()):
        raise damaged(folder / "heldout_losses.npz", f"has no {absent[0]!r}")
    if "own_loss" in arrays:
        own = [arrays.pop(name) for name in ("own_loss", "own_document", "own_place")]
        arrays |= context.bin_own(*own)
    environment = read_json(folder / "environment.json") if (folder / "environment.json").exists() else None
    return Run(key, FINISHED, result, config, _read_curve(folder / "metrics.jsonl"), arrays, environment)


def _without_folders(config: dict[str, Any]) -> dict[str, Any]:
    """The config as it may be published: folders of one machine say nothing to another."""
    data = {name: value for name, value in config.get("data", {}).items() if name != "cache_dir"}
    if os.path.isabs(data.get("path") or ""):
        data["path"] = os.path.basename(data["path"])
    return {**config, "data": data}


def _read_curve(path: Path) -> tuple[dict[str, float], ...]:
    """All evaluations, and rows with a train loss, thinned to what a figure can show."""
    rows = []
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break  # the last line of a run that was stopped while writing it
            raise damaged(path, f"line {number} is not JSON ({error})") from None
        kept = {k: _short(v) for k, v in row.items() if k == "train/loss" or k.startswith("eval/loss@")}
        if kept:
            rows.append({axis: _short(row[axis]) for axis in _AXES} | kept)
    stride = -(-len(rows) // _TRAIN_ROWS)
    return tuple(row for i, row in enumerate(rows) if i % stride == 0 or any("eval" in name for name in row))


def _short(value: float) -> float:
    return float(f"{value:.7g}") if isinstance(value, float) else value


def save(runs: Sequence[Run], folder: Path) -> None:
    """Writes the two data files of a report into `folder`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("status", "result", "config", "environment", "curve")
    table = [dataclasses.asdict(run.key) | {name: getattr(run, name) for name in names} for run in runs]
    files.write_json(folder / "results.json", {"runs": table})
    content = _arrays_npz(runs, np.float32)
    if len(content) > LOSSES_LIMIT:
        content = _arrays_npz(runs, np.float16)
    files.write_bytes(folder / "heldout_losses.npz", content)


def _arrays_npz(runs: Sequence[Run], dtype: type) -> bytes:
    """Each run's arrays under `<name>/`; targets that equal those of an earlier run are kept once, and how far back
    their pairs were seen (`repeat`) of the first run that says so: all runs on text have the same targets."""
    arrays: dict[str, np.ndarray] = {}
    kept: list[Run] = []
    repeats = False
    for run in runs:
        known = next((other for other in kept if same_targets(run, other)), None)
        for name, array in run.arrays.items():
            if (name in TARGETS and known is not None) or (name == "repeat" and repeats):
                continue
            repeats |= name == "repeat"
            arrays[f"{run.key.name}/{name}"] = array.astype(dtype) if name.startswith("loss_") else array
        if known is not None:
            arrays[f"{run.key.name}/same_targets_as"] = np.array(known.key.name)
        elif run.arrays:
            kept.append(run)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def load(folder: Path) -> list[Run]:
    """The runs of a report's folder, from its two data files.

    Raises: ConfigError naming the file that is missing or damaged.
    """
    for name in ("results.json", "heldout_losses.npz"):
        if not (folder / name).exists():
            raise ConfigError("workdir", str(folder), f"{name} is missing; run it again")
    table = read_json(folder / "results.json").get("runs")
    if not isinstance(table, list) or any("setting" not in entry for entry in table):
        raise ConfigError("workdir", str(folder), "its results.json is not a study's; see experiments.waterfall")
    stored: dict[str, dict[str, np.ndarray]] = {}
    for name, array in _read_arrays(folder / "heldout_losses.npz").items():
        run, _, what = name.partition("/")
        stored.setdefault(run, {})[what] = array
    runs = []
    for entry in table:
        key = Key(entry["strategy"], entry["setting"], entry["seed"])
        arrays = stored.get(key.name, {})
        if "same_targets_as" in arrays:
            source = stored[str(arrays.pop("same_targets_as"))]
            arrays |= {name: source[name] for name in TARGETS if name in source}
        if entry["status"] == FINISHED and not arrays:
            raise damaged(folder / "heldout_losses.npz", f"has nothing of {key.name}")
        known = [entry["status"], entry["result"], entry["config"], tuple(entry["curve"]), arrays]
        runs.append(Run(key, *known, entry.get("environment")))  # results of earlier versions have none
    return runs


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises: ConfigError naming the file, where it is missing or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise damaged(path, f"cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise damaged(path, "holds no object")
    return found


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            arrays = dict(file)
        refuse_nan(arrays)
        return arrays
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        raise damaged(path, f"cannot be read ({error})") from None


def refuse_nan(arrays: Mapping[str, np.ndarray]) -> None:
    """Raises: ValueError naming the first array that holds a number that is not finite."""
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name} holds a number that is not finite")


def damaged(path: Path, problem: str) -> ConfigError:
    """Of a file that a run or a report left: the same command makes it again where it is gone."""
    return ConfigError("workdir", str(path.parent), f"{path.name} {problem}; remove it and run it again")
