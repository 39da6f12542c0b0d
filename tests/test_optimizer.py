"""Muon's orthogonality and stacking, schedules, and who is whose parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import optimizer, sharding
from tests.precision import in_tensor_float
from tests.small import relative, small_config


def newton_schulz(x, steps=5):
    """Of one matrix, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(3, 6, 20), (2, 20, 6), (1, 9, 9)])
def test_each_matrix_of_a_stack_is_orthogonalised_on_its_own(rng, one_device, shape):
    x = rng.standard_normal(shape) * rng.uniform(0.01, 100, (shape[0], 1, 1))
    found = np.asarray(optimizer.newton_schulz(jnp.asarray(x, jnp.float32)))
    for matrix, got in zip(x, found, strict=True):
        wanted = newton_schulz(matrix) if shape[1] <= shape[2] else newton_schulz(matrix.T).T
        assert relative(got, wanted) < 1e-4
        singular = np.linalg.svd(got, compute_uv=False)
        assert singular.min() > 0.6 and singular.max() < 1.3
        u, _, vt = np.linalg.svd(matrix, full_matrices=False)
        assert np.trace(got.T @ (u @ vt)) > 0.7 * min(shape[1:])  # near U V^T, not any orthogonal matrix


def hard_matrix(rng, rows, cols, decades):
    """Gaussian; or the product of two such with a scale between them that falls by so many decades, as singular values
    then do at least."""
    x = rng.standard_normal((rows, cols))
    if decades:
        x = rng.standard_normal((rows, rows)) @ (np.logspace(0, -decades, rows)[:, None] * x)
    return x.astype(np.float32)


def furthest(found, wanted):
    """The spectral norm of their difference [R, C], R <= C: no singular value is further off."""
    error = np.asarray(found, np.float64) - wanted
    return np.sqrt(np.linalg.eigvalsh(error @ error.T)[-1])


# Ten bits behind the point: an operand is off by 2^-11 of itself at most if rounded, by 2^-10 if cut off. That gives
# 0.013 and 0.021 at most, as five maps of the matrix itself do; five of the Gram matrix in a row 0.17; bfloat16 0.13.
TENSOR_FLOAT = 0.025


@pytest.mark.parametrize("decades", [0, 4])
@pytest.mark.parametrize("shape", [(384, 384), (384, 1536)])
def test_tensor_cores_orthogonalise_as_float32_does(rng, shape, decades):
    """At JAX's default precision an NVIDIA GPU multiplies in TF32: still no singular value is far off."""
    matrix = hard_matrix(rng, *shape, decades)
    wanted = newton_schulz(matrix.astype(np.float64))
    off = lambda run: furthest(jax.jit(run)(matrix[None])[0], wanted)  # noqa: E731
    assert off(optimizer.newton_schulz) < 1e-4
    for cut in (False, True):
        assert off(in_tensor_float(optimizer.newton_schulz, cut)) < TENSOR_FLOAT


def test_products_are_taken_as_tensor_cores_take_them():
    """1 + 2^-10 is a number of TF32 and 1 + 3 * 2^-12 is not; a product that asks for more precision has it."""
    x = np.float32([[1 + 2**-10, 1 + 3 * 2**-12]])
    run = lambda x: jax.jit(lambda x: (x @ np.eye(2, dtype=np.float32)) + 0)(x)  # noqa: E731
    for cut, second in ((True, 1), (False, 1 + 2**-10)):
        assert in_tensor_float(run, cut)(x).tolist() == [[1 + 2**-10, second]]
        with jax.default_matmul_precision("highest"):
            assert in_tensor_float(run, cut)(x).tolist() == x.tolist()


SHAPES = {
    "qkv": (2, 8, 3, 2, 4), "attention_out": (2, 2, 4, 8), "up": (2, 4, 8, 16),
    "down": (2, 4, 8, 16), "router": (2, 8, 4),
}  # fmt: skip
MATRICES_OF = {"qkv": (2, 8, 24), "attention_out": (2, 8, 8), "up": (8, 8, 16), "down": (8, 8, 16), "router": (2, 8, 4)}
GROWTH = {"qkv": 3, "up": 2}  # outputs over inputs, where more than 1; `down` has its 8 outputs first


