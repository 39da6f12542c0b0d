"""What devices send: read from programs whose collectives are known, and counted in steps."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments import scale as script
from research import sharding, target
from research.analysis import collectives, memory, scale
from research.analysis.frontier import with_fields
from research.optimizer import make_schedule
from research.step import make_train_step
from tests.small import small_config

MESH = {"data": 2, "expert": 1, "seq": 4}


def test_collectives_of_a_program_that_is_known():
    """Five turns of a sum over `seq`, and one gathering over `data`."""

    def local(x):
        total = jax.lax.scan(lambda c, _: (jax.lax.psum(c, "seq") * 0.1, None), x, None, length=5)[0]
        return jax.lax.all_gather(total, "data", axis=0, tiled=True)

    with jax.set_mesh(sharding.make_mesh(MESH)):
        run = jax.jit(jax.shard_map(local, in_specs=P(), out_specs=P(), check_vma=False))
        text = run.lower(jnp.ones((6, 10))).compile().as_text()
    found = {c.kind: c for c in collectives.collectives(text, (2, 1, 4))}
    assert set(found) == {"all-reduce", "all-gather"}
    reduced, gathered = found["all-reduce"], found["all-gather"]
    assert (reduced.bytes, reduced.times, reduced.axes, reduced.group) == (240, 5, ("seq",), (0, 1, 2, 3))
    assert (gathered.bytes, gathered.times, gathered.axes, gathered.group) == (480, 1, ("data",), (0, 4))
    assert reduced.sent == 5 * 2 * 3 / 4 * 240 and gathered.sent == 480 / 2


@pytest.mark.parametrize(
    "written",
    [
        "replica_groups={{0,4},{1,5},{2,6},{3,7}}",
        "replica_groups=[4,2]<=[2,4]T(1,0)",
        "replica_groups=mesh['a'=2,'b'=4] {'a'}",
    ],
)
def test_groups_are_read_however_they_are_written(written):
    line = f"  %x = (f32[3,4]{{1,0}}, bf16[2]{{0}}) all-reduce(%a, %b), channel_id=1, {written}, to_apply=%sum"
    found = collectives._collective(line, (2, 1, 4))
    assert found == collectives.Collective("all-reduce", 52, (0, 4), ("data",), 1)
    assert collectives._collective("  %y = f32[8]{0} add(%all-reduce.1, %x)", (2, 1, 4)) is None


def test_what_is_scattered_or_awaited_counts_once_and_whole():
    text = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %s = f32[2]{0} reduce-scatter(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%sum
  %b = (f32[2]{0}, f32[8]{0}) all-gather-start(%s), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %d = f32[8]{0} all-gather-done(%b)
}
"""
    scattered, gathered = collectives.collectives(text, (2, 1, 4))
    assert (scattered.bytes, gathered.bytes) == (32, 32) and scattered.sent == gathered.sent == 24


def test_a_collective_in_a_loop_of_unknown_length_is_an_error():
    text = """
%body (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %s = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%sum
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %w = f32[8]{0} while(%p), condition=%end, body=%body
}
"""
    with pytest.raises(ValueError, match="unknown length"):
        collectives.collectives(text, (2, 1, 1))


def of_a_step(data: int, seq: int, microbatches: int = 1, **model):
    """(collectives of a step, its config, bytes of all parameters) on a mesh."""
    fields = {"batch_size": 8, "seq_len": 32, "mesh.data": data, "mesh.seq": seq}
    config = with_fields(small_config(**model), fields)
    here = target.at_hand(data * seq)
    mesh = memory.mesh_of(config, here)
    with jax.set_mesh(mesh):
        net, optimizer, state = memory.abstract_state(config, mesh)
        batch = memory.abstract_batch(config, mesh, 8, 32, microbatches)
        run = make_train_step(net, optimizer, make_schedule(config.optimizer, 0.1, 10))
        text = run.lower(state, batch).compile().as_text()
    size = sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(state.params))
    return collectives.collectives(text, (data, 1, seq)), config, size


@pytest.mark.parametrize(("data", "seq"), [(8, 1), (2, 4), (1, 8)])
@pytest.mark.parametrize("tied", [True, False])
def test_each_gradient_is_reduced_once_and_nothing_else_of_its_size(data, seq, tied):
    found, config, parameters = of_a_step(data, seq, tie_embeddings=tied)
    reduced = sum(c.bytes * c.times for c in found if c.kind == "all-reduce")
    assert parameters <= reduced < 1.05 * parameters
    in_a_layer = [c for c in found if c.kind == "all-reduce" and c.times > 1]
    assert sum(c.bytes for c in in_a_layer) < 100  # numbers, if any: no device waits for another after every layer
    model = config.model
    moved = [c for c in found if scale.spent_on(c) == "keys and values"]
    rows = config.batch_size // data * config.seq_len * model.d_model * 4
    # K and V forward, and their gradients backward: once a layer each, whole rows of one device.
    assert sum(c.bytes * c.times for c in moved) == (4 * model.num_layers * rows if seq > 1 else 0)
    assert all(c.axes == ("seq",) for c in moved)
    assert {c.kind for c in found} <= {"all-reduce", "all-gather", "reduce-scatter"}


