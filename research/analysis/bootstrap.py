"""Intervals for losses on the same held-out targets, over documents and over seeds.

Documents are resampled, not targets: targets within a document are correlated. Runs that differ in
their seed alone differ too, and that is part of every interval between strategies.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

# With n documents, the widest interval that resampling gives (lowest to highest document) covers a
# symmetric error with probability 1 - 2 / 2^n; below 6 documents that is less than 95 %.
MIN_DOCUMENTS = 6
RESAMPLES = 10_000  # of what a claim is read off; a fifth of it for curves and places, which are many
_BLOCK = 4_000_000  # draws in memory at once

Statistic = Callable[[dict[str, np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class Difference:
    """A mean difference in nats/token and its interval (NaN: too few documents for one).

    `p` is two-sided: one less the confidence at which the interval begins to touch zero (NaN without
    one); about 2 / resamples at the least. `seeds` is 1 where the interval holds documents alone.
    """

    mean: float
    low: float
    high: float
    documents: int
    targets: int
    seeds: int = 1
    p: float = math.nan

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out zero."""
        return bool(self.low > 0 or self.high < 0)


def paired_bootstrap(
    loss_a: np.ndarray,
    loss_b: np.ndarray,
    documents: np.ndarray,
    seed: int,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Difference:
    """Mean of `loss_a - loss_b` over targets, with a bootstrap interval over documents.

    Args:
      loss_a, loss_b: [n] nats of each target under two models, in the same order.
      documents: [n] the document of each target. A resample draws documents with replacement; its
      mean is weighted by tokens: the sum of all drawn differences over their count.

    The percentiles are widened for a small number of documents (expanded percentile interval,
    Hesterberg 2015, arXiv:1411.5279): plain ones are too narrow, by the factor of a
    normal to a t quantile and sqrt((n-1)/n).

    Raises: ValueError when the shapes differ, are empty, or a loss is not finite.
    """
    if not np.shape(loss_a) == np.shape(loss_b) == np.shape(documents) or np.ndim(documents) != 1:
        shapes = np.shape(loss_a), np.shape(loss_b), np.shape(documents)
        raise ValueError(f"losses and documents must be of one shape [n], got {shapes}")
    difference = np.asarray(loss_a, np.float64) - np.asarray(loss_b, np.float64)
    if not difference.size or not np.isfinite(difference).all():
        raise ValueError("losses must be finite, and at least one")
    _, document = np.unique(documents, return_inverse=True)
    sums, counts = np.bincount(document, difference), np.bincount(document)
    low, high, p = np.nan, np.nan, np.nan
    if len(counts) >= MIN_DOCUMENTS:
        means = _resampled_means(sums, counts, np.random.default_rng(seed), resamples)
        low, high, p = _interval(means, 1, len(counts), confidence)
    mean = float(sums.sum() / counts.sum())
    return Difference(mean, low, high, documents=len(counts), targets=difference.size, p=p)


def mean_interval(loss: np.ndarray, documents: np.ndarray, seed: int, resamples: int = 2000) -> Difference:
    """Mean loss over targets with a bootstrap interval over documents: the difference from zero."""
    return paired_bootstrap(loss, np.zeros_like(loss), documents, seed, resamples)


def hierarchical_bootstrap(
    losses_a: np.ndarray,
    losses_b: np.ndarray,
    documents: np.ndarray,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    paired: bool = True,
) -> Difference:
    """Mean of `losses_a - losses_b` over seeds and targets, its interval over seeds and documents.

    Args:
      losses_a, losses_b: [S, n] nats of each target under S runs of each arm; a row is a seed.
      documents: [n] the document of each target, crossed with seeds: every run scores all of them.
      paired: the S differences are what is spread over seeds; this covers whether or not a seed means anything
      to both arms. False: the S losses of each arm are, taken to be of equal spread, on 2 (S - 1) degrees of
      freedom instead of S - 1. Narrower where arms share nothing by seed, wider where they do.

    The method is that of `bootstrap_statistic`; one seed: `paired_bootstrap`, documents alone. For Holm over
    m comparisons, `resamples` should be well above 2 m / 0.05.

    Raises: ValueError when the shapes differ, are empty, or a loss is not finite.
    """
    if np.ndim(losses_a) == 2 and len(losses_a) == 1 and np.shape(losses_a) == np.shape(losses_b):
        return paired_bootstrap(losses_a[0], losses_b[0], documents, seed, resamples, confidence)
    sums, counts = _by_document({"a": losses_a, "b": losses_b}, documents)
    low, high, p = np.nan, np.nan, np.nan
    if len(counts) >= MIN_DOCUMENTS:
        draws = _draws(sums, counts, lambda arms: arms[0] - arms[1], seed, resamples, paired)
        low, high, p = _interval(draws, len(losses_a), len(counts), confidence)
    arm_a, arm_b = sums.sum(axis=(1, 2))
    mean = float((arm_a - arm_b) / (len(losses_a) * counts.sum()))
    return Difference(mean, low, high, len(counts), int(counts.sum()), seeds=len(losses_a), p=p)


def bootstrap_statistic(
    losses: Mapping[str, np.ndarray],
    documents: np.ndarray,
    statistic: Statistic,
    seed: int,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """A statistic of token-weighted means, with an interval over seeds and documents: (value, low, high).

    Args:
      losses: name -> [S, n] nats of each target under S runs; every array has the same targets, and
      row s of each the same seed. A draw moves seeds and documents of all arrays together.
      documents: [n] the document of each target.
      statistic: {name: means [R]} -> [R], elementwise over R draws (numpy does that by itself; wrap
      anything else in np.vectorize). It is also called with R = 1, for the value. Finite for any means.

    Resampling two to five seeds is far too sure: its spread is short by sqrt((S-1)/S) and by the factor of a
    normal to a t quantile. Here a draw weights the S runs at random, 1/S on average, so that each mean is spread
    as its t interval on S-1 degrees of freedom. Documents are drawn with replacement and spread as t likewise.
    The sum of the two independent moves gives the interval of Behrens and Fisher (Fisher 1935, Ann. Eugenics
    6:391; as a generalized confidence interval, Weerahandi 1993, JASA 88:899), which covers slightly more than
    it says.

    Seeds are crossed with documents, for which no bootstrap is exact (McCullagh 2000, Bernoulli 6:285): both
    moves contain the variance of seed x document and of single targets (Owen & Eckles 2012,
    doi:10.1214/12-AOAS547). So documents are moved only by what their variance exceeds it by, as in the analysis
    of variance of a crossed layout: V = V_seeds + max(0, V_documents - V_both). Where documents have no effect of
    their own, as between runs of one strategy, this leaves the t interval over seeds, which is then exact.

    One seed: expanded percentiles over documents alone. Fewer than MIN_DOCUMENTS documents: NaN for the interval.

    Raises: ValueError when shapes differ, are empty, or a loss or a value of the statistic is not finite.
    """
    names = list(losses)
    sums, counts = _by_document(losses, documents)

    def of_means(means: np.ndarray) -> np.ndarray:
        values = np.asarray(statistic(dict(zip(names, means, strict=True))), np.float64)
        if values.shape != means.shape[1:] or not np.isfinite(values).all():
            raise ValueError(f"the statistic must give finite values of shape {means.shape[1:]}, got {values}")
        return values

    num_seeds = sums.shape[1]
    means = sums.sum(axis=2) / counts.sum()
    value = of_means(means.mean(axis=1, keepdims=True)).item()
    if len(counts) < MIN_DOCUMENTS:
        return value, math.nan, math.nan
    draws = _draws(sums, counts, of_means, seed, resamples)
    low, high, _ = _interval(draws, num_seeds, len(counts), confidence)
    return value, low, high


def _by_document(losses: Mapping[str, np.ndarray], documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums [names, S, documents] of the losses and counts [documents] of the targets."""
    shapes = {np.shape(loss) for loss in losses.values()}
    shape = next(iter(shapes), ())
    if len(shapes) != 1 or len(shape) != 2 or shape[1:] != np.shape(documents) or not math.prod(shape):
        raise ValueError(f"losses must be [seeds, n], documents [n], got {shapes} and {np.shape(documents)}")
    _, document = np.unique(documents, return_inverse=True)
    counts = np.bincount(document)
    sums = np.array([[np.bincount(document, run) for run in np.asarray(loss)] for loss in losses.values()])
    if not np.isfinite(sums).all():
        raise ValueError("losses must be finite")
    return sums, counts


def _draws(
    sums: np.ndarray, counts: np.ndarray, statistic: Callable, seed: int, resamples: int, paired: bool = True
) -> np.ndarray:
    """Draws [resamples] of a statistic of means [names, R], from sums [names, S, documents]."""
    rng = np.random.default_rng(seed)
    num_names, num_seeds, num_documents = sums.shape
    means = sums.sum(axis=2) / counts.sum()
    order = np.argsort(means.sum(axis=0, keepdims=True) if paired else means, axis=1)
    order = np.broadcast_to(order, means.shape)  # the same draws in whatever order the runs come
    sums, means = (np.take_along_axis(x, i, axis=1) for x, i in ((sums, order[..., None]), (means, order)))
    centre = means.mean(axis=1, keepdims=True)
    moved = _resampled_means(sums.reshape(-1, num_documents).T, counts, rng, resamples)
    moved = moved.T.reshape(num_names, num_seeds, resamples) - means[..., None]
    by_document = moved.mean(axis=1)
    if num_seeds == 1:
        return statistic(centre + by_document)
    # Documents of unlike length weigh as much as fewer of one length (Kish 1965, Survey Sampling).
    effective = max(2.0, counts.sum() ** 2 / (counts**2).sum())
    widen = math.sqrt(effective / (effective - 1))
    weights = rng.standard_normal((1 if paired else num_names, num_seeds, resamples))
    weights = (weights - weights.mean(axis=1, keepdims=True)) / math.sqrt(num_seeds * (num_seeds - 1))
    by_seed = (means[..., None] * weights).sum(axis=1)
    by_both = (moved * weights).sum(axis=1)
    shared, twice = (statistic(centre + widen * moves).var() for moves in (by_document, by_both))
    shrink = math.sqrt(max(0.0, 1 - twice / shared)) if shared > 0 else 1.0
    of_seeds = _t_factors(len(weights) * (num_seeds - 1), rng, resamples)
    of_documents = _t_factors(effective - 1, rng, resamples)
    return statistic(centre + by_seed * of_seeds + shrink * widen * by_document * of_documents)


def _t_factors(df: float, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """What a normal draw is multiplied by to be one of Student's t."""
    return np.sqrt(df / rng.chisquare(df, resamples))


def _resampled_means(sums: np.ndarray, counts: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Means [resamples, ...] of sums [documents, ...]; a draw of documents is a vector of multiplicities."""
    num_documents = len(counts)
    share = np.full(num_documents, 1 / num_documents)
    rows = max(1, _BLOCK // num_documents)
    means = []
    for start in range(0, resamples, rows):
        drawn = rng.multinomial(num_documents, share, size=min(rows, resamples - start))
        means.append(((drawn @ sums).T / (drawn @ counts)).T)
    return np.concatenate(means)


def _interval(draws: np.ndarray, num_seeds: int, num_documents: int, confidence: float) -> tuple[float, float, float]:
    """(low, high, p) of draws: plain percentiles, expanded ones over documents alone (one seed)."""
    rising, grid = np.sort(draws), np.linspace(0, 1, len(draws))
    # The level at which zero is a quantile, from the nearer side.
    zero = max(min(np.interp(0, rising, grid), np.interp(0, -rising[::-1], grid)), 1 / len(draws))
    levels, p = ((1 - confidence) / 2, (1 + confidence) / 2), 2 * zero
    if num_seeds == 1:
        levels = _expanded_levels(num_documents, confidence)
        t = stats.norm.ppf(zero) * math.sqrt((num_documents - 1) / num_documents)  # its inverse
        p = 2 * stats.t.cdf(t, num_documents - 1)
    low, high = np.quantile(draws, levels)
    return float(low), float(high), float(min(p, 1))


def _expanded_levels(num_documents: int, confidence: float) -> tuple[float, float]:
    """Quantile levels as wide, for a normal, as a t interval on the unbiased standard deviation."""
    t = stats.t.ppf((1 + confidence) / 2, num_documents - 1)
    tail = float(stats.norm.cdf(-t * np.sqrt(num_documents / (num_documents - 1))))
    return tail, 1 - tail
