"""Causal attention behind one function, and rotary position embeddings.

Backends: `xla` materialises the [B, H, T, T] scores; `chunked` never keeps them (queries a chunk at a time, recomputed
in the backward pass as in FlashAttention, Dao et al. 2022, arXiv:2205.14135); `flash` are our kernels for a GPU
(flash.py), where they never leave the chip; `cudnn` is NVIDIA's, quicker, without masks and dropout.
Letters: B batch, T queries, S keys, H heads, K head width, R rows = B * H.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from research import flash
from research.dropout import multipliers, words
from research.remat import keep
from research.sharding import AXES, BATCH, TOKENS, platform, varying

MAX_PIECES = 16  # of the queries: more would only lengthen compilation
MASKED = -1e30
SCORES_BYTES = 256 * 2**20  # at once, on accelerators: a small part of their memory, and work enough for them


def rotary_tables(positions_BT: jax.Array, head_dim: int, base: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, K/2] of positions * base^(-2i/K) (Su et al. 2021, arXiv:2104.09864)."""
    inverse = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_BT.astype(jnp.float32)[..., None] * inverse
    return jnp.cos(angles), jnp.sin(angles)


def deinterleave(x: jax.Array) -> jax.Array:
    """The last axis with its even entries first: pairs (2i, 2i+1) become (i, i + K/2), as `rotate` takes them.

    Done to the weights of queries and keys, once a step instead of once a token: scores do not depend on the order.
    """
    return jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


