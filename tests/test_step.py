"""The training step: one outcome whatever the mesh or the accumulation; what is compiled; what is counted."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import balanced
from research import optimizer, sharding, step
from research.model import ModelConfig, MoETransformer
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


def test_no_array_of_all_logits_or_all_scores_in_a_step(rng):
    """B=4, T=32, V=61, H=4: neither [B, T, V] nor [B, H, T, T] in any shape is in the compiled step."""
    mesh, init, run = make_step(attention="chunked")
    with jax.set_mesh(mesh):
        batch = {k: jax.ShapeDtypeStruct((1, 4, 32), jnp.int32) for k in ("inputs", "targets")}
        real = jax.jit(init)()
        put = sharding.put_batch({k: np.zeros(x.shape, np.int32) for k, x in batch.items()}, mesh)
        text = run.lower(real, put).compile().as_text()
    for shape in ("[4,32,61]", "[128,61]", "[1,4,32,61]", "[4,4,32,32]", "[16,32,32]"):
        assert shape not in text, shape
    assert "[16,61]" in text  # one chunk's logits


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


@pytest.mark.parametrize(("platform", "experts"), [("cuda", "tiles"), ("tpu", "ragged")])
def test_the_step_of_an_accelerator_is_lowered_without_one(platform, experts, one_device):
    """The published model as an accelerator runs it: bfloat16, its experts, dropout; no [B, T, V] logits."""
    config = balanced.get_config("published")
    config.model.update(dict(moe=experts, attention="chunked", num_layers=2))
    model = MoETransformer(ModelConfig(**config.model, fsdp=False))
    rule = optimizer.make_optimizer(config.optimizer, 100)
    run = step.make_train_step(model, rule, optimizer.make_schedule(config.optimizer, 0.03, 100))
    tokens = jax.ShapeDtypeStruct(
        (1, config.batch_size, config.seq_len), jnp.int32,
        sharding=jax.NamedSharding(one_device, jax.P(None, *sharding.TOKENS)),
    )  # fmt: skip
    state = jax.eval_shape(lambda: step.init_state(model, rule, 0, (1, 1, 1)))
    lowered = run.trace(state, dict(inputs=tokens, targets=tokens)).lower(lowering_platforms=(platform,)).as_text()
    assert ("ragged_dot" in lowered) == (experts == "ragged") and "bf16" in lowered
    assert f"{config.batch_size}x{config.seq_len}x{config.model.vocab_size}x" not in lowered
