"""Causal attention behind one function, and rotary position embeddings.

Backends: `xla` materialises the [B, H, T, T] scores; `chunked` (chunked.py) never keeps them, a block at a time, on any
platform; `flash` are our kernels for a GPU (flash.py), where they never leave the chip; `cudnn` is NVIDIA's, quicker,
without masks and dropout.
Letters: B batch, T queries, S keys, H heads, K head width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from research import chunked, flash
from research.linear import project
from research.sharding import AXES, BATCH, TOKENS, platform, varying

MASKED = -1e30


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


def make_qkv(x_BTD: jax.Array, qkv: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    """Queries, keys and values [B, T, H, K], the first two rotated. qkv: [D, 3, H, K], `whole`; rotary: the tables."""
    qkv = jnp.concatenate([deinterleave(qkv[:, :2]), qkv[:, 2:]], axis=1)
    q, k, v = jnp.unstack(project(x_BTD, qkv).reshape(*x_BTD.shape[:2], *qkv.shape[1:]), axis=2)
    return rotate(q, *rotary), rotate(k, *rotary), v


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
        kernel = functools.partial(chunked.chunked, chunk=chunk)
        return _attend_in_shards(kernel, q_BTHK, k_BTHK, v_BTHK, segments_BT, dropout, key)
    if backend == "flash":
        interpret = platform() != "gpu"  # by tests; the interpreter does not know of varying axes
        kernel = functools.partial(flash.flash, interpret=interpret)
        return _attend_in_shards(kernel, q_BTHK, k_BTHK, v_BTHK, segments_BT, dropout, key, checked=not interpret)
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


def _attend_in_shards(kernel, q, k, v, segments, dropout, key, checked=True):
    """`kernel(q, k, v, segments, words, start, dropout)` on each shard's rows and queries, with K and V of all
    positions, segments and words (or None) of its queries and of the keys, and the position of its first query."""
    operands = [x for x in (q, k, v, segments, key if dropout > 0 else None) if x is not None]
    heads = P(BATCH, "seq", None, None)
    specs = (heads,) * 3 + (() if segments is None else (TOKENS,)) + ((P(),) if dropout > 0 else ())

    def shard(q, k, v, *rest):
        pair_words = pair_segments = None
        if dropout > 0:  # of every query, and of every key, of every head
            key = functools.reduce(jax.random.fold_in, [jax.lax.axis_index(axis) for axis in AXES], varying(rest[-1]))
            lengths = q.shape[1], q.shape[1] * jax.lax.axis_size("seq")
            pair_words = tuple(
                jax.random.bits(drawn, (q.shape[0], q.shape[2], length), jnp.uint32)
                for drawn, length in zip(jax.random.split(key), lengths, strict=True)
            )
        if segments is not None:
            pair_segments = (rest[0], _whole(rest[0]))
        start = varying(jax.lax.axis_index("seq") * q.shape[1])
        return kernel(q, _whole(k), _whole(v), pair_segments, pair_words, start, dropout)

    return jax.shard_map(shard, in_specs=specs, out_specs=heads, check_vma=checked)(*operands)


def _whole(x_BT: jax.Array) -> jax.Array:
    """Inside shard_map: all positions of an array whose positions are divided."""
    return jax.lax.all_gather(x_BT, "seq", axis=1, tiled=True) if jax.lax.axis_size("seq") > 1 else x_BT
