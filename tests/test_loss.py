"""Chunked cross-entropy against the plain one with whole logits: sums, counts and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import loss, sharding
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
