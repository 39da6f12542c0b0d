"""The paths that only a GPU takes. Left out of `make test`; on a GPU: JAX_PLATFORMS=cuda python -m pytest -m gpu"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from research import attention, chunked, flash, loss, optimizer, sharding, step, tile_kernels, tiles
from research.model import MoETransformer
from tests.precision import errors, outcome, roundings
from tests.small import model_config, placed, random_batch, small_config
from tests.test_flash import plain as plain_attention
from tests.test_moe import experts_off
from tests.test_optimizer import TENSOR_FLOAT, furthest, hard_matrix, newton_schulz

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["cudnn", "flash", "chunked"])
def test_attention_in_bfloat16_is_plain_attention_in_float32(rng, one_device, backend):
    """As the model calls it, with scores far apart: values and gradients. Rounded are the weights, their gradients and
    the results, and cuDNN rounds what it does not tell of: twice the roundings of our own."""
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in rng.standard_normal((4, 2, 256, 4, 48))]
    arrays[0] *= 4
    attend = functools.partial(attention.attend, backend=backend, chunk=64)
    plain = functools.partial(plain_attention, segments=None, words=None, start=0, rate=0.0)
    with jax.default_matmul_precision("highest"):
        found = jax.jit(lambda *x: outcome(attend, x[:3], x[3]))(*map(placed, arrays))
        wanted = jax.jit(lambda *x: outcome(plain, x[:3], x[3]))(*(x.astype(jnp.float32) for x in arrays))
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
    assert errors(found, wanted).max() < roundings(16), errors(found, wanted)


@pytest.mark.parametrize("activation", ["silu", "swiglu"])
@pytest.mark.parametrize("backend", ["tiles", "ragged", "blocks"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, roundings(12))])
def test_experts_are_every_expert_in_float32(rng, dtype, tolerance, backend, activation):
    """Values and gradients; in bfloat16 of sides that the kernels of tiles serve."""
    off = experts_off(rng, backend, activation, dtype, (100, 0, 12, 200, 50, 50, 99, 1), 64, 128, block=64)
    assert off.max() < tolerance, off


@pytest.mark.parametrize("decades", [0, 4])
@pytest.mark.parametrize("shape", [(384, 384), (384, 1152), (384, 1536)])
def test_muon_at_the_default_precision_is_muon_in_float64(rng, shape, decades):
    """A stack of the published model's matrices, multiplied in TF32: what test_optimizer.py emulates."""
    stack = np.stack([hard_matrix(rng, *shape, decades) for _ in range(2)])
    for found, matrix in zip(jax.jit(optimizer.newton_schulz)(stack), stack, strict=True):
        assert furthest(found, newton_schulz(matrix.astype(np.float64))) < TENSOR_FLOAT


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


@pytest.mark.parametrize("scale", [1, 20])  # 20: logits too far apart for one pass
def test_loss_kernels_are_the_plain_loss(rng, one_device, scale):
    """Each target's loss, and gradients, against float32. Rounded are the logits' gradients, what they are multiplied
    with, and the results."""
    hidden = placed(scale * rng.standard_normal((2, 1000, 384)), jnp.bfloat16)
    table = jnp.asarray(rng.standard_normal((4096, 384)) / 5, jnp.bfloat16)
    targets = placed(rng.integers(-1, 4096, (2, 1000)), jnp.int32)

    @jax.jit
    def run(hidden, table):
        total = lambda hidden, table: loss.cross_entropy_sums(hidden, table, targets, 512)[0]  # noqa: E731
        nll_BT = loss.token_losses(hidden, table, targets, 512)[0]
        return nll_BT, *outcome(total, (hidden, table), jnp.ones(()))

    with jax.default_matmul_precision("highest"):
        found = run(hidden, table)
        wanted = run(hidden.astype(jnp.float32), table.astype(jnp.float32))
    off = errors(found, wanted)
    assert off[:2].max() < 1e-4 and off[2:].max() < roundings(6), off


@pytest.mark.parametrize(
    ("experts", "width", "hidden", "rows"), [(8, 384, 1536, 512), (8, 1536, 384, 512), (3, 64, 96, 16)]
)
def test_kernels_of_tiles_are_products_in_float32(rng, experts, width, hidden, rows):
    """Values and gradients of one product in bfloat16, rounded once. The last expert but one has no rows, and tiles are
    left over: neither's numbers are read."""
    sizes = jnp.asarray(rng.multinomial(100 * rows, np.ones(experts) / experts), jnp.int32)
    sizes = sizes.at[0].add(sizes[-2]).at[-2].set(0)
    owner = tiles.layout(sizes, 100 * rows, rows).owner_N
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((len(owner), rows, width), (experts, width, hidden), (len(owner), rows, hidden))
    x, w, dy = (jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, shapes, strict=True))
    assert tile_kernels.served(x, w)

    @jax.jit
    def run(x, w, dy, unread):
        x, dy = (jnp.where((owner < experts)[:, None, None], a, unread) for a in (x, dy))
        w = jnp.where((sizes > 0)[:, None, None], w, unread)
        return outcome(lambda x, w: tiles.multiply(x, w, owner), (x, w), dy)

    found, again = (run(x, w, dy, jnp.nan) for _ in range(2))
    with jax.default_matmul_precision("highest"):
        wanted = run(*(a.astype(jnp.float32) for a in (x, w, dy)), 0.0)
    assert {a.dtype for a in found} == {jnp.dtype(jnp.bfloat16)}
    assert errors(found, wanted).max() < roundings(2), errors(found, wanted)
    assert not errors(again, found).any()


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("flash", "bfloat16", roundings(12)), ("chunked", "bfloat16", roundings(12)), ("chunked", "float32", 1e-5)],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention_by_blocks_is_plain_attention(rng, one_device, dropout, masked, backend, dtype, tolerance):
    """At the head width of the published model, rows of no whole blocks, scores far apart, against float32."""
    q, k, v, cotangent = (jnp.asarray(x, dtype) for x in rng.standard_normal((4, 2, 300, 2, 48)))
    q *= 4
    words = [jnp.asarray(rng.integers(0, 2**32, (2, 2, 300), dtype=np.uint32)) for _ in range(2)] if dropout else None
    segments = jnp.asarray(np.cumsum(rng.random((2, 300)) < 0.03, axis=1), jnp.int32)
    segments = (segments, segments) if masked else None
    on_gpu = sharding.platform() == "gpu"  # else kernels are interpreted: to try the test itself
    kernel = functools.partial(flash.flash, interpret=not on_gpu) if backend == "flash" else chunked.chunked

    def by_blocks(q, k, v):
        attend = functools.partial(kernel, dropout=dropout)
        shard = jax.shard_map(attend, in_specs=P(), out_specs=P(), check_vma=on_gpu or backend != "flash")
        return shard(q, k, v, segments, words, jnp.int32(0))

    def plain(q, k, v):
        return plain_attention(q, k, v, segments, words, 0, dropout)

    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(lambda *arrays: outcome(plain, arrays, cotangent))(*(x.astype(jnp.float32) for x in (q, k, v)))
        found = jax.jit(lambda *arrays: outcome(by_blocks, arrays, cotangent))(q, k, v)
    assert {x.dtype for x in found} == {jnp.dtype(dtype)}
    assert errors(found, wanted).max() < tolerance, errors(found, wanted)
