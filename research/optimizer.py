"""Muon for the matrices, AdamW for the rest, and schedules as a share of the run.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): the momentum of each matrix, made orthogonal by five
Newton-Schulz steps. Each expert's matrix of each layer is one matrix; the fused QKV projection is one matrix.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from research.sharding import AXES

# Whether a parameter's trailing axes are a matrix's inputs or outputs; axes before them (layers, experts) are a stack.
# A parameter that is not named here (the embedding, the norms, a fork's own) is AdamW's.
MATRICES = {
    "qkv": "iooo",  # [L, D, (3, H, K)]
    "attention_out": "iio",  # [L, (H, K), D]
    "router": "io",  # [L, D, E]
    "up": "io",  # [L, E, D, F]
    "gate": "io",
    "down": "oi",  # [L, E, D, F]
}
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_MAPS = (3, 2)  # between visits to the matrix itself


def make_schedule(config: Any, peak: float, num_steps: int) -> optax.Schedule:
    """step (from 0) -> learning rate: linear warm-up that reaches `peak` after warmup_fraction of the steps, then
    constant, cosine, or wsd (stable, then linear over the last decay_fraction)."""
    warmup = max(1, round(config.warmup_fraction * num_steps))
    rest = max(1, num_steps - warmup)
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    elif config.schedule == "wsd":
        decay = max(1, round(config.decay_fraction * num_steps))
        after = optax.linear_schedule(peak, peak * config.final_fraction, decay, max(0, rest - decay))
    else:
        raise ValueError(f"schedule {config.schedule!r}: choose constant, cosine or wsd")
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, warmup - 1 or 1), after], [warmup])


def make_optimizer(config: Any, num_steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then the optimiser that `config` (config.optimizer) names."""
    c = config

    def adamw(peak: float) -> optax.GradientTransformation:
        return optax.adamw(make_schedule(c, peak, num_steps), c.beta1, c.beta2, c.epsilon, weight_decay=c.weight_decay)

    if c.name == "adamw":
        update = adamw(c.learning_rate)
    elif c.name == "muon":
        muon = optax.chain(
            scale_by_muon(c.momentum),
            optax.add_decayed_weights(c.muon_weight_decay),
            optax.scale_by_learning_rate(make_schedule(c, c.learning_rate, num_steps)),
        )
        update = optax.partition({"muon": muon, "adamw": adamw(c.adamw_learning_rate)}, label_parameters)
    else:
        raise ValueError(f"optimizer {c.name!r}: choose muon or adamw")
    return optax.chain(clip_by_global_norm(c.clip_norm), update) if c.clip_norm else update


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """Gradients of a norm of `largest` at most. Optax's divides each number by the norm; a product with one number is
    so cheap that XLA joins it to what comes after, and no clipped gradients are written."""

    def clip(grads: Any, _: Any = None) -> Any:
        scale = jnp.minimum(1, largest / optax.global_norm(grads))
        return jax.tree.map(lambda g: g * scale, grads)

    return optax.stateless(clip)


def label_parameters(params: Any) -> Any:
    """'muon' for the parameters in MATRICES, 'adamw' for all others, by the parameter's own name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if path[-1].key in MATRICES else "adamw", params)


class MuonState(NamedTuple):
    momentum: Any


def scale_by_muon(beta: float) -> optax.GradientTransformation:
    """Orthogonalised Nesterov momentum of each matrix, times sqrt(max(1, outputs / inputs)).

    momentum <- beta momentum + (1 - beta) g, without bias correction (the direction is orthogonalised, its scale is
    lost).
    """

    def init(params: Any) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, state.momentum, grads)
        ahead = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, momentum, grads)
        updates = jax.tree_util.tree_map_with_path(lambda path, x: orthogonalize(x, MATRICES[path[-1].key]), ahead)
        return updates, MuonState(momentum)

    return optax.GradientTransformation(init, update)


def orthogonalize(x: jax.Array, axes: str) -> jax.Array:
    """Each matrix of a stack made orthogonal and scaled by sqrt(max(1, outputs / inputs)); axes as in MATRICES.

    On a mesh the matrices are made whole and the stack is divided over as many devices as divide it.
    """
    spec = jax.typeof(x).sharding.spec
    stack, rows, cols = _stack(x.shape, axes)
    # Gathered whole, then cut along the stack: steps that the partitioner has a collective for.
    matrices = jax.reshard(x, P()).reshape(stack, rows, cols)
    matrices = jax.reshard(matrices, P(_dividing_axes(matrices.shape[0]), None, None))
    updates = newton_schulz(matrices) * math.sqrt(max(1, cols / rows if axes[0] == "i" else rows / cols))
    return jax.reshard(jax.reshard(updates, P()).reshape(x.shape), spec)


def _stack(shape: tuple[int, ...], axes: str) -> tuple[int, int, int]:
    """(number of matrices, rows, columns) of a parameter."""
    stacked, first = len(shape) - len(axes), axes.count(axes[0])
    return math.prod(shape[:stacked]), math.prod(shape[stacked : stacked + first]), math.prod(shape[stacked + first :])


def _dividing_axes(length: int) -> tuple[str, ...] | None:
    """The mesh axes over which an axis of this length can be divided evenly."""
    sizes, chosen = jax.sharding.get_abstract_mesh().shape, []
    for axis in AXES:
        if length % sizes[axis] == 0:
            chosen.append(axis)
            length //= sizes[axis]
    return tuple(chosen) or None


def newton_schulz_share(params: Any) -> float:
    """The share of all orthogonalisation that each device of the mesh in use does: 1 / devices where they divide it."""
    whole = own = 0.0
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key in MATRICES:
            stack, rows, cols = _stack(x.shape, MATRICES[path[-1].key])
            small, large = sorted((rows, cols))
            cost = stack * small * small * (2 * large + 7 * small)  # products: see newton_schulz
            axes = _dividing_axes(stack) or ()
            whole += cost
            own += cost / math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)
    return own / whole


def newton_schulz(x_SRC: jax.Array) -> jax.Array:
    """About U V^T of the singular value decomposition of each matrix of a stack [S, R, C]: five times the quintic map
    X <- P(X X^T) X with P(A) = a I + b A + c A^2, after which singular values lie within about 0.7 and 1.2.

    Between visits to X only its Gram matrix is mapped (A <- P A P, for all of them commute), a square of the smaller
    side: at C = 4 R that is two thirds of the work. X is visited after three maps: the squares lose small singular
    values, which five maps in a row would show in float32 and three do not.
    """
    wide = x_SRC.shape[-2] <= x_SRC.shape[-1]
    x = x_SRC if wide else x_SRC.swapaxes(-1, -2)
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for maps in NEWTON_SCHULZ_MAPS:
        x = _gram_polynomial(jnp.einsum("src,sqc->srq", x, x), maps) @ x
    return x if wide else x.swapaxes(-1, -2)


def _gram_polynomial(gram: jax.Array, maps: int) -> jax.Array:
    """The product of the factors P of `maps` maps [S, R, R], from the Gram matrix before the first."""
    a, b, c = NEWTON_SCHULZ
    product = None
    for number in range(maps):
        factor = a * jnp.eye(gram.shape[-1], dtype=gram.dtype) + b * gram + c * (gram @ gram)
        product = factor if product is None else factor @ product
        if number < maps - 1:
            gram = factor @ gram @ factor
    return product
