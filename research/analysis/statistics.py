"""Intervals for losses on the same held-out targets.

Documents are resampled, not targets: targets within a document are correlated.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

# With n documents, the widest interval that resampling gives (lowest to highest document) covers a
# symmetric error with probability 1 - 2 / 2^n; below 6 documents that is less than 95 %.
MIN_DOCUMENTS = 6
_BLOCK = 4_000_000  # draws in memory at once


@dataclass(frozen=True)
class Difference:
    """A mean difference in nats/token and its interval (NaN: too few documents for one)."""

    mean: float
    low: float
    high: float
    documents: int
    targets: int

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
    low, high = np.nan, np.nan
    if len(counts) >= MIN_DOCUMENTS:
        means = _resampled_means(sums, counts, np.random.default_rng(seed), resamples)
        low, high = np.quantile(means, _expanded_levels(len(counts), confidence))
    return Difference(
        mean=float(sums.sum() / counts.sum()),
        low=float(low),
        high=float(high),
        documents=len(counts),
        targets=difference.size,
    )


def mean_interval(loss: np.ndarray, documents: np.ndarray, seed: int, resamples: int = 2000) -> Difference:
    """Mean loss over targets with a bootstrap interval over documents: the difference from zero."""
    return paired_bootstrap(loss, np.zeros_like(loss), documents, seed, resamples)


def _resampled_means(sums: np.ndarray, counts: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Token-weighted means [resamples]; a draw of documents is a vector of multiplicities."""
    num_documents = len(counts)
    share = np.full(num_documents, 1 / num_documents)
    rows = max(1, _BLOCK // num_documents)
    means = []
    for start in range(0, resamples, rows):
        drawn = rng.multinomial(num_documents, share, size=min(rows, resamples - start))
        means.append((drawn @ sums) / (drawn @ counts))
    return np.concatenate(means)


def _expanded_levels(num_documents: int, confidence: float) -> tuple[float, float]:
    """Quantile levels as wide, for a normal, as a t interval on the unbiased standard deviation."""
    t = stats.t.ppf((1 + confidence) / 2, num_documents - 1)
    tail = float(stats.norm.cdf(-t * np.sqrt(num_documents / (num_documents - 1))))
    return tail, 1 - tail
