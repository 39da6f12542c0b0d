"""What lower precision costs: how far a result may be off, and float32's products as a GPU's tensor cores take them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from tests.small import relative

UNASKED = (None, (jax.lax.Precision.DEFAULT, jax.lax.Precision.DEFAULT))

# bfloat16 keeps 8 bits: numbers from 1 to 2 are 2^-7 apart, so a rounding is off by 2^-7 / sqrt(12) of 1 in the root
# mean square, and by about 2^-9 of a number that is anywhere between.
ROUNDING = 2**-9


def roundings(number: int) -> float:
    """The relative error of so many roundings to bfloat16 after each other: independent, their squares add up."""
    return ROUNDING * number**0.5


def outcome(run: Callable, arrays: Any, cotangent: jax.Array) -> list[jax.Array]:
    """The value of run(*arrays) and its gradients, as a list of arrays."""
    out, vjp = jax.vjp(run, *arrays)
    return jax.tree.leaves((out, vjp(cotangent.astype(out.dtype))))


def errors(found: Any, wanted: Any) -> np.ndarray:
    """Relative, of each array. Their max() is not a number where one of them is not, as Python's own may not be."""
    return np.array([relative(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)])


def tensor_float(x: jax.Array, cut: bool) -> jax.Array:
    """float32 with 10 of its 23 bits behind the point: rounded, or cut off as the hardware does."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jnp.uint32(0 if cut else 1 << 12)
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFFE000), jnp.float32)


def in_tensor_float(run: Callable, cut: bool) -> Callable:
    """`run`, its float32 products as an NVIDIA GPU computes them where no precision is asked for: of operands in
    TF32, summed in float32."""

    def evaluate(jaxpr, consts, *arguments):
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
        read = lambda x: x.val if isinstance(x, Literal) else values[x]  # noqa: E731
        for equation in jaxpr.eqns:
            operands, parameters = [read(x) for x in equation.invars], equation.params
            if equation.primitive.name == "jit":
                inner = parameters["jaxpr"]
                outs = evaluate(inner.jaxpr, inner.consts, *operands)
            else:
                if equation.primitive.name == "dot_general" and parameters["precision"] in UNASKED:
                    operands = [tensor_float(x, cut) for x in operands]
                outs = equation.primitive.bind(*operands, **parameters)
                outs = outs if equation.primitive.multiple_results else [outs]
            values.update(zip(equation.outvars, outs, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def emulated(*arguments):
        traced = jax.make_jaxpr(run)(*arguments)
        return evaluate(traced.jaxpr, traced.consts, *arguments)[0]

    return emulated
