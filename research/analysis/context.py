"""What a model does with the tokens before a target: curves over contexts, and over places in window and document.

All losses are of the same held-out targets, in nats per token; intervals are 95 % over seeds and documents
(bootstrap.py). The raw model beyond its trained length meets rotary positions that it never saw; a sliding window
shows it no more than fits, so its loss there is that of the longest context within the trained length.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from research.analysis.bootstrap import MIN_DOCUMENTS, RESAMPLES, bootstrap_statistic, hierarchical_bootstrap
from research.analysis.statistics import holm

LEVEL = 0.05  # of the comparisons of a table together, by Holm's correction
TOLERANCE = 0.01  # nats per token: less than this is no help any more
ICL_PLACES = ((500, 50), (200, 20), (100, 10))  # late and early; the first is Olsson et al.'s (2022, arXiv:2209.11895)
ICL_SPREAD = 8  # positions on either side that are averaged
_SEED = 0  # of the resampling: the same documents are drawn everywhere


def bin_own(own_loss: np.ndarray, own_document: np.ndarray, own_place: np.ndarray) -> dict[str, np.ndarray]:
    """Windows of the trained length, [W, T] each, as sums and counts: small enough to keep.

    Bin b holds targets with 2^b to 2^(b+1) - 1 tokens before them: in the window (`window_sums`, `window_counts`
    [W, bins]; the last position, of T tokens, counts to the bin before its own), or in the document, where the first
    has none and is left out (`place_sums`, `place_counts` [documents, bins]). `icl_means` [W, places]: means around
    the places of ICL_PLACES that fit, in order, late and early in turn.
    """
    length = own_loss.shape[1]
    seen_T = np.arange(1, length + 1)
    bins_T = np.log2(np.minimum(seen_T, max(length - 1, 1))).astype(int)
    window_sums = np.stack([own_loss[:, bins_T == b].sum(axis=1) for b in range(bins_T[-1] + 1)], axis=1)
    window_counts = np.broadcast_to(np.bincount(bins_T), window_sums.shape)

    kept = own_place > 0
    documents, owner = np.unique(own_document[kept], return_inverse=True)
    bins = np.log2(own_place[kept]).astype(int)
    cell, shape = owner * (bins.max() + 1) + bins, (len(documents), bins.max() + 1)
    places = [p for pair in ICL_PLACES for p in pair if pair[0] + ICL_SPREAD <= length]
    around = [own_loss[:, p - ICL_SPREAD - 1 : p + ICL_SPREAD].mean(axis=1) for p in places]
    return dict(
        window_sums=window_sums.astype(np.float32),
        window_counts=window_counts.astype(np.int32),
        place_sums=np.bincount(cell, own_loss[kept], math.prod(shape)).reshape(shape).astype(np.float32),
        place_counts=np.bincount(cell, minlength=math.prod(shape)).reshape(shape).astype(np.int32),
        icl_means=np.stack(around, axis=1).astype(np.float32) if around else np.zeros((len(own_loss), 0), np.float32),
    )


def analyse(arms: Sequence[Any]) -> list[dict[str, Any]]:
    """One entry an arm (study.Arm), in order: curve, gains, slope, effective context, positions, in-context learning.

    `against`: the difference of its curve from that of the strategy of the longest rows in the same setting (of one
    length, where there is one).
    """
    longest = {}
    for arm in sorted(arms, key=lambda arm: (arm.first["seq_len"], not arm.grows)):
        longest[arm.setting] = arm
    return [
        dict(strategy=arm.strategy, setting=arm.setting, seq_len=arm.first["seq_len"], seeds=arm.seeds)
        | _on_targets(arm)
        | dict(against=_against(arm, longest[arm.setting]))
        | _on_windows([run.arrays for run in arm.runs])
        for arm in arms
    ]


def corrected(entries: Sequence[dict[str, Any]], growing: Collection[str]) -> None:
    """Adds p_holm and `shown` to comparisons of `a` with `b`: by Holm among those of rows of one length, and apart
    among those with rows that grow. So a strategy of these takes nothing from what is shown of the others."""
    for grows in (False, True):
        family = [entry for entry in entries if bool({entry["a"], entry["b"]} & set(growing)) == grows]
        adjusted = holm([np.nan if entry["p"] is None else entry["p"] for entry in family])
        for entry, p in zip(family, adjusted, strict=True):
            entry |= dict(p_holm=rounded(p), shown=bool(p < LEVEL))


def _against(arm: Any, other: Any) -> dict[str, Any] | None:
    """None of the arm against itself, or where no seed is in both."""
    seeds = [seed for seed in arm.seeds if seed in other.seeds]
    if arm is other or not seeds:
        return None

    documents = arm.runs[0].arrays["document"]
    curve = [
        dict(context=c, beyond=not arm.within(c))
        | interval(
            bootstrap_statistic(
                {"a": arm.losses(c, seeds), "b": other.losses(c, seeds)},
                documents,
                lambda means: means["a"] - means["b"],
                _SEED,
            )
        )
        for c in arm.contexts
        if c in other.contexts
    ]
    return dict(strategy=other.strategy, curve=curve)


def _on_targets(arm: Any) -> dict[str, Any]:
    documents = arm.runs[0].arrays["document"]
    losses = {c: np.stack([run.losses[c] for run in arm.runs]) for c in arm.contexts}
    within = {c: loss for c, loss in losses.items() if arm.within(c)}
    curve = [
        dict(context=c, beyond=c not in within)
        | interval(bootstrap_statistic({"x": loss}, documents, lambda means: means["x"], _SEED))
        for c, loss in losses.items()
    ]
    gains = [
        {"from": a, "to": b} | difference(hierarchical_bootstrap(within[a], within[b], documents, _SEED))
        for a, b in [*itertools.pairwise(within), *((min(within), c) for c in list(within)[2:])]
    ]
    found = dict(curve=curve, gains=gains, slope=None, effective=None)
    if len(within) > 1:
        found["slope"] = interval(bootstrap_statistic(_named(within), documents, slope_per_doubling, _SEED, RESAMPLES))
        effective = interval(bootstrap_statistic(_named(within), documents, effective_context, _SEED, RESAMPLES))
        found["effective"] = effective | dict(longest=max(within), censored=effective["mean"] == max(within))
    return found


def _named(losses: Mapping[int, np.ndarray]) -> dict[str, np.ndarray]:
    return {str(context): loss for context, loss in losses.items()}


def slope_per_doubling(means: Mapping[str, np.ndarray]) -> np.ndarray:
    """Nats per token gained a doubling of the context: minus the least-squares slope of L over log2 c. [R] -> [R]."""
    doublings = np.log2([int(context) for context in means])
    centred = doublings - doublings.mean()
    return -np.tensordot(centred, np.stack(list(means.values())), 1) / (centred @ centred)


def effective_context(means: Mapping[str, np.ndarray]) -> np.ndarray:
    """The shortest context from which no longer one gains more than TOLERANCE nats per token. [R] -> [R], tokens.

    The longest of the grid is its own answer where the loss still falls there: the value is censored.
    """
    contexts = np.array(sorted(int(context) for context in means))
    losses = np.stack([means[str(context)] for context in contexts])
    best_from = np.minimum.accumulate(losses[::-1], axis=0)[::-1]
    return contexts[np.argmax(losses - best_from <= TOLERANCE, axis=0)].astype(np.float64)


def _on_windows(runs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """From binned windows of the trained length; clusters are windows, or documents.

    Windows of fewer than MIN_DOCUMENTS documents have no intervals: they are of one text, and may overlap.
    """
    found: dict[str, Any] = dict(window=[], place=[], icl=[])
    if "window_sums" not in runs[0]:
        return found
    few = len(runs[0]["place_counts"]) < MIN_DOCUMENTS
    for name in ("window", "place"):
        counts = runs[0][f"{name}_counts"]
        sums = np.stack([run[f"{name}_sums"] for run in runs])
        for b in range(counts.shape[1]):
            there = counts[:, b] > 0
            if there.any():
                entry = {"from": 2**b, "to": 2 ** (b + 1) - 1, "targets": int(counts[:, b].sum())}
                found[name].append(entry | interval(_ratio(sums[:, there, b], counts[there, b], few)))
    means = np.stack([run["icl_means"] for run in runs])
    fitting = ICL_PLACES[len(ICL_PLACES) - means.shape[2] // 2 :]
    for i, (late, early) in enumerate(fitting):
        gained = means[:, :, 2 * i] - means[:, :, 2 * i + 1]
        found["icl"].append(dict(late=late, early=early) | interval(_ratio(gained, np.ones(gained.shape[1]), few)))
    return found


def _ratio(sums: np.ndarray, counts: np.ndarray, few: bool = False) -> tuple[float, float, float]:
    """Sum over count, sums [S, clusters], with clusters and seeds resampled; without an interval of few."""
    spread = np.broadcast_to(counts, sums.shape)
    arrays = {"sum": sums, "count": spread}
    clusters = np.arange(sums.shape[1]) * (not few)
    return bootstrap_statistic(arrays, clusters, lambda m: m["sum"] / m["count"], _SEED)


def interval(found: tuple[float, float, float]) -> dict[str, float | None]:
    """{mean, low, high} to six decimals; JSON has no NaN."""
    return {name: rounded(value) for name, value in zip(("mean", "low", "high"), found, strict=True)}


def difference(found: Any) -> dict[str, Any]:
    """A bootstrap.Difference as JSON values."""
    entry = interval((found.mean, found.low, found.high))
    return entry | dict(
        p=rounded(found.p), shown=found.shown, seeds=found.seeds, documents=found.documents, targets=found.targets
    )


def rounded(value: float | None) -> float | None:
    """Six decimals: the same on every machine."""
    return round(float(value), 6) if value is not None and math.isfinite(value) else None
