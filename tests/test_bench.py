"""How fast each part of a step is, with pytest-benchmark; not part of the tests:

    python -m pytest -m bench --benchmark-enable

Add --benchmark-autosave, and later --benchmark-compare, to see what a change has done to each.
"""

import jax
import pytest

from experiments import parts
from experiments.flags import load_config
from research import cores, sharding

STRATEGIES = ("large_batch", "balanced", "long_seq")
PARTS = ("embedding", "projections of attention", "attention", "router and dispatch", "experts", "head and loss",
         "optimizer")  # fmt: skip


@pytest.mark.bench
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_part(benchmark, strategy, name):
    config = load_config(f"configs/{strategy}.py:cpu")
    with jax.set_mesh(sharding.make_mesh(config.mesh, cores.devices_of(config))):
        (part,) = (part for part in parts.parts_of(config) if part.name == name)
        compiled = jax.jit(part.run).lower(*part.arguments).compile()
        jax.block_until_ready(compiled(*part.arguments))
        benchmark.pedantic(lambda: jax.block_until_ready(compiled(*part.arguments)), rounds=10)
