"""Products of tiles with the weights of each tile's expert, as kernels for NVIDIA GPUs (Pallas on Triton), in bfloat16.

A program reads who owns its tile, and then blocks of that expert's weights where they are: nothing is picked out or
filled in for every tile. Sums are float32 in registers and written once, in one order: the same bits on every run.

Letters: N tiles, R rows of a tile, E experts, D and F widths.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from research import kernels, sharding

SMALLEST = 16  # the sides of the smallest product that tensor cores take


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What one program computes, rows x columns of the result in steps of `inner`, all powers of two, and how: its
    warps, and the steps that are loaded ahead plus one."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int

    def within(self, rows: int, columns: int, inner: int) -> "Blocks":
        """For a result of these sides: each of a block is the largest power of two that divides it, or what it was."""
        sides = (math.gcd(rows, self.rows), math.gcd(columns, self.columns), math.gcd(inner, self.inner))
        return Blocks(*sides, self.warps, self.stages)


# The quickest of nine on an H100: of products that are summed over a short width (that of the model), over a long one
# (that of the experts), and of gradients.
SHORT, LONG = Blocks(128, 128, 64, warps=4, stages=2), Blocks(256, 128, 64, warps=8, stages=4)
GRADIENT = Blocks(128, 128, 64, warps=4, stages=3)


def served(x_NRD: jax.Array, w_EDF: jax.Array) -> bool:
    """Whether the kernels are used, known when a program is traced: bfloat16 on a GPU, and every side a multiple of 16.

    The places of elements are int32.
    """
    (N, R, _), (_, D, F) = x_NRD.shape, w_EDF.shape
    fit = all(side % SMALLEST == 0 for side in (R, D, F)) and max(N * R * max(D, F), w_EDF.size) < 2**31
    return fit and {x_NRD.dtype, w_EDF.dtype} == {jnp.dtype(jnp.bfloat16)} and _platform() == "gpu"


def _platform() -> str:
    return jax.default_backend() if jax.sharding.get_abstract_mesh().empty else sharding.platform()


def product(
    x_NRD: jax.Array,
    w_EDF: jax.Array,
    owner_N: jax.Array,
    *,
    transposed: bool = False,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """[N, R, F]: each tile by its owner's weights; `transposed`: by their transpose, x is [N, R, F], the result
    [N, R, D]. Zeros for a tile of nobody's, whose owner is E."""
    (N, R, width), (E, D, F) = x_NRD.shape, w_EDF.shape
    columns = D if transposed else F
    b = (blocks or (SHORT if width < 1024 else LONG)).within(R, columns, width)
    if transposed:
        weights = pl.BlockSpec((E, b.columns, F), lambda j, i: (0, j, 0))
    else:
        weights = pl.BlockSpec((E, D, b.columns), lambda j, i: (0, 0, j))
    y = _call(
        functools.partial(_product_kernel, of_tile=R // b.rows, inner=b.inner, transposed=transposed),
        b,
        # The first axis is the fastest: programs that run at once share rows, and one expert's weights.
        grid=(columns // b.columns, N * R // b.rows),
        in_specs=[
            pl.BlockSpec((N,), lambda j, i: (0,)), pl.BlockSpec((b.rows, width), lambda j, i: (i, 0)), weights,
        ],
        out_specs=pl.BlockSpec((b.rows, b.columns), lambda j, i: (i, j)),
        products=2 * N * R * D * F,
        interpret=interpret,
    )((N * R, columns), owner_N, x_NRD.reshape(N * R, width), w_EDF)  # fmt: skip
    return y.reshape(N, R, columns)


def _product_kernel(owner_ref, x_ref, w_ref, y_ref, *, of_tile: int, inner: int, transposed: bool):
    """A block of y, through the whole width of x. A tile is `of_tile` blocks of rows."""
    owner, num_experts = owner_ref[lax.div(pl.program_id(1), of_tile)], w_ref.shape[0]
    expert = jnp.minimum(owner, num_experts - 1)

    def step(k, y):
        at = pl.ds(k * inner, inner)
        if transposed:
            return y + kernels.dot(x_ref[:, at], w_ref[expert, :, at], 1, 1)
        return y + kernels.dot(x_ref[:, at], w_ref[expert, at, :], 1, 0)

    steps = (owner < num_experts).astype(jnp.int32) * (x_ref.shape[1] // inner)
    y_ref[...] = lax.fori_loop(0, steps, step, jnp.zeros(y_ref.shape, jnp.float32)).astype(y_ref.dtype)


def gradient(
    x_NRD: jax.Array,
    dy_NRF: jax.Array,
    owner_N: jax.Array,
    num_experts: int,
    *,
    blocks: Blocks = GRADIENT,
    interpret: bool = False,
) -> jax.Array:
    """[E, D, F]: x^T dy, summed over each expert's tiles; zeros where it has none. owner_N is sorted."""
    (N, R, D), F = x_NRD.shape, dy_NRF.shape[-1]
    b = blocks.within(D, F, R)
    before = jnp.sum(owner_N[:, None] < jnp.arange(num_experts + 1), axis=0, dtype=jnp.int32)
    return _call(
        functools.partial(_gradient_kernel, of_tile=R // b.inner, inner=b.inner),
        b,
        # Programs that run at once are of one expert, and read the same rows at about the same time.
        grid=(F // b.columns, D // b.rows, num_experts),
        in_specs=[
            pl.BlockSpec(before.shape, lambda j, i, e: (0,)),
            pl.BlockSpec((N * R, b.rows), lambda j, i, e: (0, i)),
            pl.BlockSpec((N * R, b.columns), lambda j, i, e: (0, j)),
        ],
        out_specs=pl.BlockSpec((None, b.rows, b.columns), lambda j, i, e: (e, i, j)),
        products=2 * N * R * D * F,
        interpret=interpret,
    )((num_experts, D, F), before, x_NRD.reshape(N * R, D), dy_NRF.reshape(N * R, F))


def _gradient_kernel(before_ref, x_ref, dy_ref, dw_ref, *, of_tile: int, inner: int):
    """A block of one expert's dw, through all of its rows. before[e]: the tiles before its own; a tile is `of_tile`
    steps."""
    e = pl.program_id(2)

    def step(m, dw):
        at = pl.ds(m * inner, inner)
        return dw + kernels.dot(x_ref[at, :], dy_ref[at, :], 0, 0)

    start, end = before_ref[e] * of_tile, before_ref[e + 1] * of_tile
    dw = lax.fori_loop(start, end, step, jnp.zeros(dw_ref.shape, jnp.float32))
    dw_ref[...] = dw.astype(dw_ref.dtype)


def _call(kernel: Callable, blocks: Blocks, **options) -> Callable:
    """(shape of the result, *arrays) -> the result, of the type of the last array."""

    def run(shape: tuple[int, ...], *arrays: jax.Array) -> jax.Array:
        out = kernels.result_of(shape, arrays[-1].dtype, *arrays)
        arrays = sharding.varying(arrays, tuple(sorted(out.manual_axis_type.varying)))
        run = kernels.call(kernel, out_shape=out, warps=blocks.warps, stages=blocks.stages, **options)
        return run(*arrays)

    return run
