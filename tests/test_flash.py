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


def by_kernels(q, k, v, segments, words, start, rate):
    return flash.flash(q, k, v, segments, words, start, rate, True)


def by_blocks(q, k, v, segments, words, start, rate):
    attend = functools.partial(chunked.chunked, dropout=rate, chunk=16)
    return jax.shard_map(attend, in_specs=P(), out_specs=P())(q, k, v, segments, words, start)


@pytest.mark.parametrize("attend", [by_kernels, by_blocks])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys", "start", "width"), [(64, 64, 0, 48), (50, 50, 0, 16), (40, 120, 40, 8)])
def test_is_plain_attention(rng, small_blocks, attend, queries, keys, start, width, masked, rate):
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

    mesh = sharding.make_mesh({"data": 1, "expert": 1, "seq": 1})
    with jax.set_mesh(mesh) if attend is by_blocks else contextlib.nullcontext():  # the interpreter knows of none
        found = outcome(lambda q, k, v: attend(q, k, v, segments, words, jnp.int32(start), rate))
    wanted = outcome(lambda q, k, v: plain(q, k, v, segments, words, start, rate))
    for x, y in zip(found, wanted, strict=True):
        assert relative(x, y) < 1e-6
