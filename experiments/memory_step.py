"""What a training step really takes: runs it, and prints its peak memory and its time as one line of JSON.

    python -m experiments.memory_step --config=configs/balanced.py:cpu --workdir=- --config.batch_size=64

On CPU: by how much the resident memory of this process rises while a step runs, over what it holds between steps, and
the step's arguments; the first step is not counted, since it also loads code. On an accelerator: the allocator's peak.
experiments/memory_check.py runs many.
"""

import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.flags import read_flags
from research.config import ConfigError
from research.stages import refuse_stages

STEPS = 3  # after the first


def main(argv: Sequence[str]) -> int:
    if sys.platform != "linux":
        print("error: memory is read from /proc, which only Linux has", file=sys.stderr)
        return 2
    try:
        config, _ = read_flags(argv, "memory_step", __doc__)
        refuse_stages(config)
        print(json.dumps(measure(config)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(config) -> dict[str, float]:
    """{'predicted', 'measured' (bytes), 'seconds' (median of a step), 'target'} of a config's step on what is here."""
    import jax
    import numpy as np

    from research import checkpoint, cores, heaps, sharding, step, target
    from research.analysis import memory
    from research.config import num_steps, validate
    from research.model import ModelConfig, MoETransformer
    from research.optimizer import make_optimizer, make_schedule

    cores.set_options()
    mesh = sharding.make_mesh(config.mesh)
    shape = tuple(mesh.shape[axis] for axis in sharding.AXES)
    validate(config, shape, jax.default_backend())
    model = MoETransformer(ModelConfig(**config.model, fsdp=config.mesh.fsdp))
    optimizer = make_optimizer(config.optimizer, memory.STEPS)
    schedule = make_schedule(config.optimizer, config.optimizer.learning_rate, memory.STEPS)
    with jax.set_mesh(mesh):
        init = jax.jit(lambda: step.init_state(model, optimizer, config.seed, shape))
        state = checkpoint.abstract(init, mesh)
        parts = config.train.accumulation
        batch = memory.abstract_batch(config, mesh, config.batch_size, config.seq_len, parts)
        traced = step.make_train_step(model, optimizer, schedule).trace(state, batch)
        run = heaps.compiled(traced, num_steps(config))
        init = init.lower().compile()
        found = memory.usage_of(run)
        tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, batch["inputs"].shape, dtype=np.int32)
        batch = sharding.put_batch({name: tokens for name in batch}, mesh)
        state, _ = jax.block_until_ready(run(init(), batch))
        between, seconds = _begin(), []
        for _ in range(STEPS):
            began = time.monotonic()
            state, metrics = run(state, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.monotonic() - began)
        measured = _peak() - between + (found.arguments if between else 0)
    here = target.at_hand().name
    return dict(predicted=found.total, measured=measured, seconds=statistics.median(seconds), target=here)


def _begin() -> int:
    """Starts a new peak where the system has one, and returns the bytes held now; 0 on an accelerator."""
    import jax

    if jax.default_backend() != "cpu":
        return 0
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    import jax

    if jax.default_backend() != "cpu":
        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    return _status("VmHWM")


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
