"""The training step: one outcome whatever the mesh or the accumulation; what is compiled; what is counted."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import long_seq
from research import optimizer, sharding, step
from research.model import ModelConfig, MoETransformer
from tests import programs
from tests.small import bigger, model_config, random_batch, relative, small_config


@functools.cache
def gradients(data, seq, fsdp, microbatches, balance=0.01, noise=0.1, experts="auto"):
    """(gradients, sums, collectives) of the objective on one fixed ragged batch."""
    mesh = sharding.make_mesh({"data": data, "expert": 1, "seq": seq})
    with jax.set_mesh(mesh):
        model = MoETransformer(model_config(fsdp=fsdp, router_noise=noise, balance_weight=balance, moe=experts))
        rng = np.random.default_rng(5)
        init = jax.jit(
            lambda: model.init(jax.random.key(0), jnp.zeros((data, seq), jnp.int32, out_sharding=sharding.TOKENS))
        )
        born = init()["params"]
        params = jax.tree.map(lambda x, at: jax.device_put(x, at.sharding), bigger(born, rng), born)
        batch = random_batch(rng, 8, 32)
        cut = {k: x.reshape(microbatches, -1, 32) for k, x in batch.items()}
        run = (
            jax.jit(step.accumulate, static_argnums=2)
            .lower(params, sharding.put_batch(cut, mesh), model, jax.random.key(1))
            .compile()
        )
        grads, sums = run(params, sharding.put_batch(cut, mesh), jax.random.key(1))
    return jax.tree.map(np.asarray, grads), jax.tree.map(np.asarray, sums), run.as_text()


@pytest.mark.parametrize(
    ("data", "seq", "fsdp", "experts"),
    [(8, 1, False, "auto"), (2, 4, False, "auto"), (1, 8, False, "auto"), (2, 4, True, "auto"), (8, 1, True, "auto"),
     (2, 4, True, "tiles")],
)  # fmt: skip
def test_loss_and_gradients_do_not_depend_on_the_mesh(data, seq, fsdp, experts):
    wanted_grads, wanted_sums, _ = gradients(1, 1, False, 1)
    grads, sums, _ = gradients(data, seq, fsdp, 1, experts=experts)
    assert sums["loss"] == pytest.approx(wanted_sums["loss"], rel=1e-5)
    assert sums["correct"] == wanted_sums["correct"] and sums["count"] == wanted_sums["count"]
    np.testing.assert_allclose(sums["router"]["load"], wanted_sums["router"]["load"], rtol=1e-5)
    for (path, found), wanted in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(wanted_grads), strict=True
    ):
        assert relative(found, wanted) < 1e-5, path


@pytest.mark.parametrize(
    ("data", "seq", "fsdp", "microbatches"), [(1, 1, False, 4), (1, 1, False, 8), (2, 4, False, 4), (2, 4, True, 4)]
)
def test_accumulation_is_the_full_batch_on_ragged_targets(data, seq, fsdp, microbatches):
    """Weighted by targets; without balance loss, which is nonlinear in the microbatch, and without noise."""
    wanted_grads, wanted_sums, _ = gradients(1, 1, False, 1, balance=0.0, noise=0.0)
    grads, sums, _ = gradients(data, seq, fsdp, microbatches, balance=0.0, noise=0.0)
    assert sums["loss"] == pytest.approx(wanted_sums["loss"], rel=1e-5)
    assert sums["count"] == wanted_sums["count"]
    for found, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        assert relative(found, wanted) < 1e-5


def test_data_parallel_steps_only_reduce():
    """Rows divided: no collective moves activations or weights. Positions divided: only K and V are gathered."""
    _, _, rows = gradients(8, 1, False, 1)
    assert "all-reduce" in rows
    for collective in ("all-gather(", "all-to-all(", "collective-permute("):
        assert collective not in rows
    _, _, positions = gradients(1, 8, False, 1)
    assert "all-gather(" in positions and "all-to-all(" not in positions


def make_step(mesh_shape=(1, 1), steps=20, **changes):
    config = small_config(**changes)
    mesh = sharding.make_mesh({"data": mesh_shape[0], "expert": 1, "seq": mesh_shape[1]})
    model = MoETransformer(model_config(**changes))
    tx = optimizer.make_optimizer(config.optimizer, steps)
    schedule = optimizer.make_schedule(config.optimizer, config.optimizer.learning_rate, steps)
    init = functools.partial(step.init_state, model, tx, 0, (mesh_shape[0], 1, mesh_shape[1]))
    return mesh, init, step.make_train_step(model, tx, schedule)


def test_a_batch_is_learnt_and_the_state_is_donated(rng):
    mesh, init, run = make_step()
    with jax.set_mesh(mesh):
        state = jax.jit(init)()
        batch = sharding.put_batch({k: x[None] for k, x in random_batch(rng, 4, 16).items()}, mesh)
        losses = []
        for _ in range(20):
            before = state
            state, metrics = run(state, batch)
            losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(61), abs=0.3)
    assert losses[-1] < 0.7 * losses[0]
    assert int(state.step) == 20
    assert all(x.is_deleted() for x in jax.tree.leaves(before.params))
    assert run._cache_size() == 1


def test_metrics_are_of_the_batch_before_the_update(rng):
    mesh, init, run = make_step()
    with jax.set_mesh(mesh):
        state = jax.jit(init)()
        host = random_batch(rng, 4, 16)
        batch = sharding.put_batch({k: x[None] for k, x in host.items()}, mesh)
        _, metrics = run(state, batch)
    assert int(metrics["count"]) == (host["targets"] >= 0).sum()
    assert metrics["router"]["load"].shape == (2, 4)
    np.testing.assert_allclose(metrics["router"]["load"].sum(-1), 1, rtol=1e-5)
    assert float(metrics["balance_loss"]) == pytest.approx(float(metrics["router"]["balance"].sum()), rel=1e-5)


ROWS, LENGTH, HEADS, VOCAB = 4, 128, 4, 521
ALL_LOGITS, ALL_SCORES = ROWS * LENGTH * VOCAB, ROWS * HEADS * LENGTH**2


def compiled(**changes):
    """The text of a step of ROWS x LENGTH."""
    mesh, init, run = make_step(vocab_size=VOCAB, num_heads=HEADS, **changes)
    with jax.set_mesh(mesh):
        tokens = jax.ShapeDtypeStruct(
            (1, ROWS, LENGTH), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P(None, *sharding.TOKENS))
        )
        return run.lower(jax.eval_shape(init), dict(inputs=tokens, targets=tokens)).compile().as_text()


def test_no_array_of_all_logits_or_all_scores_in_a_step():
    """Nothing in the compiled step has a quarter of the elements of [B, T, V] or of [B, H, T, T], in whatever shape."""
    text = compiled(attention="chunked")
    assert (16, VOCAB) in programs.shapes(text)  # one chunk's logits
    assert programs.largest(text)[0] < min(ALL_LOGITS, ALL_SCORES) / 4, programs.largest(text)


def test_all_logits_and_all_scores_are_seen_where_they_are():
    """With attention that keeps its scores, and one chunk of all tokens."""
    found = programs.shapes(compiled(attention="xla", loss_chunk=ROWS * LENGTH))
    assert any(math.prod(shape) >= ALL_LOGITS for shape in found if VOCAB in shape)
    assert any(math.prod(shape) >= ALL_SCORES for shape in found if VOCAB not in shape)


@pytest.mark.parametrize("activation", ["silu", "swiglu"])
def test_six_arrays_of_the_stream_are_kept_of_each_layer(rng, activation):
    """On CPU: the stream before attention and before the experts; queries, keys, values and their mixture."""
    mesh, init, run = make_step(activation=activation)
    with jax.set_mesh(mesh):
        batch = sharding.put_batch({k: x[None] for k, x in random_batch(rng, 4, 32).items()}, mesh)
        state = jax.jit(init)()
        text = run.lower(state, batch).compile().as_text()
    weights = {leaf.shape for leaf in jax.tree.leaves(state.params)}
    for loop in re.findall(r"= \((.*)\) while\(.*known_trip_count\D*2\b", text):
        shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\d+\[([\d,]+)\]", loop)]
        kept = [
            shape for shape in shapes if shape[0] == 2 and shape not in weights and np.prod(shape) >= 2 * 4 * 32 * 32
        ]
        if kept:
            break
    assert sorted(kept) == 4 * [(2, 4, 32, 4, 8)] + 2 * [(2, 4, 32, 32)]


LEAVES = re.compile(r"\b(infeed|outfeed|send|recv)\(|python\w*callback")


def test_a_step_never_leaves_the_device(rng):
    mesh, init, run = make_step()
    with jax.set_mesh(mesh):
        batch = sharding.put_batch({k: x[None] for k, x in random_batch(rng, 4, 16).items()}, mesh)
        text = run.lower(jax.jit(init)(), batch).compile().as_text()
    seen = jax.jit(lambda x: (jax.debug.callback(print, x), x)[1]).lower(1.0).compile().as_text()
    assert LEAVES.search(seen)  # as it would be written
    assert not LEAVES.search(text)


def test_fifty_steps_are_compiled_once(rng):
    mesh, init, run = make_step(steps=50)
    with jax.set_mesh(mesh):
        state = jax.jit(init)()
        for _ in range(50):
            batch = sharding.put_batch({k: x[None] for k, x in random_batch(rng, 4, 16).items()}, mesh)
            state, _ = run(state, batch)
    assert run._cache_size() == 1 and int(state.step) == 50


def test_steps_draw_different_noise_and_the_same_seed_the_same():
    mesh, init, run = make_step(router_noise=1.0)
    batch = random_batch(np.random.default_rng(0), 4, 16)
    with jax.set_mesh(mesh):
        put = sharding.put_batch({k: x[None] for k, x in batch.items()}, mesh)

        def two():
            state = jax.jit(init)()
            state, first = run(state, put)
            _, second = run(state.replace(params=jax.jit(init)().params), put)
            return float(first["loss"]), float(second["loss"])

        first, second = two(), two()
    assert first == second
    assert first[0] != first[1]


ATTENTION_KERNELS = {"flash_forward", "flash_backward_keys", "flash_backward_queries"}
TILE_KERNELS, LOSS_KERNELS = {"_product_kernel", "_gradient_kernel"}, {"_exps_kernel", "_exps_again_kernel"}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("kind", "platform", "kernels"),
    [("NVIDIA H200", "cuda", ATTENTION_KERNELS | TILE_KERNELS | LOSS_KERNELS), ("TPU v5e", "tpu", set())],
)
def test_the_step_of_an_accelerator_is_lowered_without_one(kind, platform, kernels, dropout):
    """The published model as an accelerator runs it, forward and backward: bfloat16, its own experts, and all of our
    kernels; no array as large as [B, T, V] or [B, H, T, T]."""
    config = long_seq.get_config("published")
    config.model.dropout = dropout
    if platform == "cuda":  # without dropout it is cuDNN's, which is lowered only where cuDNN is
        config.model.attention = "flash"
    mesh = programs.absent(kind, platform)
    with jax.sharding.use_abstract_mesh(mesh):
        model = MoETransformer(ModelConfig(**config.model, fsdp=False))
        rule = optimizer.make_optimizer(config.optimizer, 100)
        run = step.make_train_step(model, rule, optimizer.make_schedule(config.optimizer, 0.03, 100))
        tokens = jax.ShapeDtypeStruct(
            (1, config.batch_size, config.seq_len), jnp.int32,
            sharding=jax.NamedSharding(mesh, jax.P(None, *sharding.TOKENS)),
        )  # fmt: skip
        state = jax.eval_shape(lambda: step.init_state(model, rule, 0, (1, 1, 1)))
        lowered = run.trace(state, dict(inputs=tokens, targets=tokens)).lower(lowering_platforms=(platform,)).as_text()
    assert programs.kernels(lowered) == kernels
    assert ("ragged_dot" in lowered) == (platform == "tpu") and "bf16" in lowered
    tokens, heads = config.batch_size * config.seq_len, config.model.num_heads
    assert programs.largest(lowered)[0] < tokens * min(config.model.vocab_size, heads * config.seq_len)
