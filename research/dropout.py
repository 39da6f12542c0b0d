"""Dropout (Srivastava et al. 2014) whose draws are cheap: a hash of two random words, of the row and of the column.

The words are Threefry's (jax.random), one for each row and one for each column; an entry's draw takes five integer
operations, where a hash of its own would take a hundred. So no mask is kept for the backward pass: it draws again.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

FACTORS = (0x85EBCA6B, 0xC2B2AE35)  # of MurmurHash3's last step (Appleby 2011, public domain)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """x with a share `rate` of its entries set to 0 and the rest scaled up; the same draw on every mesh."""
    if key is None or rate == 0:
        return x
    return apply(x, *words(key, x.shape, P(*jax.typeof(x).sharding.spec[:-1])), rate)


def words(key: jax.Array, shape: tuple[int, ...], out_sharding: P | None = None) -> tuple[jax.Array, jax.Array]:
    """Random uint32 of the rows [...] and of the columns [width] of an array `shape` [..., width]; out_sharding is of
    the rows. For an array of one shard give a key of that shard, and no out_sharding."""
    rows, columns = jax.random.split(key)
    return (
        jax.random.bits(rows, shape[:-1], jnp.uint32, out_sharding=out_sharding),
        jax.random.bits(columns, shape[-1:], jnp.uint32),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def apply(x: jax.Array, rows: jax.Array, columns: jax.Array, rate: float) -> jax.Array:
    """x [..., width] times the multipliers of its words. Its gradient makes them again."""
    return (x * multipliers(rows[..., None], columns, rate)).astype(x.dtype)


apply.defvjp(
    lambda x, rows, columns, rate: (apply(x, rows, columns, rate), (rows, columns)),
    lambda rate, drawn, d_out: (apply(d_out, *drawn, rate), None, None),
)


def multipliers(row_words: jax.Array, column_words: jax.Array, rate: float) -> jax.Array:
    """Float32, for words that broadcast to the entries: 0 for a share `rate` of them, rounded to a multiple of 2^-32,
    and for the others the number that makes their mean 1."""
    kept = kept_draws(rate)
    return jnp.where(draws(row_words, column_words) < jnp.uint32(kept), jnp.float32(2**32 / kept), jnp.float32(0))


def draws(row_words: jax.Array, column_words: jax.Array) -> jax.Array:
    """A uint32 for each pair of words. Words are uniform and independent, so the draws along a row or a column are too;
    two multiplications mix enough that rows, and columns, are independent of each other."""
    x = (row_words ^ column_words) * jnp.uint32(FACTORS[0])
    return (x ^ (x >> 15)) * jnp.uint32(FACTORS[1])


def kept_draws(rate: float) -> int:
    """Draws below this are kept: the share 1 - rate of 2^32."""
    return min(2**32 - 1, max(1, round((1 - rate) * 2**32)))
