"""The paths that only a GPU takes. Left out of `make test`; on a GPU: JAX_PLATFORMS=cuda python -m pytest -m gpu"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from research import attention, chunked, flash, grouped, loss, optimizer, sharding, step, tile_kernels, tiles
from research.model import MoETransformer, make_expert
from tests.small import model_config, placed, random_batch, relative, small_config
from tests.test_flash import plain as plain_attention

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
        "down": jnp.asarray(rng.standard_normal((8, 64, 128)) / 11, dtype),
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
    """Of a shape that all kernels serve: attention's, the tiles' and the loss's."""
    shape = dict(dropout=dropout, d_model=64, vocab_size=128, moe_block=16)
    mesh = sharding.make_mesh({"data": 1, "expert": 1, "seq": 1})
    host = random_batch(rng, 8, 64)
    last = {}
    for dtype in ("float32", "bfloat16"):
        config = small_config(dtype=dtype, **shape).optimizer
        model = MoETransformer(model_config(dtype=dtype, **shape))
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


def test_loss_kernels_are_the_plain_loss(rng, one_device):
    hidden, table = rng.standard_normal((2, 1000, 384)), rng.standard_normal((4096, 384)) / 5
    targets = placed(rng.integers(-1, 4096, (2, 1000)), jnp.int32)

    def outcome(dtype, scale):
        @jax.jit
        def run(hidden, table):
            def total(hidden, table):
                return loss.cross_entropy_sums(hidden, table, targets, 512)[0]

            nll = loss.token_losses(hidden, table, targets, 512)[0]
            return jnp.sum(nll), *jax.value_and_grad(total, argnums=(0, 1))(hidden, table)

        rounded = (placed(hidden * scale, jnp.bfloat16), jnp.asarray(table, jnp.bfloat16))
        with jax.default_matmul_precision("highest"):
            return run(*(x.astype(dtype) for x in rounded))

    for scale in (1, 20):  # 20: logits too far apart for one pass
        evaluated, trained, grads = outcome(jnp.bfloat16, scale)
        _, wanted, wanted_grads = outcome(jnp.float32, scale)
        assert float(evaluated) == pytest.approx(float(wanted), rel=1e-3)
        assert float(trained) == pytest.approx(float(wanted), rel=1e-3)
        for found, exact in zip(grads, wanted_grads, strict=True):
            assert relative(found.astype(jnp.float32), exact) < 1e-2


@pytest.mark.parametrize(
    ("experts", "width", "hidden", "rows"), [(8, 384, 1536, 512), (8, 1536, 384, 512), (3, 64, 96, 16)]
)
def test_kernels_of_tiles_are_products_in_float32(rng, experts, width, hidden, rows):
    """Values and gradients of one product in bfloat16; the last expert but one has no rows, and tiles are left over."""
    sizes = jnp.asarray(rng.multinomial(100 * rows, np.ones(experts) / experts), jnp.int32)
    sizes = sizes.at[0].add(sizes[-2]).at[-2].set(0)
    owner = tiles.layout(sizes, 100 * rows, rows).owner_N
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((len(owner), rows, width), (experts, width, hidden), (len(owner), rows, hidden))
    x, w, dy = (jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, shapes, strict=True))
    own = (owner < experts)[:, None, None]
    x, dy = x * own, dy * own  # as `spread` fills them
    assert tile_kernels.served(x, w)

    def outcome(x, w, dy):
        y, vjp = jax.vjp(lambda x, w: tiles.multiply(x, w, owner), x, w)
        return y, *vjp(dy)[:2]

    found, again = jax.jit(outcome)(x, w, dy), jax.jit(outcome)(x, w, dy)
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(outcome)(*(a.astype(jnp.float32) for a in (x, w, dy)))
    for a, b, c in zip(found, wanted, again, strict=True):
        assert a.dtype == jnp.bfloat16 and relative(a.astype(jnp.float32), b) < 1e-2
        assert np.array_equal(a.astype(jnp.float32), c.astype(jnp.float32))


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), [("flash", "bfloat16", 1e-2), ("chunked", "float32", 1e-5)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention_by_blocks_is_plain_attention(rng, one_device, dropout, masked, backend, dtype, tolerance):
    """At the head width of the published model, rows of no whole blocks, against float32."""
    q, k, v, cotangent = (jnp.asarray(x, dtype) for x in rng.standard_normal((4, 2, 300, 2, 48)))
    words = [jnp.asarray(rng.integers(0, 2**32, (2, 2, 300), dtype=np.uint32)) for _ in range(2)] if dropout else None
    segments = jnp.asarray(np.cumsum(rng.random((2, 300)) < 0.03, axis=1), jnp.int32)
    segments = (segments, segments) if masked else None

    def outcome(attend, *arrays):
        out, vjp = jax.vjp(attend, *arrays)
        return out, *vjp(cotangent.astype(out.dtype))

    def by_blocks(q, k, v):
        attend = functools.partial(getattr(flash if backend == "flash" else chunked, backend), dropout=dropout)
        shard = jax.shard_map(attend, in_specs=P(), out_specs=P())
        return shard(q, k, v, segments, words, jnp.int32(0))

    def plain(q, k, v):
        return plain_attention(q, k, v, segments, words, 0, dropout)

    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(functools.partial(outcome, plain))(*(x.astype(jnp.float32) for x in (q, k, v)))
        got = jax.jit(functools.partial(outcome, by_blocks))(q, k, v)
    for found, exact in zip(got, wanted, strict=True):
        assert relative(found.astype(jnp.float32), exact) < tolerance
