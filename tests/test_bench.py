"""How fast each part of a step is, with pytest-benchmark; not part of the tests:

    python -m pytest -m bench --benchmark-enable

Add --benchmark-autosave, and later --benchmark-compare, to see what a change has done to each. What does not depend on
the clock is asserted: FLOPs and bytes, as test_benchmark_parts.py does of smaller shapes in every run of the tests.
"""

import jax
import pytest

from experiments import parts
from experiments.contestants import compulsory_bytes
from experiments.flags import load_config
from research import cores, sharding
from tests.test_benchmark_parts import bytes_by_hand, flops_by_hand

STRATEGIES = ("large_batch", "balanced", "long_seq")
PARTS = ("embedding", "projections of attention", "attention", "router and dispatch", "experts", "head and loss",
         "optimizer")  # fmt: skip


@pytest.mark.bench
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_part(benchmark, strategy, name):
    config = load_config(f"configs/{strategy}.py:cpu")
    mesh = sharding.make_mesh(config.mesh, cores.devices_of(config))
    with jax.set_mesh(mesh):
        (part,) = (part for part in parts.parts_of(config) if part.name == name)
        compiled = part.compiled()
        moved = part.times * compulsory_bytes(compiled, mesh.size)
        assert moved == pytest.approx(bytes_by_hand(config, mesh.size)[name], rel=1e-3)
        jax.block_until_ready(compiled(*part.arguments))
        benchmark.pedantic(lambda: jax.block_until_ready(compiled(*part.arguments)), rounds=10)
    with jax.set_mesh(sharding.make_mesh({"data": 1, "expert": 1, "seq": 1}, jax.devices()[:1])):
        (part,) = (part for part in parts.parts_of(config) if part.name == name)
        assert part.flops() == flops_by_hand(config)[name]
