"""Counts and FLOPs: the published numbers, real parameter trees, a hand count, and what XLA counts."""

import jax
import jax.numpy as jnp
import pytest

from configs import base
from research import flops
from research.model import ModelConfig, MoETransformer
from tests.small import small_config


def published():
    return base.get_config("published").model


def test_published_counts():
    counts = flops.parameter_counts(published())
    assert counts["total"] == 79_059_840
    assert counts["active"] == pytest.approx(36.6e6, rel=2e-3)


def test_published_flops_a_token():
    """220 MFLOP without attention, and 3.5, 14.2, 56.6 for attention at the three lengths."""
    model = published()

    def attention(length: int) -> float:
        return flops.train_flops_per_token(model, length) - flops.train_flops_per_token(model, 0)

    none = flops.train_flops_per_token(model, 0) - 6 * model.num_layers * model.d_model  # T + 1 at T = 0
    assert none == pytest.approx(220e6, rel=5e-3)
    for length, wanted in ((256, 3.5e6), (1024, 14.2e6), (4096, 56.6e6)):
        assert attention(length) == pytest.approx(wanted, rel=2e-2)


@pytest.mark.parametrize("activation", ["silu", "swiglu"])
@pytest.mark.parametrize("tied", [True, False])
def test_total_is_the_number_of_parameters_made(one_device, activation, tied):
    fields = dict(activation=activation, tie_embeddings=tied, num_experts=5, d_ff=48)
    config = small_config(**fields).model
    model = MoETransformer(ModelConfig(**config))
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(tokens.shape, tokens.dtype))["params"])
    sizes = {jax.tree_util.keystr(k): x.size for k, x in jax.tree_util.tree_leaves_with_path(tree)}
    assert flops.parameter_counts(config)["total"] == sum(sizes.values())
    idle = sum(n * 3 // 5 for k, n in sizes.items() if any(w in k for w in ("'up'", "'gate'", "'down'")))
    assert flops.parameter_counts(config)["active"] == sum(sizes.values()) - idle


def test_flops_by_hand():
    """D 4, 2 heads, F 6, 3 experts of which 2, V 10, 1 layer, T 3: mean keys (1 + 2 + 3) / 3 = 2."""
    fields = dict(d_model=4, num_heads=2, d_ff=6, num_experts=3, experts_per_token=2, vocab_size=10, num_layers=1)
    products = 3 * 4 * 4 + 4 * 4 + 4 * 3 + 2 * (4 * 6 + 6 * 4) + 10 * 4
    attention = 2 * 4 + 2 * 4  # scores and mixing, multiply-adds a key
    model = small_config(**fields).model
    assert flops.train_flops_per_token(model, 3) == 3 * (2 * products + 2 * attention)
    model.activation = "swiglu"
    assert flops.train_flops_per_token(model, 3) == 3 * (2 * (products + 2 * 24) + 2 * attention)


def test_flops_are_what_xla_counts_in_a_plain_program():
    """One layer's matrix products on one row, forward and backward; unmasked, so with T keys for (T + 1) / 2."""
    T, D, F, V, E, k = 96, 64, 80, 160, 4, 2

    def forward(x_TD, w):
        q, keys, v = x_TD @ w["q"], x_TD @ w["k"], x_TD @ w["v"]
        y_TD = (q @ keys.T) @ v @ w["out"]
        y_TD = y_TD * (y_TD @ w["router"])[:, :1]
        y_TD = sum((y_TD @ w[f"up{i}"]) @ w[f"down{i}"] for i in range(k))
        return jnp.sum((y_TD @ w["head"]) ** 2)

    shapes = dict(x=(T, D), q=(D, D), k=(D, D), v=(D, D), out=(D, D), router=(D, E), head=(D, V))
    shapes |= {f"up{i}": (D, F) for i in range(k)} | {f"down{i}": (F, D) for i in range(k)}
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    program = jax.jit(jax.value_and_grad(forward, argnums=(0, 1))).lower(arrays.pop("x"), arrays)
    fields = dict(num_layers=1, d_model=D, d_ff=F, vocab_size=V, num_experts=E, experts_per_token=k)
    unmasked = flops.train_flops_per_token(small_config(**fields).model, 2 * T - 1)
    assert program.compile().cost_analysis()["flops"] / T == pytest.approx(unmasked, rel=0.02)


def test_attention_is_linear_in_the_length():
    model = small_config().model
    at = [flops.train_flops_per_token(model, length) for length in (100, 200, 400)]
    assert at[2] - at[1] == 2 * (at[1] - at[0]) == 2 * 3 * model.num_layers * 2 * model.d_model * 100


def test_utilisation_is_flops_over_the_peak_of_known_devices():
    assert flops.peak_flops("NVIDIA H200") == flops.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak_flops("TPU v5 lite") == 197e12 and flops.peak_flops("TPU v5") == 459e12
    assert flops.peak_flops("cpu") is None
    assert flops.mfu(1e6, 220e6, 989e12) == pytest.approx(0.22245, rel=1e-4)
