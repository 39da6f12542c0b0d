"""The kernels of attention, interpreted on the CPU, against plain attention with the same draws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import flash
from research.dropout import multipliers
from tests.small import relative


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of queries and of keys in short rows, of unequal sizes."""
    for name, queries, keys in (("FORWARD", 16, 32), ("KEYS_BACKWARD", 32, 16), ("QUERIES_BACKWARD", 16, 32)):
        blocks = dataclasses.replace(getattr(flash, name), queries=queries, keys=keys)
        monkeypatch.setattr(flash, name, blocks)


def plain(q, k, v, segments, words, start, rate):
    scores = jnp.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    allowed = (start + jnp.arange(q.shape[1]))[:, None] >= jnp.arange(k.shape[1])
    if segments is not None:
        allowed = allowed & (segments[0][:, None, :, None] == segments[1][:, None, None, :])
    p = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), axis=-1)
    if words is not None:
        p = p * multipliers(words[0][..., None], words[1][..., None, :], rate)
    return jnp.einsum("bhts,bshk->bthk", p, v)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys", "start", "width"), [(64, 64, 0, 48), (50, 50, 0, 16), (40, 120, 40, 8)])
def test_kernels_are_plain_attention(rng, small_blocks, queries, keys, start, width, masked, rate):
    batch, heads = 2, 2
    q, cotangent = (jnp.asarray(rng.standard_normal((batch, queries, heads, width)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.standard_normal((batch, keys, heads, width)), jnp.float32) for _ in range(2))
    segments = words = None
    if masked:
        of_keys = jnp.asarray(np.cumsum(rng.random((batch, keys)) < 0.1, axis=1), jnp.int32)
        segments = of_keys[:, start : start + queries], of_keys
    if rate:
        words = tuple(jnp.asarray(rng.integers(0, 2**32, (batch, heads, n), dtype=np.uint32)) for n in (queries, keys))

    def outcome(attend):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(cotangent)

    found = outcome(lambda q, k, v: flash.flash(q, k, v, segments, words, jnp.int32(start), rate, True))
    wanted = outcome(lambda q, k, v: plain(q, k, v, segments, words, start, rate))
    for x, y in zip(found, wanted, strict=True):
        assert relative(x, y) < 1e-6