@pytest.mark.parametrize(("data", "seq"), [(2, 1), (2, 4)])
def test_gradients_of_many_microbatches_are_reduced_once(data, seq):
    found, _, parameters = of_a_step(data, seq, microbatches=4)
    assert parameters <= sum(c.bytes * c.times for c in found if c.kind == "all-reduce") < 1.05 * parameters


def test_one_device_sends_nothing():
    assert of_a_step(1, 1)[0] == []


def test_the_floor_of_sending_is_counted_by_hand():
    machine = scale.Machine("m", flops=1.0, flops32=1.0, near=100.0, far=10.0, node=4)
    within = collectives.Collective("all-reduce", 1000, (0, 1, 2, 3), ("seq",), 3)
    assert machine.seconds(within) == pytest.approx(3 * 2 * 1000 * (3 / 4) / 100)
    across = collectives.Collective("all-gather", 1000, tuple(range(8)), ("data",), 1)
    assert machine.seconds(across) == pytest.approx(1000 * (3 / 4) / 100 + 1000 / 4 * (1 / 2) / 10)
    apart = collectives.Collective("all-gather", 1000, (0, 4), ("data",), 1)  # two nodes, one device of each
    assert machine.seconds(apart) == pytest.approx(1000 * (1 / 2) / 10)
    uneven = collectives.Collective("all-gather", 1000, tuple(range(6)), ("data",), 1)  # a node of four, and two of one
    assert machine.seconds(uneven) == pytest.approx(1000 * (3 / 4) / 100 + 1000 / 2 * (1 / 2) / 10)


def test_a_plan_is_a_table_and_the_same_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "STRATEGIES", ("balanced",))
    arguments = ["--scale=cpu", "--tokens=16384", "--devices=1,4", "--seq=1,2", f"--workdir={tmp_path}"]
    small = ["--config.model.d_model=32", "--config.model.num_layers=4", "--config.model.d_ff=64"]
    small += ["--config.model.unroll=4", "--config.train.accumulation=2"]  # the same step, on paper
    assert script.main([*arguments, *small]) == 0
    rows = json.loads((tmp_path / "scale.json").read_text())["rows"]
    assert [(r["devices"], r["data"], r["seq"]) for r in rows] == [(1, 1, 1), (4, 4, 1), (4, 2, 2)]
    for row in rows:
        assert row["data"] * row["seq"] == row["devices"] and row["rows"] * row["seq_len"] == 16384
        assert (row["sent"]["gradients"] > 0) == (row["devices"] > 1)
        h200, (model, rest) = row["floors"]["H200, nodes of 8"]["compute"], row["flops"].values()
        assert h200 == pytest.approx(model / 989e12 + rest / 494.5e12)  # the optimizer's in float32: TF32
        assert (row["sent"]["keys and values"] > 0) == (row["seq"] > 1)
    one, four = ({r["devices"]: r for r in rows if r["strategy"] == "balanced" and r["seq"] == 1}[n] for n in (1, 4))
    assert four["flops"]["model"] == pytest.approx(one["flops"]["model"] / 4)
    assert four["flops"]["optimizer"] == pytest.approx(one["flops"]["optimizer"] / 4)  # stacks of 32 and of 4
    text = (tmp_path / "report.md").read_text()
    assert "nothing was run" in text and str(tmp_path) not in text
    assert script.main([f"--workdir={tmp_path}", "--report_only"]) == 0
    assert (tmp_path / "report.md").read_text() == text
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--devices=8,x"], "--devices"),
        (["--seq=0"], "--seq"),
        (["--devices=3", "--seq=1", "--tokens=16384"], "no mesh"),
        (["--tokens=0"], "--tokens=0: give a multiple of 2048"),
        (["--tokens=16385"], "--tokens=16385: give a multiple of 2048"),
        (["--workdir=/proc/scale"], "--workdir='/proc/scale': cannot be made"),
        (["--config.model.num_layers=1", "--devices=1", "--seq=1", "--tokens=2048"], "config.model.num_layers=1"),
        (["--config.model.width=3"], "config.model.width"),
        (["--report_only"], "no scale.json"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, named):
    assert script.main(["--scale=cpu", f"--workdir={tmp_path}", *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("error: ") and named in said[0]
    assert not list(tmp_path.iterdir())


def test_the_share_of_orthogonalisation_that_a_device_does():
    from research.optimizer import newton_schulz_share

    params = {"up": np.zeros((2, 4, 8, 16), np.float32), "embedding": np.zeros((9, 8), np.float32)}
    for mesh, share in (({"data": 8, "expert": 1, "seq": 1}, 1 / 8), ({"data": 1, "expert": 1, "seq": 1}, 1)):
        with jax.set_mesh(sharding.make_mesh(mesh)):
            assert newton_schulz_share(params) == pytest.approx(share)
