"""How much memory a step needs on each device, from its compiled program; nothing is allocated, nothing runs.

A program's buffers are its arguments, its outputs and its temporaries; outputs that are written over arguments (donated
state) count once:  total = arguments + outputs + temporaries - aliased + scratch. (The field that XLA calls peak leaves
the temporaries out on CPU.) Scratch is what the CPU's kernels take beside these buffers (scratch.py). A training run
holds the optimiser's state while it evaluates, so that is counted there too.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from research import attention, checkpoint, evaluate, heaps, sharding, sizes, step
from research.analysis import scratch
from research.config import ConfigError, num_steps, validate
from research.model import ModelConfig, MoETransformer
from research.optimizer import make_optimizer, make_schedule
from research.target import Target

STEPS = 1000  # of the schedule; no shape depends on it


@dataclasses.dataclass(frozen=True)
class Usage:
    """Bytes on one device. `limit`: where the compiler refused the program, of all that the device has; temporaries
    are then all that it says the program needs."""

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    scratch: int = 0
    limit: int = 0

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporaries - self.aliased + self.scratch


def mesh_of(config: Any, target: Target) -> jax.sharding.Mesh:
    """The config's mesh over the devices of a target; a mesh of fewer devices takes the first of them."""
    return sharding.make_mesh(config.mesh, target.devices)


def attention_of(config: Any, target: Target, name: str | None = None) -> str:
    """The attention backend of a config's (or the named) choice in a training step on a target."""
    model = config.model
    return attention.resolve_backend(
        name or model.attention, target.platform, dtype=model.dtype, head_dim=model.d_model // model.num_heads,
        dropout=model.dropout, masked=config.data.mask_documents, seq=mesh_of(config, target).shape["seq"],
    )  # fmt: skip


def train_usage(config: Any, target: Target) -> Usage:
    """Of one training step of `config` on `target`, compiled.

    Raises: ConfigError for a config that cannot run there, or where the backend does not say what memory it takes.
    """
    mesh = mesh_of(config, target)
    validate(config, tuple(mesh.shape[axis] for axis in sharding.AXES), target.platform)
    with jax.set_mesh(mesh):
        model, optimizer, state = abstract_state(config, mesh)
        schedule = make_schedule(config.optimizer, config.optimizer.learning_rate, STEPS)
        batch = abstract_batch(config, mesh, config.batch_size, config.seq_len, config.train.accumulation)
        traced = step.make_train_step(model, optimizer, schedule).trace(state, batch)
        return _compile(traced.lower(), target, heaps.compiler_options(traced, num_steps(config)))


def eval_usage(config: Any, target: Target) -> Usage:
    """Of the evaluation step at the training length, with the optimiser's state that a run holds meanwhile."""
    config = without_remat(config)
    mesh = mesh_of(config, target)
    data, _, seq = (mesh.shape[axis] for axis in sharding.AXES)
    with jax.set_mesh(mesh):
        model, _, state = abstract_state(config, mesh)
        rows = max(1, config.eval.batch_tokens // config.seq_len // data) * data
        batch = abstract_batch(config, mesh, rows, config.seq_len + -config.seq_len % seq)
        lowered = jax.jit(evaluate.eval_step, static_argnums=0).lower(model, state.params, batch)
        found = _compile(lowered, target)
    return dataclasses.replace(found, arguments=found.arguments + bytes_of(state.opt_state))


def without_remat(config: Any) -> ConfigDict:
    """A copy of a config that keeps what it computes: evaluation has no backward pass, so all choices are one."""
    changed = ConfigDict(config.to_dict())
    changed.model.remat = "none"
    return changed


def abstract_state(config: Any, mesh: Any) -> tuple[Any, Any, Any]:
    """(model, optimizer, train state as shapes with shardings) of a config; call it under `jax.set_mesh(mesh)`."""
    model = MoETransformer(ModelConfig(**config.model, fsdp=config.mesh.fsdp))
    optimizer = make_optimizer(config.optimizer, STEPS)
    shape = tuple(mesh.shape[axis] for axis in sharding.AXES)
    return model, optimizer, checkpoint.abstract(lambda: step.init_state(model, optimizer, 0, shape), mesh)


def abstract_batch(config: Any, mesh: Any, rows: int, length: int, microbatches: int | None = None) -> dict[str, Any]:
    """What `step` and `evaluate` take, as shapes: [rows, length], or [microbatches, rows / microbatches, length]."""
    shape = (rows, length) if microbatches is None else (microbatches, rows // microbatches, length)
    spec = jax.P(*[None] * (len(shape) - 2), *sharding.TOKENS)
    names = ("inputs", "targets") + (("segments", "positions") if config.data.mask_documents else ())
    array = jax.ShapeDtypeStruct(shape, np.int32, sharding=jax.NamedSharding(mesh, spec))
    return dict.fromkeys(names, array)


def _compile(lowered: Any, target: Target, options: dict[str, str] | None = None) -> Usage:
    try:
        found = usage_of(lowered.compile(compiler_options=(options or {}) | target.compiler_options))
    except jax.errors.JaxRuntimeError as error:
        found = _refused(str(error))
        if found is None:
            raise
    if found is None:
        raise ConfigError(
            "JAX's backend", target.name, "does not say what memory a program takes: nothing can be planned"
        )
    return found


def _refused(message: str) -> Usage | None:
    """What a TPU's compiler says of a program that is larger than the device: two sizes, such as 52.67G (of 1024^3)."""
    said = re.findall(r"\b(\d+(?:\.\d+)?[KMGT])\b", message)
    if "RESOURCE_EXHAUSTED" not in message or len(said) < 2:
        return None
    needed, limit = (sizes.parse(size, "size") for size in said[:2])
    return Usage(0, 0, max(needed, limit + 1), 0, limit=limit)


def usage_of(program: Any) -> Usage | None:
    """Of a compiled program; None where its backend does not say."""
    found = program.memory_analysis()
    if found is None:
        return None
    return Usage(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        scratch=scratch.scratch_bytes(program.as_text()) if scratch.KEPT else 0,
    )


def bytes_of(tree: Any) -> int:
    """Of one device's part of arrays or abstract arrays with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def state_bytes(config: Any, target: Target) -> dict[str, int]:
    """{'parameters', 'optimizer'} of one device, from shapes alone."""
    mesh = mesh_of(config, target)
    with jax.set_mesh(mesh):
        _, _, state = abstract_state(config, mesh)
    return dict(parameters=bytes_of(state.params), optimizer=bytes_of(state.opt_state))
