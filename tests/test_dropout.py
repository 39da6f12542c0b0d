"""The distribution of dropout's draws, and that the backward pass draws the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.dropout import dropout, multipliers, words
from tests.small import placed


def drawn(seed, rate, shape):
    """The multipliers of an array of this shape."""

    @jax.jit
    def draw(key):
        rows, columns = words(key, shape)
        return multipliers(rows[..., None], columns, rate)

    return np.asarray(draw(jax.random.key(seed)))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(400, 400), (3, 97, 401), (2, 90001)])
def test_the_dropped_share_is_the_rate_and_the_mean_is_one(rate, shape):
    kept = drawn(0, rate, shape)
    assert len(np.unique(kept)) == 2 and kept.min() == 0 and kept.shape == shape and kept.dtype == np.float32
    # Six standard deviations of a binomial share; the mean is exact but for float32's rounding.
    tolerance = 6 * np.sqrt(rate * (1 - rate) / kept.size)
    assert abs(np.mean(kept == 0) - rate) < tolerance
    assert kept.max() == pytest.approx(1 / (1 - rate), rel=1e-6)


def test_the_draws_are_independent_of_their_neighbours_and_of_other_keys():
    first, second = (drawn(seed, 0.5, (256, 512)) - 1 for seed in (1, 2))
    bound = 6 / np.sqrt(first.size)
    assert abs(np.mean(first * second)) < bound
    for lag in (1, 2, 64, 128, 192):
        for axis in (0, 1):
            assert abs(np.mean(first * np.roll(first, lag, axis))) < bound, (lag, axis)
    for axis in (0, 1):
        assert np.std((first + 1).mean(axis)) < 2 / np.sqrt(first.shape[axis])


def test_pairs_of_rows_and_of_columns_are_independent():
    """Their words are the same all along, so a weak hash would show in all pairs of lines: none may stand out, nor may
    they together; nor the corners of rectangles, whose words' exclusive or is 0."""
    x = (drawn(5, 0.1, (256, 4096)) == 0) - 0.1
    for lines in (x, x.T):
        few = lines[:256]
        z = few @ few.T / np.sqrt(lines.shape[1]) / (0.1 * 0.9)
        z = z[np.triu_indices(len(z), 1)]
        assert abs(z).max() < 7 and np.std(z) == pytest.approx(1, abs=0.1)
    corners = x[:-1, :-1] * x[1:, :-1] * x[:-1, 1:] * x[1:, 1:] / (0.1 * 0.9) ** 2
    assert abs(corners.mean()) < 6 / np.sqrt(corners.size)


def test_the_gradient_passes_what_was_kept(rng, one_device):
    x = placed(rng.standard_normal((2, 8, 64)), jnp.float32)
    out, vjp = jax.vjp(lambda x: dropout(x, 0.5, jax.random.key(1)), x)
    np.testing.assert_allclose(vjp(jnp.ones_like(x))[0] * x, out)
    assert 0.3 < np.mean(np.asarray(out) == 0) < 0.7


@pytest.mark.parametrize(("rate", "value"), [(1e-12, 1.0), (1 - 1e-12, 2.0**32)])
def test_rates_beyond_the_resolution_stay_finite(rate, value):
    kept = drawn(3, rate, (64, 64))
    assert np.isfinite(kept).all() and set(np.unique(kept)) <= {0.0, value}
