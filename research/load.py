"""A run's newest checkpoint, to compute with it: the model, its parameters and its tokenizer."""

import contextlib
import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from research import checkpoint, sharding, step
from research.config import ConfigError, num_steps
from research.model import ModelConfig, MoETransformer, output_table
from research.optimizer import make_optimizer


class Loaded(NamedTuple):
    """What a run has learnt, on one device. Compute under `with jax.set_mesh(loaded.mesh):`.

    step: of the checkpoint. tokenizer: None for the recall task, which has no text.
    """

    model: MoETransformer
    params: Any
    mesh: Mesh
    config: ConfigDict
    tokenizer: Tokenizer | None
    step: int

    def logits(self, tokens_BT: ArrayLike) -> jax.Array:
        """[B, T, V] of every next token, all at once; without dropout and router noise."""
        with jax.set_mesh(self.mesh):
            tokens_BT = jax.device_put(np.asarray(tokens_BT, np.int32), jax.NamedSharding(self.mesh, sharding.TOKENS))
            return _logits(self.model, self.params, tokens_BT)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: MoETransformer, params: Any, tokens_BT: jax.Array) -> jax.Array:
    hidden_BTD, _ = model.apply({"params": params}, tokens_BT)
    return jnp.einsum("btd,vd->btv", hidden_BTD, output_table(params, hidden_BTD.dtype))


def load(workdir: str | os.PathLike) -> Loaded:
    """The newest whole checkpoint of a run's folder, on the first device, whatever mesh it was trained on.

    Raises: ConfigError where the folder holds no run or no checkpoint; checkpoint.DamagedError where none can be read.
    """
    folder, config = Path(workdir), read_config(workdir)
    if not (folder / "checkpoints").is_dir():
        raise ConfigError("workdir", str(workdir), "holds no checkpoint yet; run its command again")
    config.mesh.update(data=1, expert=1, seq=1, fsdp=False)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    model = MoETransformer(ModelConfig(**config.model))
    optimizer = make_optimizer(config.optimizer, num_steps(config))
    with jax.set_mesh(mesh), contextlib.closing(checkpoint.open_manager(str(folder), 1, False)) as manager:
        abstract = checkpoint.abstract(lambda: step.init_state(model, optimizer, config.seed, (1, 1, 1)), mesh)
        found = checkpoint.restore(manager, abstract)
    if found is None:
        raise ConfigError("workdir", str(workdir), "holds no whole checkpoint; run its command again")
    state, _ = found
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file)) if file.exists() else None
    return Loaded(model, state.params, mesh, config, tokenizer, int(state.step))


def read_config(workdir: str | os.PathLike) -> ConfigDict:
    """The config of a run's folder. Raises: ConfigError where there is none."""
    try:
        return ConfigDict(json.loads((Path(workdir) / "config.json").read_bytes()))
    except (OSError, ValueError) as error:
        raise ConfigError("workdir", str(workdir), f"holds no run whose config.json can be read: {error}") from error
