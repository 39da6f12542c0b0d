"""Strategies two by two, on the same held-out targets with the same context."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.analysis import bootstrap, statistics

_SEED = 0  # of the resampling


def pairs_of(
    finished: Mapping[str, Sequence[Mapping[str, Any]]],
    losses: Mapping[str, np.ndarray],
    chosen: Sequence[tuple[str, str]] | None = None,
) -> list[dict]:
    """Loss of a minus that of b on the same targets, over the seeds that both have finished; Holm over the pairs.

    chosen: the pairs (a, b); every two if not given.
    """
    pairs = []
    every = itertools.combinations([s for s, runs in finished.items() if runs], 2)
    for a, b in every if chosen is None else chosen:
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
        pair |= {name: rounded(getattr(found, name)) for name in ("mean", "low", "high", "p")}
        pair |= {"p_holm": rounded(p), "shown": bool(p < 0.05)}
    return pairs


def rounded(value: float | None) -> float | None:
    """Six decimals: the same on every machine. JSON has no NaN."""
    return round(float(value), 6) if value is not None and math.isfinite(value) else None
