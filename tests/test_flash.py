"""Attention a block at a time, by kernels (interpreted on the CPU) and in plain JAX, against plain attention with the
same draws."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from research import chunked, flash, sharding
from research.dropout import multipliers
from tests.precision import errors, outcome, roundings


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


def by_kernels(q, k, v, segments, words, start, rate):
    return flash.flash(q, k, v, segments, words, start, rate, True)


def by_blocks(q, k, v, segments, words, start, rate):
    attend = functools.partial(chunked.chunked, dropout=rate, chunk=16)
    return jax.shard_map(attend, in_specs=P(), out_specs=P())(q, k, v, segments, words, start)


def on_mesh(attend):
    """The interpreter of kernels knows of no mesh."""
    mesh = sharding.make_mesh({"data": 1, "expert": 1, "seq": 1})
    return jax.set_mesh(mesh) if attend is by_blocks else contextlib.nullcontext()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, roundings(8))], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("attend", [by_kernels, by_blocks])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys", "start", "width"), [(64, 64, 0, 48), (50, 50, 0, 16), (40, 120, 40, 8)])
def test_is_plain_attention(rng, small_blocks, attend, queries, keys, start, width, masked, rate, dtype, tolerance):
    """Values and gradients, against float32. Of bfloat16 the weights, their gradients and the results are rounded, and
    the gradients of the scores are smaller than the numbers of which they are the difference."""
    batch, heads = 2, 2
    q, cotangent = (jnp.asarray(rng.standard_normal((batch, queries, heads, width)), dtype) for _ in range(2))
    k, v = (jnp.asarray(rng.standard_normal((batch, keys, heads, width)), dtype) for _ in range(2))
    segments = words = None
    if masked:
        of_keys = jnp.asarray(np.cumsum(rng.random((batch, keys)) < 0.1, axis=1), jnp.int32)
        segments = of_keys[:, start : start + queries], of_keys
    if rate:
        words = tuple(jnp.asarray(rng.integers(0, 2**32, (batch, heads, n), dtype=np.uint32)) for n in (queries, keys))

    def run(attend, *arrays):
        attend = functools.partial(attend, segments=segments, words=words, start=jnp.int32(start), rate=rate)
        return outcome(attend, arrays, cotangent)

    with on_mesh(attend):
        found = jax.jit(run, static_argnums=0)(attend, q, k, v)
    wanted = jax.jit(run, static_argnums=0)(plain, *(x.astype(jnp.float32) for x in (q, k, v)))
    assert {x.dtype for x in found} == {jnp.dtype(dtype)}
    assert errors(found, wanted).max() < tolerance, errors(found, wanted)


@pytest.mark.parametrize("attend", [by_kernels, by_blocks])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_scores_and_sums_over_many_blocks_are_float32(rng, small_blocks, attend, rate):
    """Of bfloat16, with scores far apart: if they were rounded, or a sum after each of its blocks, it would show."""
    q, k, v, cotangent = (jnp.asarray(x, jnp.bfloat16) for x in rng.standard_normal((4, 1, 512, 1, 16)))
    words = [jnp.asarray(rng.integers(0, 2**32, (1, 1, 512), dtype=np.uint32)) for _ in range(2)] if rate else None

    def run(attend, *arrays):
        attend = functools.partial(attend, segments=None, words=words, start=jnp.int32(0), rate=rate)
        return outcome(attend, arrays, cotangent)

    with on_mesh(attend):
        found = jax.jit(run, static_argnums=0)(attend, 4 * q, k, v)
    wanted = jax.jit(run, static_argnums=0)(plain, *(x.astype(jnp.float32) for x in (4 * q, k, v)))
    off = errors(found, wanted)  # the gradients of values are of weights alone, not of the differences
    assert off[0] < roundings(2) and off[1:3].max() < roundings(8) and off[3] < roundings(4), off


@pytest.mark.parametrize("attend", [by_kernels, by_blocks])
def test_a_block_of_keys_that_no_query_of_a_block_sees_is_not_met(rng, small_blocks, attend):
    """Masked it would be met: what is not a number, times 0, still shows."""
    q, k, v, cotangent = (jnp.asarray(x, jnp.bfloat16) for x in rng.standard_normal((4, 1, 64, 2, 16)))
    early = (jnp.arange(64) < 32)[None, :, None, None]

    @jax.jit
    def run(q, k, v, cotangent):
        attend_all = functools.partial(attend, segments=None, words=None, start=jnp.int32(0), rate=0.0)
        return outcome(attend_all, (q, k, v), cotangent)

    with on_mesh(attend):
        out, dq, dk, dv = run(q, k, v, cotangent)
        poisoned = run(q, *(jnp.where(early, x, jnp.nan) for x in (k, v)), cotangent)
        for x, y in zip(poisoned[:2], (out, dq), strict=True):  # of queries that come before these keys
            np.testing.assert_array_equal(x[:, :32].astype(jnp.float32), y[:, :32].astype(jnp.float32))
        q, cotangent = (jnp.where(early, jnp.nan, x) for x in (q, cotangent))
        for x, y in zip(run(q, k, v, cotangent)[2:], (dk, dv), strict=True):  # of keys that come after these queries
            np.testing.assert_array_equal(x[:, 32:].astype(jnp.float32), y[:, 32:].astype(jnp.float32))
