"""The paths that only a GPU takes. Left out of `make test`; on a GPU: JAX_PLATFORMS=cuda python -m pytest -m gpu"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import attention, grouped, optimizer, sharding, step
from research.model import MoETransformer, make_expert
from tests.small import model_config, placed, random_batch, relative, small_config

pytestmark = pytest.mark.gpu


def test_fused_attention_is_chunked_attention(rng, one_device):
    q, k, v, cotangent = (placed(x, jnp.bfloat16) for x in rng.standard_normal((4, 2, 256, 4, 48)))

    def outcome(backend):
        def total(q, k, v):
            out = attention.attend(q, k, v, backend=backend, chunk=64)
            return jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32))

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)

    fused, chunked = outcome("cudnn"), outcome("chunked")
    for found, wanted in zip(jax.tree.leaves(fused[1]), jax.tree.leaves(chunked[1]), strict=True):
        assert relative(found.astype(jnp.float32), wanted.astype(jnp.float32)) < 2e-2


@pytest.mark.parametrize("fast", ["tiles", "ragged"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_experts_at_once_are_block_experts(rng, dtype, fast):
    x = jnp.asarray(rng.standard_normal((512, 64)), dtype)
    weights = {
        "up": jnp.asarray(rng.standard_normal((8, 64, 128)) / 8, dtype),
        "down": jnp.asarray(rng.standard_normal((8, 128, 64)) / 11, dtype),
    }
    sizes = jnp.asarray([100, 0, 12, 200, 50, 50, 99, 1], jnp.int32)

    def outcome(backend):
        def run(x, weights):
            return grouped.apply_experts(make_expert("silu", 0.0), x, weights, sizes, backend=backend, block=64)

        with jax.default_matmul_precision("highest"):
            out, vjp = jax.vjp(run, x, weights)
            return out, vjp(out)

    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for found, wanted in zip(jax.tree.leaves(outcome(fast)), jax.tree.leaves(outcome("blocks")), strict=True):
        assert relative(found.astype(jnp.float32), wanted.astype(jnp.float32)) < tolerance


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_bfloat16_step_learns_as_float32_does(rng, dropout):
    mesh = sharding.make_mesh({"data": 1, "expert": 1, "seq": 1})
    host = random_batch(rng, 8, 64)
    last = {}
    for dtype in ("float32", "bfloat16"):
        config = small_config(dtype=dtype, dropout=dropout).optimizer
        model = MoETransformer(model_config(dtype=dtype, dropout=dropout))
        run = step.make_train_step(
            model, optimizer.make_optimizer(config, 20), optimizer.make_schedule(config, config.learning_rate, 20)
        )
        with jax.set_mesh(mesh):
            state = jax.jit(
                lambda m=model, c=config: step.init_state(m, optimizer.make_optimizer(c, 20), 0, (1, 1, 1))
            )()
            batch = sharding.put_batch({k: x[None] for k, x in host.items()}, mesh)
            for _ in range(20):
                state, metrics = run(state, batch)
        last[dtype] = float(metrics["loss"])
    assert np.isfinite(last["bfloat16"]) and last["bfloat16"] == pytest.approx(last["float32"], rel=0.1)
