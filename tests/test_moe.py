"""Experts on sorted rows against a loop over experts in float64: values and gradients, any sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research import grouped, moe
from research.model import make_expert
from tests.precision import errors, outcome, roundings
from tests.small import placed, relative


def make_weights(rng, experts, width, hidden, names=("up", "down")):
    inputs = dict(up=width, gate=width, down=hidden)
    return {name: rng.standard_normal((experts, width, hidden)) / np.sqrt(inputs[name]) for name in names}


ROWS, EXPERTS = 24, 4


def every_expert(x, weights, sizes, activation):
    """Every expert on every row; a row keeps its own expert's output."""
    silu = lambda a: a / (1 + jnp.exp(-a))  # noqa: E731
    product = lambda name: jnp.einsum("md,edf->emf", x, weights[name])  # noqa: E731
    hidden = silu(product("gate")) * product("up") if activation == "swiglu" else silu(product("up"))
    own = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=len(x))[None] == jnp.arange(len(sizes))[:, None]
    return jnp.einsum("emf,edf,em->md", hidden, weights["down"], own)


@functools.partial(jax.jit, static_argnames=("backend", "activation", "block"))
def experts(x, weights, share, sizes, cotangent, backend, activation, block=None):
    """Output and gradients of apply_experts, or, where backend is "plain", of every_expert. share None: all ones."""

    def run(x, weights, share=None):
        if backend == "plain":
            return every_expert(x, weights, sizes, activation) * (1 if share is None else share[:, None])
        expert = make_expert(activation, 0.0)
        return grouped.apply_experts(expert, x, weights, sizes, share, backend=backend, block=block)

    return outcome(run, (x, weights) if share is None else (x, weights, share), cotangent)


def experts_off(rng, backend, activation, dtype, sizes, width, hidden, block):
    """Relative errors of values and gradients in `dtype`, to every expert on every row in float32, of the same numbers.
    The shares are float32, as the router's are, and given to whom the model gives them."""
    names = ("up", "gate", "down") if activation == "swiglu" else ("up", "down")
    given = dict(
        x=rng.standard_normal((sum(sizes), width)), weights=make_weights(rng, len(sizes), width, hidden, names)
    )
    given = jax.tree.map(lambda a: jnp.asarray(a, dtype), given)
    share = jnp.asarray(rng.uniform(size=sum(sizes)), jnp.float32) if backend == "blocks" else None
    rest = dict(sizes=jnp.asarray(sizes, jnp.int32), activation=activation)
    rest["cotangent"] = jnp.asarray(rng.standard_normal((sum(sizes), width)), jnp.float32)
    with jax.default_matmul_precision("highest"):
        found = experts(**given, share=share, **rest, backend=backend, block=block)
        wanted = experts(**jax.tree.map(lambda a: a.astype(jnp.float32), given), share=share, **rest, backend="plain")
    assert {a.dtype for a in found[: 2 + len(names)]} == {jnp.dtype(dtype)}
    return errors(found, wanted)


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, ROWS), min_size=EXPERTS - 1, max_size=EXPERTS - 1).map(sorted),
    backend=st.sampled_from(["blocks", "tiles", "ragged"]),
    activation=st.sampled_from(["silu", "swiglu"]),
    block=st.sampled_from([4, 9, 12, 99]),  # quarters of one, two and three rows; longer than all rows together
    seed=st.integers(0, 2**32 - 1),
)
def test_experts_equal_every_expert_on_every_row(cuts, backend, activation, block, seed):
    rng = np.random.default_rng(seed)
    sizes = np.diff([0, *cuts, ROWS]).astype(np.int32)
    with jax.enable_x64(True):
        weights = make_weights(rng, EXPERTS, 8, 12, ("up", "gate", "down"))
        x, cotangent = rng.standard_normal((2, ROWS, 8))
        arrays = x, weights, rng.uniform(size=ROWS), sizes, cotangent
        found = experts(*arrays, backend, activation, block)
        wanted = experts(*arrays, "plain", activation)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["blocks", "tiles", "ragged"])
@pytest.mark.parametrize("activation", ["silu", "swiglu"])
def test_experts_in_bfloat16_are_every_expert_in_float32(rng, backend, activation):
    """Rounded are two or three products, each step of the activation, the share, and all of their gradients, but no sum
    after each of its blocks."""
    off = experts_off(rng, backend, activation, jnp.bfloat16, (150, 0, 5, 445), 32, 48, block=8)
    assert off.max() < roundings(12), off


