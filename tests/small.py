"""A model small enough for tests, and random batches for it."""

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from research import sharding
from research.model import ModelConfig
from research.optimizer import MATRICES

SMALL = dict(
    num_layers=2, d_model=32, num_heads=4, d_ff=64, num_experts=4, experts_per_token=2, vocab_size=61,
    attention_chunk=8, moe_block=8, loss_chunk=16, router_noise=0.0,
)  # fmt: skip


def small_config(**model):
    """The `cpu` config with a small model (SMALL, changed by `model`)."""
    config = base.get_config("cpu")
    config.train.tokens = None  # a test says its steps
    config.model.update({**SMALL, **model})
    return config


def model_config(fsdp: bool = False, **model) -> ModelConfig:
    return ModelConfig(**small_config(**model).model, fsdp=fsdp)


def random_batch(rng: np.random.Generator, rows: int, length: int, vocab: int = 61, ragged: bool = True):
    """Host arrays [rows, length]; `ragged` leaves a different number of targets of each row uncounted."""
    inputs = rng.integers(0, vocab, (rows, length), dtype=np.int32)
    targets = rng.integers(0, vocab, (rows, length), dtype=np.int32)
    if ragged:
        targets[rng.random((rows, length)) < rng.random((rows, 1))] = -1
    return dict(inputs=inputs, targets=targets)


def placed(x, dtype=None):
    """An array [B, T, ...] sharded over the rows and positions of the mesh that is set."""
    x = jnp.asarray(x, dtype)
    return jax.reshard(x, jax.P(*sharding.TOKENS, *[None] * (x.ndim - 2)))


def bigger(params, rng: np.random.Generator):
    """Random weights of 1.5 times the standard scale, so that nothing is too small to show; norms near one."""

    def draw(path, x):
        name, shape = path[-1].key, np.shape(x)
        if name.endswith("norm"):
            return (1 + 0.3 * rng.standard_normal(shape)).astype(np.float32)
        axes = MATRICES.get(name, "i")
        fan_in = np.prod([size for size, kind in zip(shape[-len(axes) :], axes, strict=True) if kind == "i"])
        return (1.5 * rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, params)


def relative(found, wanted) -> float:
    """||found - wanted|| / ||wanted||."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-30))
