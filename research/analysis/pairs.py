"""Strategies two by two, on the same held-out targets with the same context."""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
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
    every = itertools.combinations([s for s, runs in finished.items() if runs], 2)
    found = (pair_of(a, b, finished, losses) for a, b in (every if chosen is None else chosen))
    return corrected([pair for pair in found if pair])


def pair_of(
    a: str,
    b: str,
    finished: Mapping[str, Sequence[Mapping[str, Any]]],
    losses: Mapping[str, np.ndarray],
    seeds: Collection[int] | None = None,
) -> dict[str, Any] | None:
    """Loss of a minus that of b, over the seeds that both have (of `seeds`, if given); None where there is none."""
    by_seed = [{run["result"]["seed"]: run["name"] for run in finished[s]} for s in (a, b)]
    both = sorted(seed for seed in by_seed[0].keys() & by_seed[1].keys() if seeds is None or seed in seeds)
    if not both:
        return None
    arms = [np.stack([losses[f"{names[s]}/loss"] for s in both]).astype(np.float64) for names in by_seed]
    found = bootstrap.hierarchical_bootstrap(*arms, losses["document"], _SEED)
    about = {name: rounded(getattr(found, name)) for name in ("mean", "low", "high")}
    return {"a": a, "b": b, "seeds": both} | about | {"p": found.p}


def corrected(pairs: list[dict]) -> list[dict]:
    """The same pairs with p_holm, over all of them, and `shown`."""
    adjusted = statistics.holm([pair["p"] for pair in pairs])
    for pair, p in zip(pairs, adjusted, strict=True):
        pair |= {"p": rounded(pair["p"]), "p_holm": rounded(p), "shown": bool(p < 0.05)}
    return pairs


def rounded(value: float | None) -> float | None:
    """Six decimals: the same on every machine. JSON has no NaN."""
    return round(float(value), 6) if value is not None and math.isfinite(value) else None
