"""What the kernels for NVIDIA GPUs share: they are written in Pallas and compiled by Triton.

Of the two compilers that Pallas has for GPUs this is the one that takes a kernel as it is, on every generation; JAX
0.11 says that it will go one day. Then kernels change, and nothing around them: each has a plain twin, by which XLA
computes the same on every other device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from research import sharding


def call(kernel: Callable, *, warps: int, stages: int, products: int, interpret: bool = False, **options) -> Callable:
    """pl.pallas_call: a program runs on so many warps, with so many steps of its loops in flight. products: the FLOPs
    of the kernel's matrix products, for those who count (analysis/compute.py)."""
    return pl.pallas_call(
        kernel,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        cost_estimate=pl.CostEstimate(flops=int(products), bytes_accessed=0, transcendentals=0),
        interpret=interpret,
        **options,
    )


def result_of(shape: tuple[int, ...], dtype: Any, *operands: jax.Array) -> jax.ShapeDtypeStruct:
    """Of a kernel inside shard_map: it differs from shard to shard where one of its operands does."""
    axes = frozenset(axis for x in operands for axis in sharding.varying_axes(x))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=axes))


def dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """The product of two blocks over an axis of each, summed in float32."""
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)
