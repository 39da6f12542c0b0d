"""One training step: a pure function of (state, batch). Losses and gradients are sums until they are divided once."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from research import loss, sharding
from research.model import MoETransformer, gather_tables, output_table


@flax.struct.dataclass
class TrainState:
    """All that training changes. key: uint32 data of the run's random key, from which each step folds its own."""

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


def init_state(
    model: MoETransformer, optimizer: optax.GradientTransformation, seed: int, mesh_shape: tuple[int, int, int]
) -> TrainState:
    """Call under jit and a mesh: every leaf is born with its sharding."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    data, _, seq = mesh_shape
    tokens_BT = jnp.zeros((data, seq), jnp.int32, out_sharding=sharding.TOKENS)
    params = model.init(init_key, tokens_BT)["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=jax.random.key_data(run_key),
    )


def objective(
    params: Any, batch: dict[str, jax.Array], model: MoETransformer, key: jax.Array, scale: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(`scale` * (sum of cross-entropy + targets * balance_weight * sum of the layers' balance losses), sums).

    batch: inputs, targets [B, T] int32 (a target of -1 is not counted), optionally segments and positions [B, T].
    """
    dropout_key, router_key = jax.random.split(key)
    params = gather_tables(params, model.config.dtype)
    hidden_BTD, router = model.apply(
        {"params": params},
        batch["inputs"],
        segments_BT=batch.get("segments"),
        positions_BT=batch.get("positions"),
        train=True,
        rngs={"dropout": dropout_key, "router": router_key},
    )
    table_VD = output_table(params, hidden_BTD.dtype)
    sum_loss, correct, count = loss.cross_entropy_sums(hidden_BTD, table_VD, batch["targets"], model.config.loss_chunk)
    balance = router["balance"].sum()
    total = sum_loss + count * model.config.balance_weight * balance
    weighted_router = jax.tree.map(lambda x: x * count, router)
    sums = dict(loss=sum_loss, balance_loss=balance * count, correct=correct, count=count, router=weighted_router)
    return total * scale, sums


def accumulate(
    params: Any, batch: dict[str, jax.Array], model: MoETransformer, key: jax.Array
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradients of the mean objective, and sums, over microbatches [A, B, T], weighted by their targets.

    Devices wait for one another once: their parts of the gradients are added up after the last microbatch.
    """
    held = sharding.hold(params)
    scale = 1.0 / jnp.maximum(jnp.sum(batch["targets"] >= 0), 1).astype(jnp.float32)
    grad = jax.grad(objective, has_aux=True)
    microbatches = batch["inputs"].shape[0]
    if microbatches == 1:
        only = jax.tree.map(lambda x: jnp.squeeze(x, 0), batch)
        grads, sums = grad(held, only, model, jax.random.fold_in(key, 0), scale)
        return sharding.add_up(grads, params), sums

    def one(total: Any, scanned: tuple) -> tuple[Any, None]:
        index, microbatch = scanned
        found = grad(held, microbatch, model, jax.random.fold_in(key, index), scale)
        return jax.tree.map(jnp.add, total, found), None

    shapes = jax.eval_shape(lambda b: grad(held, b, model, key, scale), jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding), shapes)
    grads, sums = jax.lax.scan(one, zeros, (jnp.arange(microbatches), batch))[0]
    return sharding.add_up(grads, params), sums


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    model: MoETransformer,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """(state after one update, metrics). batch: [A, B, T] arrays, A microbatches, as `objective` takes them.

    metrics: loss (cross-entropy, nats a target), balance_loss (sum over layers, unweighted), accuracy, count, grad_norm
    (before clipping), learning_rate, and per layer load [L, E], probability [L, E], max_violation [L], entropy [L].
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    grads, sums = accumulate(state.params, batch, model, key)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = dict(
        loss=sums["loss"] / sums["count"],
        balance_loss=sums["balance_loss"] / sums["count"],
        accuracy=sums["correct"] / sums["count"],
        count=sums["count"],
        grad_norm=optax.tree.norm(grads),
        learning_rate=schedule(state.step),
        router=jax.tree.map(lambda x: x / sums["count"], sums["router"]),
    )
    state = state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)
    return state, metrics


def make_train_step(model: MoETransformer, optimizer: optax.GradientTransformation, schedule: optax.Schedule) -> Any:
    """train_step jitted, its state donated."""
    step = functools.partial(train_step, model=model, optimizer=optimizer, schedule=schedule)
    return jax.jit(step, donate_argnums=0)
