"""Intervals cover what they claim to, weight by tokens, and see documents and seeds rather than tokens."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from research.analysis.bootstrap import (
    MIN_DOCUMENTS,
    bootstrap_statistic,
    hierarchical_bootstrap,
    mean_interval,
    paired_bootstrap,
)
from research.analysis.statistics import holm, seeds_needed, t_interval, wilson


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
    monkeypatch.setattr("research.analysis.bootstrap._BLOCK", 50 * 7)
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


def study(rng, seeds, num_documents, seed_sd, by_arm, seed_by_document, token_sd, shared_seeds=0.0):
    """Two arms' losses [seeds, n] of equal true means, on documents of 4 to 40 targets, and the documents.

    Spreads in nats: of a run, of a strategy on a document (0: both arms are one strategy), of a run on a document,
    of a target. `shared_seeds`: the spread of what runs of one seed have in common.
    """
    documents = np.repeat(np.arange(num_documents), rng.integers(4, 40, size=num_documents))
    of_seed = seed_sd * rng.normal(size=(2, seeds, 1)) + shared_seeds * rng.normal(size=(1, seeds, 1))
    of_document = rng.normal(3.0, 0.5, size=num_documents) + by_arm * rng.normal(size=(2, 1, num_documents))
    mean = of_document + of_seed + seed_by_document * rng.normal(size=(2, seeds, num_documents))
    a, b = mean[..., documents] + token_sd * rng.normal(size=(2, seeds, documents.size))
    return a, b, documents


SEEDS = dict(seed_sd=0.03, by_arm=0.0, seed_by_document=0.02, token_sd=0.2)
DOCUMENTS = dict(seed_sd=0.001, by_arm=0.0, seed_by_document=0.1, token_sd=0.2)
MIXED = dict(seed_sd=0.02, by_arm=0.0, seed_by_document=0.1, token_sd=0.3)


def coverage(paired=True, trials=400, **sizes):
    rng = np.random.default_rng(0)
    found = [hierarchical_bootstrap(*study(rng, **sizes), i, 400, paired=paired) for i in range(trials)]
    return np.mean([f.low <= 0 <= f.high for f in found])


@pytest.mark.parametrize(
    "regime, seeds, num_documents",
    [
        (SEEDS, 2, 20),
        (SEEDS, 3, 60),
        (SEEDS, 5, 30),
        (DOCUMENTS, 2, 30),
        (DOCUMENTS, 3, 20),
        (MIXED, 3, 30),
        (MIXED, 5, 20),
    ],
)
def test_runs_of_one_strategy_show_no_difference_95_percent_of_the_time(regime, seeds, num_documents):
    """A/A: seeds of the arms have nothing in common, whichever variance dominates."""
    assert 0.92 <= coverage(seeds=seeds, num_documents=num_documents, **regime) <= 0.985


@pytest.mark.parametrize("seeds, most", [(2, 1.0), (5, 0.985)])
def test_strategies_unlike_on_single_documents_are_covered(seeds, most):
    """Documents are a sample too: with an effect of strategy on each, seeds alone would be too sure."""
    assert 0.925 <= coverage(seeds=seeds, num_documents=30, **(DOCUMENTS | {"by_arm": 0.1})) <= most


def test_seeds_of_unlike_arms_need_not_be_paired():
    """Unpaired, arms with nothing in common are covered as well; what seeds do share it takes for noise."""
    assert 0.92 <= coverage(paired=False, seeds=2, num_documents=20, **SEEDS) <= 0.985
    a, b, documents = study(np.random.default_rng(1), 3, 30, **(SEEDS | {"seed_sd": 0.001}), shared_seeds=0.1)
    paired, unpaired = (hierarchical_bootstrap(a, b, documents, 0, paired=p) for p in (True, False))
    assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)


def test_without_an_effect_of_documents_it_is_the_t_interval_over_seeds():
    """Percentiles of three resampled seeds would reach sd * sqrt(2/3), not 4.3 sd / sqrt(3)."""
    documents = np.repeat(np.arange(20), 5)
    a = 3 + np.array([[0.01], [0.02], [0.06]]) + np.zeros(100)
    found = hierarchical_bootstrap(a, np.full_like(a, 3.0), documents, 0, resamples=100_000)
    low, high = stats.t.interval(0.95, 2, 0.03, np.std([0.01, 0.02, 0.06], ddof=1) / np.sqrt(3))
    np.testing.assert_allclose([found.mean, found.low, found.high], [0.03, low, high], rtol=0.03)
    assert found.p == pytest.approx(stats.ttest_1samp([0.01, 0.02, 0.06], 0).pvalue, rel=0.03)


def test_seeds_are_spread_as_their_means_by_token():
    """Runs that differ on ten documents of one target out of 100: by 0.1 of it on average, not 10 / 11."""
    documents = np.concatenate([np.arange(10), np.full(90, 10)])
    a = np.array([[-1.0], [0.0], [1.0]]) * (documents < 10)
    found = hierarchical_bootstrap(a, np.zeros_like(a), documents, 0, resamples=100_000)
    half = stats.t.ppf(0.975, 2) * 0.1 / np.sqrt(3)
    np.testing.assert_allclose([found.low, found.high], [-half, half], rtol=0.05)


def test_without_an_effect_of_seeds_it_is_the_interval_over_documents():
    a, b, documents = losses(np.random.default_rng(6), 60, effect=0.1)
    alone = paired_bootstrap(a, b, documents, 0, 20_000)
    again = hierarchical_bootstrap(np.stack([a, a, a]), np.stack([b, b, b]), documents, 0, 20_000)
    assert (again.mean, again.seeds) == (pytest.approx(alone.mean), 3)
    np.testing.assert_allclose([again.low, again.high], [alone.low, alone.high], atol=0.06 * (alone.high - alone.low))


def test_documents_of_unlike_length_are_as_many_as_they_weigh():
    """Two of 60 targets and ten of 12 weigh as much as 240^2 / 8640 = 6.7 of one length: 5.7 degrees of freedom."""
    documents = np.repeat(np.arange(12), [60, 60] + 10 * [12])
    rng = np.random.default_rng(16)
    loss = rng.normal(0, 0.3, 12)[documents]
    drawn = rng.multinomial(12, np.full(12, 1 / 12), 50_000)
    sums, counts = np.bincount(documents, loss), np.bincount(documents)
    spread = np.std((drawn @ sums) / (drawn @ counts))
    found = hierarchical_bootstrap(np.stack([loss] * 3), np.zeros((3, loss.size)), documents, 0, 50_000)
    effective = 240**2 / 8640
    half = stats.t.ppf(0.975, effective - 1) * np.sqrt(effective / (effective - 1)) * spread
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)


def test_one_seed_is_documents_alone():
    a, b, documents = study(np.random.default_rng(7), 1, 30, **MIXED)
    alone = paired_bootstrap(a[0], b[0], documents, 5, 500)
    assert hierarchical_bootstrap(a, b, documents, 5, 500) == alone
    assert alone.seeds == 1 and 0 < alone.p < 1
    value = bootstrap_statistic({"a": a, "b": b}, documents, lambda m: m["a"] - m["b"], 5, 500)
    np.testing.assert_allclose(value, [alone.mean, alone.low, alone.high])


@pytest.mark.parametrize("seeds", [1, 3])
def test_equal_arms_show_nothing(seeds):
    a, _, documents = study(np.random.default_rng(8), seeds, 30, **MIXED)
    same = hierarchical_bootstrap(a, a, documents, 0)
    assert (same.mean, same.low, same.high, same.p, same.shown) == (0.0, 0.0, 0.0, 1.0, False)


@pytest.mark.parametrize("paired", [True, False])
def test_order_of_seeds_and_of_targets_does_not_matter(paired):
    rng = np.random.default_rng(9)
    a, b, documents = study(rng, 5, 30, **MIXED)
    rows, order = rng.permutation(5), rng.permutation(documents.size)
    found = hierarchical_bootstrap(a, b, documents, 3, 500, paired=paired)
    shuffled = hierarchical_bootstrap(a[rows][:, order], b[rows][:, order], documents[order], 3, 500, paired=paired)
    numbers = [(d.mean, d.low, d.high, d.p, d.documents, d.targets, d.seeds) for d in (found, shuffled)]
    np.testing.assert_allclose(*numbers)
    if paired:
        turned = hierarchical_bootstrap(b, a, documents, 3, 500)
        symmetric = turned.mean, (turned.low + turned.high) / 2, turned.high - turned.low
        want = -found.mean, -(found.low + found.high) / 2, found.high - found.low
        np.testing.assert_allclose(symmetric, want, atol=0.2 * (found.high - found.low))


def test_runs_are_weighted_by_tokens_within_and_alike_between():
    documents = np.concatenate([np.arange(10), np.full(90, 10)])
    a = np.stack([np.where(documents < 10, 1.0, 0.0), np.where(documents < 10, 3.0, 0.0)])
    found = hierarchical_bootstrap(a, np.zeros_like(a), documents, 0)
    assert found.mean == pytest.approx((10 / 100 + 30 / 100) / 2)
    assert (found.documents, found.targets, found.seeds) == (11, 100, 2)


@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_p_is_where_the_interval_touches_zero(seeds):
    a, b, documents = study(np.random.default_rng(10), seeds, 30, **MIXED)
    a = a + 0.03
    found = hierarchical_bootstrap(a, b, documents, 0)
    touching = hierarchical_bootstrap(a, b, documents, 0, confidence=1 - found.p)
    assert min(abs(touching.low), abs(touching.high)) < 1e-6 < 1e-3 < found.high - found.low
    assert found.shown == (found.p < 0.05)


def test_too_few_documents_give_no_interval_over_seeds():
    a = np.ones((3, MIN_DOCUMENTS - 1))
    found = hierarchical_bootstrap(a, 0 * a, np.arange(a.shape[1]), 0)
    assert found.mean == 1.0 and np.isnan([found.low, found.high, found.p]).all() and not found.shown
    value, low, high = bootstrap_statistic({"a": a}, np.arange(a.shape[1]), lambda m: m["a"], 0)
    assert value == 1.0 and math.isnan(low) and math.isnan(high)


def test_statistic_of_two_means_is_their_difference():
    a, b, documents = study(np.random.default_rng(11), 3, 30, **MIXED)
    found = hierarchical_bootstrap(a, b, documents, 4, 500)
    value = bootstrap_statistic({"x": a, "y": b}, documents, lambda m: m["x"] - m["y"], 4, 500)
    np.testing.assert_allclose(value, [found.mean, found.low, found.high])


def test_statistic_resamples_all_arrays_together():
    """What two settings have in common, run by run and target by target, is gone from their difference."""
    rng = np.random.default_rng(12)
    a, b, documents = study(rng, 3, 30, **MIXED)
    common = rng.normal(0, 1, size=(3, 1)) + rng.normal(0, 5, size=documents.size)

    def gap(m):
        return (m["a1"] - m["b1"]) - (m["a2"] - m["b2"])

    still = bootstrap_statistic({"a1": a, "b1": b, "a2": a - 0.1, "b2": b}, documents, gap, 0)
    np.testing.assert_allclose(still, 0.1, rtol=1e-6)
    small = {"a1": 0.01 * a, "b1": 0.01 * b, "a2": 0 * a, "b2": 0 * b}
    moved = {name: loss + common for name, loss in small.items()}
    value, low, high = bootstrap_statistic(small, documents, gap, 0)
    moved_value, moved_low, moved_high = bootstrap_statistic(moved, documents, gap, 0)
    assert moved_value == pytest.approx(value)
    assert moved_high - moved_low == pytest.approx(high - low, rel=0.3)


CONTEXTS = np.array([16, 64, 256, 1024])


def slope(m):
    """Nats per doubling of the context, by least squares."""
    doublings = np.log2(CONTEXTS) - np.log2(CONTEXTS).mean()
    return sum(x * m[str(c)] for x, c in zip(doublings, CONTEXTS, strict=True)) / (doublings**2).sum()


def effective(m, within=0.05):
    """Context (in doublings) from which less than `within` nats are left to gain, between those measured."""
    found = np.full(np.shape(m["16"]), np.log2(CONTEXTS[-1]))
    for short, long in reversed(list(itertools.pairwise(CONTEXTS))):
        left, less = m[str(short)] - m["1024"], m[str(long)] - m["1024"]
        share = np.clip((left - within) / np.where(left == less, 1, left - less), 0, 1)
        found = np.where(left >= within, found, np.log2(short))
        found = np.where((left >= within) & (less < within), np.log2(short) + 2 * share, found)
    return found


@pytest.mark.parametrize("statistic", [slope, effective])
def test_statistics_of_a_context_curve_are_covered(statistic):
    gains = dict(zip(map(str, CONTEXTS), [0.5, 0.2, 0.08, 0.0], strict=True))
    true = statistic({c: np.array([gain]) for c, gain in gains.items()}).item()
    rng, covered, trials = np.random.default_rng(13), 0, 200
    for trial in range(trials):
        documents = np.repeat(np.arange(25), rng.integers(4, 30, size=25))
        run = 3 + rng.normal(0, 0.5, size=25)[documents] + rng.normal(0, 0.02, size=(3, 1))
        use = 1 + rng.normal(0, 0.1, size=25)[documents] + rng.normal(0, 0.05, size=(3, 1))
        curves = {c: run + gain * use + rng.normal(0, 0.2, size=run.shape) for c, gain in gains.items()}
        value, low, high = bootstrap_statistic(curves, documents, statistic, trial, 300)
        covered += low <= true <= high
    assert 0.905 <= covered / trials <= 0.995  # 95 % and what the interval has to spare


@pytest.mark.parametrize(
    "a, b, documents",
    [
        (np.ones((2, 3)), np.ones((3, 3)), np.zeros(3)),
        (np.ones((2, 3)), np.ones((2, 3)), np.zeros(2)),
        (np.ones(3), np.ones(3), np.zeros(3)),
        (np.ones((2, 0)), np.ones((2, 0)), np.zeros(0)),
        (np.full((2, 3), np.inf), np.ones((2, 3)), np.zeros(3)),
    ],
)
def test_runs_that_do_not_pair_are_refused(a, b, documents):
    with pytest.raises(ValueError):
        hierarchical_bootstrap(a, b, documents, seed=0)


@pytest.mark.parametrize("statistic", [lambda m: m["a"].mean(), lambda m: m["a"] * np.nan])
def test_statistic_that_is_not_a_finite_number_a_draw_is_refused(statistic):
    a, _, documents = study(np.random.default_rng(14), 2, 10, **MIXED)
    with pytest.raises(ValueError, match="statistic must give finite values"):
        bootstrap_statistic({"a": a}, documents, statistic, 0, 100)


def test_holm_by_hand():
    """Sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04, which may not be below the one before."""
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, math.nan, 0.01]), [0.6, math.nan, 0.02])
    assert holm([]) == []


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closure_of_bonferroni(p):
    """A hypothesis is rejected when Bonferroni's test rejects every set of hypotheses that it is in."""
    indices = range(len(p))
    sets = [c for size in range(1, len(p) + 1) for c in itertools.combinations(indices, size)]
    brute = [max(min(1.0, len(c) * min(p[j] for j in c)) for c in sets if i in c) for i in indices]
    np.testing.assert_allclose(holm(p), brute)


