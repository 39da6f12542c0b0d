"""Cross-entropy over the vocabulary, a chunk of tokens at a time: sums and counts, never means.

The logits [B, T, V] never exist whole. Training computes the gradient of the hidden states and of the output table in
the same pass as the loss (they are linear in the loss's cotangent), so no logits are kept or computed twice.
On a GPU in bfloat16 not even a chunk's logits are written, only their gradient: `loss_kernels.py`.
A target of -1 is not counted. Letters: N tokens of a shard, C tokens of a chunk, D width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from research import loss_kernels
from research.sharding import AXES, HIDDEN, TOKENS, platform, varying, varying_axes, whole


def cross_entropy_sums(
    hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sum of -log p of the targets in nats, number predicted right, number of targets), over the whole mesh.

    hidden is sharded over rows and positions, table replicated or `whole`. Differentiable in the first of the three.
    """
    table_VD = jax.reshard(table_VD, whole())

    def local(hidden, table, targets):
        loss, correct = _loss_sums(hidden.reshape(-1, hidden.shape[-1]), varying(table), targets.reshape(-1), chunk)
        return jax.lax.psum((loss, correct, jnp.sum(targets >= 0)), AXES)

    return jax.shard_map(local, in_specs=(HIDDEN, whole(), TOKENS), out_specs=(P(), P(), P()))(
        hidden_BTD, table_VD, targets_BT
    )


def token_losses(
    hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """(-log p [B, T] in nats, predicted right [B, T] bool) of each target; 0 and False where it is -1."""
    table_VD = jax.reshard(table_VD, whole())

    def local(hidden, table, targets):
        def one(_, scanned):
            x_CD, targets_C = scanned
            lse_C, picked_C, right_C = _scores(x_CD, table, targets_C)
            return None, (jnp.where(targets_C >= 0, lse_C - picked_C, 0), right_C)

        parts = _in_chunks(hidden.reshape(-1, hidden.shape[-1]), table, targets.reshape(-1), chunk)
        _, (nll, right) = jax.lax.scan(one, None, parts)
        return tuple(x.reshape(-1)[: targets.size].reshape(targets.shape) for x in (nll, right))

    return jax.shard_map(local, in_specs=(HIDDEN, whole(), TOKENS), out_specs=(TOKENS, TOKENS))(
        hidden_BTD, table_VD, targets_BT
    )


def _in_chunks(x_ND, table_VD, targets_N, chunk):
    """[chunks, C, D] and [chunks, C]; the last chunk is filled up with tokens that are not counted."""
    chunk = min(chunk, x_ND.shape[0])
    if loss_kernels.served(x_ND, table_VD):
        chunk = loss_kernels.chunk_of(x_ND.shape[0], chunk)
    spare = -x_ND.shape[0] % chunk
    x_ND = jnp.pad(x_ND, ((0, spare), (0, 0)))
    targets_N = jnp.pad(targets_N, (0, spare), constant_values=-1)
    return x_ND.reshape(-1, chunk, x_ND.shape[-1]), targets_N.reshape(-1, chunk)


def _chunk(x_CD, table_VD, targets_C):
    """exp(logits - largest) [C, V] and its sums, log of the sums of exp(logits), targets' logits, which are right."""
    logits_CV = jnp.einsum("cd,vd->cv", x_CD, table_VD, preferred_element_type=jnp.float32)
    largest_C = logits_CV.max(axis=-1)
    exps_CV = jnp.exp(logits_CV - largest_C[:, None])
    sums_C = exps_CV.sum(axis=-1)
    index = jnp.maximum(targets_C, 0)[:, None]
    picked_C = jnp.take_along_axis(logits_CV, index, axis=-1)[:, 0]
    right_C = (targets_C >= 0) & (picked_C >= largest_C)
    return exps_CV, sums_C, largest_C + jnp.log(sums_C), picked_C, right_C


def _scores(x_CD, table_VD, targets_C):
    """Log of the sums of exp(logits), targets' logits, which are right: [C] each."""
    if loss_kernels.served(x_CD, table_VD):
        return loss_kernels.scores(x_CD, table_VD, targets_C)
    return _chunk(x_CD, table_VD, targets_C)[2:]


def _d_logits(x_CD, table_VD, targets_C):
    """The gradient of the logits times sums [C, V], the sums of exps [C], and `_scores`.

    It is exps / sums - hit, of which the exps are at hand first: what it is multiplied with is divided by the sums.
    """
    if loss_kernels.served(x_CD, table_VD):
        return loss_kernels.d_logits(x_CD, table_VD, targets_C)
    exps_CV, sums_C, *scores = _chunk(x_CD, table_VD, targets_C)
    hit_CV = targets_C[:, None] == jnp.arange(table_VD.shape[0])
    return jnp.where(hit_CV, exps_CV - sums_C[:, None], exps_CV).astype(x_CD.dtype), sums_C, *scores


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _loss_sums(x_ND, table_VD, targets_N, chunk):
    def one(sums, scanned):
        x_CD, targets_C = scanned
        lse_C, picked_C, right_C = _scores(x_CD, table_VD, targets_C)
        loss = jnp.sum(jnp.where(targets_C >= 0, lse_C - picked_C, 0))
        return (sums[0] + loss, sums[1] + jnp.sum(right_C)), None

    return jax.lax.scan(one, _zero_sums(x_ND), _in_chunks(x_ND, table_VD, targets_N, chunk))[0]


def _loss_sums_forward(x_ND, table_VD, targets_N, chunk):
    def one(carry, scanned):
        x_CD, targets_C = scanned
        (loss, correct), d_table_DV = carry
        d_logits, sums_C, lse_C, picked_C, right_C = _d_logits(x_CD, table_VD, targets_C)
        counted_C = targets_C >= 0
        scale_C1 = jnp.where(counted_C, 1 / sums_C, 0)[:, None]
        d_x = jnp.einsum("cv,vd->cd", d_logits, table_VD, preferred_element_type=jnp.float32) * scale_C1
        scaled_DC = (x_CD.T * scale_C1.T).astype(x_CD.dtype)
        if platform() == "cpu":  # turned around before the product, which does it slowly, as XLA would have it
            scaled_DC = jax.lax.optimization_barrier(scaled_DC)
        d_table_DV += jnp.einsum("dc,cv->dv", scaled_DC, d_logits, preferred_element_type=jnp.float32)
        loss += jnp.sum(jnp.where(counted_C, lse_C - picked_C, 0))
        return ((loss, correct + jnp.sum(right_C)), d_table_DV), d_x.astype(x_CD.dtype)

    zeros_DV = varying(jnp.zeros_like(table_VD.T, jnp.float32), varying_axes(table_VD))
    start = (_zero_sums(x_ND), zeros_DV)  # transposed: as the product with the smaller operand turned around
    (sums, d_table_DV), d_x = jax.lax.scan(one, start, _in_chunks(x_ND, table_VD, targets_N, chunk))
    d_x = d_x.reshape(-1, x_ND.shape[-1])[: x_ND.shape[0]]
    return sums, (d_x, d_table_DV.T.astype(table_VD.dtype))


def _loss_sums_backward(chunk, saved, cotangents):
    d_x, d_table = saved
    d_loss = cotangents[0]
    return d_x * d_loss.astype(d_x.dtype), d_table * d_loss.astype(d_table.dtype), None


def _zero_sums(like):
    zeros = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))
    return varying(zeros, varying_axes(like))


_loss_sums.defvjp(_loss_sums_forward, _loss_sums_backward)
