"""Dropout (Srivastava et al. 2014). Its draws are most of its cost, so those inside a shard are made four to a hash."""

import math

import jax
import jax.numpy as jnp

from research.remat import keep
from research.sharding import varying, varying_axes

BITS = 16  # of a draw
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """x with a share `rate` of its entries set to 0 and the rest scaled up; the same draw on every mesh."""
    if key is None or rate == 0:
        return x
    kept = keep(jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=jax.typeof(x).sharding))
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def multipliers(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Float32 `shape` [..., rows, width], to be multiplied with an array of one shard: 0 for a share `rate` of the
    entries, rounded to a multiple of 2^-16, and for the others the number that makes their mean 1.
    """
    kept = max(1, round((1 - rate) * 2**BITS))
    *batch, rows, width = shape
    hashes = (*batch, -(-rows // 4), width)
    seed = jax.random.bits(key, (2,), jnp.uint32)
    counts = varying(jax.lax.iota(jnp.uint32, math.prod(hashes)), varying_axes(seed)).reshape(hashes)
    words = jnp.concatenate(threefry(seed, counts, jnp.zeros_like(counts)), axis=-2)
    draws = jnp.concatenate([words & (2**BITS - 1), words >> BITS], axis=-2)[..., :rows, :]
    return jnp.where(draws < kept, jnp.float32(2**BITS / kept), jnp.float32(0))


def threefry(seed: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The hash Threefry-2x32 with 20 rounds (Salmon et al. 2011) of pairs x, y under seed [2]; all uint32.

    JAX's own gives the same words; written out here, the compiler fuses it into what uses the words, which takes the
    CPU half the time of a loop over rounds.
    """
    keys = (seed[0], seed[1], seed[0] ^ seed[1] ^ jnp.uint32(PARITY))
    x, y = x + keys[0], y + keys[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x = x + y
            y = x ^ ((y << rotation) | (y >> (32 - rotation)))
        x, y = x + keys[(group + 1) % 3], y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y
