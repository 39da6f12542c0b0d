"""The cross-entropy's kernels for NVIDIA GPUs, in bfloat16: logits are summed up where they are computed.

`d_logits` multiplies a chunk with the table and writes exp(logit - the target's logit) alone: one pass, as no largest
logit has to be known. Rows where that is too large are computed once more (FAR). `scores` walks over the vocabulary
and writes nothing of [C, V]. No atomics: the same bits on each run.
Letters: N tokens, C tokens of a chunk, D width, V vocabulary; in a kernel M rows, N columns and K of D.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from research import kernels, sharding

# Tokens, vocabulary and width of a block; a program has one block of logits in its registers. Of this size two
# programs share a multiprocessor, and one's exponentials run beside the other's products.
ROWS, COLUMNS, WIDTH = 128, 128, 64
WARPS, STAGES = 4, 3  # warps of a program, and blocks of the width that are in its shared memory at once
PROGRAMS = 528  # where the vocabulary is walked over, it is cut until there are as many: four a multiprocessor
FAR = 60.0  # nats of a largest logit above the target's: e^60, times any vocabulary, still is a float32
LOG2E = math.log2(math.e)


def served(x_ND: jax.Array, table_VD: jax.Array) -> bool:
    """Whether the kernels are used: bfloat16 on a GPU, with V and D in whole blocks."""
    (V, D), dtypes = table_VD.shape, {x_ND.dtype, table_VD.dtype}
    return sharding.platform() == "gpu" and dtypes == {jnp.dtype(jnp.bfloat16)} and not (V % COLUMNS or D % WIDTH)


def chunk_of(num_tokens: int, chunk: int) -> int:
    """The size of equal chunks in whole blocks, of about `chunk` tokens at most: the last has little to fill up."""
    return pl.cdiv(pl.cdiv(num_tokens, pl.cdiv(num_tokens, chunk)), ROWS) * ROWS


def d_logits(
    x_CD: jax.Array, table_VD: jax.Array, targets_C: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradient of the logits times sums [C, V], sums of exps, log-sum-exp, targets' logits, which are right; [C] each.

    C is a multiple of ROWS. Of a target of -1 the gradient and the sum are 0 and the log-sum-exp is not a number.
    """
    counted_C, at_C = targets_C >= 0, jnp.maximum(targets_C, 0)
    near_C = jnp.sum(x_CD.astype(jnp.float32) * table_VD[at_C], axis=1)  # the target's logit but for rounding
    shift_C = jnp.where(counted_C, near_C, jnp.inf)
    exps_CV, sums_C, largest_C, picked_C = _exps(x_CD, table_VD, targets_C, shift_C)
    far_C = largest_C - shift_C > FAR
    shift_C = jnp.where(far_C, largest_C, shift_C)
    exps_CV, sums_far_C = _exps_again(x_CD, table_VD, exps_CV, shift_C, far_C)
    sums_C = jnp.where(far_C, sums_far_C, sums_C)
    hits_C = (jnp.exp(picked_C - shift_C) - sums_C).astype(exps_CV.dtype)
    gradient_CV = exps_CV.at[jnp.arange(at_C.size), at_C].set(
        hits_C, indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds"
    )  # in place: one number a token
    return gradient_CV, sums_C, shift_C + jnp.log(sums_C), picked_C, counted_C & (picked_C >= largest_C)


