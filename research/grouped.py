"""Experts on rows sorted by expert: one interface, a backend for each platform.

An expert is any function `expert(x_MD, weights, multiply, key, share_M) -> y_MD` that multiplies only through
`multiply(x, w)`, treats the leading axes of x alike (there may be two), and multiplies its rows by share_M, if it is
not None, where that is cheapest to differentiate: before its last product.

`blocks`  (CPU) expert after expert, a block of rows at a time through the whole expert, so that its hidden layer never
          leaves the cache; the backward pass runs each block forward again and adds up weight gradients in place.
`tiles`   (GPU) the expert once on all rows, in tiles of which each is one expert's (tiles.py): a batched product.
`ragged`  (TPU) the expert once on all rows, with `multiply` the ragged matrix product of the platform. On CPU and GPU
          XLA computes that product for every expert and every row, E times the work.

All are dropless: expert e owns exactly the sizes[e] rows that were sent to it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from research import tiles
from research.sharding import varying, varying_axes

Expert = Callable[[jax.Array, Any, Callable, jax.Array | None, jax.Array | None], jax.Array]


def resolve_backend(backend: str, platform: str) -> str:
    """`auto` to the backend of a platform ('cpu', 'gpu', 'tpu')."""
    return dict(cpu="blocks", gpu="tiles", tpu="ragged")[platform] if backend == "auto" else backend


def apply_experts(
    expert: Expert,
    x_MD: jax.Array,
    weights: Any,
    sizes_E: jax.Array,
    share_M: jax.Array | None = None,
    *,
    backend: str,
    block: int = 256,
    key: jax.Array | None = None,
) -> jax.Array:
    """y_MD: each row of x_MD through its expert. Rows are sorted by expert, sizes_E (int32) of each, summing to M.

    weights: a pytree of arrays [E, ...]. share_M: multiplies the rows of y. key: for an expert that draws (dropout),
    else None. For local arrays: call it inside shard_map, with all of them varying over the same axes.
    """
    if backend == "blocks":
        return _blocks(x_MD, share_M, weights, sizes_E, key, expert, block)
    if backend == "tiles":
        y_MD = _tiles(x_MD, weights, sizes_E, key, expert, block)
    elif backend == "ragged":
        y_MD = expert(x_MD, weights, lambda x, w: lax.ragged_dot(x, w, sizes_E), key, None)
    else:
        raise ValueError(f"moe backend {backend!r}: choose blocks, tiles or ragged")
    return y_MD if share_M is None else y_MD * share_M[:, None].astype(y_MD.dtype)


def _tiles(x_MD, weights, sizes_E, key, expert, block):
    rows = tiles.tile_rows(x_MD.shape[0], sizes_E.shape[0], block)
    at = tiles.layout(sizes_E, x_MD.shape[0], rows)
    out_NRD = expert(tiles.spread(x_MD, at), weights, lambda x, w: tiles.multiply(x, w, at.owner_N), key, None)
    return tiles.gather(out_NRD, at)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _blocks(x_MD, share_M, weights, sizes_E, key, expert, block):
    """Each expert walks its rows in blocks, and its results take the place of the rows."""
    block = min(block, x_MD.shape[0])

    def one_expert(rows_MD, scanned):
        w, first, size, number = scanned

        def one_block(at, length, whole, rows_MD):
            start, own = _window(first, size, at, length, whole, x_MD.shape[0])
            rows, share = _cut((rows_MD, share_M), start, length)
            out = expert(rows, w, jnp.matmul, _block_key(key, number, at), share)
            return _paste(rows_MD, out, rows, own, start)

        return _walk(size, block, one_block, rows_MD), None

    return lax.scan(one_expert, x_MD, _scanned(weights, sizes_E))[0]


def _blocks_forward(x_MD, share_M, weights, sizes_E, key, expert, block):
    return _blocks(x_MD, share_M, weights, sizes_E, key, expert, block), (x_MD, share_M, weights, sizes_E, key)


def _blocks_backward(expert, block, saved, dy_MD):
    x_MD, share_M, weights, sizes_E, key = saved
    block = min(block, x_MD.shape[0])

    def one_expert(done, scanned):
        w, first, size, number = scanned

        def one_block(at, length, whole, carry):
            done, dw = carry
            start, own = _window(first, size, at, length, whole, x_MD.shape[0])
            drawn = _block_key(key, number, at)
            rows, share, dy, d_share = _cut((x_MD, share_M, *done), start, length)
            _, vjp = jax.vjp(lambda rows, share, w: expert(rows, w, jnp.matmul, drawn, share), rows, share, w)
            *d_own, d_w = vjp(dy if own is None else jnp.where(own, dy, 0))
            done = _paste(done, tuple(d_own), (dy, d_share), own, start)
            return done, jax.tree.map(lambda total, g: total + g.astype(total.dtype), dw, d_w)

        zeros = jax.tree.map(lambda a: _zeros(a, jnp.promote_types(a.dtype, jnp.float32)), w)
        done, dw = _walk(size, block, one_block, (done, zeros))
        return done, jax.tree.map(lambda total, a: total.astype(a.dtype), dw, w)

    done = dy_MD, jax.tree.map(_zeros, share_M)  # gradients of the rows take the place of those of the results
    (dx, d_share), dw = lax.scan(one_expert, done, _scanned(weights, sizes_E))
    return dx, d_share, dw, None, None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _walk(size, block, one_block, carry):
    """`one_block(first row, rows, whether all are the expert's, carry)` over `size` rows: whole blocks, then what is
    left in quarters of one, of which the last alone has rows to spare."""
    whole, quarter = size // block, max(1, block // 4)
    left = whole * block
    carry = lax.fori_loop(0, whole, lambda i, carry: one_block(i * block, block, True, carry), carry)
    quarters = (size - left + quarter - 1) // quarter
    return lax.fori_loop(0, quarters, lambda i, carry: one_block(left + i * quarter, quarter, False, carry), carry)


def _window(first, size, at, length, whole, num_rows):
    """Where rows at..at + length of the expert with rows first..first + size start, and which of them [length, 1]
    are its own, None for all. The others are the next expert's, or, of the last one, done already: they stay."""
    if whole:
        return first + at, None
    start = jnp.minimum(first + at, num_rows - length)
    row = start + jnp.arange(length)
    return start, ((row >= first + at) & (row < first + size))[:, None]


def _cut(arrays, start, block):
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, block), arrays)


def _paste(arrays, new, old, own, start):
    """The rows from `start` on: new ones where they are `own` (None: all), the old ones elsewhere."""

    def one(array, new, old):
        new = new.astype(old.dtype)
        chosen = new if own is None else jnp.where(own if new.ndim > 1 else own[:, 0], new, old)
        return lax.dynamic_update_slice_in_dim(array, chosen, start, 0)

    return jax.tree.map(one, arrays, new, old)


def _zeros(like: jax.Array, dtype: Any = None) -> jax.Array:
    """Zeros that vary over the same mesh axes as `like`, for a loop's carry."""
    return varying(jnp.zeros_like(like, dtype), varying_axes(like))


def _scanned(weights, sizes_E):
    """What the scan over experts walks: weights, first row, number of rows, the expert's number."""
    return weights, jnp.cumsum(sizes_E) - sizes_E, sizes_E, jnp.arange(sizes_E.shape[0])


def _block_key(key, number, at):
    return None if key is None else jax.random.fold_in(jax.random.fold_in(key, number), at)
