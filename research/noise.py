"""How much the gradient varies from one piece of text to another, at fixed weights.

The gradient of the mean cross-entropy alone (no balance loss, router noise, dropout or clipping) is taken over M
micro-batches of n tokens, in K blocks of M / K. Kept are the squares of each block's gradients, added up, and the inner
products of the blocks' sums: all that analysis/noise.py needs for its estimates and for their jackknife over blocks.
Until the end the host holds a gradient per block: 64 bytes per parameter.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import loss, sharding
from research.config import ConfigError
from research.data import stream
from research.data.tokens import Corpus
from research.load import Loaded
from research.model import MoETransformer, gather_tables, output_table

ORDERS = ("independent", "paired")
BLOCKS = 16  # of the jackknife
GROUPS = {  # parameters by name; all others are of the norms
    "embedding": ("embedding", "head"),
    "attention": ("qkv", "attention_out"),
    "router": ("router",),
    "experts": ("up", "gate", "down"),
}
NAMES = (*GROUPS, "norms")
_CHUNK = 1 << 20  # numbers of a parameter in float64 at once


def gradient(params: Any, batch: dict[str, jax.Array], model: MoETransformer) -> Any:
    """Of the mean cross-entropy (nats a target) of `batch`, [B, T] arrays as `step.objective` takes them."""

    def mean_loss(params: Any) -> jax.Array:
        tables = gather_tables(params, model.config.dtype)
        hidden_BTD, _ = model.apply(
            {"params": tables},
            batch["inputs"],
            segments_BT=batch.get("segments"),
            positions_BT=batch.get("positions"),
        )
        table_VD = output_table(tables, hidden_BTD.dtype)
        total, _, count = loss.cross_entropy_sums(hidden_BTD, table_VD, batch["targets"], model.config.loss_chunk)
        return total / count

    return jax.grad(mean_loss)(params)


@functools.partial(jax.jit, static_argnums=2)
def block_sums(params: Any, batches: dict[str, jax.Array], model: MoETransformer) -> tuple[Any, jax.Array]:
    """(sum of the micro-batches' gradients, their squared norms by group [G]). batches: [M, B, T] arrays."""

    def one(sums: tuple, batch: dict[str, jax.Array]) -> tuple[tuple, None]:
        found = gradient(params, batch, model)
        return (jax.tree.map(jnp.add, sums[0], found), sums[1] + squares(found)), None

    zeros = jax.tree.map(jnp.zeros_like, params), jnp.zeros(len(NAMES))
    return jax.lax.scan(one, zeros, batches)[0]


def squares(grads: Any) -> jax.Array:
    """Squared norm of each group of parameters [G], float32."""
    found = [jnp.zeros(())] * len(NAMES)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        found[group(path[-1].key)] += jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    return jnp.stack(found)


def group(name: str) -> int:
    """The place in NAMES of a parameter's group."""
    return next((i for i, members in enumerate(GROUPS.values()) if name in members), len(GROUPS))


def inner_products(sums: list[Any]) -> np.ndarray:
    """[K, K, G] of K gradients on the host, in float64."""
    found = np.zeros((len(sums), len(sums), len(NAMES)))
    leaves = [jax.tree_util.tree_leaves_with_path(tree) for tree in sums]
    for same in zip(*leaves, strict=True):
        flat = [np.asarray(leaf).reshape(-1) for _, leaf in same]
        for start in range(0, flat[0].size, _CHUNK):
            part = np.stack([x[start : start + _CHUNK] for x in flat]).astype(np.float64)
            found[:, :, group(same[0][0][-1].key)] += part @ part.T
    return found


def layout(config: Any, order: str, length: int, longest: int, seed: int) -> Any:
    """The config by which stream.py reads micro-batches of `longest` tokens, cut into rows of `length`.

    independent: each row from a place of its own. paired: a micro-batch is one place of the text, whatever the rows'
    length.
    """
    config = config.copy_and_resolve_references()
    config.update(batch_size=longest // length, seq_len=length, seed=seed)
    config.train.stages = None
    config.data.update(shuffle_block=0 if order == "independent" else longest, max_epochs=1)  # no piece comes twice
    return config


def measure(loaded: Loaded, corpus: Corpus, config: Any, batches: int) -> dict[str, list]:
    """`squares` [K, G] and `gram` [K, K, G] of `batches` micro-batches, each a step of `config` (of `layout`).

    Raises: ConfigError where the text is too short for them, or K does not divide their number.
    """
    if batches % BLOCKS or batches < 2 * BLOCKS:
        raise ConfigError("--batches", batches, f"give a multiple of {BLOCKS}, {2 * BLOCKS} or more")
    tokens, each = config.batch_size * config.seq_len, batches // BLOCKS
    room = stream.epoch_tokens(corpus, config) // (BLOCKS * tokens) * BLOCKS
    if batches > room:
        raise ConfigError("--batches", batches, f"the text has room for {room} pieces of {tokens} tokens; give no more")
    sums, norms = [], []
    for block in range(BLOCKS):
        rows = [stream.batch(corpus, config, (block * each + i) * tokens) for i in range(each)]
        stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        with jax.set_mesh(loaded.mesh):
            total, found = block_sums(loaded.params, sharding.put_batch(stacked, loaded.mesh), loaded.model)
        sums.append(jax.tree.map(np.asarray, total))
        norms.append(np.asarray(found, np.float64))
    return {"squares": _short(np.stack(norms)), "gram": _short(inner_products(sums))}


def _short(x: np.ndarray) -> list:
    """Nested lists, eight digits: float32 has seven."""
    return [_short(part) for part in x] if x.ndim else float(f"{x:.8g}")
