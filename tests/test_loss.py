"""Chunked cross-entropy against the plain one with whole logits: sums, counts and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import loss, loss_kernels, sharding
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


@pytest.mark.parametrize("chunk", [4, 5, 1000])
@pytest.mark.parametrize(("data", "seq"), [(1, 1), (2, 4)])
def test_chunked_loss_equals_plain_loss(rng, chunk, data, seq):
    hidden, table = rng.standard_normal((2, 12, 8)), rng.standard_normal((19, 8))
    targets = rng.integers(-1, 19, (2, 12))
    want_loss, want_right, want_count, want_nll, want_rights = plain(hidden, table, targets)
    mesh = sharding.make_mesh({"data": data, "expert": 1, "seq": seq})
    with jax.set_mesh(mesh):
        args = placed(hidden, jnp.float32), jnp.asarray(table, jnp.float32)
        targets_BT = placed(targets, jnp.int32)
        total, right, count = loss.cross_entropy_sums(*args, targets_BT, chunk)
        nll, rights = loss.token_losses(*args, targets_BT, chunk)

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
    assert relative(grads[0], d_logits @ table) < 1e-5
    assert relative(grads[1], np.einsum("btv,btd->vd", d_logits, hidden)) < 1e-5


def test_no_array_of_all_logits_is_compiled(rng, one_device):
    hidden, table = placed(rng.standard_normal((4, 32, 8)), jnp.float32), jnp.ones((50, 8))
    targets = placed(rng.integers(0, 50, (4, 32)), jnp.int32)

    def total(hidden, table):
        return loss.cross_entropy_sums(hidden, table, targets, 16)[0]

    text = jax.jit(jax.grad(total, argnums=(0, 1))).lower(hidden, table).compile().as_text()
    assert "[16,50]" in text  # a chunk's logits
    for whole in ("[128,50]", "[4,32,50]", "[8,16,50]"):
        assert whole not in text


def test_targets_that_are_not_counted_have_no_gradient(rng, one_device):
    hidden, table = placed(rng.standard_normal((1, 6, 4)), jnp.float32), jnp.asarray(rng.standard_normal((7, 4)))
    targets = placed([[1, -1, 3, -1, -1, 6]], jnp.int32)
    grad = jax.grad(lambda h: loss.cross_entropy_sums(h, table, targets, 4)[0])(hidden)
    assert (np.abs(np.asarray(grad)).sum(-1) > 0).tolist() == [[True, False, True, False, False, True]]


@pytest.mark.parametrize("scale", [1.0, 30.0])  # 30: logits too far apart for one pass
@pytest.mark.parametrize("tokens", [100, 384])
def test_kernels_equal_the_plain_loss(rng, one_device, monkeypatch, tokens, scale):
    hidden = jnp.asarray(scale * rng.standard_normal((tokens, 64)), jnp.bfloat16)
    table = jnp.asarray(0.2 * rng.standard_normal((256, 64)), jnp.bfloat16)
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    targets = np.where(rng.random(tokens) < 0.3, logits.argmax(-1), rng.integers(-1, 256, tokens)).astype(np.int32)

    def outcome():
        def run(hidden, table, targets):
            def total(hidden, table):
                return loss._loss_sums(hidden, table, targets, 200)

            return total(hidden, table), jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, table)

        # Without its checks: the interpreter of kernels does not know the types that vary from shard to shard.
        run = jax.shard_map(run, in_specs=(jax.P(),) * 3, out_specs=jax.P(), check_vma=False)
        return jax.jit(run)(hidden, table, targets)

    (want, want_right), (_, want_grads) = outcome()
    monkeypatch.setattr(loss_kernels, "served", lambda x, table: True)
    alone, (beside, grads) = outcome()
    for value, right in (alone, beside):
        assert float(value) == pytest.approx(float(want), rel=1e-5)
        assert int(right) == int(want_right) > 0
    for found, wanted in zip(grads, want_grads, strict=True):
        assert relative(found.astype(jnp.float32), wanted.astype(jnp.float32)) < 5e-3  # of bfloat16


def test_kernels_are_for_whole_blocks_in_bfloat16_on_a_gpu(monkeypatch):
    def served(V, D, dtype=jnp.bfloat16, platform="gpu"):
        monkeypatch.setattr(sharding, "platform", lambda: platform)
        return loss_kernels.served(jnp.zeros((8, D), dtype), jnp.zeros((V, D), dtype))

    assert served(4096, 384) and served(256, 64)
    assert not (served(61, 64) or served(256, 32) or served(256, 64, jnp.float32) or served(256, 64, platform="cpu"))
