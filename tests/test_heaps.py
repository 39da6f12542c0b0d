"""A step works in memory that the one before has left; what is larger than a block is found before it is compiled."""

import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.serialize_executable import serialize

from research import heaps, jaxprs, sharding

STEPS = """
import resource
from research import cores
cores.as_devices()
from configs import large_batch
from experiments.contestants import build
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step, _ = build("ours", large_batch.get_config("cpu"), "cpu")
taken = [faults()]
for _ in range(10):
    step()
    taken.append(faults())
print(min(after - before for before, after in zip(taken, taken[1:])))
"""


def of_mesh(data: int, seq: int = 1):
    return jax.set_mesh(sharding.make_mesh({"data": data, "expert": 1, "seq": seq}))


def placed(shape, spec=None, dtype=jnp.float32):
    mesh = jax.sharding.get_mesh()
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec or jax.P()))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_a_step_takes_no_new_memory():
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS" and k not in heaps.variables()}
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True, env=kept)
    assert int(done.stdout) < 2_000  # pages of a step; 48,000 of each where they are given back


def test_who_tells_the_c_library_otherwise_is_heeded(monkeypatch):
    told = []
    monkeypatch.setattr(heaps.ctypes, "CDLL", lambda _: type("", (), {"mallopt": lambda *option: told.append(option)}))
    for name in heaps.variables():
        monkeypatch.delenv(name)
    heaps.keep()
    assert len(told) == len(heaps.KEEP)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    heaps.keep()
    assert len(told) == len(heaps.KEEP)


@pytest.mark.parametrize(("data", "seq"), [(1, 1), (2, 1), (2, 4)])
def test_the_largest_array_is_of_one_device(data, seq):
    def run(x_BTD):
        def local(x_BTD):  # [4 / data, 8 / seq, 16]
            wide = jnp.concatenate([x_BTD] * 5, axis=-1)
            return wide.sum(axis=-1, keepdims=True) + x_BTD

        return jax.shard_map(local, in_specs=sharding.HIDDEN, out_specs=sharding.HIDDEN)(x_BTD)

    with of_mesh(data, seq):
        jaxpr = jax.jit(run).trace(placed((4, 8, 16), sharding.HIDDEN)).jaxpr.jaxpr
    assert jaxprs.largest_array(jaxpr) == 4 * 8 * 16 * 5 * 4 // (data * seq)


def test_what_a_loop_keeps_of_all_turns_counts():
    with of_mesh(1):
        traced = jax.jit(lambda x: jax.lax.scan(lambda c, _: (c + 1, c), x, length=7)).trace(placed((3,)))
    assert jaxprs.largest_array(traced.jaxpr.jaxpr) == 7 * 3 * 4


def test_only_a_cpus_program_of_small_arrays_and_many_runs_is_in_blocks(monkeypatch):
    def options(elements: int, steps: float = heaps.LONG):
        return heaps.compiler_options(jax.jit(lambda x: x + 1).trace(placed((elements,))), steps)

    with of_mesh(1):
        fits = heaps.BLOCK // 4
        assert options(fits) == {"xla_multiheap_size_constraint_per_heap": str(heaps.BLOCK)}
        assert options(fits + 1) is None
        assert options(fits, steps=heaps.LONG - 1) is None
        monkeypatch.setattr(heaps, "platform", lambda: "gpu")
        assert options(fits) is None


def six_at_once(x):
    parts = [jnp.sin(x @ (x + i)) for i in range(6)]
    return sum(parts[i] @ parts[-1 - i] for i in range(6))


def test_a_program_in_blocks_takes_blocks():
    """XLA knows the option: no block is larger, and together they are no more than what is alive at once needs."""
    with of_mesh(1):
        traced = jax.jit(six_at_once).trace(placed((1024, 1024)))
        one, blocks = (heaps.compiled(traced, steps) for steps in (1, heaps.LONG))
    usage = [x.memory_analysis().temp_size_in_bytes for x in (one, blocks)]
    assert heaps.BLOCK < usage[0] <= usage[1] < 1.25 * usage[0]


def test_what_is_run_a_few_times_is_kept_on_disk():
    """As JAX's compilation cache does it, which only warns where it cannot: then each run compiles anew."""
    with of_mesh(1):
        traced = jax.jit(six_at_once).trace(placed((1024, 1024)))
        assert serialize(heaps.compiled(traced, heaps.LONG - 1))
        with pytest.raises(jax.errors.JaxRuntimeError, match="Multiple temp buffer"):  # else LONG has no purpose
            serialize(heaps.compiled(traced, heaps.LONG))
