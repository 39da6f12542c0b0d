"""What the benchmark times: a training step of ours, one of the PyTorch original, and the machine.

JAX and PyTorch are imported where they are used, so that the peak memory of a process that runs one
of them is without the other.
"""

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from research.config import num_steps, validate

MATMUL_SIZE = 2048
COPY_BYTES = 256 * 2**20
Step = Callable[[], float]  # takes one training step, waits for it, returns its cross-entropy


def random_batch(config: ConfigDict) -> dict[str, np.ndarray]:
    """inputs and targets int32 [B, T]: the same for both implementations."""
    rng = np.random.default_rng(config.seed)
    shape = (config.batch_size, config.seq_len + 1)
    tokens = rng.integers(config.model.vocab_size, size=shape, dtype=np.int32)
    return dict(inputs=tokens[:, :-1], targets=tokens[:, 1:])


def build_ours(config: ConfigDict) -> tuple[Step, dict[str, Any]]:
    """A step of research/, compiled, and what compilation took and needs."""
    import jax

    from research import sharding, step
    from research.model import ModelConfig, MoETransformer
    from research.optimizer import make_optimizer, make_schedule
    from research.result import compiled_bytes

    shape = sharding.mesh_shape(config.mesh, len(jax.devices()))
    validate(config, shape, jax.default_backend())
    mesh = sharding.make_mesh(config.mesh)
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

    return take, dict(compile_seconds=compile_seconds, compiled_bytes=compiled_bytes(compiled))


def build_original(config: ConfigDict) -> tuple[Step, dict[str, Any]]:
    """A step of the PyTorch original."""
    import torch

    from tests.parity.original import Original, Trainer

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(config.seed)
    model = Original(config.model).train()
    trainer = Trainer(model, config.optimizer, num_steps(config))
    batch = random_batch(config)
    tensors = tuple(torch.tensor(batch[k], dtype=torch.int64) for k in ("inputs", "targets"))
    return lambda: trainer.step(tensors, config.model.balance_weight), {}


BUILDERS = {"ours": build_ours, "original": build_original}


def seconds_of(run: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result


def machine_speeds(with_torch: bool) -> dict[str, Callable[[], float]]:
    """Measurements by name: float32 matmul in FLOP/s, copies (read plus written) in bytes/s."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), jnp.float32)
    y = jnp.ones(COPY_BYTES // 4, jnp.float32)
    multiply, add = jax.jit(jnp.matmul), jax.jit(lambda a: a + 1)
    work = {
        "matmul_jax": lambda: jax.block_until_ready(multiply(x, x)),
        "copy_jax": lambda: jax.block_until_ready(add(y)),
    }
    if with_torch:
        import torch

        a, b = (torch.ones(MATMUL_SIZE, MATMUL_SIZE) for _ in range(2))
        c, d = (torch.ones(COPY_BYTES // 4) for _ in range(2))
        work |= {"matmul_torch": lambda: a @ b, "copy_torch": lambda: d.copy_(c)}
    amount = {"matmul": 2 * MATMUL_SIZE**3, "copy": 2 * COPY_BYTES}

    def speed(name: str) -> float:
        return amount[name.partition("_")[0]] / seconds_of(work[name])[0]

    return {name: lambda name=name: speed(name) for name in work}


def process_peak_bytes() -> int:
    """The largest resident size of this process since it began.

    On Linux ru_maxrss begins at the parent's: the kernel's own high-water mark (VmHWM) does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024  # written in kB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
