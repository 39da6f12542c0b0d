"""The model: its size, causality, isolation of documents, and what its options must not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from research import sharding
from research.model import ModelConfig, MoETransformer, look_up, output_table, rms_norm
from tests.precision import roundings
from tests.small import bigger, model_config, placed, relative


def build(rng, **changes):
    """(model, random parameters) under the mesh that is set."""
    model = MoETransformer(model_config(**changes))
    params = jax.jit(lambda: model.init(jax.random.key(0), placed(np.zeros((1, 8), np.int32))))()["params"]
    return model, bigger(params, rng)


def logits_of(model, params, tokens, **kwargs):
    """Whole logits [B, T, V], as the loss never makes them."""

    @jax.jit
    def run(params, tokens, kwargs):
        hidden, _ = model.apply({"params": params}, tokens, **kwargs)
        table = output_table(params, hidden.dtype)
        return jnp.einsum("btd,vd->btv", hidden, table)

    return np.asarray(run(params, placed(tokens), {k: placed(v) for k, v in kwargs.items()}))


def test_published_model_has_the_originals_parameters(one_device):
    config = ModelConfig(**base.get_config("published").model)
    shapes = jax.eval_shape(lambda: MoETransformer(config).init(jax.random.key(0), placed(np.zeros((1, 8), np.int32))))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 79_059_840


@pytest.mark.parametrize("attention", ["xla", "chunked"])
def test_a_later_token_changes_no_earlier_logit(rng, one_device, attention):
    model, params = build(rng, attention=attention)
    tokens = rng.integers(0, 61, (2, 24))
    other = tokens.copy()
    other[:, 13] = (other[:, 13] + 1) % 61
    changed = (logits_of(model, params, tokens) != logits_of(model, params, other)).any(axis=(0, 2))
    assert not changed[:13].any() and changed[13:].all()


@pytest.mark.parametrize("attention", ["xla", "chunked"])
def test_a_document_is_scored_as_if_it_were_alone(rng, one_device, attention):
    model, params = build(rng, attention=attention)
    tokens = rng.integers(0, 61, (1, 24))
    segments = np.array([[1] * 9 + [2] * 15])
    positions = np.array([[*range(9), *range(15)]])
    packed = logits_of(model, params, tokens, segments_BT=segments, positions_BT=positions)
    alone = logits_of(model, params, tokens[:, 9:])
    assert relative(packed[:, 9:], alone) < 1e-5
    assert relative(logits_of(model, params, tokens)[:, 9:], alone) > 1e-2  # unmasked, it would see the other


def test_backends_and_remat_compute_one_function(rng, one_device):
    plain, params = build(rng, attention="xla", moe="ragged")
    tokens = placed(rng.integers(0, 61, (2, 24)))
    weights = placed(rng.standard_normal((2, 24, 32)), jnp.float32)

    def outcome(model):
        def total(params):
            hidden, aux = model.apply({"params": params}, tokens)
            return jnp.sum(hidden * weights) + 10 * aux["balance"].sum()

        return jax.jit(jax.value_and_grad(total))(params)

    wanted = outcome(plain)
    for changes in (dict(attention="chunked", moe="blocks"), dict(attention="xla", moe="blocks", remat="block")):
        found = outcome(MoETransformer(model_config(**changes)))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert relative(a, b) < 2e-5


def test_an_untied_head_is_its_own_table(rng, one_device):
    model, params = build(rng, tie_embeddings=False)
    assert params["head"].shape == (61, 32)
    tokens = rng.integers(0, 61, (1, 8))
    params["head"] = jnp.zeros_like(params["head"])
    assert not logits_of(model, params, tokens).any()


def test_training_draws_and_evaluation_does_not(rng, one_device):
    model, params = build(rng, dropout=0.2, router_noise=0.5)
    tokens = placed(rng.integers(0, 61, (2, 16)))

    @functools.partial(jax.jit, static_argnames="train")
    def hidden(key, train):
        rngs = dict(zip(("dropout", "router"), jax.random.split(key), strict=True))
        return model.apply({"params": params}, tokens, train=train, rngs=rngs)[0]

    def run(seed, train):
        return np.asarray(hidden(jax.random.key(seed), train))

    assert (run(1, False) == run(2, False)).all()
    assert (run(1, True) == run(1, True)).all()
    assert relative(run(1, True), run(2, True)) > 0.05


def test_bfloat16_computes_what_float32_does_to_its_precision(rng, one_device):
    single, params = build(rng)
    half = MoETransformer(model_config(dtype="bfloat16"))
    tokens = placed(rng.integers(0, 61, (2, 16)))
    wanted, found = (jax.jit(lambda p, m=m: m.apply({"params": p}, tokens)[0])(params) for m in (single, half))
    assert found.dtype == jnp.bfloat16
    # Routing may flip where two experts are nearly tied: most rows agree, not all.
    error = np.linalg.norm(np.asarray(found - wanted, np.float32), axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert np.median(error) < 0.03


def test_parameters_are_born_sharded_under_fsdp():
    mesh = sharding.make_mesh({"data": 2, "expert": 1, "seq": 4})
    with jax.set_mesh(mesh):
        model = MoETransformer(model_config(fsdp=True))
        params = jax.jit(lambda: model.init(jax.random.key(0), placed(np.zeros((2, 8), np.int32))))()["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        held = leaf.addressable_shards[0].data.size
        assert held == (leaf.size if path[-1].key.endswith("norm") else leaf.size // 8), path


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, roundings(2))], ids=["float32", "bfloat16"]
)
def test_the_norms_own_gradient_is_that_of_its_formula(rng, dtype, tolerance):
    def plain(x, scale):
        return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-3) * scale

    x, d_out = (jnp.asarray(rng.standard_normal((3, 50, 32)), dtype) for _ in range(2))
    scale = rng.standard_normal(32).astype(np.float32)
    out, backward = jax.vjp(lambda x, s: rms_norm(x, s, 1e-3), x, scale)
    with jax.enable_x64(True):
        wanted, plain_backward = jax.vjp(plain, *(np.asarray(a, np.float64) for a in (x, scale)))
        wanted_gradients = plain_backward(np.asarray(d_out, np.float64))
    d_x, d_scale = backward(d_out)
    assert (out.dtype, d_x.dtype, d_scale.dtype) == (dtype, dtype, jnp.float32)
    assert relative(out, wanted) < tolerance and relative(d_x, wanted_gradients[0]) < tolerance
    assert relative(d_scale, wanted_gradients[1]) < 1e-6  # added up in float32 whatever x is


def test_the_gradient_of_a_common_token_is_not_lost_in_bfloat16(rng, one_device):
    """Five thousand rows of one: in bfloat16 their sum stands still once a row is less than half its last bit."""
    tokens_BT = jnp.asarray(rng.integers(0, 2, (10, 1000)))
    d_BTD = jax.reshard(jnp.asarray(rng.normal(0.05, 0.1, (10, 1000, 4)), jnp.bfloat16), sharding.HIDDEN)
    table_VD = jnp.asarray(rng.normal(size=(3, 4)), jnp.bfloat16)
    rows_BTD, back = jax.vjp(lambda table: look_up(table, tokens_BT), table_VD)
    assert rows_BTD.dtype == jnp.bfloat16 and (rows_BTD == table_VD[tokens_BT]).all()
    exact = [np.asarray(d_BTD, np.float64)[tokens_BT == v].sum(0) for v in range(3)]
    np.testing.assert_allclose(np.asarray(back(d_BTD)[0], np.float64), exact, rtol=2**-8, atol=0)
