"""What a step computes: the floating-point operations of its matrix products, counted in the traced program.

Counted as written, recomputation and the optimiser's Newton-Schulz steps too, once for every turn of a loop; nothing is
compiled. The experts are traced with their ragged product, whose work is that of each row with its own expert, so tiles
that are not full are not counted. (flops.py has what the mathematics needs, by formula.)
"""

import math
import re
from typing import Any

import jax

from research.analysis import memory
from research.analysis.frontier import with_fields
from research.chunked import TURNS
from research.config import validate
from research.jaxprs import inside
from research.optimizer import make_schedule
from research.sharding import AXES
from research.step import make_train_step
from research.target import Target

ONE_DEVICE = {"mesh.data": 1, "mesh.expert": 1, "mesh.seq": 1, "model.moe": "ragged"}


def train_flops(config: Any, target: Target) -> int:
    """Of one training step of `config`, as one device would do it. Raises: ConfigError for a config that cannot run."""
    config = with_fields(config, ONE_DEVICE)
    mesh = memory.mesh_of(config, target)
    validate(config, tuple(mesh.shape[axis] for axis in AXES), target.platform)
    with jax.set_mesh(mesh):
        model, optimizer, state = memory.abstract_state(config, mesh)
        schedule = make_schedule(config.optimizer, config.optimizer.learning_rate, memory.STEPS)
        batch = memory.abstract_batch(config, mesh, config.batch_size, config.seq_len, config.train.accumulation)
        return count(make_train_step(model, optimizer, schedule).trace(state, batch).jaxpr.jaxpr)


def count(jaxpr: Any) -> int:
    """FLOPs of the matrix products of a jaxpr and of all inside it. Raises: ValueError at a loop of unknown length."""
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            total += _product(equation)
        elif name == "ragged_dot_general":
            total += _ragged_product(equation)
        elif name == "pallas_call":
            total += equation.params["cost_estimate"].flops
        elif name == "while":
            total += int(_turns(equation) * count(equation.params["body_jaxpr"].jaxpr))
        else:
            turns = equation.params["length"] if name == "scan" else 1
            total += turns * sum(count(part) for part in inside(equation.params))
    return total


def _turns(equation: Any) -> float:
    """Of a loop, in the mean, as its name says (a multiple of 1/2, and FLOPs are even: the product is exact)."""
    turns = re.search(TURNS + r"(\d+\.\d+)", str(equation.source_info.name_stack))
    if not turns:
        raise ValueError("a while loop: how often it turns is not known before it runs, and its name does not say")
    return float(turns[1])


def _product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    lhs, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2 * math.prod(out) * math.prod(lhs[dim] for dim in contracted)


def _ragged_product(equation: Any) -> int:
    """Every row with the matrix of its own group, whether rows or what is contracted is divided into groups."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batched) = numbers.dot_dimension_numbers
    lhs, rhs = (var.aval.shape for var in equation.invars[:2])
    inner = {*contracted, *batched, *numbers.rhs_group_dimensions}
    return 2 * math.prod(lhs) * math.prod(size for dim, size in enumerate(rhs) if dim not in inner)
