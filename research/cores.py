"""A CPU's cores as the devices of a mesh: each core then takes whole rows through whole layers.

On one device XLA divides every operation over the cores, and they wait for each other at its end; as devices they
wait for each other where gradients are added up. XLA is told so, and to use a core's whole vectors.
"""

import contextlib
import os
from typing import Any

import jax

from research import heaps

MOST = 8  # each holds the parameters and the optimiser's state, and all of them share one memory
FLAG = "xla_force_host_platform_device_count"  # of those who say it themselves
OPTIONS = {  # of XLA, by name, that they may also say themselves
    # XLA's 256 bits take AVX-512 cores twice as long for an exponential.
    "xla_cpu_prefer_vector_width": "--xla_cpu_prefer_vector_width=512",
    # A core runs one operation after another.
    "xla_cpu_enable_concurrency_optimized_scheduler": "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    # The tiled emitter takes sums in place through the stack, at a fifth of the speed (jaxlib 0.10).
    "xla_cpu_disable_tiled_emitter": "--xla_backend_extra_options=xla_cpu_disable_tiled_emitter",
    # Unrolled, an inner loop of 32 numbers (a head's width) is not made of vectors: again a fifth.
    "xla_cpu_disable_loop_unrolling": "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling",
}


def as_devices() -> None:
    """Call before anything else uses JAX: the CPU becomes a device a core, `MOST` at most, XLA gets its OPTIONS,
    and steps keep their memory (heaps.py).

    Without effect where JAX has begun, or the number of its CPU devices is chosen already.
    """
    set_options()
    heaps.keep()
    if FLAG in os.environ["XLA_FLAGS"] or jax.config.jax_num_cpu_devices > 0:
        return
    with contextlib.suppress(RuntimeError):  # JAX has begun: what there is has to do
        jax.config.update("jax_num_cpu_devices", min(count(), MOST))


def set_options() -> None:
    """Gives XLA those of OPTIONS that are not in XLA_FLAGS; without effect where it has compiled something."""
    chosen = os.environ.get("XLA_FLAGS", "")
    ours = [option for name, option in OPTIONS.items() if name not in chosen]
    os.environ["XLA_FLAGS"] = " ".join([chosen, *ours]).strip()


def count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices_of(config: Any) -> list[jax.Device]:
    """The devices that the mesh of a config is laid over.

    All of them; but of a CPU's, where config.mesh.data is -1, as many as divide the rows of a microbatch, the others'
    cores helping with single operations. (An accelerator left idle is a mistake, and `config.validate` says so.)
    """
    as_devices()
    devices, mesh = jax.devices(), config.mesh
    if jax.default_backend() != "cpu" or mesh.data != -1 or mesh.seq < 1:
        return devices
    for data in range(len(devices) // mesh.seq, 0, -1):
        if config.batch_size < 1 or config.batch_size % (data * max(1, config.train.accumulation)) == 0:
            return devices[: data * mesh.seq]
    return devices


def sharing_memory(mesh: jax.sharding.Mesh) -> int:
    """How many devices of a mesh live in one memory: all of a CPU's; an accelerator has its own."""
    return mesh.size if mesh.devices.flat[0].platform == "cpu" else 1
