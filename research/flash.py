"""Causal attention on a GPU in three kernels (Pallas, through Triton), with dropout and documents' masks inside.

FlashAttention (Dao et al. 2022, arXiv:2205.14135; the backward pass as in Dao 2023, arXiv:2307.08691): a block of
queries meets the keys a block at a time, and neither scores nor dropout's mask ever leave the chip. cuDNN's kernel is
quicker, but has no masks for documents, and its dropout counts its calls: in a loop over layers, whose backward pass
runs from the last to the first, it would draw other masks there than in the forward pass.

Dropout: every query and every key of a head has a random word, of which a pair's draw is made (dropout.py), so the
three kernels agree without keeping a mask.

Letters: B batch, T queries, S keys, H heads, K head width, Q queries of a block, C keys of a block.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from research import kernels
from research.dropout import draws, kept_draws, multipliers

MASKED = -1e30
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Queries and keys of a block, and how Triton runs a program: chosen by trying on an H100."""

    queries: int
    keys: int
    warps: int
    stages: int


FORWARD = Blocks(queries=64, keys=64, warps=4, stages=3)
KEYS_BACKWARD = Blocks(queries=64, keys=64, warps=4, stages=3)  # gradients of keys and values
QUERIES_BACKWARD = Blocks(queries=64, keys=64, warps=4, stages=3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def flash(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    words: tuple[jax.Array, jax.Array] | None,
    start: jax.Array,
    dropout: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
    """Attention [B, T, H, K] of queries at positions start..start+T over the keys at 0..S at or before each.

    segments: int32 ([B, T], [B, S]), a query sees the keys of its own segment; None: all. words: random uint32
    ([B, H, T], [B, H, S]) where `dropout` > 0, else None. start: int32 [], start + T <= S. Local arrays: call it
    inside shard_map.
    """
    return _flash_forward(q_BTHK, k_BSHK, v_BSHK, segments, words, start, dropout, interpret)[0]


def _flash_forward(q, k, v, segments, words, start, dropout, interpret):
    blocks, length = FORWARD, q.shape[1]
    arrays = _fill_up(dict(q=q, k=k, v=v, **_named(segments, words)), blocks)
    (batch, queries, heads, width), keys = arrays["q"].shape, arrays["k"].shape[1]
    kernel = functools.partial(_forward_kernel, blocks=blocks, width=width, num_keys=keys, dropout=dropout)
    outs = dict(out=(arrays["q"].shape, q.dtype), lse=((batch, heads, queries), jnp.float32))
    made = _call(kernel, "flash_forward", 2, blocks, queries // blocks.queries, arrays, start, outs, interpret)
    out, lse = made["out"][:, :length], made["lse"][..., :length]
    return out, (q, k, v, segments, words, start, out, lse)


def _flash_backward(dropout, interpret, saved, d_out):
    q, k, v, segments, words, start, out, lse = saved
    delta = jnp.einsum("bthk,bthk->bht", d_out.astype(jnp.float32), out.astype(jnp.float32))
    arrays = dict(q=q, k=k, v=v, d_out=d_out.astype(q.dtype), lse=lse, delta=delta, **_named(segments, words))

    def gradients(kernel, name, products, blocks, of, by_queries):
        filled = _fill_up(arrays, blocks)
        queries, keys = filled["q"].shape[1], filled["k"].shape[1]
        kernel = functools.partial(
            kernel, blocks=blocks, width=q.shape[-1], num_queries=queries, num_keys=keys, dropout=dropout
        )
        programs = queries // blocks.queries if by_queries else keys // blocks.keys
        outs = {f"d_{x}": (filled[x].shape, filled[x].dtype) for x in of}
        made = _call(kernel, name, products, blocks, programs, filled, start, outs, interpret)
        return [made[f"d_{x}"][:, : arrays[x].shape[1]] for x in of]

    dk, dv = gradients(_keys_kernel, "flash_backward_keys", 4, KEYS_BACKWARD, "kv", False)
    (dq,) = gradients(_queries_kernel, "flash_backward_queries", 3, QUERIES_BACKWARD, "q", True)
    return dq, dk, dv, None, None, None


flash.defvjp(_flash_forward, _flash_backward)


def _named(segments: Any, words: Any) -> dict[str, jax.Array]:
    named = {}
    if segments is not None:
        named |= dict(q_segments=segments[0], k_segments=segments[1])
    if words is not None:
        named |= dict(q_words=words[0], k_words=words[1])
    return named


def _fill_up(arrays: dict[str, jax.Array], blocks: Blocks) -> dict[str, jax.Array]:
    """Whole blocks of queries and of keys: keys beyond the last are after every query, and queries beyond the last
    have a gradient of 0."""

    def one(name: str, x: jax.Array) -> jax.Array:
        axis = 1 if x.ndim == 4 or name.endswith("segments") else 2
        block = blocks.keys if name in ("k", "v", "k_segments", "k_words") else blocks.queries
        spare = -x.shape[axis] % block
        return jnp.pad(x, [(0, spare if i == axis else 0) for i in range(x.ndim)]) if spare else x

    return {name: one(name, x) for name, x in arrays.items()}


def _call(
    kernel: Callable, name: str, products: int, blocks: Blocks, programs: int, arrays: dict[str, jax.Array],
    start: jax.Array, outs: dict[str, tuple], interpret: bool,
) -> dict[str, jax.Array]:  # fmt: skip
    """Runs `kernel(i, start, refs)` for i below `programs`, for each head of each row; refs by name, those of one head:
    [T, K], [T]. The axis K is filled up to a power of two: what is read there has to be masked. products: how many of
    the size of the scores it computes."""
    batch, _, heads, width = arrays["q"].shape
    names = [*arrays, *outs]

    def run(start_ref, *refs):
        kernel(pl.program_id(0), start_ref[0], dict(zip(names, refs, strict=True)))

    def spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        if len(shape) == 4:
            return pl.BlockSpec((None, shape[1], None, _columns(width)), lambda i, b, h: (b, 0, h, 0))
        if name.endswith("segments"):
            return pl.BlockSpec((None, shape[1]), lambda i, b, h: (b, 0))
        return pl.BlockSpec((None, None, shape[2]), lambda i, b, h: (b, h, 0))

    seen = batch * heads * (arrays["q"].shape[1] * (arrays["k"].shape[1] - arrays["q"].shape[1] / 2))
    made = kernels.call(
        run,
        out_shape=[kernels.result_of(shape, dtype, *arrays.values()) for shape, dtype in outs.values()],
        grid=(programs, batch, heads),
        in_specs=[pl.BlockSpec((1,), lambda i, b, h: (0,)), *(spec(n, x.shape) for n, x in arrays.items())],
        out_specs=[spec(n, shape) for n, (shape, _) in outs.items()],
        warps=blocks.warps,
        stages=blocks.stages,
        products=products * 2 * seen * width,
        interpret=interpret,
        name=name,
    )(start.astype(jnp.int32).reshape(1), *arrays.values())
    return dict(zip(outs, made, strict=True))


def _columns(width: int) -> int:
    return max(16, pl.next_power_of_2(width))


def _rows(ref: Any, first: Any, count: int, width: int) -> jax.Array:
    """[count, K] of a [T, K] ref, 0 beyond its width."""
    inside = jnp.arange(_columns(width))[None] < width
    return triton.load(ref.at[pl.ds(first, count), :], mask=inside, other=0.0)


def _write(ref: Any, first: Any, rows: jax.Array, width: int) -> None:
    inside = jnp.arange(rows.shape[1])[None] < width
    triton.store(ref.at[pl.ds(first, rows.shape[0]), :], rows.astype(ref.dtype), mask=inside)


def _line(refs: dict, name: str, first: Any, count: int) -> jax.Array | None:
    return refs[name][pl.ds(first, count)] if name in refs else None


def _masked(scores, queries_at, keys_at, q_segments, k_segments, causal):
    """Scores, MASKED where a query may not see a key. [Q, C] with [Q, 1] and [1, C]; or turned."""
    if causal:
        scores = jnp.where(queries_at >= keys_at, scores, MASKED)
    return scores if q_segments is None else jnp.where(q_segments == k_segments, scores, MASKED)


def _forward_kernel(i, start, refs, *, blocks, width, num_keys, dropout):
    Q, C = blocks.queries, blocks.keys
    i = num_blocks(refs["q"], Q) - 1 - i  # the longest first
    first = i * Q
    q = _rows(refs["q"], first, Q, width)
    at = start + first + jnp.arange(Q)[:, None]
    segments, words = (_column(_line(refs, name, first, Q)) for name in ("q_segments", "q_words"))

    def meet(j, carry, causal):
        mixed, largest, sums = carry
        k, v = (_rows(refs[x], j * C, C, width) for x in "kv")
        scores = kernels.dot(q, k, 1, 1) * (width**-0.5 * LOG2E)
        k_segments, k_words = (_row(_line(refs, name, j * C, C)) for name in ("k_segments", "k_words"))
        scores = _masked(scores, at, j * C + jnp.arange(C)[None], segments, k_segments, causal)
        new = jnp.maximum(largest, scores.max(axis=1))
        shrink, exps = jnp.exp2(largest - new), jnp.exp2(scores - new[:, None])
        sums = sums * shrink + exps.sum(axis=1)
        if dropout > 0:
            exps = jnp.where(draws(words, k_words) < jnp.uint32(kept_draws(dropout)), exps, 0.0)
        mixed = mixed * shrink[:, None] + kernels.dot(exps.astype(v.dtype), v, 1, 0)
        return mixed, new, sums

    carry = (jnp.zeros((Q, _columns(width)), jnp.float32), jnp.full(Q, MASKED, jnp.float32), jnp.zeros(Q, jnp.float32))
    whole = jnp.minimum((start + first + 1) // C, num_keys // C)  # blocks of keys that every query of the block sees
    last = jnp.minimum((start + first + Q + C - 1) // C, num_keys // C)
    carry = jax.lax.fori_loop(0, whole, functools.partial(meet, causal=False), carry)
    mixed, largest, sums = jax.lax.fori_loop(whole, last, functools.partial(meet, causal=True), carry)
    _write(refs["out"], first, mixed / (sums * (kept_draws(dropout) / 2**32))[:, None], width)
    refs["lse"][pl.ds(first, Q)] = (largest + jnp.log2(sums)) / LOG2E


def _keys_kernel(j, start, refs, *, blocks, width, num_queries, num_keys, dropout):
    """Gradients of a block of keys and values, from the queries that see it. Scores are [C, Q] here, as both products
    want them."""
    Q, C = blocks.queries, blocks.keys
    first = j * C
    k, v = (_rows(refs[x], first, C, width) for x in "kv")
    at = first + jnp.arange(C)[:, None]
    segments, words = (_column(_line(refs, name, first, C)) for name in ("k_segments", "k_words"))

    def meet(i, carry, causal):
        dk, dv = carry
        q, d_out = (_rows(refs[x], i * Q, Q, width) for x in ("q", "d_out"))
        lse, delta, q_segments, q_words = (
            _row(_line(refs, name, i * Q, Q)) for name in ("lse", "delta", "q_segments", "q_words")
        )
        scores = kernels.dot(k, q, 1, 1) * (width**-0.5 * LOG2E)
        scores = _masked(scores, start + i * Q + jnp.arange(Q)[None], at, q_segments, segments, causal)
        p, kept = jnp.exp2(scores - lse * LOG2E), _kept(q_words, words, dropout)
        dv += kernels.dot((p * kept).astype(v.dtype), d_out, 1, 0)
        d_scores = p * (kernels.dot(v, d_out, 1, 1) * kept - delta)
        return dk + kernels.dot(d_scores.astype(q.dtype), q, 1, 0), dv

    carry = (jnp.zeros((C, _columns(width)), jnp.float32),) * 2
    behind = num_queries // Q
    begin = jnp.clip((first - start) // Q, 0, behind)
    whole = jnp.clip((first + C - 1 - start + Q - 1) // Q, begin, behind)  # from here on every query sees every key
    carry = jax.lax.fori_loop(begin, whole, functools.partial(meet, causal=True), carry)
    dk, dv = jax.lax.fori_loop(whole, behind, functools.partial(meet, causal=False), carry)
    _write(refs["d_k"], first, dk * width**-0.5, width)
    _write(refs["d_v"], first, dv, width)


def _queries_kernel(i, start, refs, *, blocks, width, num_queries, num_keys, dropout):
    """Gradients of a block of queries, from the keys that it sees."""
    Q, C = blocks.queries, blocks.keys
    i = num_queries // Q - 1 - i
    first = i * Q
    q, d_out = (_rows(refs[x], first, Q, width) for x in ("q", "d_out"))
    at = start + first + jnp.arange(Q)[:, None]
    lse, delta, segments, words = (
        _column(_line(refs, name, first, Q)) for name in ("lse", "delta", "q_segments", "q_words")
    )

    def meet(j, dq, causal):
        k, v = (_rows(refs[x], j * C, C, width) for x in "kv")
        k_segments, k_words = (_row(_line(refs, name, j * C, C)) for name in ("k_segments", "k_words"))
        scores = kernels.dot(q, k, 1, 1) * (width**-0.5 * LOG2E)
        scores = _masked(scores, at, j * C + jnp.arange(C)[None], segments, k_segments, causal)
        p, kept = jnp.exp2(scores - lse * LOG2E), _kept(words, k_words, dropout)
        d_scores = p * (kernels.dot(d_out, v, 1, 1) * kept - delta)
        return dq + kernels.dot(d_scores.astype(k.dtype), k, 1, 0)

    whole = jnp.minimum((start + first + 1) // C, num_keys // C)
    last = jnp.minimum((start + first + Q + C - 1) // C, num_keys // C)
    dq = jax.lax.fori_loop(
        0, whole, functools.partial(meet, causal=False), jnp.zeros((Q, _columns(width)), jnp.float32)
    )
    dq = jax.lax.fori_loop(whole, last, functools.partial(meet, causal=True), dq)
    _write(refs["d_q"], first, dq * width**-0.5, width)


def num_blocks(ref: Any, block: int) -> int:
    return ref.shape[0] // block


def _kept(query_words, key_words, dropout):
    return multipliers(query_words, key_words, dropout) if dropout > 0 else 1.0


def _column(x_Q: jax.Array | None) -> jax.Array | None:
    return None if x_Q is None else x_Q[:, None]


def _row(x_C: jax.Array | None) -> jax.Array | None:
    return None if x_C is None else x_C[None, :]
