"""Dropout inside a shard: its hash word for word, and the distribution of its draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from research.dropout import multipliers, threefry


def drawn(seed, rate, shape):
    return np.asarray(jax.jit(lambda key: multipliers(key, rate, shape))(jax.random.key(seed)))


def test_the_hash_is_threefry_word_for_word(rng):
    seed, counts = (jnp.asarray(rng.integers(0, 2**32, n, dtype=np.uint32)) for n in (2, 2000))
    # JAX hashes the first half of its counts against the second.
    expected = threefry_2x32(seed, counts)
    found = jnp.concatenate(jax.jit(threefry)(seed, *jnp.split(counts, 2)))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(400, 400), (3, 97, 401), (2, 90001)])
def test_the_dropped_share_is_the_rate_and_the_mean_is_one(rate, shape):
    kept = drawn(0, rate, shape)
    assert len(np.unique(kept)) == 2 and kept.min() == 0 and kept.shape == shape and kept.dtype == np.float32
    # Six standard deviations of a binomial share; the mean is exact but for what rounding to 16 bits leaves.
    tolerance = 6 * np.sqrt(rate * (1 - rate) / kept.size)
    assert abs(np.mean(kept == 0) - rate) < tolerance
    share = round((1 - rate) * 2**16) / 2**16
    assert abs(share - (1 - rate)) <= 2**-17 and kept.max() == np.float32(1 / share)


def test_the_draws_are_independent_of_their_neighbours_and_of_other_keys():
    """Four draws of one hash lie a quarter of the rows apart: that lag is among those tried."""
    first, second = (drawn(seed, 0.5, (256, 512)) - 1 for seed in (1, 2))
    bound = 6 / np.sqrt(first.size)
    assert abs(np.mean(first * second)) < bound
    for lag in (1, 2, 64, 128, 192):
        for axis in (0, 1):
            assert abs(np.mean(first * np.roll(first, lag, axis))) < bound, (lag, axis)
    for axis in (0, 1):
        assert np.std((first + 1).mean(axis)) < 2 / np.sqrt(first.shape[axis])


@pytest.mark.parametrize(("rate", "value"), [(1e-9, 1.0), (1 - 1e-9, 65536.0)])
def test_rates_beyond_the_resolution_stay_finite(rate, value):
    kept = drawn(3, rate, (64, 64))
    assert np.isfinite(kept).all() and set(np.unique(kept)) <= {0.0, value}
