"""The law of a step: amount = a + b * B * T + c * B * T^2, one for each attention backend.

Of memory (bytes of compiled programs): a, what no batch takes away (state, gradients, a chunk's logits); b, activations
of a token; c, scores that are kept for every pair of tokens. Of compute (FLOPs of traced programs): a, the optimiser;
b, the products of a token; c, those of a pair. The original claims "2x batch = 2x memory, 2x length = 4x memory", at
fixed batch.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from research.analysis.page import VERDICTS

HOLDS, CONDITIONS, FAILS, _ = VERDICTS
NAMES = ("a", "b", "c")
CLOSE = 0.1  # a ratio within 10 % of what the claim says agrees with it


@dataclasses.dataclass(frozen=True)
class Point:
    """A step: rows, tokens per row, and what it takes of one device (bytes, or FLOPs)."""

    batch: int
    seq_len: int
    amount: int


def fit(points: Sequence[Point]) -> dict[str, dict[str, float]]:
    """{'a', 'b', 'c'}: each {'value', 'low', 'high'}, and 'misfit': the largest relative error.

    Least squares of relative errors; intervals of 95 % by Student's t (Draper and Smith 1998, chapter 1): nothing is
    drawn at random here, so they tell how far the three terms explain it. Raises: ValueError for fewer than five
    points.
    """
    if len(points) < 5:
        raise ValueError(f"{len(points)} points: a fit of three terms with intervals needs five")
    size = np.array([p.amount for p in points], np.float64)
    tokens = np.array([p.batch * p.seq_len for p in points], np.float64)
    length = np.array([p.seq_len for p in points], np.float64)
    terms = np.stack([np.ones_like(tokens), tokens, tokens * length], axis=1) / size[:, None]
    scale = np.linalg.norm(terms, axis=0)
    found, *_ = np.linalg.lstsq(terms / scale, np.ones_like(size), rcond=None)
    residual = terms / scale @ found - 1
    free = len(points) - len(NAMES)
    covariance = np.linalg.inv((terms / scale).T @ (terms / scale)) * (residual @ residual) / free
    reach = stats.t.ppf(0.975, free) * np.sqrt(np.diag(covariance))
    law = {
        name: dict(value=float(v / s), low=float((v - r) / s), high=float((v + r) / s))
        for name, v, r, s in zip(NAMES, found, reach, scale, strict=True)
    }
    return law | {"misfit": float(np.abs(residual).max())}


def ratios(points: Sequence[Point], a: float) -> list[dict[str, Any]]:
    """For every point whose doubles are there too: what doubling the batch, the length, or the length at equal tokens
    multiplies the amount by; whole, and without the part `a` that no batch changes."""
    sizes = {(p.batch, p.seq_len): p.amount for p in points}
    found = []
    for (batch, length), size in sorted(sizes.items()):
        doubles = dict(batch=(2 * batch, length), length=(batch, 2 * length), equal_tokens=(batch // 2, 2 * length))
        known = {name: sizes[key] for name, key in doubles.items() if key in sizes}
        if len(known) == len(doubles) and batch % 2 == 0:
            whole = {name: value / size for name, value in known.items()}
            growing = {name: (value - a) / (size - a) for name, value in known.items()}
            found.append(dict(batch=batch, seq_len=length, whole=whole, growing=growing))
    return found


def verdict(found: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """(one of VERDICTS, the numbers) for "2x batch = 2x memory; 2x length = 4x memory"."""
    double = [entry["growing"]["batch"] for entry in found]
    longer = [entry["growing"]["length"] for entry in found]
    equal = [entry["growing"]["equal_tokens"] for entry in found]
    fourfold = [
        abs(rows / 2 - 1) <= CLOSE and abs(ratio / 4 - 1) <= CLOSE for rows, ratio in zip(double, longer, strict=True)
    ]
    verdict = HOLDS if all(fourfold) else CONDITIONS if any(fourfold) else FAILS
    text = (
        f"Of the memory that grows with the batch, 2x batch takes {_range(double)} times, 2x length at fixed batch "
        f"{_range(longer)} times, and 2x length at equal tokens {_range(equal)} times."
    )
    return verdict, text


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
