"""What a traced program is made of."""

import math
from collections.abc import Iterator
from typing import Any

import jax


def inside(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def largest_array(jaxpr: Any) -> int:
    """Bytes of the largest array that a jaxpr, or one inside it, makes on one device."""
    largest = 0
    for equation in jaxpr.eqns:
        arrays = [var.aval for var in equation.outvars if hasattr(var.aval, "dtype")]
        largest = max(largest, 0, *map(_bytes, arrays), *map(largest_array, inside(equation.params)))
    return largest


def _bytes(aval: Any) -> int:
    divided = jax.tree.leaves(aval.sharding.spec.partitions)  # names of mesh axes; none inside shard_map
    return math.prod(aval.shape) * aval.dtype.itemsize // math.prod(aval.sharding.mesh.shape[axis] for axis in divided)
