"""Chunked cross-entropy against the plain one with whole logits: sums, counts and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import loss, loss_kernels, sharding
from tests import programs
from tests.precision import errors, roundings
from tests.small import placed, relative


def plain(hidden, table, targets):
    """(sum of -log p, right, count), -log p of each, from whole logits in float64."""
    logits = hidden @ table.T
    logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logp -= logits.max(-1, keepdims=True)
    counted = targets >= 0
    picked = np.take_along_axis(logp, np.maximum(targets, 0)[..., None], -1)[..., 0]
    nll = np.where(counted, -picked, 0)
    right = counted & (logits.argmax(-1) == targets)
    return nll.sum(), right.sum(), counted.sum(), nll, right


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, roundings(6))], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("chunk", [4, 5, 1000])
@pytest.mark.parametrize(("data", "seq"), [(1, 1), (2, 4)])
def test_chunked_loss_equals_plain_loss(rng, chunk, data, seq, dtype, tolerance):
    """In float64. Of bfloat16 the gradients are rounded, not the loss, nor their sums over chunks."""
    hidden, table = (
        np.asarray(rng.standard_normal(shape), dtype).astype(np.float64) for shape in ((2, 96, 8), (19, 8))
    )
    targets = rng.integers(-1, 19, (2, 96))
    want_loss, want_right, want_count, want_nll, want_rights = plain(hidden, table, targets)
    mesh = sharding.make_mesh({"data": data, "expert": 1, "seq": seq})
    with jax.set_mesh(mesh):
        args = placed(hidden, dtype), jnp.asarray(table, dtype)
        targets_BT = placed(targets, jnp.int32)
        both = jax.jit(lambda *args: [f(*args, chunk) for f in (loss.cross_entropy_sums, loss.token_losses)])
        (total, right, count), (nll, rights) = both(*args, targets_BT)

        def scaled(hidden, table):
            return 3.0 * loss.cross_entropy_sums(hidden, table, targets_BT, chunk)[0]

        grads = jax.jit(jax.grad(scaled, argnums=(0, 1)))(*args)
    assert float(total) == pytest.approx(want_loss, rel=1e-5)
    assert (int(right), int(count)) == (want_right, want_count)
    np.testing.assert_allclose(nll, want_nll, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(rights, want_rights)

    logits = hidden @ table.T
    share = np.exp(logits - logits.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    d_logits = (share - np.eye(19)[targets]) * (targets >= 0)[..., None] * 3.0
    assert {grad.dtype for grad in grads} == {jnp.dtype(dtype)}
    assert relative(grads[0], d_logits @ table) < tolerance
    assert relative(grads[1], np.einsum("btv,btd->vd", d_logits, hidden)) < tolerance


def test_no_array_of_all_logits_is_compiled(rng, one_device):
    hidden, table = placed(rng.standard_normal((4, 32, 8)), jnp.float32), jnp.ones((50, 8))
    targets = placed(rng.integers(0, 50, (4, 32)), jnp.int32)

    def total(hidden, table):
        return loss.cross_entropy_sums(hidden, table, targets, 16)[0]

    text = jax.jit(jax.grad(total, argnums=(0, 1))).lower(hidden, table).compile().as_text()
    assert (16, 50) in programs.shapes(text)  # a chunk's logits
    assert programs.largest(text)[0] < 4 * 32 * 50 / 4, programs.largest(text)


def test_targets_that_are_not_counted_have_no_gradient(rng, one_device):
    hidden, table = placed(rng.standard_normal((1, 6, 4)), jnp.float32), jnp.asarray(rng.standard_normal((7, 4)))
    targets = placed([[1, -1, 3, -1, -1, 6]], jnp.int32)
    grad = jax.grad(lambda h: loss.cross_entropy_sums(h, table, targets, 4)[0])(hidden)
    assert (np.abs(np.asarray(grad)).sum(-1) > 0).tolist() == [[True, False, True, False, False, True]]


@pytest.mark.parametrize("scale", [1.0, 30.0])  # 30: logits too far apart for one pass
@pytest.mark.parametrize("tokens", [100, 384])
def test_kernels_equal_the_plain_loss(rng, one_device, monkeypatch, tokens, scale):
    """In float32. Rounded are the logits' gradients, what they are multiplied with, and the results."""
    hidden = jnp.asarray(scale * rng.standard_normal((tokens, 64)), jnp.bfloat16)
    table = jnp.asarray(0.2 * rng.standard_normal((256, 64)), jnp.bfloat16)
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    targets = np.where(rng.random(tokens) < 0.3, logits.argmax(-1), rng.integers(-1, 256, tokens)).astype(np.int32)

    def outcome(*arrays):
        def run(hidden, table, targets):
            def total(hidden, table):
                return loss._loss_sums(hidden, table, targets, 200)

            return total(hidden, table), jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, table)

        # Without its checks: the interpreter of kernels does not know the types that vary from shard to shard.
        run = jax.shard_map(run, in_specs=(jax.P(),) * 3, out_specs=jax.P(), check_vma=False)
        return jax.jit(run)(*arrays, targets)

    (want, want_right), (_, want_grads) = outcome(hidden.astype(jnp.float32), table.astype(jnp.float32))
    monkeypatch.setattr(loss_kernels, "served", lambda x, table: True)
    alone, (beside, grads) = outcome(hidden, table)
    for value, right in (alone, beside):
        assert float(value) == pytest.approx(float(want), rel=1e-5)
        assert int(right) == int(want_right) > 0
    assert {grad.dtype for grad in grads} == {jnp.dtype(jnp.bfloat16)}
    assert errors(grads, want_grads).max() < roundings(6), errors(grads, want_grads)


def test_an_evaluation_on_a_gpu_writes_no_logits_at_all():
    """Lowered for one that is not here, at the published size: not even a chunk's, a quarter of them or more."""
    mesh = programs.absent("NVIDIA H200", "cuda")
    chunk, vocab, width = 4096, 49_152, 384
    with jax.sharding.use_abstract_mesh(mesh):
        hidden, table, targets = (
            jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))
            for shape, dtype, spec in (
                ((6, 4096, width), jnp.bfloat16, sharding.HIDDEN),
                ((vocab, width), jnp.bfloat16, jax.P()),
                ((6, 4096), jnp.int32, sharding.TOKENS),
            )
        )
        traced = jax.jit(loss.token_losses, static_argnums=3).trace(hidden, table, targets, chunk)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert programs.kernels(text) == {"_scores_kernel"}
    assert programs.largest(text)[0] < chunk * vocab / 4, programs.largest(text)


def test_kernels_are_for_whole_blocks_in_bfloat16_on_a_gpu(monkeypatch):
    def served(V, D, dtype=jnp.bfloat16, platform="gpu"):
        monkeypatch.setattr(sharding, "platform", lambda: platform)
        return loss_kernels.served(jnp.zeros((8, D), dtype), jnp.zeros((V, D), dtype))

    assert served(4096, 384) and served(256, 64)
    assert not (served(61, 64) or served(256, 32) or served(256, 64, jnp.float32) or served(256, 64, platform="cpu"))
