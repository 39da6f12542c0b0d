"""Intervals cover what they claim to, weight by tokens, and see documents rather than tokens."""

import numpy as np
import pytest

from research.analysis.statistics import MIN_DOCUMENTS, mean_interval, paired_bootstrap


def losses(rng, num_documents, effect=0.0, tokens=(4, 20)):
    """Two models' losses on documents of unlike length, whose targets share a document effect."""
    sizes = rng.integers(*tokens, size=num_documents)
    documents = np.repeat(np.arange(num_documents), sizes)
    shared = rng.gamma(4.0, 1.0, size=documents.size)  # how hard each target is, for both
    by_document = rng.normal(0.0, 0.3, size=num_documents)[documents]
    noise = rng.normal(0.0, 0.5, size=documents.size)
    return shared + effect + by_document + noise, shared, documents


@pytest.mark.parametrize("num_documents", [8, 20, 100])
def test_interval_covers_the_true_difference_about_95_percent_of_the_time(num_documents):
    rng = np.random.default_rng(num_documents)
    trials, covered = 400, 0
    for trial in range(trials):
        a, b, documents = losses(rng, num_documents, effect=0.1)
        found = paired_bootstrap(a, b, documents, seed=trial, resamples=500)
        covered += found.low <= 0.1 <= found.high
    assert 0.92 <= covered / trials <= 0.98  # 95 % plus and minus 2.7 standard errors


def test_resampling_tokens_would_be_too_sure():
    """The invariant behind documents: targets of one document move together."""
    a, b, documents = losses(np.random.default_rng(0), 30)
    by_document = paired_bootstrap(a, b, documents, seed=0)
    by_token = paired_bootstrap(a, b, np.arange(a.size), seed=0)
    assert by_document.high - by_document.low > 1.3 * (by_token.high - by_token.low)


def test_equal_models_show_no_difference():
    a, _, documents = losses(np.random.default_rng(1), 30)
    same = paired_bootstrap(a, a, documents, seed=0)
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)
    assert not same.shown


def test_pairing_finds_what_unpaired_means_cannot():
    a, b, documents = losses(np.random.default_rng(2), 100, effect=0.15)
    difference = paired_bootstrap(a, b, documents, seed=0)
    mean_a, mean_b = mean_interval(a, documents, seed=0), mean_interval(b, documents, seed=0)
    assert difference.shown and difference.low > 0
    assert mean_a.low < mean_b.high  # the separate intervals overlap


def test_means_are_weighted_by_tokens():
    """Ten documents of one target at 1 nat and one of ninety at 0: 10 / 100, not 10 / 11."""
    documents = np.concatenate([np.arange(10), np.full(90, 10)])
    loss = np.where(documents < 10, 1.0, 0.0)
    found = mean_interval(loss, documents, seed=0)
    assert found.mean == pytest.approx(0.1)
    assert found.documents == 11 and found.targets == 100
    # A resample has the long document twice, or not at all: unweighted it would stay near 10 / 11.
    assert found.low < 0.2 and found.high > 0.5


def test_order_of_targets_and_of_models_does_not_matter():
    rng = np.random.default_rng(3)
    a, b, documents = losses(rng, 40)
    order = rng.permutation(a.size)
    found = paired_bootstrap(a, b, documents, seed=5)
    shuffled = paired_bootstrap(a[order], b[order], documents[order], seed=5)
    turned = paired_bootstrap(b, a, documents, seed=5)
    np.testing.assert_allclose([shuffled.mean, shuffled.low, shuffled.high], [found.mean, found.low, found.high])
    np.testing.assert_allclose([turned.mean, turned.low, turned.high], [-found.mean, -found.high, -found.low])


def test_too_few_documents_give_no_interval():
    few = np.arange(MIN_DOCUMENTS - 1)
    found = mean_interval(np.ones(few.size), few, seed=0)
    assert found.mean == 1.0 and np.isnan(found.low) and np.isnan(found.high)
    assert not found.shown


def test_blocks_of_resamples_are_all_drawn(monkeypatch):
    """Many documents are resampled a block at a time; the interval does not depend on the block's
    size.
    """
    a, b, documents = losses(np.random.default_rng(4), 50)
    whole = paired_bootstrap(a, b, documents, seed=0, resamples=300)
    monkeypatch.setattr("research.analysis.statistics._BLOCK", 50 * 7)
    blocks = paired_bootstrap(a, b, documents, seed=0, resamples=300)
    np.testing.assert_allclose([blocks.low, blocks.high], [whole.low, whole.high])


@pytest.mark.parametrize(
    "a, b, documents",
    [
        ([1.0], [1.0, 2.0], [0, 0]),
        ([[1.0]], [[1.0]], [[0]]),
        ([], [], []),
        ([np.nan], [1.0], [0]),
    ],
)
def test_losses_that_do_not_pair_are_refused(a, b, documents):
    with pytest.raises(ValueError):
        paired_bootstrap(np.array(a), np.array(b), np.array(documents), seed=0)