def scores(x_CD: jax.Array, table_VD: jax.Array, targets_C: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-sum-exp, the targets' logits, and which are right: [C] each; C is a multiple of ROWS."""
    parts, in_specs, of_tokens, of_parts, numbers = _walk(x_CD, table_VD)
    largest, sums, picked = _call(
        _scores_kernel,
        2 * x_CD.size * table_VD.shape[0],
        grid=(x_CD.shape[0] // ROWS, parts),
        in_specs=[*in_specs, of_tokens],
        out_specs=[of_parts] * 3,
        out_shape=[numbers] * 3,
    )(x_CD, table_VD, targets_C)
    largest_C, picked_C = largest.max(0), picked.sum(0)
    lse_C = largest_C + jnp.log(jnp.sum(sums * jnp.exp(largest - largest_C), axis=0))
    return lse_C, picked_C, (targets_C >= 0) & (picked_C >= largest_C)


def _exps(x_CD, table_VD, targets_C, shift_C):
    """exp(logits - shift) [C, V], their sums, the largest logits and the targets' [C]: 0 where the target is -1."""
    (C, D), V = x_CD.shape, table_VD.shape[0]
    of_tokens, of_blocks = pl.BlockSpec((ROWS,), lambda m, n: (m,)), pl.BlockSpec((None, ROWS), lambda m, n: (n, m))
    numbers = kernels.result_of((V // COLUMNS, C), jnp.float32, x_CD, table_VD)
    exps_CV, sums, largest, picked = _call(
        _exps_kernel,
        2 * C * V * D,
        grid=(C // ROWS, V // COLUMNS),  # rows first: programs that run at once share blocks of the table
        in_specs=[
            pl.BlockSpec((ROWS, D), lambda m, n: (m, 0)),
            pl.BlockSpec((COLUMNS, D), lambda m, n: (n, 0)),
            of_tokens,
            of_tokens,
        ],
        out_specs=[pl.BlockSpec((ROWS, COLUMNS), lambda m, n: (m, n)), of_blocks, of_blocks, of_blocks],
        out_shape=[kernels.result_of((C, V), x_CD.dtype, x_CD, table_VD), numbers, numbers, numbers],
    )(x_CD, table_VD, targets_C, shift_C)
    return exps_CV, sums.sum(0), largest.max(0), picked.sum(0)


def _exps_again(x_CD, table_VD, exps_CV, shift_C, far_C):
    """`exps` in place, and the sums [C], for those blocks of rows that have any `far`: hardly any training has one."""
    parts, in_specs, of_tokens, of_parts, numbers = _walk(x_CD, table_VD)
    of_exps = pl.BlockSpec((ROWS, table_VD.shape[0] // parts), lambda m, p: (m, p))
    exps_CV, sums = _call(
        _exps_again_kernel,
        0,  # as a rule
        grid=(x_CD.shape[0] // ROWS, parts),
        in_specs=[*in_specs, of_exps, of_tokens, of_tokens],
        out_specs=[of_exps, of_parts],
        out_shape=[kernels.result_of(exps_CV.shape, exps_CV.dtype, x_CD, table_VD), numbers],
        input_output_aliases={2: 0},
    )(x_CD, table_VD, exps_CV, shift_C, far_C.astype(jnp.int32))
    return exps_CV, sums.sum(0)


def _walk(x_CD, table_VD):
    """Parts of the vocabulary, each to be walked over by a program; specs of x and table, of tokens, of results."""
    (C, D), (V, _) = x_CD.shape, table_VD.shape
    blocks = V // COLUMNS
    parts = next(p for p in range(1, blocks + 1) if blocks % p == 0 and (p * C // ROWS >= PROGRAMS or p == blocks))
    in_specs = pl.BlockSpec((ROWS, D), lambda m, p: (m, 0)), pl.BlockSpec((V // parts, D), lambda m, p: (p, 0))
    of_tokens, of_parts = pl.BlockSpec((ROWS,), lambda m, p: (m,)), pl.BlockSpec((None, ROWS), lambda m, p: (p, m))
    return parts, in_specs, of_tokens, of_parts, kernels.result_of((parts, C), jnp.float32, x_CD, table_VD)


def _exps_kernel(x_ref, table_ref, targets_ref, shift_ref, exps_ref, sums_ref, largest_ref, picked_ref):
    logits_MN = _logits(x_ref, table_ref, 0)
    largest_ref[...] = logits_MN.max(axis=1)
    picked_ref[...] = _picked(logits_MN, targets_ref[...] - pl.program_id(1) * COLUMNS)
    exps_MN = _exp(logits_MN, shift_ref[...])
    sums_ref[...] = exps_MN.sum(axis=1)
    exps_ref[...] = exps_MN.astype(exps_ref.dtype)


def _exps_again_kernel(x_ref, table_ref, _, shift_ref, far_ref, exps_ref, sums_ref):
    def block(n, sums_M):
        exps_MN = _exp(_logits(x_ref, table_ref, n * COLUMNS), shift_ref[...])
        exps_ref[:, pl.ds(n * COLUMNS, COLUMNS)] = exps_MN.astype(exps_ref.dtype)
        return sums_M + exps_MN.sum(axis=1)

    blocks = far_ref[...].max() * (table_ref.shape[0] // COLUMNS)  # all or none
    sums_ref[...] = jax.lax.fori_loop(0, blocks, block, jnp.zeros((ROWS,), jnp.float32))


def _scores_kernel(x_ref, table_ref, targets_ref, largest_ref, sums_ref, picked_ref):
    part = pl.program_id(1) * table_ref.shape[0]

    def block(n, carry):
        largest_M, sums_M, picked_M = carry
        logits_MN = _logits(x_ref, table_ref, n * COLUMNS)
        higher_M = jnp.maximum(largest_M, logits_MN.max(axis=1))
        sums_M = sums_M * jnp.exp2((largest_M - higher_M) * LOG2E) + _exp(logits_MN, higher_M).sum(axis=1)
        return higher_M, sums_M, picked_M + _picked(logits_MN, targets_ref[...] - part - n * COLUMNS)

    zeros_M = jnp.zeros((ROWS,), jnp.float32)
    largest_ref[...], sums_ref[...], picked_ref[...] = jax.lax.fori_loop(
        0, table_ref.shape[0] // COLUMNS, block, (jnp.full_like(zeros_M, -jnp.inf), zeros_M, zeros_M)
    )


def _exp(logits_MN, shift_M):
    """exp(logits - shift): base 2 is what the hardware has."""
    return jnp.exp2((logits_MN - shift_M[:, None]) * LOG2E)


def _logits(x_ref, table_ref, first):
    """A block of logits [M, N], float32: all rows of x times the table's from `first` on."""

    def step(k, sum_MN):
        width = pl.ds(k * WIDTH, WIDTH)
        table_NK = table_ref[pl.ds(first, COLUMNS), width]
        return sum_MN + kernels.dot(x_ref[:, width], table_NK, 1, 1)

    return jax.lax.fori_loop(0, x_ref.shape[1] // WIDTH, step, jnp.zeros((ROWS, COLUMNS), jnp.float32))


def _picked(logits_MN, column_M):
    """The logit of each row at its column [M], 0 where that is not one of the block's."""
    hit_MN = jnp.arange(COLUMNS)[None] == column_M[:, None]
    return jnp.where(hit_MN, logits_MN, 0.0).sum(axis=1)


def _call(kernel, products, **specs):
    interpret = sharding.platform() != "gpu"  # tests
    return kernels.call(kernel, warps=WARPS, stages=STAGES, products=products, interpret=interpret, **specs)
