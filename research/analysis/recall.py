"""How far back a model recalls: accuracy on the recall task against the distance to where the key was last said."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from research.analysis.context import rounded
from research.analysis.page import Section, Table
from research.analysis.statistics import wilson
from research.analysis.study import Arm, lengths_of

SAME = 0.05  # of all answers: a share that is higher by less is no higher
SUITES = {"raw": "whole documents", "window": "windows of the trained length"}


def analyse(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Per strategy, suite and bin of distances [2^b, 2^(b+1)): right of total answers of all seeds, with Wilson's
    interval of as many answers as there are: seeds answer the same ones.

    `raw` reads whole documents, beyond the trained length too; `window` shows what fits. Chance is one value in
    `chance`; a model that is at it does not recall.
    """
    return [
        dict(
            strategy=arm.strategy,
            seeds=arm.seeds,
            seq_len=arm.first["seq_len"],
            stages=arm.first["stages"] if arm.grows else None,
            chance=rounded(1 / arm.runs[0].config["data"]["recall"]["num_values"]),
            **{suite: _by_distance(arm, suite) for suite in SUITES},
        )
        for arm in arms
    ]


def _by_distance(arm: Arm, suite: str) -> list[dict[str, Any]]:
    distances = arm.runs[0].arrays["distance"]
    right = np.stack([_right(run.arrays, suite) for run in arm.runs])
    bins = np.log2(distances).astype(int)
    found = []
    for b in np.unique(bins):
        hits = right[:, bins == b]
        low, high = wilson(round(hits.sum() / len(hits)), hits.shape[1])
        entry = dict(right=int(hits.sum()), answers=int(hits.size), mean=rounded(hits.mean()))
        spread = rounded(np.std(hits.mean(axis=1), ddof=1)) if len(hits) > 1 else None
        entry |= dict(low=low, high=high, sd=spread, by_seed=[rounded(share) for share in hits.mean(axis=1)])
        found.append({"from": int(2**b), "to": int(2 ** (b + 1) - 1)} | entry)
    return found


def _right(arrays: Any, suite: str) -> np.ndarray:
    if suite == "window":
        return arrays["right_window"]
    return arrays[next(name for name in arrays if name.startswith("right_") and name[6:].isdecimal())]


def section(analysis: dict[str, Any]) -> Section | None:
    found = analysis["recall"]
    if not found:
        return None
    tables = tuple(_table(found, suite) for suite in SUITES)
    text = (
        "A document binds keys to values; later a key comes again, and its value is asked for. Loss and accuracy are "
        "of the answers alone. A document binds a key once, values are independent, and the distance to where the key "
        "was last said is independent of the place, so nothing but recall helps. A loss on text does not show it "
        "directly. The models are others than those on text: smaller, trained on this task alone, in much shorter rows."
    )
    return Section("How far back can it recall?", text, tables)


def share(b: dict[str, Any]) -> str:
    """Accuracy in a bin of distances, with each seed's, or of one seed with its interval.

    Looking up is learnt all at once or not at all, so seeds differ by far more than the interval of their answers says.
    """
    if len(b["by_seed"]) < 2:
        return f"{b['mean']:.1%} [{b['low']:.1%}, {b['high']:.1%}]"
    return f"{b['mean']:.0%} ({', '.join(f'{seed:.0%}' for seed in b['by_seed'])})"


def above(b: dict[str, Any], a: dict[str, Any]) -> bool:
    """Whether one recalls more in a bin than another: in every seed, and by more than their answers leave to chance."""
    return min(b["by_seed"]) > max(a["by_seed"]) and b["low"] > a["high"]


def no_more(b: dict[str, Any], most: float) -> bool:
    """Whether it is shown that no more than a share `most` is recalled in a bin, to SAME: by answers and every seed."""
    return max(b["high"], *b["by_seed"]) < most + SAME


def least(b: dict[str, Any]) -> float:
    """The lowest share that answers and seeds leave to a bin."""
    return min(b["low"], *b["by_seed"])


def _table(found: Sequence[dict[str, Any]], suite: str) -> Table:
    bins = [(e["from"], e["to"]) for e in found[0][suite]]
    lengths = {e["strategy"]: " then ".join(f"{length:,}" for length in lengths_of(e)) for e in found}
    rows = tuple((e["strategy"], lengths[e["strategy"]], *(share(b) for b in e[suite])) for e in found)
    seeds = ", ".join(str(seed) for seed in found[0]["seeds"])
    of = f"mean (seeds {seeds})" if len(found[0]["seeds"]) > 1 else "[95 %, Wilson]"
    note = (
        f"Accuracy, {of}, in {SUITES[suite]}; chance is {found[0]['chance']:.1%}. "
        f"Answers per cell and seed: {found[0][suite][0]['answers'] // len(found[0]['seeds']):,} or so."
    )
    if suite == "window":
        note += " A window shows 3/4 T to T tokens before an answer: of keys farther back than 3/4 T not all are seen."
    if len(found[0]["seeds"]) < 2:
        note += " Of one seed: no interval holds the choice of it, and seeds differ by far more than answers."
    return Table(("strategy", "trained at", *(f"{a:,} to {b:,}" for a, b in bins)), rows, note)
