"""Tests and intervals of values over seeds, by formula; over documents they are resampled (bootstrap.py)."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values (1979, Scand. J. Statist. 6:65), in the order given.

    NaN (a comparison without an interval) stays NaN and is not counted among the comparisons.
    """
    values = np.asarray(p, np.float64)
    adjusted = np.full(values.shape, math.nan)
    order = [i for i in np.argsort(values, kind="stable") if not math.isnan(values[i])]
    steps = values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps))
    return adjusted.tolist()


def wilson(right: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval (1927, JASA 22:209) of the share right / total; NaN of none. Raises: ValueError."""
    if not 0 <= right <= total:  # SciPy 1.17 says so itself, 1.18 not always
        raise ValueError(f"{right} right of {total}")
    if total == 0:
        return math.nan, math.nan
    found = stats.binomtest(right, total).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) of independent values by Student's t; NaN for the ends of one, for all of none."""
    if len(values) < 2:
        return float(np.mean(values)) if len(values) else math.nan, math.nan, math.nan
    mean = float(np.mean(values))
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values)
    return mean, float(mean - half), float(mean + half)


def seeds_needed(sd: float, delta: float, power: float = 0.8, alpha: float = 0.05, paired: bool = True) -> int:
    """Seeds per arm (2 or more) at which a two-sided t test finds `delta`, on its side, with probability `power`.

    Args:
      sd: standard deviation over seeds, in the unit of `delta`, of the paired difference (paired) or
      of the loss of each of two arms (unpaired).

    Power by the noncentral t distribution. For many seeds the number tends to that of a normal test,
    (z_{1-alpha/2} + z_power)^2 sd^2 / delta^2 = 7.85 sd^2 / delta^2, twice that (15.7) unpaired.

    Raises: ValueError unless sd >= 0, delta > 0 and 0 < alpha < power < 1.
    """
    if not (sd >= 0 and delta > 0 and 0 < alpha < power < 1 and math.isfinite(sd)):
        raise ValueError(f"no number of seeds for sd={sd}, delta={delta}, power={power}, alpha={alpha}")
    arms = 1 if paired else 2
    z = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)
    n = max(2, math.ceil(arms * (z * sd / delta) ** 2))  # the t test needs at least as many as the normal
    while sd > 0:
        df, shift = arms * (n - 1), delta / sd * math.sqrt(n / arms)
        if stats.nct.sf(stats.t.ppf(1 - alpha / 2, df), df, shift) >= power:
            break
        n += 1
    return n
