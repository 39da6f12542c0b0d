"""Eight simulated devices on the CPU, set before JAX starts; children of the tests start without them."""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
DEVICES_FLAG = "--xla_force_host_platform_device_count=8"
QUICK_FLAG = "--xla_backend_optimization_level=0"  # tests compile far more than they compute
TIMED = "bench" in sys.argv  # pytest -m bench: as users run it, with neither
if os.environ["JAX_PLATFORMS"] == "cpu" and DEVICES_FLAG not in os.environ.get("XLA_FLAGS", "") and not TIMED:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES_FLAG} {QUICK_FLAG}".strip()

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from research import cores, sharding  # noqa: E402

cores.set_options()  # for every test, whichever compiles first


@pytest.fixture
def one_device():
    """A mesh of one device, set for the test."""
    mesh = sharding.make_mesh({"data": 1, "expert": 1, "seq": 1})
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Numbers that differ from test to test, and are the same on every run of one test."""
    return np.random.default_rng(list(request.node.nodeid.encode()))