@settings(deadline=None)
@given(st.integers(0, 500), st.integers(1, 500), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_is_its_formula(right, more, confidence):
    total = right + more - (more > 250)
    z, share = stats.norm.ppf((1 + confidence) / 2), right / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    np.testing.assert_allclose(wilson(right, total, confidence), [centre - half, centre + half], atol=1e-12)


def test_wilson_of_nothing_and_of_nonsense():
    assert np.isnan(wilson(0, 0)).all()
    for right, total in ((3, 2), (-1, 2), (1, 0)):
        with pytest.raises(ValueError):
            wilson(right, total)


def test_t_interval_is_that_of_scipy_and_of_one_value_there_is_none():
    values = [0.01, 0.02, 0.06]
    low, high = stats.t.interval(0.95, 2, 0.03, np.std(values, ddof=1) / np.sqrt(3))
    np.testing.assert_allclose(t_interval(values), [0.03, low, high])
    assert t_interval([0.5])[0] == 0.5 and np.isnan(t_interval([0.5])[1:]).all() and np.isnan(t_interval([])).all()


@pytest.mark.parametrize("sd, paired", [(0.5, True), (1.0, True), (0.6, False), (1.0, False)])
def test_seeds_needed_have_the_power_that_simulation_finds(sd, paired):
    rng, trials, arms = np.random.default_rng(15), 20_000, 1 if paired else 2

    def power(n):
        a = rng.normal(1.0, sd, size=(trials, n))
        if paired:
            return np.mean(stats.ttest_1samp(a, 0, axis=1).pvalue < 0.05)
        return np.mean(stats.ttest_ind(a, rng.normal(0, sd, size=(trials, n)), axis=1).pvalue < 0.05)

    n = seeds_needed(sd, 1.0, paired=paired)
    assert n > arms * 7.849 * sd**2  # more than the normal test
    assert power(n) > 0.79 and power(n - 1) < 0.81


@pytest.mark.parametrize("paired, factor", [(True, 7.849), (False, 15.698)])
def test_many_seeds_are_those_of_the_normal_test(paired, factor):
    for sd in (10, 100, 1e4):
        assert seeds_needed(sd, 1.0, paired=paired) == pytest.approx(factor * sd**2, rel=1e-3, abs=3)
    # sigma = 0.0015, delta = 0.002: 8.8 seeds an arm by the normal test
    assert seeds_needed(0.0015, 0.002, paired=False) == 10
    assert seeds_needed(0.0, 0.01) == 2 and seeds_needed(1e-9, 1.0) == 2


def test_seeds_rise_with_spread_and_with_power():
    assert np.all(np.diff([seeds_needed(sd, 1.0) for sd in np.geomspace(0.01, 30, 40)]) >= 0)
    assert seeds_needed(1.0, 1.0, power=0.9) > seeds_needed(1.0, 1.0) > seeds_needed(1.0, 1.0, alpha=0.2)
    for sd, delta, power in ((1.0, 0.0, 0.8), (-1.0, 1.0, 0.8), (math.nan, 1.0, 0.8), (1.0, 1.0, 1.0)):
        with pytest.raises(ValueError):
            seeds_needed(sd, delta, power)
