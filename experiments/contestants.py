"""What the benchmark times: a training step of ours, those of its peers in PyTorch, and the machine.

JAX and PyTorch are imported where they are used, so that the peak memory of a process that runs one
of them is without the other.
"""

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from research.config import num_steps, validate

MATMUL_SIZE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}  # of a square product that is near the machine's fastest
COPY_BYTES = 256 * 2**20
Step = Callable[[], float]  # takes one training step, waits for it, returns its cross-entropy
Facts = Callable[[], dict[str, Any]]  # what else there is to say of it: call it after the steps


def random_batch(config: ConfigDict) -> dict[str, np.ndarray]:
    """inputs and targets int32 [B, T]: the same for both implementations."""
    rng = np.random.default_rng(config.seed)
    shape = (config.batch_size, config.seq_len + 1)
    tokens = rng.integers(config.model.vocab_size, size=shape, dtype=np.int32)
    return dict(inputs=tokens[:, :-1], targets=tokens[:, 1:])


def build_ours(config: ConfigDict) -> tuple[Step, Facts]:
    """A step of research/, compiled, and what compilation took and needs."""
    import jax

    from research import cores, sharding, step
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
        compiled = step.make_train_step(model, transform, schedule).lower(state, batch).compile()
    compile_seconds = time.perf_counter() - began

    def take() -> float:
        nonlocal state
        state, metrics = jax.block_until_ready(compiled(state, batch))
        return float(metrics["loss"])

    def facts() -> dict[str, Any]:
        from research.result import compiled_bytes  # loads TensorBoard, and that PyTorch

        return dict(devices=mesh.size, compile_seconds=compile_seconds, compiled_bytes=compiled_bytes(compiled, mesh))

    return take, facts


def build_original(config: ConfigDict, compiled: bool = False) -> tuple[Step, Facts]:
    """A step of the PyTorch original, eager or with its model compiled by torch.compile."""
    import torch

    from tests.parity.original import Original, Trainer

    torch.manual_seed(config.seed)
    model = Original(config.model).train()
    if compiled:
        model.compile()
    return _torch_step(config, Trainer(model, config.optimizer, num_steps(config)))


def build_mixtral(config: ConfigDict) -> tuple[Step, Facts]:
    """A step of transformers' Mixtral, at the same dimensions."""
    import torch

    from tests.parity import mixtral

    torch.manual_seed(config.seed)
    model = mixtral.build(config.model, config.seq_len).train()
    return _torch_step(config, mixtral.Trainer(model, config.optimizer))


def _torch_step(config: ConfigDict, trainer: Any) -> tuple[Step, Facts]:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    batch = random_batch(config)
    tensors = tuple(torch.tensor(batch[k], dtype=torch.int64) for k in ("inputs", "targets"))
    facts = dict(threads=torch.get_num_threads(), wait_policy=os.environ.get("OMP_WAIT_POLICY"))
    return lambda: trainer.step(tensors, config.model.balance_weight), lambda: facts


BUILDERS = {
    "ours": build_ours,
    "original": build_original,
    "compiled": functools.partial(build_original, compiled=True),
    "mixtral": build_mixtral,
}


def seconds_of(run: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result


def machine_speeds(with_torch: bool, dtype: str) -> dict[str, Callable[[], float]]:
    """Measurements by name: matmul of `dtype` in FLOP/s, copies (read plus written) in bytes/s."""
    import jax
    import jax.numpy as jnp

    size = MATMUL_SIZE[jax.default_backend()]
    x = jnp.ones((size, size), dtype)
    y = jnp.ones(COPY_BYTES // 4, jnp.float32)
    multiply, add = jax.jit(jnp.matmul), jax.jit(lambda a: a + 1)
    work = {
        "matmul_jax": lambda: jax.block_until_ready(multiply(x, x)),
        "copy_jax": lambda: jax.block_until_ready(add(y)),
    }
    if with_torch:
        import torch

        a, b = (torch.ones(size, size) for _ in range(2))
        c, d = (torch.ones(COPY_BYTES // 4) for _ in range(2))
        work |= {"matmul_torch": lambda: a @ b, "copy_torch": lambda: d.copy_(c)}
    amount = {"matmul": 2 * size**3, "copy": 2 * COPY_BYTES}

    def speed(name: str) -> float:
        return amount[name.partition("_")[0]] / seconds_of(work[name])[0]

    return {name: lambda name=name: speed(name) for name in work}
