"""Rows sorted by expert, laid out in tiles of which each is one expert's: the ragged product as a plain batched one.

On NVIDIA GPUs XLA computes `jax.lax.ragged_dot` as if every expert had every row: E times the work, arrays [E, M, F].
Here an expert's rows are filled up to whole tiles of `block` rows, so a product is tile by tile with the weights of the
tile's expert, and at most E tiles of work and memory are wasted. Where tile_kernels.py serves, it does the products.

Letters: M rows, E experts, N tiles, R rows of a tile, D and F widths.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from research import tile_kernels


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Where sorted rows are in tiles. `owner_N`: a tile's expert, E where it is left over; `source_NR`: the row that a
    place holds, M for none; `place_M`: the place of a row, counted through the tiles."""

    owner_N: jax.Array
    source_NR: jax.Array
    place_M: jax.Array


def tile_rows(num_rows: int, num_experts: int, block: int) -> int:
    """Rows of a tile: a power of two, `block` at most, and small enough that empty places are a fifth at most."""
    most = min(block, max(1, num_rows // (4 * num_experts)))
    return 1 << (most.bit_length() - 1)


def layout(sizes_E: jax.Array, num_rows: int, rows: int) -> Layout:
    """Of `num_rows` rows sorted by expert, sizes_E of each, in tiles of `rows` rows; tiles enough for any sizes."""
    num_experts = sizes_E.shape[0]
    num_tiles = (num_rows + num_experts * (rows - 1)) // rows
    tiles_E = (sizes_E + rows - 1) // rows
    last_E, end_E = jnp.cumsum(tiles_E), jnp.cumsum(sizes_E)
    first_E, start_E = last_E - tiles_E, end_E - sizes_E
    tile_N = jnp.arange(num_tiles, dtype=jnp.int32)
    owner_N = _expert_of(tile_N, last_E)
    known_N = jnp.minimum(owner_N, num_experts - 1)
    within_NR = (tile_N - first_E[known_N])[:, None] * rows + jnp.arange(rows, dtype=jnp.int32)
    source_NR = jnp.where(within_NR < sizes_E[known_N][:, None], start_E[known_N][:, None] + within_NR, num_rows)
    row_M = jnp.arange(num_rows, dtype=jnp.int32)
    expert_M = _expert_of(row_M, end_E)
    return Layout(owner_N, source_NR, first_E[expert_M] * rows + row_M - start_E[expert_M])


def _expert_of(positions: jax.Array, ends_E: jax.Array) -> jax.Array:
    """The first expert that ends behind each position; comparisons with all E, which is few, and no search."""
    return jnp.sum(positions[:, None] >= ends_E, axis=1, dtype=jnp.int32)


@jax.custom_vjp
def spread(x_MD: jax.Array, at: Layout) -> jax.Array:
    """[N, R, D], zeros where a place is empty. Its gradient is `gather`, where autodiff would scatter."""
    return x_MD.at[at.source_NR].get(mode="fill", fill_value=0)


@jax.custom_vjp
def gather(y_NRD: jax.Array, at: Layout) -> jax.Array:
    """[M, D]: the rows back in their order. Its gradient is `spread`."""
    return y_NRD.reshape(-1, y_NRD.shape[-1])[at.place_M]


spread.defvjp(lambda x_MD, at: (spread(x_MD, at), at), lambda at, d_NRD: (gather(d_NRD, at), None))
gather.defvjp(lambda y_NRD, at: (gather(y_NRD, at), at), lambda at, d_MD: (spread(d_MD, at), None))


@jax.custom_vjp
def multiply(x_NRD: jax.Array, w_EDF: jax.Array, owner_N: jax.Array) -> jax.Array:
    """[N, R, F]: each tile by the weights of its owner. owner_N is sorted; a tile of owner E gives nothing of use.

    Keeps x and w for the backward pass, not the weights picked for every tile. Gradients of w are summed over tiles in
    float32 (or more), in the order of the tiles: the same on every run.
    """
    if tile_kernels.served(x_NRD, w_EDF):
        return tile_kernels.product(x_NRD, w_EDF, owner_N)
    return jnp.einsum("nrd,ndf->nrf", x_NRD, _picked(w_EDF, owner_N))


def _picked(w_EDF, owner_N):
    return w_EDF.at[owner_N].get(mode="clip")


def _multiply_forward(x_NRD, w_EDF, owner_N):
    return multiply(x_NRD, w_EDF, owner_N), (x_NRD, w_EDF, owner_N)


def _multiply_backward(saved: tuple, dy_NRF: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    x_NRD, w_EDF, owner_N = saved
    if tile_kernels.served(x_NRD, w_EDF):
        dx_NRD = tile_kernels.product(dy_NRF, w_EDF, owner_N, transposed=True)
        return dx_NRD, tile_kernels.gradient(x_NRD, dy_NRF, owner_N, w_EDF.shape[0]), None
    exact = jnp.promote_types(w_EDF.dtype, jnp.float32)
    dx_NRD = jnp.einsum("nrf,ndf->nrd", dy_NRF, _picked(w_EDF, owner_N))
    dw_NDF = jnp.einsum("nrd,nrf->ndf", x_NRD, dy_NRF, preferred_element_type=exact)
    own_NE = (owner_N[:, None] == jnp.arange(w_EDF.shape[0])).astype(exact)
    dw_EDF = jnp.einsum("ne,ndf->edf", own_NE, dw_NDF, precision="highest")
    return dx_NRD, dw_EDF.astype(w_EDF.dtype), None


multiply.defvjp(_multiply_forward, _multiply_backward)
