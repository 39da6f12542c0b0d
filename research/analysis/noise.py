"""The noise of the gradient: its estimates from noise.json, with a jackknife over blocks of micro-batches.

With g_m the gradients of M micro-batches at fixed weights, their true mean G and covariance Sigma of one micro-batch:

    |G|^2    = (|sum g|^2 - sum |g|^2) / (M (M - 1))
    tr Sigma = sum |g - mean g|^2 / (M - 1)

are unbiased (the two-batch form is McCandlish et al. 2018, arXiv:1812.06162, appendix A.1). The noise scale, tr Sigma /
|G|^2 times a micro-batch's tokens, is in tokens: a step of so many has as much noise as signal.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from research import files
from research.config import ConfigError

FILE = "noise.json"  # of a study's folder, and of its report's
MATRICES = ("attention", "router", "experts")  # groups that Muon trains
_ABOUT = ("run", "strategy", "setting", "seed", "seq_len", "step", "consumed")


def read(folder: Path) -> dict[str, Any] | None:
    """noise.json of a folder, or None. Raises: ConfigError where it is damaged."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        for entry in found["measured"]:
            _check(entry, found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{FILE} is damaged ({type(error).__name__}: {error}); remove it and measure again"
        raise ConfigError("workdir", str(folder), message) from None
    return found


def _check(entry: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises: KeyError, TypeError or ValueError where an entry is not what `_run` reads."""
    groups = len(found["groups"])
    squares, gram = (np.asarray(entry[name], np.float64) for name in ("squares", "gram"))
    blocks = len(squares)
    if squares.shape != (blocks, groups) or gram.shape != (blocks, blocks, groups) or blocks < 2:
        raise ValueError(f"numbers of {entry['run']} are of unlike shapes")
    if not (np.isfinite(squares).all() and np.isfinite(gram).all()):
        raise ValueError(f"a number of {entry['run']} is not finite")
    if int(found["batches"]) % blocks or found["batches"] < 2 * blocks or int(found["tokens"]) % int(entry["length"]):
        raise ValueError("batches are no multiple of blocks, or tokens of a length")
    for name in _ABOUT:
        entry[name]


def copy(workdir: Path, folder: Path) -> None:
    """Puts a study's noise.json beside its report's other data files; one that is gone is gone there too."""
    if read(workdir) is not None:
        files.write_bytes(folder / FILE, (workdir / FILE).read_bytes())
    else:
        (folder / FILE).unlink(missing_ok=True)


def tokens_per_step(analysis: Mapping[str, Any]) -> int | None:
    """Of every strategy; None where they differ."""
    sizes = {arm["tokens_per_step"] for arm in analysis["arms"]}
    return sizes.pop() if len(sizes) == 1 else None


def analyse(found: Mapping[str, Any] | None, finished: Collection[str] | None = None) -> list[dict[str, Any]]:
    """For each run that was measured: its `cells` by order and length, and `ratios` of them, with 95 % intervals.

    A cell: `spread` (tr Sigma of a micro-batch) and what it is `relative` to the shortest rows' in independent order,
    `signal` (|G|^2), `scale` (tokens; `value` None where the interval of |G|^2 holds zero: `low` is then all that is
    known), and `groups`, the share of the spread in each. Ratios are of spreads at equal tokens, of the run's longest
    rows to the shortest: `total`, and `matrices`, of Muon's parameters alone, in independent order; `length`, on the
    same text; `diversity`, total over length. `place`: of the shortest rows, from one place to places of their own.

    finished: names of the runs to keep; None: all. One without its shortest rows in independent order is left out.
    """
    runs: dict[str, list] = {}
    for entry in found["measured"] if found else ():
        runs.setdefault(entry["run"], []).append(entry)
    if finished is not None:
        runs = {name: entries for name, entries in runs.items() if name in finished}
    whole = [entries for entries in runs.values() if _has_base(entries)]
    return [_run(entries, found) for entries in whole]


def _has_base(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the cell is there that others are relative to: a measurement that was stopped may lack it."""
    shortest = min(entry["length"] for entry in entries)
    return any(entry["order"] == "independent" and entry["length"] == shortest for entry in entries)


def _run(entries: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> dict[str, Any]:
    first, tokens, batches = entries[0], found["tokens"], found["batches"]
    muon = [i for i, name in enumerate(found["groups"]) if name in MATRICES]
    cells = {(e["order"], e["length"]): estimates(e, batches) for e in entries}
    spread = {place: cell["spread"] for place, cell in cells.items()}
    matrices = {(e["order"], e["length"]): estimates(e, batches, muon)["spread"] for e in entries}
    for known in (spread, matrices):  # rows as long as a micro-batch: both orders are one
        if ("independent", tokens) in known:
            known["paired", tokens] = known["independent", tokens]
    lengths = sorted({length for _, length in cells})
    short, long = lengths[0], lengths[-1]
    base = spread["independent", short]
    shown = [
        {"order": order, "length": length, "rows": tokens // length}
        | {name: jackknife(cell[name], logs=name == "spread") for name in ("spread", "signal")}
        | {"relative": jackknife(cell["spread"] / base, logs=True)}
        | {"scale": _scale(cell, tokens), "groups": _shares(entry, found)}
        for (order, length), cell, entry in zip(cells, cells.values(), entries, strict=True)
    ]
    ratios = {}
    if ("paired", short) in spread and short < tokens:
        ratios["place"] = spread["paired", short] / base
    if short < long:
        ratios["total"] = spread["independent", long] / base
        ratios["matrices"] = matrices["independent", long] / matrices["independent", short]
        if ("paired", short) in spread and ("paired", long) in spread:
            ratios["length"] = spread["paired", long] / spread["paired", short]
            ratios["diversity"] = ratios["total"] / ratios["length"]
    about = {name: first[name] for name in _ABOUT}
    about |= {"tokens": tokens, "batches": batches, "short": short, "long": long, "cells": shown}
    return about | {"ratios": {name: jackknife(values, logs=True) for name, values in ratios.items()}}


def estimates(
    entry: Mapping[str, Any], batches: int, groups: Sequence[int] | slice = slice(None)
) -> dict[str, np.ndarray]:
    """`signal` and `spread` [1 + K]: of all blocks, then without each; of some groups of parameters, or of all."""
    squares, gram = (np.asarray(entry[name], np.float64)[..., groups].sum(-1) for name in ("squares", "gram"))
    blocks = len(squares)
    each = batches // blocks
    kept = np.vstack([np.ones(blocks), 1 - np.eye(blocks)])  # [1 + K, K]
    count = each * kept.sum(1)
    norm, total = np.einsum("ra,ab,rb->r", kept, gram, kept), kept @ squares
    return {"signal": (norm - total) / (count * (count - 1)), "spread": (total - norm / count) / (count - 1)}


def jackknife(values: np.ndarray, logs: bool, confidence: float = 0.95) -> dict[str, float | None]:
    """`value`, `low`, `high` of an estimate [1 + K]: of all blocks, then without each (Student's t, K - 1).

    logs: of its logarithm, for what is above zero.
    """
    scale = np.log(values) if logs else values
    blocks = len(values) - 1
    error = math.sqrt((blocks - 1) / blocks * np.square(scale[1:] - scale[1:].mean()).sum())
    reach = stats.t.ppf((1 + confidence) / 2, blocks - 1) * error
    ends = scale[0], scale[0] - reach, scale[0] + reach
    return dict(zip(("value", "low", "high"), (_short(math.exp(x) if logs else x) for x in ends), strict=True))


def _scale(cell: Mapping[str, np.ndarray], tokens: int) -> dict[str, float | None]:
    signal = jackknife(cell["signal"], logs=False)
    if signal["low"] > 0 and (cell["signal"] > 0).all():
        return jackknife(tokens * cell["spread"] / cell["signal"], logs=True)
    low = tokens * cell["spread"][0] / signal["high"] if signal["high"] > 0 else None
    return {"value": None, "low": _short(low), "high": None}


def _shares(entry: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, float]:
    """Which share of the spread is in each group of parameters."""
    parts = [estimates(entry, found["batches"], [i])["spread"][0] for i in range(len(found["groups"]))]
    return {name: _short(part / sum(parts)) for name, part in zip(found["groups"], parts, strict=True)}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
