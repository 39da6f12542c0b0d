"""Programs for devices that are not here; what is in a program's text, compiled (HLO) or only lowered (StableHLO)."""

import math
import re

import jax

from research import sharding
from research.analysis import hlo

TENSOR = re.compile(r"\btensor<((?:\d+x)+)")
TRITON = re.compile(r"@__gpu\$xla\.gpu\.triton\(.*?\bname = \"(\w+)\"")


def absent(kind: str, platform: str) -> jax.sharding.AbstractMesh:
    """A mesh of one device, to trace and lower for: with jax.sharding.use_abstract_mesh(absent(...))."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    explicit = (jax.sharding.AxisType.Explicit,) * len(sharding.AXES)
    return jax.sharding.AbstractMesh((1, 1, 1), sharding.AXES, explicit, abstract_device=device)


def kernels(lowered: str) -> set[str]:
    """The names of the Triton kernels that a program calls."""
    return set(TRITON.findall(lowered))


def shapes(text: str) -> set[tuple[int, ...]]:
    """Of all arrays that occur, those of tuples and of operands too."""
    found = {tuple(int(dim) for dim in dims.split(",") if dim) for _, dims in hlo.ARRAY.findall(text)}
    return found | {tuple(int(dim) for dim in dims.split("x") if dim) for dims in TENSOR.findall(text)}


def largest(text: str) -> tuple[int, tuple[int, ...]]:
    """(elements, shape) of the array with the most elements."""
    return max((math.prod(shape), shape) for shape in shapes(text))
