"""Attention: every backend against plain softmax attention in float64, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import attention, chunked, sharding
from tests.small import placed, relative


def plain(q, k, v, segments=None):
    """Softmax attention in float64 on the host's plain arrays."""
    scores = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    allowed = np.tril(np.ones((q.shape[1], q.shape[1]), bool))[None, None]
    if segments is not None:
        allowed = allowed & (segments[:, None, :, None] == segments[:, None, None, :])
    scores = np.where(allowed, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), v)


def plain_gradients(q, k, v, segments, cotangent, epsilon=1e-6):
    """d <plain, cotangent> along one random direction of each input, by central differences in float64."""
    rng = np.random.default_rng(7)
    directions, slopes = [], []
    for i in range(3):
        direction = rng.standard_normal(q.shape)
        ends = []
        for sign in (1, -1):
            args = [q, k, v]
            args[i] = args[i] + sign * epsilon * direction
            ends.append(np.sum(plain(*args, segments) * cotangent))
        directions.append(direction)
        slopes.append((ends[0] - ends[1]) / (2 * epsilon))
    return directions, slopes


def documents(rng, rows, length):
    """Segment numbers that rise at random places."""
    return 1 + np.cumsum(rng.random((rows, length)) < 0.15, axis=1).astype(np.int32)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seq", [1, 4])
@pytest.mark.parametrize(
    ("backend", "length", "chunk"), [("xla", 24, 8), ("chunked", 24, 8), ("chunked", 20, 7), ("flash", 24, 8)]
)
def test_backend_equals_plain_attention(rng, backend, length, chunk, seq, masked):
    q, k, v, cotangent = rng.standard_normal((4, 2, length, 3, 8))
    segments = documents(rng, 2, length) if masked else None
    mesh = sharding.make_mesh({"data": 2, "expert": 1, "seq": seq})
    with jax.set_mesh(mesh):
        args = [placed(x, jnp.float32) for x in (q, k, v)]
        segments_BT = placed(segments) if masked else None

        @jax.jit
        def loss(q, k, v):
            out = attention.attend(q, k, v, backend=backend, chunk=chunk, segments_BT=segments_BT)
            return jnp.sum(out * jnp.asarray(cotangent, jnp.float32)), out

        (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*args)
    assert relative(out, plain(q, k, v, segments)) < 1e-6
    for direction, slope, grad in zip(*plain_gradients(q, k, v, segments, cotangent), grads, strict=True):
        assert np.sum(direction * np.asarray(grad)) == pytest.approx(slope, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize(("held", "size"), [(1, 1), (2, 2), (5, 3), (7, 6)])
def test_rows_at_once_are_rows_one_by_one(rng, one_device, monkeypatch, held, size):
    """On accelerators rows go in groups that a budget of scores holds; on CPU each by itself."""
    q, k, v, cotangent = (placed(x, jnp.float32) for x in rng.standard_normal((4, 2, 24, 3, 8)))
    segments_BT = placed(documents(rng, 2, 24))

    def outcome():
        run = lambda q, k, v: attention.attend(q, k, v, backend="chunked", chunk=8, segments_BT=segments_BT)  # noqa: E731
        out, vjp = jax.vjp(jax.jit(run), q, k, v)
        return out, vjp(cotangent)

    wanted = outcome()
    monkeypatch.setattr(chunked, "platform", lambda: "gpu")
    monkeypatch.setattr(chunked, "SCORES_BYTES", 4 * 8 * 8 * held + 5)
    assert chunked.rows_at_once(6, 8 * 8) == size
    for found, plain in zip(jax.tree.leaves(outcome()), jax.tree.leaves(wanted), strict=True):
        assert relative(found, plain) < 1e-6


def test_a_documents_neighbours_do_not_see_it(rng, one_device):
    q, k, v = (placed(x, jnp.float32) for x in rng.standard_normal((3, 1, 24, 2, 8)))
    segments = placed([[1] * 9 + [2] * 8 + [3] * 7])
    for backend in ("xla", "chunked"):

        def out(k, v, backend=backend):
            return attention.attend(q, k, v, backend=backend, chunk=8, segments_BT=segments)

        step = (np.asarray(segments) == 2)[..., None, None]
        other = out(*(placed(np.asarray(x) + step, jnp.float32) for x in (k, v)))
        changed = np.asarray(other != out(k, v)).any(axis=(0, 2, 3))
        assert changed[9:17].all() and not changed[:9].any() and not changed[17:].any()


def test_rotary_is_complex_rotation(rng):
    x = rng.standard_normal((2, 5, 3, 8))
    positions = rng.integers(0, 4096, (2, 5))
    angles = positions[..., None] * 10_000.0 ** (-np.arange(0, 8, 2) / 8)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, :, None]
    wanted = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    tables = attention.rotary_tables(jnp.asarray(positions), 8, 10_000.0)
    found = attention.rotate(attention.deinterleave(jnp.asarray(x, jnp.float32)), *tables)
    wanted = attention.deinterleave(wanted)
    assert relative(found, wanted) < 2e-4  # angles up to 4095 radians in float32
    near = attention.rotary_tables(jnp.asarray(positions % 8), 8, 10_000.0)
    angles = (positions % 8)[..., None] * 10_000.0 ** (-np.arange(0, 8, 2) / 8)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, :, None]
    wanted = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    found = attention.rotate(attention.deinterleave(jnp.asarray(x, jnp.float32)), *near)
    assert relative(found, attention.deinterleave(wanted)) < 1e-6


@pytest.mark.parametrize("backend", ["xla", "chunked"])
def test_dropout_keeps_the_mean_and_its_gradient_belongs_to_its_draw(rng, one_device, backend):
    q, k, v = (placed(x, jnp.float32) for x in rng.standard_normal((3, 1, 16, 2, 8)))

    @jax.jit
    def drop(v, key):
        return attention.attend(q, k, v, backend=backend, chunk=8, dropout=0.3, key=key)

    keys = jax.random.split(jax.random.key(3), 1500)
    mean = sum(np.asarray(drop(v, key)) for key in keys) / len(keys)
    kept = attention.attend(q, k, v, backend=backend, chunk=8)
    assert relative(mean, kept) < 0.05
    # Attention is linear in v for one draw: its derivative along v is the value itself.
    value, tangent = drop(v, keys[0]), jax.vjp(lambda v: drop(v, keys[0]), v)
    assert relative(value, kept) > 0.1
    direction = placed(rng.standard_normal(value.shape), jnp.float32)
    found = np.vdot(tangent[1](direction)[0], v)
    assert found == pytest.approx(np.vdot(direction, value), rel=1e-4)


def test_auto_never_chooses_a_kernel_that_cannot_do_what_is_asked():
    pick = attention.resolve_backend
    able = dict(dtype="bfloat16", head_dim=48, dropout=0.0, masked=False, seq=1)
    assert pick("auto", "gpu", **able) == "cudnn"
    for change in (dict(dropout=0.1), dict(masked=True), dict(seq=2), dict(head_dim=20)):
        assert pick("auto", "gpu", **able | change) == "flash"
    for change in (dict(dtype="float32"), dict(head_dim=256)):
        assert pick("auto", "gpu", **able | change) == "chunked"
    assert pick("auto", "cpu", **able) == "chunked"
    assert pick("xla", "gpu", **able) == "xla"
