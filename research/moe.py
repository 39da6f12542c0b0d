"""Mixture of experts: route, dispatch, experts, combine.

Letters: B batch, T sequence, D width, N = B * T tokens, K experts a token, M = N * K assignments, E experts, F hidden.
Routing is dropless: every token reaches all K experts it chose, whatever the load.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from research import grouped
from research.remat import keep
from research.sharding import AXES, BATCH, HIDDEN, varying, whole


def route(logits_NE: jax.Array, num_chosen: int) -> tuple[jax.Array, jax.Array]:
    """Each token's experts (int32 [N, K], best first) and their weights [N, K]: the softmax of the chosen logits."""
    chosen_NK, experts_NK = top_k(logits_NE, num_chosen)
    return experts_NK, jax.nn.softmax(chosen_NK, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def top_k(logits_NE: jax.Array, num_chosen: int) -> tuple[jax.Array, jax.Array]:
    """The largest logits [N, K] and where they were (int32), both kept: its gradient needs no more."""
    return _top_k_forward(logits_NE, num_chosen)[0]


def _top_k_forward(logits_NE, num_chosen):
    chosen_NK, experts_NK = keep(jax.lax.top_k(logits_NE, num_chosen))
    return (chosen_NK, experts_NK.astype(jnp.int32)), (logits_NE, experts_NK)


def _top_k_backward(num_chosen, saved, gradients):
    logits_NE, experts_NK = saved
    own_NKE = experts_NK[..., None] == jnp.arange(logits_NE.shape[-1])
    return (jnp.sum(jnp.where(own_NKE, gradients[0][..., None], 0), axis=1),)


top_k.defvjp(_top_k_forward, _top_k_backward)


def sort_by_expert(experts_NK: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(order_M, rank_M, sizes_E): sorted row r is assignment order[r]; assignment a is sorted row rank[a].

    By counting, which keeps the order within an expert: there are few experts, and two argsorts take 6 times as long.
    """
    flat_M = experts_NK.reshape(-1)
    chosen_ME = (flat_M[:, None] == jnp.arange(num_experts)).astype(jnp.int32)
    so_far_ME = jnp.cumsum(chosen_ME, axis=0)
    sizes_E = so_far_ME[-1]
    rank_M = (jnp.cumsum(sizes_E) - sizes_E)[flat_M] + jnp.sum(so_far_ME * chosen_ME, axis=1) - 1
    order_M = jnp.zeros_like(rank_M).at[rank_M].set(jnp.arange(rank_M.size, dtype=jnp.int32), unique_indices=True)
    return order_M, rank_M, sizes_E


@jax.custom_vjp
def dispatch(x_ND: jax.Array, order_M: jax.Array, rank_M: jax.Array) -> jax.Array:
    """Sorted rows [M, D] of the tokens, one for each assignment (M a multiple of N).

    Own gradient: `combine`, a gather and a sum over K, where autodiff would scatter.
    """
    return x_ND[order_M // (order_M.shape[0] // x_ND.shape[0])]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def combine(y_MD: jax.Array, order_M: jax.Array, rank_M: jax.Array, num_chosen: int) -> jax.Array:
    """The sum of each token's rows [N, D]; its gradient is `dispatch`."""
    return y_MD[rank_M].reshape(-1, num_chosen, y_MD.shape[-1]).sum(axis=1)


@jax.custom_vjp
def permute(x_M: jax.Array, order_M: jax.Array, rank_M: jax.Array) -> jax.Array:
    """x[order], or rows of it; its gradient is the inverse permutation, again a gather."""
    return x_M[order_M]


dispatch.defvjp(
    lambda x_ND, order_M, rank_M: (dispatch(x_ND, order_M, rank_M), (order_M, rank_M, rank_M.shape[0] // len(x_ND))),
    lambda saved, d_MD: (combine(d_MD, *saved), None, None),
)
combine.defvjp(
    lambda y_MD, order_M, rank_M, num_chosen: (combine(y_MD, order_M, rank_M, num_chosen), (order_M, rank_M)),
    lambda num_chosen, saved, d_ND: (dispatch(d_ND, *saved), None, None),
)
permute.defvjp(
    lambda x_M, order_M, rank_M: (x_M[order_M], rank_M),
    lambda rank_M, d_M: (d_M[rank_M], None, None),
)


def moe(
    x_BTD: jax.Array,
    router_DE: jax.Array,
    weights: Any,
    expert: grouped.Expert,
    *,
    num_chosen: int,
    backend: str,
    block: int,
    noise: float = 0.0,
    noise_key: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One layer of experts: (out [B, T, D], statistics).

    weights: pytree of [E, ...], replicated. noise: standard deviation added to the router's logits, from noise_key.
    statistics, each shard's own sums [shards of B, shards of T, E], to be added up once for all layers:
    `assignments` (how many went to each expert) and `probability` (of the softmax over all experts).
    """
    logits_BTE = _router_logits(x_BTD, router_DE)
    if noise > 0 and noise_key is not None:
        sharding = jax.typeof(logits_BTE).sharding
        logits_BTE += noise * jax.random.normal(noise_key, logits_BTE.shape, out_sharding=sharding)
    logits_BTE = keep(logits_BTE)

    def local(x_BTD, logits_BTE, weights, *key):
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        logits_NE = logits_BTE.reshape(x_ND.shape[0], -1)
        experts_NK, share_NK = route(logits_NE, num_chosen)
        order_M, rank_M, sizes_E = keep(sort_by_expert(experts_NK, logits_NE.shape[-1]))
        run = functools.partial(
            grouped.apply_experts, expert, dispatch(x_ND, order_M, rank_M), varying(weights), sizes_E,
            backend=backend, block=block, key=_shard_key(key[0]) if key else None,
        )  # fmt: skip
        if backend == "blocks":  # in the expert, where the gradient of the shares needs no results
            y_MD = run(share_M=permute(share_NK.reshape(-1), order_M, rank_M))
            out_ND = combine(y_MD, order_M, rank_M, num_chosen)
        else:
            y_NKD = permute(run(), rank_M, order_M).reshape(*experts_NK.shape, -1)
            out_ND = jnp.einsum("nkd,nk->nd", y_NKD, share_NK.astype(y_NKD.dtype))
        probability_E = jax.nn.softmax(logits_NE, axis=-1).sum(axis=0)
        statistics = dict(assignments=sizes_E.astype(jnp.float32), probability=probability_E)
        return out_ND.reshape(x_BTD.shape), jax.tree.map(lambda s: s[None, None], statistics)

    keys = () if dropout_key is None else (dropout_key,)
    sums = dict(assignments=P(BATCH, "seq", None), probability=P(BATCH, "seq", None))
    run = jax.shard_map(
        local,
        in_specs=(HIDDEN, HIDDEN, whole(), *[P() for _ in keys]),
        out_specs=(HIDDEN, sums),
    )
    return run(x_BTD, logits_BTE, weights, *keys)


@functools.partial(jax.checkpoint, prevent_cse=False)  # x is cast again in the backward pass, not kept in float32
def _router_logits(x_BTD, router_DE):
    return jnp.einsum("btd,de->bte", x_BTD.astype(jnp.float32), router_DE)


def _shard_key(key: jax.Array) -> jax.Array:
    key = varying(key)
    for axis in AXES:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    return key


def router_statistics(sums: dict[str, jax.Array], num_tokens: int) -> dict[str, jax.Array]:
    """Of all layers at once, from the shards' sums [L, b, t, E] over `num_tokens` tokens.

    load_LE: share of the assignments; probability_LE: mean router probability; balance_L: E * sum(load * probability),
    1 when uniform (Shazeer et al. 2017; Fedus et al. 2021, arXiv:2101.03961, eq. 4), with a gradient through the
    probability only; max_violation_L: largest load over the mean, minus 1; entropy_L: of the load, over ln E.
    """
    assignments_LE = sums["assignments"].sum(axis=(1, 2))
    load_LE = jax.lax.stop_gradient(assignments_LE / assignments_LE.sum(axis=-1, keepdims=True))
    probability_LE = sums["probability"].sum(axis=(1, 2)) / num_tokens
    num_experts = load_LE.shape[-1]
    entropy_L = -jnp.sum(jax.scipy.special.xlogy(load_LE, load_LE), axis=-1)
    return dict(
        load=load_LE,
        probability=probability_LE,
        balance=num_experts * jnp.sum(load_LE * probability_LE, axis=-1),
        max_violation=num_experts * load_LE.max(axis=-1) - 1,
        entropy=entropy_L / max(math.log(num_experts), 1e-9),
    )
