"""A CPU's cores become devices, as many as divide the rows; whoever says it otherwise is heeded."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from research import cores, planner, sharding, step, target
from research.analysis import frontier, memory, programs
from research.config import ConfigError
from research.model import MoETransformer
from research.optimizer import make_optimizer, make_schedule
from tests.small import model_config, random_batch, small_config

STARTED = "from research import cores; cores.as_devices(); import jax; print(jax.device_count(), cores.count())"


def config_of(**fields):
    return frontier.with_fields(small_config(remat="none"), dict(seq_len=16) | fields)


def started(program: str = STARTED, **variables: str) -> list[int]:
    """What a new process prints, without the simulated devices of the tests."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=kept | variables)
    return [int(word) for word in done.stdout.split()]


def test_a_process_begins_with_a_device_a_core():
    devices, count = started()
    assert devices == min(count, cores.MOST)


@pytest.mark.parametrize(
    "variables", [dict(XLA_FLAGS="--xla_force_host_platform_device_count=3"), dict(JAX_NUM_CPU_DEVICES="3")]
)
def test_who_chooses_the_number_of_devices_gets_it(variables):
    assert started(**variables)[0] == 3


def test_xla_gets_its_options_once_and_who_chooses_one_keeps_it():
    told = (
        "import os; from research import cores; cores.as_devices(); cores.as_devices(); flags = os.environ['XLA_FLAGS']"
    )
    program = f"{told}; print(*(flags.count(option) for option in cores.OPTIONS.values()))"
    assert started(program) == [1, 1, 1, 1]
    assert started(program, XLA_FLAGS="--xla_cpu_prefer_vector_width=128") == [0, 1, 1, 1]
    assert started(program, XLA_FLAGS="--xla_backend_extra_options=xla_cpu_optimize_for_size") == [1, 1, 1, 1]
    assert started(f"{told}; import jax.numpy as jnp; print(int(jnp.ones(3).sum()))") == [3]  # XLA knows them


def test_where_jax_has_begun_its_devices_stay():
    assert started(f"import jax; jax.devices(); {STARTED}")[0] == 1


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        (dict(batch_size=16), 8),
        (dict(batch_size=6), 6),
        (dict(batch_size=7), 7),
        (dict(batch_size=26), 2),  # 13 are more than there are
        (dict(batch_size=1), 1),
        (dict(batch_size=12, **{"train.accumulation": 3}), 4),  # rows of a microbatch
        (dict(batch_size=3, **{"mesh.seq": 2}), 6),
        (dict(batch_size=-1), 8),  # to be planned: as many rows as they want
        (dict(batch_size=3, **{"mesh.data": 2}), 8),  # the user's choice, and mistake: validate says so
        (dict(batch_size=4, **{"mesh.data": 1}), 8),
    ],
)
def test_as_many_as_divide_the_rows(fields, wanted):
    assert len(cores.devices_of(config_of(**fields))) == wanted
    config = config_of(**fields)
    shape = sharding.mesh_shape(config.mesh, wanted)
    if config.mesh.data == -1:
        assert np.prod(shape) == wanted and (config.batch_size < 1 or config.batch_size % shape[0] == 0)


def test_an_accelerator_is_never_left_idle(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert len(cores.devices_of(config_of(batch_size=6))) == 8


def test_a_budget_is_of_all_devices_of_a_cpu(tmp_path):
    config = config_of(batch_size=-1, memory_budget="6MiB", **{"data.cache_dir": str(tmp_path), "train.steps": 10})
    config.eval.batch_tokens, config.eval.contexts = 64, (8,)
    config.optimizer.name, config.model.num_layers = "adamw", 1  # quick to compile
    found = planner.planned(config)
    here = target.at_hand()
    mesh = memory.mesh_of(found, here)
    assert mesh.size == 8 and found.batch_size % 8 == 0
    compiled = programs.Programs(here)

    def all_devices(rows: int) -> int:
        return 8 * compiled.usage(frontier.with_fields(found, dict(batch_size=rows))).total

    assert all_devices(found.batch_size) <= 6 * 2**20 < all_devices(found.batch_size + 8)
    given = frontier.with_fields(found, dict(batch_size=found.batch_size + 8))
    with pytest.raises(ConfigError, match="a step needs"):
        planner.planned(given)


def test_more_devices_take_the_same_step(rng):
    """Router noise included: the random numbers of a step do not depend on how its rows are divided."""
    model = MoETransformer(model_config(router_noise=0.1, num_layers=1))
    batch, got = random_batch(rng, 2, 16), []
    optimizer = small_config().optimizer
    for data in (1, 2):
        mesh = sharding.make_mesh({"data": data, "expert": 1, "seq": 1})
        with jax.set_mesh(mesh):
            transform, schedule = make_optimizer(optimizer, 10), make_schedule(optimizer, 0.01, 10)
            state = jax.jit(lambda: step.init_state(model, transform, 0, (data, 1, 1)))()  # noqa: B023
            run = step.make_train_step(model, transform, schedule)
            placed = sharding.put_batch({name: x[None] for name, x in batch.items()}, mesh)
            for _ in range(2):
                state, metrics = run(state, placed)
            got.append(jax.tree.map(np.asarray, (metrics["loss"], metrics["grad_norm"])))
    np.testing.assert_allclose(*got, rtol=1e-5)


def test_the_step_of_a_run_says_what_all_its_devices_need():
    from research.result import compiled_bytes

    sizes = {}
    for data in (1, 8):
        mesh = sharding.make_mesh({"data": data, "expert": 1, "seq": 1})
        spec = jax.NamedSharding(mesh, jax.P("data"))
        x = jax.device_put(np.ones(64, np.float32), spec)
        sizes[data] = compiled_bytes(jax.jit(lambda x: x + 1).lower(x).compile(), mesh)
    assert sizes[1] == sizes[8] == 2 * 64 * 4
