"""The finished runs of a study: gathered from their folders, kept in three small files, read back
from those alone.

A report's folder holds `results.json` (each run's result and config), `curves.csv` (rows of metrics
for the figures) and `heldout_losses.npz` (each target's loss). The report is made from these files,
so it can be made again from them.
"""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from research.config import ConfigError

FINISHED, MISSING = "finished", "missing"
LOSSES_LIMIT = 1_000_000  # bytes of heldout_losses.npz above which losses are kept as float16
_TRAIN_ROWS = 400  # of a curve; more are not seen in a figure
_AXES = ("step", "tokens", "train_seconds")
_KEPT = ("train/loss", "perf/tokens_per_s")  # and every eval/loss@<context>
_NEEDED = frozenset(
    {"strategy", "protocol", "seed", "batch_size", "seq_len", "tokens_per_step", "steps", "tokens"}
    | {"parameters", "corpus", "fingerprint", "train_tokens", "unigram_entropy", "seconds", "eval"}
    | {"tokens_per_second", "step_seconds", "memory_bytes", "device", "jax", "date"}
)


@dataclass(frozen=True)
class Run:
    """One strategy of a study; `result` and what follows are empty unless it is finished."""

    strategy: str
    status: str  # 'finished', 'missing' or 'failed: exit code N'
    result: dict[str, Any] | None = None  # result.json
    config: dict[str, Any] | None = None  # config.json, without folders of the machine
    curve: tuple[dict[str, float], ...] = ()  # rows of metrics.jsonl by step
    losses: Mapping[int, np.ndarray] = field(default_factory=dict)  # context -> [targets] nats
    documents: np.ndarray | None = None  # [targets] held-out document of each target
    positions: np.ndarray | None = None  # [targets] place in the held-out tokens

    @property
    def finished(self) -> bool:
        return self.status == FINISHED


def collect(workdir: Path, strategies: Sequence[str], exit_codes: Mapping[str, int]) -> list[Run]:
    """The runs in `<workdir>/<strategy>/`.

    A strategy whose last command failed is shown as failed even where an older result.json lies in
    its folder. Raises: ConfigError when a finished run's file is damaged.
    """
    runs = []
    for strategy in strategies:
        folder = workdir / strategy
        if code := exit_codes.get(strategy, 0):
            runs.append(Run(strategy, f"failed: exit code {code}"))
        elif not (folder / "result.json").exists():
            runs.append(Run(strategy, MISSING))
        else:
            runs.append(_read_run(folder, strategy))
    return runs


def _read_run(folder: Path, strategy: str) -> Run:
    result = _read_json(folder / "result.json")
    if absent := sorted(_NEEDED - result.keys()):
        raise _damaged(folder / "result.json", f"has no {absent[0]!r}")
    config = _read_json(folder / "config.json")
    losses, documents, positions = {}, None, None
    if (path := folder / "heldout_losses.npz").exists():
        arrays = _read_arrays(path)
        losses = {int(name[5:]): arrays[name] for name in arrays if name.startswith("loss_")}
        documents, positions = arrays.get("document"), arrays.get("position")
        if documents is None or positions is None:
            raise _damaged(path, "has no 'document' and 'position'")
    return Run(
        strategy,
        FINISHED,
        result,
        _without_folders(config),
        _read_curve(folder / "metrics.jsonl"),
        losses,
        documents,
        positions,
    )


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
            raise _damaged(path, f"line {number} is not JSON ({error})") from None
        kept = {k: v for k, v in row.items() if k in _KEPT or k.startswith("eval/loss@")}
        if kept:
            rows.append({axis: row[axis] for axis in _AXES} | kept)
    stride = -(-len(rows) // _TRAIN_ROWS)
    return tuple(row for i, row in enumerate(rows) if i % stride == 0 or any("eval" in name for name in row))


def save(runs: Sequence[Run], folder: Path) -> None:
    """Writes the three data files of a report into `folder`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    table = [{"strategy": r.strategy, "status": r.status, "result": r.result, "config": r.config} for r in runs]
    write_text(folder / "results.json", json.dumps({"runs": table}, indent=1, allow_nan=False) + "\n")
    write_text(folder / "curves.csv", _curves_csv(runs))
    content = _losses_npz(runs, np.float32)
    if len(content) > LOSSES_LIMIT:
        content = _losses_npz(runs, np.float16)
    write_bytes(folder / "heldout_losses.npz", content)


def _curves_csv(runs: Sequence[Run]) -> str:
    rows = [{"strategy": run.strategy, **row} for run in runs for row in run.curve]
    names = {name for row in rows for name in row} - {"strategy", *_AXES}
    text = io.StringIO()
    writer = csv.DictWriter(text, ["strategy", *_AXES, *sorted(names)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()


def _losses_npz(runs: Sequence[Run], dtype: type) -> bytes:
    """Each run's arrays under `<strategy>/`; targets that equal the first run's are kept once."""
    arrays: dict[str, np.ndarray] = {}
    kept: list[Run] = []
    for run in runs:
        if run.positions is None:
            continue
        arrays |= {f"{run.strategy}/loss_{c}": a.astype(dtype) for c, a in run.losses.items()}
        if not any(same_targets(run, other) for other in kept[:1]):
            arrays[f"{run.strategy}/document"] = run.documents
            arrays[f"{run.strategy}/position"] = run.positions
        kept.append(run)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def load(folder: Path) -> list[Run]:
    """The runs of a report's folder, from its three data files.

    Raises: ConfigError naming the file that is missing or damaged.
    """
    for name in ("results.json", "curves.csv", "heldout_losses.npz"):
        if not (folder / name).exists():
            raise _damaged(folder / name, "is missing")
    table = _read_json(folder / "results.json").get("runs")
    if table is None:
        raise _damaged(folder / "results.json", "has no 'runs'")
    with open(folder / "curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    arrays = _read_arrays(folder / "heldout_losses.npz")
    targets = [name[: -len("/document")] for name in arrays if name.endswith("/document")]
    runs = []
    for entry in table:
        own = entry["strategy"] + "/"
        losses = {
            int(name.removeprefix(own + "loss_")): array
            for name, array in arrays.items()
            if name.startswith(own + "loss_")
        }
        source = entry["strategy"] if own + "document" in arrays else next(iter(targets), "")
        runs.append(
            Run(
                **entry,
                curve=tuple(_numbers(row) for row in rows if row["strategy"] == entry["strategy"]),
                losses=losses,
                documents=arrays[f"{source}/document"] if losses else None,
                positions=arrays[f"{source}/position"] if losses else None,
            )
        )
    return runs


def same_targets(a: Run, b: Run) -> bool:
    """Whether two runs were scored on the same held-out tokens of the same corpus."""
    if a.positions is None or b.positions is None or not a.finished or not b.finished:
        return False
    corpus = a.result["fingerprint"] == b.result["fingerprint"]
    return corpus and np.array_equal(a.positions, b.positions) and np.array_equal(a.documents, b.documents)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole: under a temporary name in its folder, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _numbers(row: dict[str, str]) -> dict[str, float]:
    return {name: float(value) for name, value in row.items() if name != "strategy" and value}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _damaged(path, f"cannot be read ({error})") from None


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            return dict(file)
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        raise _damaged(path, f"cannot be read ({error})") from None


def _damaged(path: Path, problem: str) -> ConfigError:
    return ConfigError("workdir", str(path.parent), f"{path.name} {problem}; run that strategy again")