def test_an_expert_without_rows_takes_no_part(rng):
    """Its weights are not read: what is not a number, times 0, would show."""
    weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), make_weights(rng, 4, 8, 12))
    x, cotangent = (jnp.asarray(a, jnp.float32) for a in rng.standard_normal((2, 24, 8)))
    arrays = jnp.ones(24), jnp.asarray([9, 0, 15, 0], jnp.int32), cotangent, "blocks", "silu", 4
    poisoned = jax.tree.map(lambda w: w.at[jnp.asarray([1, 3])].set(jnp.nan), weights)
    for found, wanted in zip(experts(x, poisoned, *arrays), experts(x, weights, *arrays), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_dropout_in_an_expert_is_the_same_draw_forward_and_backward(rng):
    weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), make_weights(rng, 3, 8, 12))
    x = jnp.asarray(rng.standard_normal((20, 8)), jnp.float32)
    sizes = jnp.asarray([7, 0, 13], jnp.int32)
    key = jax.random.key(5)

    def run(down, key):
        expert = make_expert("silu", 0.4)
        return grouped.apply_experts(expert, x, weights | {"down": down}, sizes, backend="blocks", block=4, key=key)

    value, vjp = jax.vjp(lambda down: run(down, key), weights["down"])
    direction = jnp.asarray(rng.standard_normal(value.shape), jnp.float32)
    # The output is linear in `down` for one draw.
    assert float(jnp.vdot(vjp(direction)[0], weights["down"])) == pytest.approx(
        float(jnp.vdot(direction, value)), rel=1e-4
    )
    assert relative(value, run(weights["down"], jax.random.key(6))) > 0.1


@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(1, 40), experts=st.integers(1, 6), chosen=st.integers(1, 4), seed=st.integers(0, 99))
def test_sort_by_expert_is_a_permutation_with_its_inverse(tokens, experts, chosen, seed):
    choice = np.random.default_rng(seed).integers(0, experts, (tokens, chosen)).astype(np.int32)
    order, rank, sizes = (np.asarray(x) for x in moe.sort_by_expert(jnp.asarray(choice), experts))
    flat = choice.reshape(-1)
    assert (np.diff(flat[order]) >= 0).all()
    assert (rank[order] == np.arange(len(flat))).all()
    assert (sizes == np.bincount(flat, minlength=experts)).all()


def plain_layer(x_ND, router, weights, chosen):
    """A token's chosen experts, weighted by the softmax of their logits, one token at a time."""
    logits = x_ND @ router
    out = np.zeros_like(x_ND)
    for n, row in enumerate(logits):
        best = np.argsort(-row, kind="stable")[:chosen]
        share = np.exp(row[best] - row[best].max())
        for e, w in zip(best, share / share.sum(), strict=True):
            hidden = x_ND[n] @ weights["up"][e]
            out[n] += w * ((hidden / (1 + np.exp(-hidden))) @ weights["down"][e].T)
    return out, logits


@pytest.mark.parametrize(("experts", "chosen"), [(4, 2), (4, 1), (1, 1), (4, 4)])
@pytest.mark.parametrize("backend", ["blocks", "tiles", "ragged"])
def test_layer_equals_each_token_through_its_experts(rng, one_device, backend, experts, chosen):
    x = rng.standard_normal((2, 7, 8))
    router, weights = rng.standard_normal((8, experts)), make_weights(rng, experts, 8, 12)
    single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (x, router, weights))
    out, sums = moe.moe(
        placed(single[0]), *single[1:], make_expert("silu", 0.0), num_chosen=chosen, backend=backend, block=4
    )
    wanted, logits = plain_layer(x.reshape(14, 8), router, weights, chosen)
    assert relative(np.asarray(out).reshape(14, 8), wanted) < 1e-5

    statistics = moe.router_statistics(jax.tree.map(lambda s: s[None], sums), 14)
    best = np.argsort(-logits, axis=-1, kind="stable")[:, :chosen]
    load = np.bincount(best.reshape(-1), minlength=experts) / best.size
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(statistics["load"][0], load, rtol=1e-6)
    np.testing.assert_allclose(statistics["probability"][0], probability.mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics["balance"][0], experts * (load * probability.mean(0)).sum(), rtol=1e-5)
    np.testing.assert_allclose(statistics["max_violation"][0], experts * load.max() - 1, atol=1e-6)


def test_uniform_load_has_balance_one_and_entropy_one():
    sums = dict(assignments=jnp.full((2, 1, 1, 8), 4.0), probability=jnp.full((2, 1, 1, 8), 2.0))
    statistics = moe.router_statistics(sums, 16)
    for name, value in dict(balance=1.0, entropy=1.0, max_violation=0.0).items():
        np.testing.assert_allclose(statistics[name], value, atol=1e-6)


def test_layer_gradients_equal_the_dense_layer(rng, one_device):
    x = placed(rng.standard_normal((2, 6, 8)), jnp.float32)
    router = jnp.asarray(rng.standard_normal((8, 4)), jnp.float32)
    weights = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), make_weights(rng, 4, 8, 12))
    cotangent = placed(rng.standard_normal((2, 6, 8)), jnp.float32)

    logits = np.asarray(x) @ np.asarray(router)
    kept = placed(logits >= np.sort(logits, axis=-1)[..., -2, None])

    def routed(x, router, weights):
        out, _ = moe.moe(x, router, weights, make_expert("silu", 0.0), num_chosen=2, backend="blocks", block=4)
        return jnp.sum(out * cotangent)

    def dense(x, router, weights):
        logits = x @ router
        share = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)
        hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, weights["up"]))
        return jnp.sum(jnp.einsum("btef,edf,bte->btd", hidden, weights["down"], share) * cotangent)

    found, wanted = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(x, router, weights) for f in (routed, dense))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert relative(a, b) < 1e-5
