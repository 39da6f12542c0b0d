"""Causal attention that never keeps the [T, S] scores, in plain JAX: for a CPU, and where no kernel of ours serves.

As in FlashAttention (Dao et al. 2022, arXiv:2205.14135) a block of queries meets a block of keys at a time, and pairs
of blocks in which no query may see a key are left out. The loop over the pairs is the program's, so one pair's scores
are all that there is at once: on a CPU they stay in its cache.

Dropout draws for every pair of a query's and a key's random word (dropout.py), whatever the blocks.

Letters: B batch, T queries, S keys, H heads, K head width, R rows = B * H; q queries and s keys of a block.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.dropout import multipliers
from research.remat import keep
from research.sharding import platform, varying, varying_axes

MASKED = -1e30
SCORES_BYTES = 256 * 2**20  # at once, on accelerators: a small part of their memory, and work enough for them
FEW_PAIRS = 6  # of blocks: so many are written out on a CPU, where a turn of a loop costs as much as a small operation


def chunked(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    words: tuple[jax.Array, jax.Array] | None,
    start: jax.Array,
    dropout: float = 0.0,
    chunk: int = 256,
) -> jax.Array:
    """What `flash.flash` computes, of the same arguments, anywhere. chunk: queries of a block.

    segments and words: a pair each, of the queries [B, T] and [B, H, T] and of the keys, or None.
    """
    batch, queries, heads, width = q_BTHK.shape
    block = block_of(queries, chunk)
    others = {}
    if segments is not None:
        others |= dict(zip(("q_segments", "k_segments"), (jnp.repeat(x, heads, axis=0) for x in segments), strict=True))
    if words is not None:
        others |= dict(zip(("q_words", "k_words"), (x.reshape(batch * heads, -1) for x in words), strict=True))
    q_RTK, k_RSK, v_RSK = keep([_fill_up(_to_rows(x), block) for x in (q_BTHK, k_BSHK, v_BSHK)])
    others = {name: _fill_up(x, block) for name, x in others.items()}
    out_RTK = _attend(q_RTK, k_RSK, v_RSK, others, start, dropout, block, k_BSHK.shape[1] - queries)
    return out_RTK[:, :queries].reshape(batch, heads, queries, width).swapaxes(1, 2)


def block_of(queries: int, chunk: int) -> int:
    """Queries of a block: an even number, `chunk` or one more at most, and the same for all with as few to fill up."""
    blocks = -(-queries // chunk)
    return 2 * -(-queries // (2 * blocks))


def _to_rows(x_BTHK: jax.Array) -> jax.Array:
    batch, length, heads, width = x_BTHK.shape
    return x_BTHK.swapaxes(1, 2).reshape(batch * heads, length, width)


def _fill_up(x_RT: jax.Array, block: int) -> jax.Array:
    """Whole blocks. What is added comes after every query that counts, and its own results are cut off."""
    return jnp.pad(x_RT, [(0, 0), (0, -x_RT.shape[1] % block), *[(0, 0)] * (x_RT.ndim - 2)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q_RTK, k_RSK, v_RSK, others, start, dropout, block, before):
    """before: keys before the first query of the last shard. others: segments and words of the rows, by name."""
    return _attend_forward(q_RTK, k_RSK, v_RSK, others, start, dropout, block, before)[0]


def _attend_forward(q, k, v, others, start, dropout, block, before):
    arrays = dict(q=q, k=k, v=v, **others)
    out, lse = keep(_in_groups(functools.partial(_forward, start, dropout, block, before), arrays, block))
    return out, (q, k, v, others, start, out, lse)


def _attend_backward(dropout, block, before, saved, d_out):
    q, k, v, others, start, out, lse = saved
    delta = jnp.sum(d_out.astype(lse.dtype) * out.astype(lse.dtype), axis=-1)
    arrays = dict(q=q, k=k, v=v, d_out=d_out, lse=lse, delta=delta, **others)
    dq, dk, dv = _in_groups(functools.partial(_backward, start, dropout, block, before), arrays, block)
    return dq, dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _in_groups(run: Callable, arrays: dict[str, jax.Array], block: int) -> Any:
    """CPU: a row (one head of one sequence) at a time, which makes plain matrix products of them all; else as many rows
    at once as SCORES_BYTES hold, so that memory does not grow with the rows."""
    rows = arrays["q"].shape[0]
    size = 1 if platform() == "cpu" else rows_at_once(rows, block * block)
    if size == rows:
        return run(arrays)
    groups = (rows // size,) if size == 1 else (rows // size, size)
    grouped = jax.tree.map(lambda x: x.reshape(*groups, *x.shape[1:]), arrays)
    outs = jax.lax.scan(lambda _, group: (None, run(group)), None, grouped)[1]
    return jax.tree.map(lambda x: x.reshape(rows, *x.shape[len(groups) :]), outs)


def rows_at_once(rows: int, scores: int) -> int:
    """The largest divisor of `rows` whose float32 scores, so many a row, are SCORES_BYTES at most; 1 at least."""
    most = max(1, SCORES_BYTES // (4 * scores))
    return max(size for size in range(1, min(rows, most) + 1) if rows % size == 0)


def _forward(start, dropout, block, before, arrays):
    """(out [..., T, K], log [..., T] of the sums of the exponentials), with rows [R] before these axes or without."""
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    exact = jnp.promote_types(q.dtype, jnp.float32)

    def meet(carry, pair):
        outs, largest, sums = carry
        i, j = pair
        scores = _scores(arrays, i, j, block, block, start)
        old = _cut(largest, i, block)
        new = jnp.maximum(old, scores.max(axis=-1))
        exps, shrink = jnp.exp(scores - new[..., None]), jnp.exp(old - new)
        sums = _paste(sums, _cut(sums, i, block) * shrink + exps.sum(axis=-1), i)
        if dropout > 0:
            exps = exps * _multipliers(arrays, i, j, block, block, dropout)
        mixed = jnp.einsum("...qs,...sk->...qk", exps.astype(v.dtype), _cut(v, j, block, -2),
                           preferred_element_type=exact)  # fmt: skip
        outs = _paste(outs, _cut(outs, i, block, -2) * shrink[..., None] + mixed, i, -2)
        return outs, _paste(largest, new, i), sums

    rows = _full(q, q.shape[:-1], 0, exact)
    start_with = _full(q, q.shape, 0, exact), rows + MASKED, rows
    outs, largest, sums = _over_pairs(meet, start_with, q.shape[-2], k.shape[-2], block, block, before)
    return (outs / sums[..., None]).astype(q.dtype), largest + jnp.log(sums)


def _backward(start, dropout, block, before, arrays):
    """Gradients of q, k and v. Half as many keys at once: there are twice as many arrays of the size of the scores."""
    q, k, v, d_out = (arrays[name] for name in ("q", "k", "v", "d_out"))
    exact = jnp.promote_types(q.dtype, jnp.float32)
    keys = block // 2

    def meet(carry, pair):
        dq, dk, dv = carry
        i, j = pair
        q_i, d_i = (_cut(x, i, block, -2) for x in (q, d_out))
        k_j, v_j = (_cut(x, j, keys, -2) for x in (k, v))
        p = jnp.exp(_scores(arrays, i, j, block, keys, start) - _cut(arrays["lse"], i, block)[..., None])
        d_p = jnp.einsum("...qk,...sk->...qs", d_i, v_j, preferred_element_type=exact)
        kept = _multipliers(arrays, i, j, block, keys, dropout) if dropout > 0 else 1.0
        d_scores = p * (d_p * kept - _cut(arrays["delta"], i, block)[..., None]) * q.shape[-1] ** -0.5
        d_scores, p = d_scores.astype(q.dtype), (p * kept).astype(q.dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=exact)
        dq = _paste(dq, _cut(dq, i, block, -2) + product("...qs,...sk->...qk", d_scores, k_j), i, -2)
        dk = _paste(dk, _cut(dk, j, keys) + product("...qs,...qk->...ks", d_scores, q_i), j)
        dv = _paste(dv, _cut(dv, j, keys) + product("...qs,...qk->...ks", p, d_i), j)
        return dq, dk, dv

    # dk and dv turned around: a product whose smaller operand comes second is the quicker one.
    start_with = _full(q, q.shape, 0, exact), *[_full(x, x.mT.shape, 0, exact) for x in (k, v)]
    dq, dk, dv = _over_pairs(meet, start_with, q.shape[-2], k.shape[-2], block, keys, before)
    return dq.astype(q.dtype), dk.mT.astype(k.dtype), dv.mT.astype(v.dtype)


def _over_pairs(meet: Callable, carry: Any, queries: int, keys: int, block: int, keys_block: int, before: int) -> Any:
    """`carry` after `meet(carry, (first query, first key))` of every pair of blocks that some shard needs."""
    seen = [(i, min(before + i + block, keys)) for i in range(0, queries, block)]
    pairs = np.array([(i, j) for i, stop in seen for j in range(0, stop, keys_block)], np.int32)
    unroll = len(pairs) if platform() == "cpu" and len(pairs) <= FEW_PAIRS else 1
    walk = functools.partial(jax.lax.scan, lambda carry, pair: (meet(carry, pair), None), unroll=unroll)
    return walk(carry, (pairs[:, 0], pairs[:, 1]))[0]


def _scores(arrays, i, j, queries, keys, start):
    """Of a block of queries from i and a block of keys from j; MASKED where not allowed."""
    q, k = _cut(arrays["q"], i, queries, -2), _cut(arrays["k"], j, keys, -2)
    scores = jnp.einsum("...qk,...sk->...qs", q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    allowed = (start + i + jnp.arange(queries))[:, None] >= j + jnp.arange(keys)
    if "q_segments" in arrays:
        of_queries, of_keys = _cut(arrays["q_segments"], i, queries), _cut(arrays["k_segments"], j, keys)
        allowed = allowed & (of_queries[..., None] == of_keys[..., None, :])
    return jnp.where(allowed, scores * q.shape[-1] ** -0.5, MASKED)


def _multipliers(arrays, i, j, queries, keys, dropout):
    of_queries, of_keys = _cut(arrays["q_words"], i, queries), _cut(arrays["k_words"], j, keys)
    return multipliers(of_queries[..., None], of_keys[..., None, :], dropout)


def _cut(x, first, size, axis=-1):
    return jax.lax.dynamic_slice_in_dim(x, first, size, axis=axis, allow_negative_indices=False)


def _paste(x, part, first, axis=-1):
    return jax.lax.dynamic_update_slice_in_dim(x, part, first, axis, allow_negative_indices=False)


def _full(like, shape, value, dtype):
    """For a loop's carry: varying over the same mesh axes as `like`."""
    return varying(jnp.full(shape, value, dtype), varying_axes(like))
