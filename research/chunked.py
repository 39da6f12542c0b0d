"""Causal attention that never keeps the [T, S] scores, in plain JAX: for a CPU, and where no kernel of ours serves.

As in FlashAttention (Dao et al. 2022, arXiv:2205.14135) a block of queries meets a block of keys at a time. The loops
over them are the program's, so one pair's scores are all that there is at once: on a CPU they stay in its cache. Blocks
of keys that no query of the block may see are left out, and those that every one may see are met without a mask.

Dropout draws for every pair of a query's and a key's random word (dropout.py), whatever the blocks.

Letters: B batch, T queries, S keys, H heads, K head width, R rows = B * H; q queries and s keys of a block. What goes
with queries is [..., T, 1] and what goes with keys [..., 1, S], with rows before these axes or without.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.dropout import multipliers
from research.remat import keep
from research.sharding import platform, varying, varying_axes

MASKED = -1e30
SCORES_BYTES = 256 * 2**20  # at once, on accelerators: a small part of their memory, and work enough for them
TURNS = "turns_"  # and a number, in the name of a loop: how often it turns, in the mean, for analysis/compute.py
FEW_BLOCKS = 2  # of queries: written out on a CPU, where a turn of a loop costs as much as a small operation


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
    queries, heads = q_BTHK.shape[1:3]
    block = block_of(queries, chunk)
    of_queries, of_keys = {}, {}
    if segments is not None:
        of_queries["segments"], of_keys["segments"] = (jnp.repeat(x[:, :, None, None], heads, axis=2) for x in segments)
    if words is not None:
        of_queries["words"], of_keys["words"] = (x.swapaxes(1, 2)[..., None] for x in words)
    of_queries, of_keys = jax.tree.map(lambda x: _fill_up(x, block), (of_queries, of_keys))
    q, k, v = keep([_fill_up(x, block) for x in (q_BTHK, k_BSHK, v_BSHK)])
    return _attend(q, k, v, of_queries, of_keys, start, dropout, block, k_BSHK.shape[1] - queries)[:, :queries]


def block_of(queries: int, chunk: int) -> int:
    """Queries of a block: an even number, `chunk` or one more at most, and the same for all with as few to fill up."""
    blocks = -(-queries // chunk)
    return 2 * -(-queries // (2 * blocks))


def _fill_up(x_BTHX: jax.Array, block: int) -> jax.Array:
    """Whole blocks. What is added comes after every query that counts, and its own results are cut off."""
    return jnp.pad(x_BTHX, [(0, -x_BTHX.shape[1] % block if axis == 1 else 0) for axis in range(4)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attend(q_BTHK, k_BSHK, v_BSHK, of_queries, of_keys, start, dropout, block, before):
    """before: keys before the first query of the last shard. of_queries, of_keys: segments and words, by name."""
    return _attend_forward(q_BTHK, k_BSHK, v_BSHK, of_queries, of_keys, start, dropout, block, before)[0]


def _attend_forward(q, k, v, of_queries, of_keys, start, dropout, block, before):
    sides = dict(q=q, **of_queries), dict(k=k, v=v, **of_keys)
    out, lse = keep(_in_groups(functools.partial(_forward, start, dropout, block, before), sides, block))
    return out, (q, k, v, of_queries, of_keys, start, out, lse)


def _attend_backward(dropout, block, before, saved, d_out):
    q, k, v, of_queries, of_keys, start, out, lse = saved
    delta = jnp.sum(d_out.astype(lse.dtype) * out.astype(lse.dtype), axis=-1, keepdims=True)
    sides = dict(q=q, d_out=d_out, lse=lse, delta=delta, **of_queries), dict(k=k, v=v, **of_keys)
    dq, dk, dv = _in_groups(functools.partial(_backward, start, dropout, block, before), sides, block)
    return dq, dk, dv, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _in_groups(run: Callable, sides: tuple[dict, dict], block: int) -> Any:
    """`run(queries' arrays, keys' arrays)` of rows [..., T, X], in and out of arrays [B, T, H, X]. On a CPU a row at a
    time; else as many at once as SCORES_BYTES hold, so that memory does not grow with the rows."""
    if platform() == "cpu":
        return _row_by_row(run, sides)
    batch, _, heads, _ = sides[0]["q"].shape
    rows = batch * heads
    sides = jax.tree.map(lambda x: x.swapaxes(1, 2).reshape(rows, x.shape[1], x.shape[3]), sides)
    size = rows_at_once(rows, block * block)
    if size == rows:
        outs = run(*sides)
    else:
        groups = jax.tree.map(lambda x: x.reshape(rows // size, size, *x.shape[1:]), sides)
        outs = jax.lax.scan(lambda _, group: (None, run(*group)), None, groups)[1]
    return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[-2:]).swapaxes(1, 2), outs)


def _row_by_row(run: Callable, sides: tuple[dict, dict]) -> Any:
    """One head of one sequence at a time, which makes plain matrix products of them all. Each is cut from where it lies
    and its results are put where they belong: to turn whole arrays around, heads first, takes a CPU longer."""
    q = sides[0]["q"]
    batch, _, heads, _ = q.shape

    def one(row, outs):
        at = row // heads, 0, row % heads, 0
        parts = run(*jax.tree.map(lambda x: _row(x, at), sides))
        return jax.tree.map(lambda out, part: _with_row(out, part, at), outs, parts)

    shapes = jax.eval_shape(run, *jax.tree.map(lambda x: _row(x, (0, 0, 0, 0)), sides))
    outs = jax.tree.map(lambda x: _full(q, (batch, x.shape[0], heads, x.shape[1]), 0, x.dtype), shapes)
    return jax.lax.fori_loop(0, batch * heads, one, outs)


def _row(x_BTHX, at):
    _, length, _, width = x_BTHX.shape
    return jax.lax.dynamic_slice(x_BTHX, at, (1, length, 1, width), allow_negative_indices=False)[0, :, 0]


def _with_row(x_BTHX, row_TX, at):
    return jax.lax.dynamic_update_slice(x_BTHX, row_TX[None, :, None], at, allow_negative_indices=False)


def rows_at_once(rows: int, scores: int) -> int:
    """The largest divisor of `rows` whose float32 scores, so many a row, are SCORES_BYTES at most; 1 at least."""
    most = max(1, SCORES_BYTES // (4 * scores))
    return max(size for size in range(1, min(rows, most) + 1) if rows % size == 0)


def _forward(start, dropout, block, before, queries, keys):
    """(out [..., T, K], log [..., T, 1] of the sums of the exponentials)."""
    q, scale = queries["q"], queries["q"].shape[-1] ** -0.5
    exact = jnp.promote_types(q.dtype, jnp.float32)

    def meet(state, mine, i, j, size, masked):
        (outs, largest, sums), _ = state
        theirs = _keys_from(keys, j, size)
        scores = _scores(mine, theirs, start + i - j if masked else None)
        new = jnp.maximum(largest, scores.max(axis=-1, keepdims=True) * scale)
        exps, shrink = jnp.exp(scores * scale - new), jnp.exp(largest - new)
        sums = sums * shrink + exps.sum(axis=-1, keepdims=True)
        if dropout > 0:
            exps = exps * multipliers(mine["words"], theirs["words"].mT, dropout)
        mixed = jnp.einsum(
            "...qs,...sk->...qk", exps.astype(theirs["v"].dtype), theirs["v"], preferred_element_type=exact
        )
        return (outs * shrink + mixed, new, sums), ()

    def one_block(_, number):
        mine = _queries_from(queries, number * block, block)
        rows = _full(q, (*mine["q"].shape[:-1], 1), 0, exact)
        state = (_full(q, mine["q"].shape, 0, exact), rows + MASKED, rows), ()
        (outs, largest, sums), _ = _over_keys(meet, state, mine, number, block, before, keys)
        return (), ((outs / sums).astype(q.dtype), largest + jnp.log(sums))

    return _over_queries(one_block, (), q.shape[-2], block)[1]


def _backward(start, dropout, block, before, queries, keys):
    """Gradients of q, k and v. Half as many keys at once: there are twice as many arrays of the size of the scores."""
    q, scale = queries["q"], queries["q"].shape[-1] ** -0.5
    exact = jnp.promote_types(q.dtype, jnp.float32)
    product = functools.partial(jnp.einsum, preferred_element_type=exact)

    def meet(state, mine, i, j, size, masked):
        dq, (dk, dv) = state
        theirs = _keys_from(keys, j, size)
        p = jnp.exp(_scores(mine, theirs, start + i - j if masked else None) * scale - mine["lse"])
        d_p = product("...qk,...sk->...qs", mine["d_out"], theirs["v"])
        kept = multipliers(mine["words"], theirs["words"].mT, dropout) if dropout > 0 else 1.0
        d_scores = (p * (d_p * kept - mine["delta"]) * scale).astype(q.dtype)
        dq += product("...qs,...sk->...qk", d_scores, theirs["k"])
        dk = _added(dk, product("...qs,...qk->...ks", d_scores, mine["q"]), j)
        dv = _added(dv, product("...qs,...qk->...ks", (p * kept).astype(q.dtype), mine["d_out"]), j)
        return dq, (dk, dv)

    def one_block(of_keys, number):
        mine = _queries_from(queries, number * block, block)
        state = _full(q, mine["q"].shape, 0, exact), of_keys
        dq, of_keys = _over_keys(meet, state, mine, number, block // 2, before, keys)
        return of_keys, dq.astype(q.dtype)

    # dk and dv turned around: a product whose smaller operand comes second is the quicker one.
    zeros = tuple(_full(keys[name], keys[name].mT.shape, 0, exact) for name in ("k", "v"))
    (dk, dv), dq = _over_queries(one_block, zeros, q.shape[-2], block)
    return dq, dk.mT.astype(keys["k"].dtype), dv.mT.astype(keys["v"].dtype)


def _over_queries(one_block, carry, length, block):
    """(carry, outs of all queries) of `one_block(carry, number of the block) -> (carry, outs of the block)`."""
    if platform() != "cpu" or length > FEW_BLOCKS * block:
        carry, outs = jax.lax.scan(one_block, carry, jnp.arange(length // block))
        return carry, jax.tree.map(lambda x: _joined(jnp.moveaxis(x, 0, -3)), outs)
    parts = []
    for number in range(length // block):
        carry, outs = one_block(carry, number)
        parts.append(outs)
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-2), *parts)


def _over_keys(meet, state, mine, number, size, before, keys):
    """`state` after that block of queries, `mine`, has met all keys that it may see on some shard, `size` at a time.

    state: what goes with these queries, and what goes with all keys.
    `meet(state, queries, first query, first key, keys, whether some may not be seen) -> state`.
    """
    queries = mine["q"].shape[-2]
    i = number * queries
    if before > 0:  # of these, each shard's queries see others
        stop = jnp.minimum(before + i + queries, keys["k"].shape[-2])
        turns = (stop - i + size - 1) // size
        meet_masked = lambda turn, state: meet(state, mine, i, i + turn * size, size, True)  # noqa: E731
        state = jax.lax.fori_loop(0, turns, meet_masked, state)
    else:  # one shard: of the keys beside the queries, the first half have no use for the second
        half = queries // 2
        own, others = meet(state, mine, i, i, half, True)
        later = jax.tree.map(lambda x: _cut(x, half, half), own)
        later, others = meet((later, others), _queries_from(mine, half, half), i + half, i + half, half, True)
        state = jax.tree.map(lambda x, y: jnp.concatenate([_cut(x, 0, half), y], axis=-2), own, later), others
    each = queries // size
    mean = (keys["k"].shape[-2] // queries - 1) / 2 * each
    with jax.named_scope(f"{TURNS}{mean}"):
        meet_one = lambda turn, state: meet(state, mine, i, turn * size, size, False)  # noqa: E731
        return jax.lax.fori_loop(0, number * each, meet_one, state)


def _scores(mine, theirs, ahead):
    """Products of queries and keys, to be multiplied by K^-0.5; MASKED where not allowed.

    ahead: position of the first query less that of the first key, None if all queries come after all keys.
    """
    q, k = mine["q"], theirs["k"]
    scores = jnp.einsum("...qk,...sk->...qs", q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    if ahead is not None:
        allowed = ahead + jnp.arange(q.shape[-2])[:, None] >= jnp.arange(k.shape[-2])
        scores = jnp.where(allowed, scores, MASKED)
    if "segments" in mine:
        scores = jnp.where(mine["segments"] == theirs["segments"].mT, scores, MASKED)
    return scores


def _queries_from(queries, first, size):
    return {name: _cut(x, first, size) for name, x in queries.items()}


def _keys_from(keys, first, size):
    return {name: _cut(x, first, size) for name, x in keys.items()}


def _cut(x, first, size, axis=-2):
    return jax.lax.dynamic_slice_in_dim(x, first, size, axis=axis, allow_negative_indices=False)


def _added(total, part, first):
    part = _cut(total, first, part.shape[-1], -1) + part
    return jax.lax.dynamic_update_slice_in_dim(total, part, first, -1, allow_negative_indices=False)


def _joined(x):
    """Blocks side by side: [..., blocks, q, K] to [..., T, K]."""
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _full(like, shape, value, dtype):
    """For a loop's carry: varying over the same mesh axes as `like`."""
    return varying(jnp.full(shape, value, dtype), varying_axes(like))
