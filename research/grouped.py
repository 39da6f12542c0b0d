"""Experts on rows sorted by expert: one interface, a backend for each platform.

An expert is any function `expert(x_MD, weights, multiply, key) -> y_MD` that multiplies only through `multiply(x, w)`,
and treats the leading axes of x alike (there may be two):

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

Expert = Callable[[jax.Array, Any, Callable, jax.Array | None], jax.Array]


def resolve_backend(backend: str, platform: str) -> str:
    """`auto` to the backend of a platform ('cpu', 'gpu', 'tpu')."""
    return dict(cpu="blocks", gpu="tiles", tpu="ragged")[platform] if backend == "auto" else backend


def apply_experts(
    expert: Expert,
    x_MD: jax.Array,
    weights: Any,
    sizes_E: jax.Array,
    *,
    backend: str,
    block: int = 256,
    key: jax.Array | None = None,
) -> jax.Array:
    """y_MD: each row of x_MD through its expert. Rows are sorted by expert, sizes_E (int32) of each, summing to M.

    weights: a pytree of arrays [E, ...]. key: for an expert that draws (dropout), else None. For local arrays: call
    it inside shard_map, with weights and x varying over the same axes.
    """
    if backend == "blocks":
        return _blocks(x_MD, weights, sizes_E, key, expert, block)
    if backend == "tiles":
        return _tiles(x_MD, weights, sizes_E, key, expert, block)
    if backend == "ragged":
        return expert(x_MD, weights, lambda x, w: lax.ragged_dot(x, w, sizes_E), key)
    raise ValueError(f"moe backend {backend!r}: choose blocks, tiles or ragged")


def _tiles(x_MD, weights, sizes_E, key, expert, block):
    rows = tiles.tile_rows(x_MD.shape[0], sizes_E.shape[0], block)
    at = tiles.layout(sizes_E, x_MD.shape[0], rows)
    out_NRD = expert(tiles.spread(x_MD, at), weights, lambda x, w: tiles.multiply(x, w, at.owner_N), key)
    return tiles.gather(out_NRD, at)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _blocks(x_MD, weights, sizes_E, key, expert, block):
    """Each expert walks its rows in blocks. Its last block may reach into the next expert's rows: those results are
    overwritten when the next expert comes, and the last expert's go to `block` rows of padding."""
    padded = jnp.pad(x_MD, ((0, block), (0, 0)))

    def one_expert(y, scanned):
        w, first, size, number = scanned

        def one_block(i, y):
            at = first + i * block
            rows = lax.dynamic_slice_in_dim(padded, at, block)
            out = expert(rows, w, jnp.matmul, _block_key(key, number, i))
            return lax.dynamic_update_slice_in_dim(y, out.astype(y.dtype), at, 0)

        return lax.fori_loop(0, ceil_div(size, block), one_block, y), None

    return lax.scan(one_expert, _zeros(padded), _scanned(weights, sizes_E))[0][: len(x_MD)]


def _blocks_forward(x_MD, weights, sizes_E, key, expert, block):
    return _blocks(x_MD, weights, sizes_E, key, expert, block), (x_MD, weights, sizes_E, key)


def _blocks_backward(expert, block, saved, dy_MD):
    x_MD, weights, sizes_E, key = saved
    padded, d_padded = (jnp.pad(a, ((0, block), (0, 0))) for a in (x_MD, dy_MD))

    def one_expert(dx, scanned):
        w, first, size, number = scanned

        def one_block(i, carry):
            dx, dw = carry
            at = first + i * block
            rows, drawn = lax.dynamic_slice_in_dim(padded, at, block), _block_key(key, number, i)
            _, vjp = jax.vjp(lambda rows, w: expert(rows, w, jnp.matmul, drawn), rows, w)
            own = (i * block + jnp.arange(block) < size)[:, None]
            d_rows, d_w = vjp(jnp.where(own, lax.dynamic_slice_in_dim(d_padded, at, block), 0))
            dx = lax.dynamic_update_slice_in_dim(dx, d_rows, at, 0)
            return dx, jax.tree.map(lambda total, g: total + g.astype(total.dtype), dw, d_w)

        zeros = jax.tree.map(lambda a: _zeros(a, jnp.promote_types(a.dtype, jnp.float32)), w)
        dx, dw = lax.fori_loop(0, ceil_div(size, block), one_block, (dx, zeros))
        return dx, jax.tree.map(lambda total, a: total.astype(a.dtype), dw, w)

    dx, dw = lax.scan(one_expert, _zeros(padded), _scanned(weights, sizes_E))
    return dx[: len(x_MD)], dw, None, None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def ceil_div(a, b):
    return (a + b - 1) // b


def _zeros(like: jax.Array, dtype: Any = None) -> jax.Array:
    """Zeros that vary over the same mesh axes as `like`, for a loop's carry."""
    return varying(jnp.zeros_like(like, dtype), varying_axes(like))


def _scanned(weights, sizes_E):
    """What the scan over experts walks: weights, first row, number of rows, the expert's number."""
    return weights, jnp.cumsum(sizes_E) - sizes_E, sizes_E, jnp.arange(sizes_E.shape[0])


def _block_key(key, number, i):
    return None if key is None else jax.random.fold_in(jax.random.fold_in(key, number), i)
