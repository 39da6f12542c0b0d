"""How fast the machine multiplies and copies, in JAX and, beside peers, in PyTorch, and how near to it some work comes.

Operands are random: a GPU multiplies ones at less power, and so at a higher clock, than it does a model's numbers. A
measurement on an accelerator is of `TIMES` operations in a row and one wait: the launch of a single one, and the wait
for it, take as long as part of the work.
"""

from collections.abc import Callable, Sequence
from typing import Any

from experiments.contestants import seconds_of
from experiments.peers import prepare

MATMUL_SIZE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}  # of a square product that is near the machine's fastest
COPY_BYTES = {"cpu": 2**28, "gpu": 2**30, "tpu": 2**30}  # several times what caches hold
TIMES = {"cpu": 1, "gpu": 10, "tpu": 10}


def speeds(library: str, platform: str, dtype: str) -> dict[str, Callable[[], float]]:
    """Measurements of a library, 'jax' or 'torch', by name: matmul_LIBRARY of `dtype` in FLOP/s, and copy_LIBRARY, the
    bandwidth of the machine's memory in bytes/s, read plus written, of float32.

    JAX's are of all devices at once; a CPU's cores share one product and one array. Both libraries write to memory that
    they hold already, so that none has to be got from the system: JAX adds one to numbers in their own place, PyTorch
    copies from one array to another.
    """
    size, count, times = MATMUL_SIZE[platform], COPY_BYTES[platform] // 4, TIMES[platform]
    if library == "jax":
        multiply, copy, each = _in_jax(size, count, times, dtype)
    else:
        multiply, copy = _in_torch(size, count, times, dtype, "cuda" if platform == "gpu" else "cpu")
        each = 1
    return {
        f"matmul_{library}": lambda: each * 2 * size**3 * times / seconds_of(multiply)[0],
        f"copy_{library}": lambda: each * 2 * 4 * count * times / seconds_of(copy)[0],
    }


def _in_jax(size: int, count: int, times: int, dtype: str) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """(product, copy, how many of each are done at once)."""
    import jax
    import jax.numpy as jnp

    devices = jax.devices()
    each = 1 if devices[0].platform == "cpu" else len(devices)
    divided = jax.NamedSharding(jax.make_mesh((len(devices),), ("all",)), jax.P("all"))

    def draw(shape: tuple[int, ...], dtype: str, sharding: Any = None) -> jax.Array:
        return jax.jit(lambda: jax.random.normal(jax.random.key(0), shape, dtype), out_shardings=sharding)()

    x = draw((size, size), dtype) if each == 1 else draw((each, size, size), dtype, divided)
    y = draw((len(devices), each * count // len(devices)), "float32", divided)
    multiply, add = jax.jit(jnp.matmul), jax.jit(lambda a: a + 1, donate_argnums=0)

    def products() -> None:
        for _ in range(times):  # each a program of its own, in this order: none can be left out
            out = multiply(x, x)
        jax.block_until_ready(out)

    def copies() -> jax.Array:
        nonlocal y
        for _ in range(times):
            y = add(y)
        return jax.block_until_ready(y)

    return products, copies, each


def _in_torch(
    size: int, count: int, times: int, dtype: str, device: str
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    torch = prepare(device)
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    c, d = (torch.randn(count, device=device) for _ in range(2))
    product = torch.empty_like(a)

    def repeat(run: Callable[[], Any]) -> None:
        for _ in range(times):
            run()
        if device == "cuda":
            torch.cuda.synchronize()

    return lambda: repeat(lambda: torch.matmul(a, b, out=product)), lambda: repeat(lambda: d.copy_(c))


def roofline(
    flops: float, bytes_: int | None, seconds: float, speeds: dict[str, Sequence[float]]
) -> dict[str, float | None]:
    """How near work of so many FLOPs and bytes comes to what this machine can do, by the fastest of `speeds` (lists of
    what was measured, by name): shares of its matmul and of its copies, and time over a floor.

    floor_seconds: max(FLOPs / matmul, bytes / copy), with all of one behind the other. A lower bound: what the work
    writes and reads in between is not in it, nor what is no matrix product. (Arrays that are in a cache already are
    read quicker than a copy, so a small one may be below it.) Without bytes, where they are not known.
    """
    fastest = {
        kind: max(max(values) for name, values in speeds.items() if name.startswith(kind))
        for kind in ("matmul", "copy")
    }
    floor = max(flops / fastest["matmul"], (bytes_ or 0) / fastest["copy"])
    return dict(
        floor_seconds=floor,
        over_floor=seconds / floor if floor else None,
        matmul_share=flops / seconds / fastest["matmul"],
        copy_share=None if bytes_ is None else bytes_ / seconds / fastest["copy"],
    )
