"""What the benchmark times: a training step of ours, and those of its peers.

JAX and PyTorch are imported where they are used, so that the peak memory of a process that runs one
of them is without the other.
"""

import math
import time
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from experiments import peers
from experiments.batch import random_batch
from research.config import num_steps, validate

Step = Callable[[], float]  # takes one training step, waits for it, returns its cross-entropy
Facts = Callable[[], dict[str, Any]]  # what else there is to say of it: call it after the steps
WITHOUT_GRAPHS = {"xla_gpu_enable_command_buffer": ""}  # a trace then says of every kernel where it comes from


def build(implementation: str, config: ConfigDict, device: str, short: bool = False) -> tuple[Step, Facts]:
    """A contestant; peers on `device`, 'cpu' or 'cuda', ours where JAX runs."""
    if implementation == "ours":
        return build_ours(config, short)
    return peers.BUILDERS[implementation](config, device)


def build_ours(
    config: ConfigDict, short: bool = False, compiler_options: dict[str, Any] | None = None
) -> tuple[Step, Facts]:
    """A step of research/, compiled, and what compilation took and needs.

    short: as it is compiled for a run of a few steps, else for one that is long enough to keep its memory (heaps.py).
    """
    import jax

    from research import cores, heaps, sharding, step
    from research.model import ModelConfig, MoETransformer
    from research.optimizer import make_optimizer, make_schedule

    mesh = sharding.make_mesh(config.mesh, cores.devices_of(config))
    shape = tuple(mesh.shape[axis] for axis in sharding.AXES)
    validate(config, shape, jax.default_backend())
    model = MoETransformer(ModelConfig(**config.model, fsdp=config.mesh.fsdp))
    transform = make_optimizer(config.optimizer, num_steps(config))
    schedule = make_schedule(config.optimizer, config.optimizer.learning_rate, num_steps(config))
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: step.init_state(model, transform, config.seed, shape))()
        batch = sharding.put_batch({k: x[None] for k, x in random_batch(config).items()}, mesh)
        traced = step.make_train_step(model, transform, schedule).trace(state, batch)
        in_blocks = heaps.compiler_options(traced, 1 if short else math.inf)
        compiled = traced.lower().compile(compiler_options=compiler_options or in_blocks)
    compile_seconds = time.perf_counter() - began

    def take() -> float:
        nonlocal state
        state, metrics = jax.block_until_ready(compiled(state, batch))
        return float(metrics["loss"])

    def facts() -> dict[str, Any]:
        from research.result import compiled_bytes  # loads TensorBoard, and that PyTorch

        return dict(
            devices=mesh.size,
            run="short" if short else "long",
            in_blocks=bool(in_blocks),
            compile_seconds=compile_seconds,
            compiled_bytes=compiled_bytes(compiled, mesh),
            compulsory_bytes=compulsory_bytes(compiled, mesh.size),
        )

    return take, facts


def compulsory_bytes(compiled: Any, devices: int) -> int | None:
    """Bytes that a program moves however it is written: each argument read once and each result written once, whole, on
    every device that holds it. What it keeps in memory in between is not in it. None where the backend does not say."""
    m = compiled.memory_analysis()
    return None if m is None else (m.argument_size_in_bytes + m.output_size_in_bytes) * devices


def seconds_of(run: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result