@pytest.mark.parametrize(("name", "shape"), SHAPES.items())
def test_a_parameter_is_a_stack_of_its_matrices_whatever_the_mesh(rng, name, shape):
    x = rng.standard_normal(shape).astype(np.float32)
    matrices = x.reshape(MATRICES_OF[name]).astype(np.float64)
    wide = matrices.shape[1] <= matrices.shape[2]
    wanted = np.stack([newton_schulz(m) if wide else newton_schulz(m.T).T for m in matrices])
    wanted *= np.sqrt(GROWTH.get(name, 1))
    for mesh_sizes in ((1, 1), (8, 1), (2, 4)):
        mesh = sharding.make_mesh({"data": mesh_sizes[0], "expert": 1, "seq": mesh_sizes[1]})
        with jax.set_mesh(mesh):
            found = jax.jit(lambda x: optimizer.orthogonalize(x, optimizer.MATRICES[name]))(jnp.asarray(x))
        assert relative(np.asarray(found).reshape(wanted.shape), wanted) < 1e-4


def test_momentum_is_an_average_with_nesterov(one_device):
    """Two steps by hand: the direction that is orthogonalised is beta m + (1 - beta) g."""
    transform = optimizer.scale_by_muon(0.9)
    g1, g2 = (np.random.default_rng(i).standard_normal((1, 4, 8)).astype(np.float32) for i in (1, 2))
    state = transform.init({"up": jnp.zeros((1, 4, 8))})
    _, state = transform.update({"up": jnp.asarray(g1)}, state)
    update, _ = transform.update({"up": jnp.asarray(g2)}, state)
    momentum = 0.9 * (0.1 * g1) + 0.1 * g2
    wanted = newton_schulz((0.9 * momentum + 0.1 * g2)[0].astype(np.float64)) * np.sqrt(2)
    assert relative(update["up"][0], wanted) < 1e-4


@pytest.mark.parametrize("kind", ["constant", "cosine", "wsd"])
def test_schedule_warms_up_then_does_what_it_says(kind):
    config = small_config().optimizer
    config.update(dict(schedule=kind, warmup_fraction=0.05, decay_fraction=0.2, final_fraction=0.1))
    schedule = optimizer.make_schedule(config, 2.0, 200)
    rates = np.array([schedule(step) for step in range(200)])
    np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)
    assert rates[10] == pytest.approx(2.0, rel=1e-3)
    if kind == "constant":
        np.testing.assert_allclose(rates[10:], 2.0)
    if kind == "cosine":
        assert (np.diff(rates[10:]) < 0).all() and rates[-1] == pytest.approx(0.2, rel=0.01)
    if kind == "wsd":
        np.testing.assert_allclose(rates[10:160], 2.0)
        np.testing.assert_allclose(np.diff(rates[161:]), -1.8 / 40, rtol=1e-3)
        assert rates[-1] == pytest.approx(0.2 + 1.8 / 40, rel=0.02)


def test_a_run_of_a_few_steps_has_a_schedule():
    for steps in (1, 2, 3):
        for kind in ("constant", "cosine", "wsd"):
            config = small_config().optimizer
            config.schedule = kind
            schedule = optimizer.make_schedule(config, 2.0, steps)
            assert all(np.isfinite(schedule(s)) and schedule(s) >= 0 for s in range(steps))
            assert schedule(0) == pytest.approx(2.0)


def test_matrices_are_muons_and_the_rest_adamws():
    params = {"embedding": 0, "final_norm": 0, "layers": {"qkv": 0, "router": 0, "up": 0, "moe_norm": 0, "mine": 0}}
    labels = optimizer.label_parameters(params)
    assert labels["layers"] == {"qkv": "muon", "router": "muon", "up": "muon", "moe_norm": "adamw", "mine": "adamw"}
    assert labels["embedding"] == labels["final_norm"] == "adamw"


def test_clipping_bounds_the_gradient_that_the_optimiser_sees(one_device):
    config = small_config().optimizer
    config.update(
        dict(name="adamw", clip_norm=1.0, weight_decay=0.0, epsilon=1e9, learning_rate=1.0, warmup_fraction=0.0)
    )
    tx = optimizer.make_optimizer(config, 10)
    params = {"embedding": jnp.zeros((3, 4))}
    grads = {"embedding": jnp.full((3, 4), 50.0)}
    update, _ = tx.update(grads, tx.init(params), params)  # a large epsilon: update = -gradient / epsilon
    assert float(jnp.linalg.norm(update["embedding"])) * 1e9 == pytest.approx(1.0, rel=1e-3)