def rotate(x_BTHK: jax.Array, cos_BTK: jax.Array, sin_BTK: jax.Array) -> jax.Array:
    """Rotate the pairs (i, i + K/2) of the head width by the angles of the tables."""
    even, odd = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTK[:, :, None], sin_BTK[:, :, None]
    out = jnp.concatenate([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return out.astype(x_BTHK.dtype)


def resolve_backend(
    backend: str, platform: str, *, dtype: str, head_dim: int, dropout: float, masked: bool, seq: int
) -> str:
    """`auto` to the best backend that can do what is asked on this platform ('cpu', 'gpu', 'tpu')."""
    if backend != "auto":
        return backend
    if platform != "gpu" or dtype != "bfloat16" or head_dim > 128:
        return "chunked"
    return "cudnn" if dropout == 0 and not masked and seq == 1 and head_dim % 8 == 0 else "flash"


def attend(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    *,
    backend: str,
    chunk: int = 256,
    segments_BT: jax.Array | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention [B, T, H, K], each query over the keys at or before it (and of its own segment).

    All inputs are sharded P(('data', 'expert'), 'seq'); K and V are gathered over `seq`. `dropout` is the share of
    attention probabilities that are set to 0, drawn from `key`.
    """
    if backend == "xla":
        return _attend_xla(q_BTHK, k_BTHK, v_BTHK, segments_BT, dropout, key)
    if backend == "chunked":
        return _attend_chunked(q_BTHK, k_BTHK, v_BTHK, segments_BT, dropout, key, chunk)
    if backend == "flash":
        return _attend_flash(q_BTHK, k_BTHK, v_BTHK, segments_BT, dropout, key)
    if backend == "cudnn":
        if segments_BT is not None or dropout > 0:
            raise ValueError("attention backend cudnn: neither documents' masks nor dropout; use flash")
        return _attend_cudnn(q_BTHK, k_BTHK, v_BTHK)
    raise ValueError(f"attention backend {backend!r}: choose xla, chunked, flash or cudnn")


def _attend_xla(q, k, v, segments, dropout, key):
    k, v = jax.reshard((k, v), P(BATCH, None, None, None))
    scores_BHTS = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32)
    length = q.shape[1]
    allowed = (jnp.arange(length)[:, None] >= jnp.arange(length)[None])[None, None]
    if segments is not None:
        keys_segments = jax.reshard(segments, P(BATCH, None))
        allowed = allowed & (segments[:, None, :, None] == keys_segments[:, None, None, :])
    scores_BHTS = jnp.where(allowed, scores_BHTS * q.shape[-1] ** -0.5, MASKED)
    probabilities = jax.nn.softmax(scores_BHTS, axis=-1)
    if dropout > 0:
        keep = jax.random.bernoulli(key, 1 - dropout, scores_BHTS.shape, out_sharding=jax.typeof(scores_BHTS).sharding)
        probabilities = jnp.where(keep, probabilities / (1 - dropout), 0)
    return jnp.einsum("bhts,bshk->bthk", probabilities.astype(v.dtype), v)


def _attend_cudnn(q, k, v):
    spec = P(BATCH, None, None, None)  # config.validate refuses cudnn with a seq axis larger than 1
    kernel = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    out = jax.shard_map(kernel, in_specs=(spec,) * 3, out_specs=spec)(*jax.reshard((q, k, v), (spec,) * 3))
    return jax.reshard(out, P(BATCH, "seq", None, None))


def _attend_flash(q, k, v, segments, dropout, key):
    def local(q, k, v, segments, key, start):
        pair_words = None
        if dropout > 0:  # of every query, and of every key, of every head
            shapes = [(x.shape[0], x.shape[2], x.shape[1]) for x in (q, k)]
            keys = jax.random.split(key)
            pair_words = tuple(jax.random.bits(k, s, jnp.uint32) for k, s in zip(keys, shapes, strict=True))
        segments = None if segments is None else (segments, _whole(segments))
        return flash.flash(q, k, v, segments, pair_words, start, dropout, interpreted)

    interpreted = platform() != "gpu"  # by tests; the interpreter does not know of varying axes
    return _in_shards(local, q, k, v, segments, key if dropout > 0 else None, checked=not interpreted)


def _attend_chunked(q, k, v, segments, dropout, key, chunk):
    def local(q, k, v, segments, key, start):
        q_segments = k_segments = None
        if segments is not None:
            q_segments = jnp.repeat(segments, q.shape[2], axis=0)
            k_segments = _whole(q_segments)
        rows = keep([_to_rows(x) for x in (q, k, v)])
        out_RTK = _grouped_rows(*rows, q_segments, k_segments, key, start, chunk, dropout)
        return out_RTK.reshape(q.shape[0], q.shape[2], q.shape[1], -1).swapaxes(1, 2)

    return _in_shards(local, q, k, v, segments, key if dropout > 0 else None)


def _in_shards(local, q, k, v, segments, key, checked=True):
    """Runs `local(q, k, v, segments, key, start)` on each shard's rows and queries, with K and V of all positions, a
    key of its own (both None where they are not asked for), and the position of its first query."""
    operands = [x for x in (q, k, v, segments, key) if x is not None]
    heads = P(BATCH, "seq", None, None)
    specs = (heads,) * 3 + (() if segments is None else (TOKENS,)) + (() if key is None else (P(),))

    def shard(q, k, v, *rest):
        shard_key = None
        if key is not None:
            shard_key = functools.reduce(
                jax.random.fold_in, [jax.lax.axis_index(axis) for axis in AXES], varying(rest[-1])
            )
        start = varying(jax.lax.axis_index("seq") * q.shape[1])
        return local(q, _whole(k), _whole(v), None if segments is None else rest[0], shard_key, start)

    return jax.shard_map(shard, in_specs=specs, out_specs=heads, check_vma=checked)(*operands)


def _whole(x_BT: jax.Array) -> jax.Array:
    """Inside shard_map: all positions of an array whose positions are divided."""
    return jax.lax.all_gather(x_BT, "seq", axis=1, tiled=True) if jax.lax.axis_size("seq") > 1 else x_BT


def _to_rows(x_BTHK: jax.Array) -> jax.Array:
    batch, length, heads, width = x_BTHK.shape
    return x_BTHK.swapaxes(1, 2).reshape(batch * heads, length, width)


def _grouped_rows(q, k, v, q_segments, k_segments, key, start, chunk, dropout):
    """CPU: a row (one head of one sequence) at a time, so that its scores stay in cache; else as many rows at once as
    SCORES_BYTES hold, so that memory does not grow with the square of the length."""
    rows, queries, _ = q.shape
    size = 1 if platform() == "cpu" else _rows_at_once(rows, min(queries, _chunk(queries, chunk)) * k.shape[1])
    if size == rows:
        return _flash(q, k, v, q_segments, k_segments, key, start, chunk, dropout)
    groups = (rows // size,) if size == 1 else (rows // size, size)
    arrays = jax.tree.map(lambda x: x.reshape(*groups, *x.shape[1:]), (q, k, v, q_segments, k_segments))
    keys = None if key is None else jax.random.split(key, groups[0])

    def one(_, group):
        return None, _flash(*group, start, chunk, dropout)

    return jax.lax.scan(one, None, (*arrays, keys))[1].reshape(q.shape)


def _rows_at_once(rows: int, scores: int) -> int:
    """The largest divisor of `rows` whose float32 scores, so many a row, are SCORES_BYTES at most; 1 at least."""
    most = max(1, SCORES_BYTES // (4 * scores))
    return max(size for size in range(1, min(rows, most) + 1) if rows % size == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _flash(q_TK, k_SK, v_SK, q_segments_T, k_segments_S, key, start, chunk, dropout):
    """Attention of queries start..start+T over keys 0..S, never keeping [T, S]; all arrays local, with or without rows
    [R, ...] before these axes (one row alone is a plain matrix product, which the CPU does best)."""
    return _flash_forward(q_TK, k_SK, v_SK, q_segments_T, k_segments_S, key, start, chunk, dropout)[0]


def _pieces(queries: int, keys: int, chunk: int) -> list[tuple[int, int, int]]:
    """(first, last, number of keys) of each chunk of queries: keys past them all are left out.

    A query i of a shard sees at most keys - queries + i + 1 keys, whichever shard it is.
    """
    chunk = _chunk(queries, chunk)
    stops = [(first, min(first + chunk, queries)) for first in range(0, queries, chunk)]
    return [(first, stop, keys - queries + stop) for first, stop in stops]


def _chunk(queries: int, chunk: int) -> int:
    """Queries at a time: `chunk`, or more where that would be more than MAX_PIECES pieces."""
    return max(chunk, -(-queries // MAX_PIECES))


def _scores(q, k, q_segments, k_segments, start):
    scores = jnp.einsum("...qk,...sk->...qs", q, k, preferred_element_type=jnp.float32)
    queries, keys = scores.shape[-2:]
    allowed = (start + jnp.arange(queries))[:, None] >= jnp.arange(keys)[None]
    if q_segments is not None:
        allowed = allowed & (q_segments[..., :, None] == k_segments[..., None, :])
    return jnp.where(allowed, scores * q.shape[-1] ** -0.5, MASKED)


def _after(*arrays):
    """The arrays, the first when all are there: piece after piece, or a GPU's compiler holds the scores of several."""
    return arrays if platform() == "cpu" else jax.lax.optimization_barrier(arrays)


def _cut(x, first, stop):
    return None if x is None else x[..., first:stop]


def _multipliers(key, piece, dropout, shape):
    rows, columns = words(jax.random.fold_in(key, piece), shape)
    return multipliers(rows[..., None], columns, dropout)


def _flash_forward(q, k, v, q_segments, k_segments, key, start, chunk, dropout):
    outs, lses = [], []
    for piece, (first, stop, keys) in enumerate(_pieces(q.shape[-2], k.shape[-2], chunk)):
        q_piece = q[..., first:stop, :]
        if outs:
            q_piece, outs[-1] = _after(q_piece, outs[-1])
        scores = _scores(
            q_piece, k[..., :keys, :],
            _cut(q_segments, first, stop), _cut(k_segments, 0, keys), start + first,
        )  # fmt: skip
        largest = scores.max(axis=-1, keepdims=True)
        exps = jnp.exp(scores - largest)
        sums = exps.sum(axis=-1, keepdims=True)
        if dropout > 0:
            exps = exps * _multipliers(key, piece, dropout, exps.shape)
        mixed = jnp.einsum("...qs,...sk->...qk", exps.astype(v.dtype), v[..., :keys, :],
                           preferred_element_type=jnp.float32)  # fmt: skip
        outs.append((mixed / sums).astype(v.dtype))
        lses.append((largest + jnp.log(sums))[..., 0])
    out, lse = keep((jnp.concatenate(outs, axis=-2), jnp.concatenate(lses, axis=-1)))
    return out, (q, k, v, q_segments, k_segments, key, start, out, lse)


def _flash_backward(chunk, dropout, saved, d_out):
    q, k, v, q_segments, k_segments, key, start, out, lse = saved
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    dqs = []
    dk, dv = (jnp.zeros_like(x.mT, jnp.float32) for x in (k, v))
    for piece, (first, stop, keys) in enumerate(_pieces(q.shape[-2], k.shape[-2], chunk)):
        q_piece, k_piece, d_piece = q[..., first:stop, :], k[..., :keys, :], d_out[..., first:stop, :]
        if dqs:
            q_piece, d_piece, dqs[-1], dk, dv = _after(q_piece, d_piece, dqs[-1], dk, dv)
        scores = _scores(q_piece, k_piece, _cut(q_segments, first, stop), _cut(k_segments, 0, keys), start + first)
        p = jnp.exp(scores - lse[..., first:stop, None])
        d_p = jnp.einsum("...qk,...sk->...qs", d_piece, v[..., :keys, :], preferred_element_type=jnp.float32)
        kept = _multipliers(key, piece, dropout, p.shape) if dropout > 0 else 1.0
        d_scores = (p * (d_p * kept - delta[..., first:stop, None]) * q.shape[-1] ** -0.5).astype(q.dtype)
        dqs.append(jnp.einsum("...qs,...sk->...qk", d_scores, k_piece))
        dk = dk.at[..., :keys].add(jnp.einsum("...qs,...qk->...ks", d_scores, q_piece))
        dv = dv.at[..., :keys].add(jnp.einsum("...qs,...qk->...ks", (p * kept).astype(v.dtype), d_piece))
    dq, dk, dv = jnp.concatenate(dqs, axis=-2), dk.mT.astype(k.dtype), dv.mT.astype(v.dtype)
    return dq, dk, dv, None, None, None, None


_flash.defvjp(_flash_forward, _flash_backward)
