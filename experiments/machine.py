"""How fast the machine multiplies and copies, in JAX and, beside peers, in PyTorch.

Operands are random: a GPU multiplies ones at less power, and so at a higher clock, than it does a model's numbers. A
measurement on an accelerator is of `TIMES` operations in a row and one wait: the launch of a single one, and the wait
for it, take as long as part of the work.
"""

from collections.abc import Callable
from typing import Any

from experiments.contestants import seconds_of
from experiments.peers import prepare

MATMUL_SIZE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}  # of a square product that is near the machine's fastest
COPY_BYTES = {"cpu": 2**28, "gpu": 2**30, "tpu": 2**30}
TIMES = {"cpu": 1, "gpu": 10, "tpu": 10}


def speeds(library: str, platform: str, dtype: str) -> dict[str, Callable[[], float]]:
    """Measurements of a library, 'jax' or 'torch', by name: matmul_LIBRARY of `dtype` in FLOP/s, copy_LIBRARY of
    float32 (read plus written) in bytes/s."""
    size, count, times = MATMUL_SIZE[platform], COPY_BYTES[platform] // 4, TIMES[platform]
    if library == "jax":
        multiply, copy = _in_jax(size, count, times, dtype)
    else:
        multiply, copy = _in_torch(size, count, times, dtype, "cuda" if platform == "gpu" else "cpu")
    return {
        f"matmul_{library}": lambda: 2 * size**3 * times / seconds_of(multiply)[0],
        f"copy_{library}": lambda: 2 * 4 * count * times / seconds_of(copy)[0],
    }


def _in_jax(size: int, count: int, times: int, dtype: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    y = jax.random.normal(jax.random.key(1), (count,), jnp.float32)
    multiply, add = jax.jit(jnp.matmul), jax.jit(lambda a: a + 1)

    def repeat(run: Callable, *arguments: jax.Array) -> None:
        for _ in range(times):  # each a program of its own, in this order: none can be left out
            out = run(*arguments)
        jax.block_until_ready(out)

    return lambda: repeat(multiply, x, x), lambda: repeat(add, y)


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
